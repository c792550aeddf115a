"""The first pass, recorded."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltasam_plugin.instance.coverage import Coverage
from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.interception import Interception, ParameterSlice
from deltasam_plugin.instance.layers import LAYERS
from deltasam_plugin.instance.layers.base import Layer, RecordedCall
from deltasam_plugin.loss import nodes_of


class _Root(torch.autograd.Function):
    """Identity that makes the output of a first layer reachable in a backward pass to the tape's token."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.new_zeros(())


class Tape:
    """The calls of one first pass, in order. Made by :meth:`InstanceEngine.recording`."""

    def __init__(self, parameters: dict[str, nn.Parameter], coverage: Coverage, rows: Sequence[Tensor]) -> None:
        self.rows = rows
        self.sites: list[RecordedCall] = []
        self.token: Tensor | None = None
        self.probed: dict[int, Tensor] | None = None
        self.ledger = PerSampleGradients()
        self._coverage = coverage
        self._inputs = Inputs()
        self._uses: defaultdict[tuple[Any, ...], int] = defaultdict(int)
        self._outputs: set[Any] = set()  # nodes of the graph: where calls ended,
        self._before: set[Any] = set()  # and those that no call leads to
        self.interception = Interception(parameters, LAYERS, self._visit)

    def _visit(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operation = LAYERS[func]
        call = operation.read(*args, **kwargs)
        if call is None or not torch.is_grad_enabled():
            return NotImplemented
        weight, bias = self.interception.target(call.weight), self.interception.target(call.bias)
        if weight is None and bias is None:
            return NotImplemented
        x = self._inputs.rows(operation, call.x)
        y = operation.run(call, x)
        if not self._follows(call.x):
            if self.token is None:
                self.token = torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            y = _Root.apply(y, self.token)
        use = operation.name, weight, bias
        key = (*use, self._uses[use], len(call.lead))
        self._uses[use] += 1
        weight = weight if weight is None or self._coverage.covers(weight) else None
        bias = bias if bias is None or self._coverage.covers(bias) else None
        shape = torch.Size(()) if call.weight is None else call.weight.shape
        site = RecordedCall(operation, weight, bias, key, call.lead, call.options, shape, self._inputs.detached(x))
        index = len(self.sites)
        self.sites.append(site)
        y.register_hook(lambda gradient: self._arrive(index, gradient))
        self._outputs.add(y.grad_fn)
        return operation.finish(call, y)

    def _follows(self, x: Tensor) -> bool:
        """Whether x was computed from the output of an earlier call; the graph is searched back to the next ones."""
        passed = []
        for node in nodes_of(x, self._before):
            if node in self._outputs:
                return True
            passed.append(node)
        self._before.update(passed)
        return False

    def _arrive(self, index: int, gradient: Tensor) -> None:
        if self.probed is not None:
            self.probed[index] = gradient
            return
        site = self.sites[index]
        if site.grouping is not None:
            site.operation.contribute(site, gradient.detach(), self.ledger)
        site.x = None

    def end(self) -> None:
        """The forward pass is over."""
        self._inputs = Inputs()
        self._outputs, self._before = set(), set()

    def misused(self) -> dict[str, str]:
        """Parameters with uses that have no perturbed form, with the reason."""
        found = dict(self.interception.foreign)
        parts: defaultdict[str, set[ParameterSlice]] = defaultdict(set)
        roles: defaultdict[str, set[str]] = defaultdict(set)
        for site in self.sites:
            for target, role in ((site.weight, site.operation.role), (site.bias, "vector")):
                if target is not None:
                    parts[target.name].add(target)
                    roles[target.name].add(role)
        for name, targets in parts.items():
            ordered = sorted(targets)
            if any(one.stop > other.start for one, other in itertools.pairwise(ordered)):
                found.setdefault(name, "used whole and in parts")
            if len(roles[name]) > 1:
                found.setdefault(name, "used in layers of different kinds")
            if name in self.interception.frozen_uses:
                found.setdefault(name, "used with and without gradient")
        return found


class Inputs:
    """Inputs as rows, and detached: one tensor each for all layers that read the same input."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}
        self._detached: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, operation: Layer, x: Tensor) -> Tensor:
        key = id(x), x._version, operation.name
        if key not in self._rows:
            self._rows[key] = (x, operation.rows(x))
        return self._rows[key][1]

    def detached(self, x: Tensor) -> Tensor:
        if id(x) not in self._detached:
            self._detached[id(x)] = (x, x.detach())
        return self._detached[id(x)][1]
