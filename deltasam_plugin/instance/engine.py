r"""Two batched passes for the gradient of every instance at its own worst-case weights.

.. math:: G^* = \sum_i \nabla\ell_i\Bigl(w + \rho\,\frac{g_i}{\|g_i\|}\Bigr), \qquad g_i = \nabla\ell_i(w)
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltasam_plugin.instance.coverage import Coverage, not_a_replay
from deltasam_plugin.instance.factored import forming_is_cheaper
from deltasam_plugin.instance.gradients import PerSampleGradients, PerSamplePerturbation
from deltasam_plugin.instance.interception import Interception, ParameterSlice
from deltasam_plugin.instance.layers import LAYERS
from deltasam_plugin.instance.layers.base import RecordedCall
from deltasam_plugin.instance.ownership import Ownership
from deltasam_plugin.instance.recording import Inputs, Tape
from deltasam_plugin.loss import leaves_of


class InstanceEngine:
    r"""Exact per-instance perturbation: :math:`G^* = \sum_i \nabla\ell_i(w + \rho\, g_i / \|g_i\|)`.

    The perturbation of instance i is a multiple of its own gradient, of rank at most T in a layer that is applied to T
    rows. The perturbed layer's output therefore follows from the inputs and output gradients of a first pass, in matrix
    products that are batched over the instances; neither per-instance weights nor a change of the weights is needed.

    Args:
        parameters: a module, or its parameters by name. Those that require a gradient are perturbed.
        rho: radius, L2 norm in parameter space.

    Example:
        >>> engine = InstanceEngine(model, rho=0.05)
        >>> with engine.recording() as tape:
        ...     losses = F.cross_entropy(model(x), y, reduction="none")
        >>> correction = engine.solve(tape, losses)
        >>> with engine.perturbed(correction):
        ...     F.cross_entropy(model(x), y, reduction="sum").backward()  # the caller replays random numbers
    """

    def __init__(self, parameters: nn.Module | Iterable[tuple[str, nn.Parameter]], rho: float) -> None:
        if not (math.isfinite(rho) and rho >= 0):
            raise ValueError(f"Invalid rho={rho}. Must be finite and >= 0.")
        named = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
        if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
            raise ValueError(f"Several parameters of the same name: {', '.join(twice)}. Must be unique: add a prefix.")
        self.rho = rho
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._coverage = Coverage(self._parameters)
        self._ownership = Ownership()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is to be perturbed, covered or not."""
        return list(self._parameters.values())

    @property
    def uncovered(self) -> list[Tensor]:
        """The parameters that stay unperturbed."""
        return self._coverage.uncovered

    @contextmanager
    def recording(self, rows: Sequence[Tensor] = ()) -> Iterator[Tape]:
        """Record a forward pass.

        Args:
            rows: for layers that see a selection of all positions (masked tokens): the sample of each selected row,
                integer (N,). Several lists if there are several selections.
        """
        tape = Tape(self._parameters, self._coverage, rows)
        with tape.interception:
            yield tape
        tape.end()

    def solve(self, tape: Tape, losses: Tensor, scale: Tensor | float = 1.0) -> PerSamplePerturbation:
        r"""Find every instance's perturbation in one backward pass, which reaches no weight and no ``.grad``.

        Args:
            tape: of the pass that computed the losses. It is spent, and so is the losses' graph.
            losses: per-sample losses with graph, (B,).
            scale: factor on the losses during this pass, against underflow in half precision. The perturbation does
                not depend on it; ``norms`` are those of the scaled losses.

        Returns:
            The correction, for :meth:`perturbed`.

        Raises:
            ValueError: losses are not of shape (B,).
            RuntimeError: samples are mixed, or more than 1 % of the weights are used in ways that are not covered.
        """
        if losses.dim() != 1 or losses.numel() == 0:
            raise ValueError(
                f"Invalid per-sample losses of shape {tuple(losses.shape)}. Must be (B,), B >= 1: one loss a sample."
            )
        with torch.autocast(losses.device.type, enabled=False):
            seed = torch.as_tensor(scale, dtype=losses.dtype, device=losses.device).detach()
            self._coverage.exclude(tape.misused())
            nothing = torch.zeros_like(seed)

            def probe(chosen: Tensor) -> dict[int, Tensor]:
                return self._probe(tape, losses, torch.where(chosen.to(losses.device), seed, nothing))[0]

            self._ownership.settle(tape.sites, losses.numel(), tape.rows, probe)
            self._verify(tape, losses, seed)
            self._plan(tape)
            self._backward(tape, losses, seed.expand_as(losses), retain_graph=False)
            correction = tape.ledger.settle(losses.detach(), self.rho)
        correction.sites, tape.sites, tape.ledger = tape.sites, [], PerSampleGradients()
        for site in correction.sites:
            site.x = None
        return correction

    @contextmanager
    def perturbed(self, correction: PerSamplePerturbation) -> Iterator[None]:
        """Each instance sees its own perturbed weights in the forward pass that runs within.

        Raises:
            RuntimeError: that pass calls other layers, or on other shapes, than the recorded one.
        """
        inputs, pending = Inputs(), iter(correction.sites)
        uses: Counter[tuple[Any, ...]] = Counter()

        def visit(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            operation = LAYERS[func]
            call = operation.read(*args, **kwargs)
            if call is None or not torch.is_grad_enabled():
                return NotImplemented
            use = operation.name, interception.target(call.weight), interception.target(call.bias)
            if use[1] is None and use[2] is None:
                return NotImplemented
            key = (*use, uses[use], len(call.lead))
            uses[use] += 1
            site = next(pending, None)
            if site is None or (site.key, site.lead) != (key, call.lead):
                raise RuntimeError(not_a_replay(site, key, call.lead))
            x = inputs.rows(operation, call.x)
            y = operation.run(call, x)
            if site.grouping is not None:
                with torch.autocast(y.device.type, enabled=False):
                    y = operation.correct(site, x, y, correction)
            if uses.total() == len(correction.sites):
                correction.release()
            return operation.finish(call, y)

        interception = Interception(self._parameters, LAYERS, visit)
        try:
            with interception:
                yield
            missing = next(pending, None)
            if missing is not None:
                raise RuntimeError(not_a_replay(missing))
        finally:
            correction.release()

    def _backward(
        self, tape: Tape, losses: Tensor, gradient: Tensor, retain_graph: bool, wanted: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        inputs = [*wanted, *([] if tape.token is None else [tape.token])]
        if not inputs or not losses.requires_grad:
            return tuple(None for _ in wanted)
        found = torch.autograd.grad(losses, inputs, gradient, retain_graph=retain_graph, allow_unused=True)
        return found[: len(wanted)]

    def _probe(
        self, tape: Tape, losses: Tensor, gradient: Tensor, wanted: Sequence[Tensor] = ()
    ) -> tuple[dict[int, Tensor], tuple[Tensor | None, ...]]:
        """Output gradients by site, and gradients of `wanted`, for this weighting of the losses."""
        tape.probed = {}
        try:
            found = self._backward(tape, losses, gradient, True, wanted)
            return tape.probed, found
        finally:
            tape.probed = None

    def _verify(self, tape: Tape, losses: Tensor, scale: Tensor) -> None:
        """Compare weight gradients made from what was recorded with autograd's own, once for each parameter."""
        names = self._coverage.unverified()
        if names:
            used = {id(leaf) for leaf in leaves_of(losses)}
            names = [name for name in names if id(self._parameters[name]) in used]
        if names:
            wanted = [self._parameters[name] for name in names]
            gradients, true = self._probe(tape, losses, scale.expand_as(losses), wanted)
            arrived = [(tape.sites[i], gradient) for i, gradient in gradients.items()]
            self._coverage.verify(dict(zip(names, true)), arrived)
        self._coverage.warn()

    def _plan(self, tape: Tape) -> None:
        """Decide for every matrix in which form its gradients are kept."""
        uses: defaultdict[ParameterSlice, list[RecordedCall]] = defaultdict(list)
        for site in tape.sites:
            for role in ("weight", "bias"):
                target = getattr(site, role)
                if target is not None and not self._coverage.covers(target):
                    setattr(site, role, None)
                elif target is not None and site.grouping is not None:
                    uses[target].append(site)
        for target, sites in uses.items():
            if any(site.weight != target or site.operation.name != "linear" for site in sites):
                continue
            rows = sum(site.grouping.width for site in sites if site.grouping is not None)
            formed = forming_is_cheaper(rows, *sites[0].shape)
            bias = sites[0].bias
            affine = not formed and bias is not None and all(site.bias == bias for site in sites)
            affine = affine and len(uses[bias]) == len(sites)  # type: ignore[index]
            for site in sites:
                site.formed, site.affine = formed, affine
