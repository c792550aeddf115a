"""The calls of one pass: identified in both passes, recorded in the first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deltasam_plugin.errors import Refused
from deltasam_plugin.instance.apex import unfused_norms
from deltasam_plugin.instance.compilation import uncompiled
from deltasam_plugin.instance.coverage import DETACHED, REMEDY
from deltasam_plugin.instance.interception import Expandable, Interception
from deltasam_plugin.instance.layers import LAYERS
from deltasam_plugin.instance.layers.base import CallArguments, CallKey, Layer
from deltasam_plugin.instance.memo import Memo
from deltasam_plugin.instance.slices import ParameterSlice

Use = tuple[str, ParameterSlice | None, ParameterSlice | None]
Handle = Callable[[Layer, CallArguments, CallKey, Tensor], Tensor]
OutputGradients = Sequence[Tensor | None]  # of the output of each call; None where no loss depends on it


def intercept_layers(
    parameters: Mapping[str, Tensor], handle: Handle, once: Memo, superseded: set[CallKey]
) -> Interception:
    """Hand every differentiable call of a known kind of layer with a known parameter to `handle`.

    Args:
        parameters: by name.
        handle: called as ``handle(layer, arguments, key, x)`` with ``x = layer.rows(arguments.x)``, one tensor for all
            layers that read the same input. Returns the result of ``layer.run``.
        once: for these rows. The caller clears it once the pass is over.
        superseded: filled with calls whose rows all samples share, and which further calls with rows for each replace
            wherever they are used.
    """
    uses: Counter[Use] = Counter()
    also_used: set[CallKey] = set()

    def visit(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = LAYERS[func]
        try:
            arguments = layer.read(*args, **kwargs)
        except TypeError:  # an old form of the call, or one with other names
            return NotImplemented
        if arguments is None or not torch.is_grad_enabled():
            return NotImplemented
        weight, bias = interception.slice_of(arguments.weight), interception.slice_of(arguments.bias)
        if weight is None and bias is None:
            return NotImplemented
        if arguments.x.is_nested:
            raise Refused(f"Instance mode does not cover nested tensors, as in {layer.name}(). Pad them, or {REMEDY}.")
        use: Use = (layer.name, weight, bias)
        result = run(layer, arguments, use)
        if layer.may_be_shared and arguments.x.dim() and (arguments.x.dim() == 1 or arguments.x.shape[0] == 1):
            key = CallKey(*use, uses[use] - 1, len(arguments.leading_shape))

            def expanded(shape: tuple[int, ...]) -> Tensor:
                superseded.update({key} - also_used)
                x = arguments.x.expand(shape[: len(shape) - 1])
                with torch.enable_grad():
                    return run(layer, replace(arguments, x=x, leading_shape=tuple(x.shape)), use)

            def on_other_use() -> None:
                also_used.add(key)
                superseded.discard(key)

            interception.expand_in_sums(Expandable(result, expanded, on_other_use))
        return result

    def run(layer: Layer, arguments: CallArguments, use: Use) -> Tensor:
        key = CallKey(*use, uses[use], len(arguments.leading_shape))
        uses[use] += 1
        return layer.finish(arguments, handle(layer, arguments, key, once(layer.rows, arguments.x)))

    interception = Interception(parameters, LAYERS, visit)
    return interception


@dataclass(frozen=True)
class RecordedCall:
    """A call in the first pass.

    Attributes:
        layer: what was called.
        key: names the call from pass to pass.
        leading_shape: sizes of its leading dimensions.
        options: as in the call.
        weight_shape: of the weight; empty if there is none.
        x: input rows, detached.
        output: where the result stands in the graph.
        dtype: of the result.
    """

    layer: Layer
    key: CallKey
    leading_shape: tuple[int, ...]
    options: tuple[Any, ...]
    weight_shape: torch.Size
    x: Tensor
    output: GradientEdge
    dtype: torch.dtype

    @property
    def parts(self) -> list[ParameterSlice]:
        """What the call uses of the parameters."""
        return [part for part in (self.key.weight, self.key.bias) if part is not None]

    @property
    def names(self) -> list[str]:
        """The parameters that the call uses."""
        return [part.name for part in self.parts]


class Tape:
    """The calls of one first pass. Made by :meth:`InstanceEngine.recording`.

    Attributes:
        calls: in order, recorded while the context of :meth:`running` is active.
        rows: lists of the sample of each row, from the caller.
        superseded: calls that others replace.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rows: Sequence[Tensor]) -> None:
        self.rows = rows
        self.calls: list[RecordedCall] = []
        self.superseded: set[CallKey] = set()
        self._once = Memo()
        self._interception = intercept_layers(parameters, self._record, self._once, self.superseded)

    @contextmanager
    def running(self) -> Iterator[None]:
        """To be entered around the pass."""
        try:
            with uncompiled(), unfused_norms(), self._interception:
                yield
        finally:
            self._once.clear()

    def _record(self, layer: Layer, arguments: CallArguments, key: CallKey, x: Tensor) -> Tensor:
        y = layer.run(arguments, x)
        if not y.requires_grad:
            raise Refused(
                f"Instance mode cannot record {key} where no gradient is recorded: within torch.func (vmap, grad), or "
                f"with a weight that was cast under no_grad. Leave this out, or {REMEDY}."
            )
        shape = torch.Size(()) if arguments.weight is None else arguments.weight.shape
        detached = self._once(Tensor.detach, x)
        call = RecordedCall(
            layer, key, arguments.leading_shape, arguments.options, shape, detached, get_gradient_edge(y), y.dtype
        )
        self.calls.append(call)
        return y

    @property
    def written(self) -> list[tuple[Tensor, int]]:
        """Where the pass wrote rows to, in order: the tensor, and the place in its memory."""
        return self._interception.written

    @property
    def decides(self) -> bool:
        """Whether the pass turned numbers into indices or masks, by which rows may be routed."""
        return self._interception.decides

    def misused(self) -> dict[str, str]:
        """Parameters with uses that have no perturbed form, with the reason."""
        found = dict(self._interception.foreign)
        parts: defaultdict[str, set[ParameterSlice]] = defaultdict(set)
        kinds: defaultdict[str, set[str]] = defaultdict(set)
        for call in self.calls:
            for part, kind in ((call.key.weight, call.layer.weight_kind), (call.key.bias, "vector")):
                if part is not None:
                    parts[part.name].add(part)
                    kinds[part.name].add(kind)
        for name, slices in parts.items():
            if any(one.overlaps(other) for one, other in combinations(slices, 2)):
                found.setdefault(name, "used whole and in parts")
            if len(kinds[name]) > 1 or (
                any(part.transposed for part in slices)
                and any(c.layer.name == "embedding" for c in self.calls if name in c.names)
            ):
                found.setdefault(name, "used in layers of different kinds")
            if name in self._interception.frozen_uses:
                found.setdefault(name, "used with and without gradient, or read as numbers")
        return found


def detached_uses(
    calls: Sequence[RecordedCall], gradients: OutputGradients, superseded: set[CallKey]
) -> dict[str, str]:
    """Parameters with a gradient that are also used where no gradient arrives.

    What the losses take from there without a gradient (a target behind detach) would be computed at w.
    """
    pairs = list(zip(calls, gradients))
    live = {name for call, gradient in pairs if gradient is not None for name in call.names}
    dead = [call for call, gradient in pairs if gradient is None and call.key not in superseded]
    silent = {name for call in dead for name in call.names}
    return dict.fromkeys(live & silent, DETACHED)
