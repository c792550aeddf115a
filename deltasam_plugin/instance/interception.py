r"""See every use that a forward pass makes of the parameters, within a scope and without patching anything.

A :class:`torch.overrides.TorchFunctionMode` is handed every call of the public torch API while it is active. It reaches
``torch.nn.functional.linear`` inside modules and outside, leaves nothing behind after an exception, and belongs to one
thread. It sees arguments too: a parameter in a call that is not understood is reported, not overlooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltasam_plugin.instance.composites import COMPOSITE, addmm
from deltasam_plugin.instance.functions import (
    CASTS,
    DETACHES,
    GRADIENT,
    LOOKS,
    MAKES,
    SPLITS,
    SUMS,
    TRANSPOSES,
    TYPE_OR_SHAPE_ONLY,
    decides,
    name_of,
    writes_in_place,
)
from deltasam_plugin.instance.slices import ParameterSlice, divided, indexed

Visitor = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Expandable(NamedTuple):
    """A result that all samples share.

    Attributes:
        result: of a call, such as embedded positions (1, T, C).
        expanded: runs the call for a result of the given shape, to which its own can be expanded.
        on_other_use: called when anything but a sum takes values from the result.
    """

    result: Tensor
    expanded: Callable[[tuple[int, ...]], Tensor]
    on_other_use: Callable[[], None]


class Interception(TorchFunctionMode):
    """Hands the calls of some functions to a visitor while it is active.

    Args:
        parameters: by name.
        visited: functions to hand over.
        visit: called as ``visit(function, args, kwargs)`` in place of the function. The mode is off meanwhile.
            Returns the result, or ``NotImplemented`` to run the function as it is.

    Attributes:
        foreign: parameters used in some other differentiable way, by name, with the function that did.
        frozen_uses: parameters used where gradients are off, behind detach(), in a comparison, or as numbers.
        written: where rows with a gradient were written to, in order: the tensor, and the place in its memory.
        decides: whether computed numbers were turned into indices or masks, by which rows may be routed.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visited: Iterable[Callable[..., Any]], visit: Visitor) -> None:
        super().__init__()
        self.foreign: dict[str, str] = {}
        self.frozen_uses: set[str] = set()
        self.written: list[tuple[Tensor, int]] = []
        self.decides = self._computes_aside = False
        self._detached: dict[int, tuple[Tensor, str]] = {}
        self._expandable: dict[int, Expandable] = {}
        self._visited = frozenset(visited)
        self._visit = visit
        # The tensor is kept beside its slices: an id is only good as long as its object lives.
        self._known: dict[int, tuple[Tensor, tuple[ParameterSlice, ...]]] = {
            id(p): (p, (ParameterSlice(name, 0, p.shape[0] if p.dim() else 1),)) for name, p in parameters.items()
        }

    def slice_of(self, tensor: Tensor | None) -> ParameterSlice | None:
        """The parameter, or the part of one, that this tensor is; None if it is none."""
        known = self._known.get(id(tensor))
        return known[1][0] if known is not None and len(known[1]) == 1 else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._expandable and func in SUMS:
            args = tuple(self._expanded(argument, args) for argument in args)
        composite = COMPOSITE.get(func)
        if func is torch.addmm and len(args) == 3 and id(args[2]) in self._known:
            composite = addmm
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        given = (*args, *kwargs.values()) if kwargs else args
        if func in self._visited and "out" not in kwargs:
            result = self._visit(func, args, kwargs)
            if result is not NotImplemented:
                self._note_detached(given)
                self._report_other_use(given, result)
                self._report(func, [slices for _, slices in self._found(given) if len(slices) > 1])
                return result
        if args and writes_in_place(func):
            self._note_written(func, given)
        found = self._found(given)
        versions = [tensor._version for tensor, _ in found]
        result = func(*args, **kwargs)
        self._computes_aside |= func in DETACHES and given[0].requires_grad
        if not self.decides and decides(func):
            self.decides = self._is_decision(given, result)
        written = [slices for (tensor, slices), version in zip(found, versions) if tensor._version != version]
        self._report(func, written, "written to by")
        if func not in SUMS:
            self._report_other_use(given, result)
        self._follow(func, args, kwargs, given, result, [slices for _, slices in found])
        return result

    def _note_written(self, func: Callable[..., Any], given: tuple[Any, ...]) -> None:
        """Note where rows with a gradient are written to, but for lists of indices: the graph has those."""
        target, *others = given
        if not any(isinstance(value, Tensor) and value.requires_grad for value in others):
            return
        if func is Tensor.__setitem__:
            places = others[0] if isinstance(others[0], tuple) else (others[0],)
            if any(isinstance(place, list | bool) or getattr(place, "ndim", 0) for place in places):
                return
            target = target[others[0]]
        if target._base is not None:
            self.written.append((target._base, target.storage_offset()))

    def _is_decision(self, given: tuple[Any, ...], result: Any) -> bool:
        """Whether indices or a mask are made of numbers that the model may have computed."""
        results = result if isinstance(result, tuple) else (result,)
        if not any(isinstance(found, Tensor) and not found.is_floating_point() for found in results):
            return False
        aside = self._computes_aside or not torch.is_grad_enabled()
        return any(isinstance(v, Tensor) and v.is_floating_point() and (aside or v.requires_grad) for v in given)

    def expand_in_sums(self, shared: Expandable) -> None:
        """Replace a result in sums where all samples share it: as if each had rows of its own."""
        self._expandable[id(shared.result)] = shared

    def _report_other_use(self, given: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, list | tuple) else (output,)
        if not self._expandable or not any(isinstance(value, Tensor) for value in outputs):
            return
        for shared in (self._expandable.get(id(argument)) for argument in given):
            if shared is not None and shared.result is not output:  # x.to(device) may be x
                shared.on_other_use()

    def _expanded(self, argument: Any, args: tuple[Any, ...]) -> Any:
        shared = self._expandable.get(id(argument))
        others = [other for other in args if isinstance(other, Tensor) and other is not argument]
        if shared is None or not others:
            return argument
        shape = tuple(torch.broadcast_shapes(shared.result.shape, others[0].shape))
        return argument if shape == tuple(shared.result.shape) else shared.expanded(shape)

    def _found(self, given: tuple[Any, ...]) -> list[tuple[Tensor, tuple[ParameterSlice, ...]]]:
        known, found = self._known, []
        for argument in given:
            if id(argument) in known:
                found.append(known[id(argument)])
            elif isinstance(argument, list | tuple):
                found += [known[id(item)] for item in argument if id(item) in known]
        return found

    def _report(self, func: Callable[..., Any], found: list[tuple[ParameterSlice, ...]], how: str = "used by") -> None:
        for part in (part for slices in found for part in slices):
            self.foreign.setdefault(part.name, f"{how} {name_of(func)}()")

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: tuple[Any, ...],
        result: Any,
        found: list[tuple[ParameterSlice, ...]],
    ) -> None:
        if not found and not self._detached:  # most calls by far
            return
        if func in TYPE_OR_SHAPE_ONLY and id(args[0]) not in self._known and id(args[0]) not in self._detached:
            return
        results = result if isinstance(result, list | tuple) else (result,)
        tensors, name = [r for r in results if isinstance(r, Tensor)], name_of(func)
        if func is GRADIENT or (MAKES.match(name) and not any(map(self._is_known, given[1:]))):
            return
        outputs = [r for r in tensors if id(r) not in self._known]
        numbers = not tensors and result is not None and result is not NotImplemented
        tells = numbers or any(not output.is_floating_point() for output in outputs)
        tells = tells and not LOOKS.match(name)
        computes = tells or any(output.is_floating_point() for output in outputs)
        if computes:
            self._note_detached(given)
        if not found:
            return
        if func in DETACHES and outputs:
            self._detached[id(outputs[0])] = (outputs[0], found[0][0].name)
            return
        if tells or any(output.is_floating_point() and not output.requires_grad for output in outputs):
            self.frozen_uses.update(part.name for slices in found for part in slices)
        turned = any(part.transposed for slices in found for part in slices)
        if func in TRANSPOSES and len(found[0]) == 1 and outputs and outputs[0].dim() == 2:
            turn = not found[0][0].transposed
            self._learn(outputs[0], (found[0][0]._replace(transposed=turn),))
        elif turned and any(output.requires_grad for output in outputs):
            self._report(func, found)
        elif func in SPLITS and len(found[0]) >= 1 and _dim(args, kwargs, 2) == 0:
            for output, inside in zip(outputs, divided(found[0], [output.shape[0] for output in outputs])):
                self._learn(output, inside)
        elif func is torch.cat and _dim(args, kwargs, 1) == 0 and len(found) == len(args[0] if args else ()):
            self._learn(outputs[0], tuple(part for slices in found for part in slices))
        elif func in CASTS and len(found) == 1 and outputs:
            self._learn(outputs[0], found[0])
        elif func is Tensor.__getitem__ and outputs and (part := indexed(found[0], *args)) is not None:
            self._learn(outputs[0], (part,))
        elif func is Tensor.__setitem__ or any(output.requires_grad for output in outputs):
            self._report(func, found)

    def _is_known(self, argument: Any) -> bool:
        return id(argument) in self._known or id(argument) in self._detached

    def _note_detached(self, given: tuple[Any, ...]) -> None:
        if self._detached:
            used = [argument for argument in given if id(argument) in self._detached]
            self.frozen_uses.update(self._detached[id(argument)][1] for argument in used)

    def _learn(self, tensor: Tensor, slices: tuple[ParameterSlice, ...]) -> None:
        self._known[id(tensor)] = (tensor, slices)


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> int:
    return kwargs.get("dim", args[position] if len(args) > position else 0)
