"""Parts of parameters: what a forward pass cuts off packed ones, such as query, key and value projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class ParameterSlice(NamedTuple):
    """A named parameter, or a part of one, as in packed projections.

    Attributes:
        name: of the parameter.
        start, stop: rows of its first dimension.
        columns: range of its second dimension; None for all.
        transposed: whether it is used as the transpose of that part.
    """

    name: str
    start: int
    stop: int
    columns: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def upright(self) -> ParameterSlice:
        """The same part, not transposed."""
        return self._replace(transposed=False)

    def of(self, tensor: Tensor) -> Tensor:
        """The same part, upright, of a tensor that has the parameter's shape; a view."""
        part = tensor[self.start : self.stop] if tensor.dim() else tensor
        return part if self.columns is None else part[:, slice(*self.columns)]

    def overlaps(self, other: ParameterSlice) -> bool:
        """Whether two different slices have elements in common."""
        if (
            self.upright == other.upright
            or self.name != other.name
            or self.start >= other.stop
            or other.start >= self.stop
        ):
            return False
        if self.columns is None or other.columns is None:
            return True
        return self.columns[0] < other.columns[1] and other.columns[0] < self.columns[1]


def divided(slices: Sequence[ParameterSlice], lengths: Sequence[int]) -> list[tuple[ParameterSlice, ...]]:
    """What pieces hold that several slices, one after the other, are cut into.

    Args:
        slices: as :func:`torch.cat` has joined them.
        lengths: of the pieces, in rows.
    """
    pieces, begin = [], 0
    for length in lengths:
        end, offset, inside = begin + length, 0, []
        for name, start, stop, columns, _ in slices:
            low, high = max(begin - offset, 0), min(end - offset, stop - start)
            if low < high:
                inside.append(ParameterSlice(name, start + low, start + high, columns))
            offset += stop - start
        pieces.append(tuple(inside))
        begin = end
    return pieces


def indexed(slices: tuple[ParameterSlice, ...], tensor: Tensor, index: Any) -> ParameterSlice | None:
    """The slice that ``tensor[index]`` is, for one or two plain ranges; None for any other index."""
    ranges = index if isinstance(index, tuple) else (index,)
    if len(slices) != 1 or not 1 <= len(ranges) <= min(2, tensor.dim()):
        return None
    if any(not isinstance(r, slice) or r.step not in (None, 1) for r in ranges):
        return None
    bounds = [r.indices(size)[:2] for r, size in zip(ranges, tensor.shape)]
    if any(low >= high for low, high in bounds):
        return None
    name, start, _, columns, _ = slices[0]
    (low, high), offset = bounds[0], 0 if columns is None else columns[0]
    if len(bounds) == 2 and bounds[1] != (0, tensor.shape[1]):
        columns = (offset + bounds[1][0], offset + bounds[1][1])
    return ParameterSlice(name, start + low, start + high, columns)
