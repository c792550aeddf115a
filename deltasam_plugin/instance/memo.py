"""Results that several layers share, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class Memo:
    """Calls a function once for the same arguments: query, key and value projections read the same input.

    Tensors are the same if they are one object that was not written to in between. Other arguments are compared by
    value. The arguments are kept as long as the result.

    Args:
        size: how many results are kept, the latest; None for all.
    """

    def __init__(self, size: int | None = None) -> None:
        self._size = size
        self._kept: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}

    def __call__(self, function: Callable[..., Result], *args: Any) -> Result:
        key = function, *((id(arg), _version(arg)) if isinstance(arg, Tensor) else arg for arg in args)
        if key not in self._kept:
            if len(self._kept) == self._size:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = args, function(*args)
        return self._kept[key][1]

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()


def _version(tensor: Tensor) -> int:
    """How often it was written to. Of tensors made for inference nothing counts that."""
    return -1 if tensor.is_inference() else tensor._version
