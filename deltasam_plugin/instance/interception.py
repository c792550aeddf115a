r"""See every use that a forward pass makes of the weights, within a scope and without patching anything.

A :class:`torch.overrides.TorchFunctionMode` is handed every call of the public torch API while it is active. It reaches
``torch.nn.functional.linear`` inside modules and outside, leaves nothing behind after an exception, and belongs to one
thread. It sees arguments too: a parameter in a call that is not understood is reported, not overlooked.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ParameterSlice(NamedTuple):
    """Rows start:stop of a named parameter's first dimension: all of it, or a part as in packed projections."""

    name: str
    start: int
    stop: int


# For these a parameter stays recognisable: (packed) query, key and value projections, and casts of fp16 weights.
_SPLITS = {torch.chunk, Tensor.chunk, torch.split, Tensor.split}
_CASTS = {Tensor.float, Tensor.to, Tensor.type_as, Tensor.contiguous, Tensor.double, Tensor.half, Tensor.bfloat16}


def _without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same code, with the check at its head that would hand the call to the mode again switched off.

    torch offers composite functions to the mode as one call; this is how to see the calls inside.
    """
    namespace = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_COMPOSITE = {F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward)}

Visitor = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Interception(TorchFunctionMode):
    """Hands the calls of some functions to a visitor while it is active.

    Args:
        parameters: by name.
        visited: functions to hand over.
        visit: called as ``visit(function, args, kwargs)`` in place of the function. The mode is off meanwhile.
            Returns the result, or ``NotImplemented`` to run the function as it is.

    Attributes:
        foreign: parameters used in some other differentiable way, by name, with the function that did.
        frozen_uses: parameters used where gradients are off.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visited: Iterable[Callable[..., Any]], visit: Visitor) -> None:
        super().__init__()
        self.foreign: dict[str, str] = {}
        self.frozen_uses: set[str] = set()
        self._visited = frozenset(visited)
        self._visit = visit
        # The tensor is kept beside its parts: an id is only good as long as its object lives.
        self._known: dict[int, tuple[Tensor, tuple[ParameterSlice, ...]]] = {
            id(p): (p, (ParameterSlice(name, 0, p.shape[0] if p.dim() else 1),)) for name, p in parameters.items()
        }

    def target(self, tensor: Tensor | None) -> ParameterSlice | None:
        """The parameter, or the part of one, that this tensor is; None if it is none."""
        known = self._known.get(id(tensor))
        return known[1][0] if known is not None and len(known[1]) == 1 else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        composite = _COMPOSITE.get(func)
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        if func in self._visited:
            result = self._visit(func, args, kwargs)
            if result is not NotImplemented:
                self._report(func, [targets for targets in self._found(args, kwargs) if len(targets) > 1])
                return result
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[ParameterSlice, ...]]:
        known, found = self._known, []
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if id(argument) in known:
                found.append(known[id(argument)][1])
            elif isinstance(argument, list | tuple):
                found += [known[id(item)][1] for item in argument if id(item) in known]
        return found

    def _report(self, func: Callable[..., Any], found: list[tuple[ParameterSlice, ...]]) -> None:
        name = getattr(func, "__name__", str(func))
        for target in (target for targets in found for target in targets):
            self.foreign.setdefault(target.name, f"used by {name}()")

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        found = self._found(args, kwargs)
        if not found:
            return
        if func in self._visited and not torch.is_grad_enabled():
            self.frozen_uses.update(target.name for targets in found for target in targets)
        results = result if isinstance(result, list | tuple) else (result,)
        outputs = [r for r in results if isinstance(r, Tensor) and id(r) not in self._known]
        if func in _SPLITS and len(found[0]) >= 1 and _dim(args, kwargs, 2) == 0:
            self._learn_parts(found[0], outputs)
        elif func is torch.cat and _dim(args, kwargs, 1) == 0 and len(found) == len(args[0] if args else ()):
            self._learn(outputs[0], tuple(target for targets in found for target in targets))
        elif func in _CASTS and len(found) == 1 and outputs:
            self._learn(outputs[0], found[0])
        elif func is Tensor.__setitem__ or any(output.requires_grad for output in outputs):
            self._report(func, found)

    def _learn(self, tensor: Tensor, targets: tuple[ParameterSlice, ...]) -> None:
        self._known[id(tensor)] = (tensor, targets)

    def _learn_parts(self, targets: tuple[ParameterSlice, ...], parts: list[Tensor]) -> None:
        begin = 0
        for part in parts:
            end, offset, inside = begin + part.shape[0], 0, []
            for name, start, stop in targets:
                low, high = max(begin - offset, 0), min(end - offset, stop - start)
                if low < high:
                    inside.append(ParameterSlice(name, start + low, start + high))
                offset += stop - start
            self._learn(part, tuple(inside))
            begin = end


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> int:
    return kwargs.get("dim", args[position] if len(args) > position else 0)
