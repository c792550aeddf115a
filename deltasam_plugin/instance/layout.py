r"""Which rows of a layer's output belong to which sample.

Sequence models move the batch about: (T, B, C) inside, (B, T, C) outside, (T·B, C) in attention's output projection,
(B, C) in a classification head, and a list of masked positions in a masked language model's head. T may equal B. So the
batch dimension is not guessed from sizes: the gradient of one sample's loss is non-zero in that sample's rows only, and
this says which of the conceivable layouts hold. A layout is symbolic, and holds for later batches of other T and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# Owners of a row that several samples' losses depend on, and of one that none does. Setting further bits keeps both
# negative, and the first stays the less.
SEVERAL, NOBODY = -(2**62), -1


class Grouping:
    """Rows of one call, by sample: a :class:`Layout` bound to sizes."""

    def __init__(self, lead: tuple[int, ...], batch: int, width: int) -> None:
        self.lead = lead  # sizes of the leading dimensions, whose product is N
        self.batch = batch
        self.width = width  # T: the most rows that one sample has

    def group(self, rows: Tensor) -> Tensor:
        """(N, ...) to (B, T, ...), missing rows as zeros. A view where strides allow it."""
        raise NotImplementedError

    def ungroup(self, grouped: Tensor) -> Tensor:
        """(B, T, ...) to (\\*lead, ...): the inverse of :meth:`group`."""
        raise NotImplementedError

    def samples(self) -> Tensor:
        """The sample of each row, shape lead, on the CPU."""
        return self.ungroup(torch.arange(self.batch).unsqueeze(1).expand(-1, self.width))

    def same(self, other: Grouping) -> bool:
        """Whether both assign every row to the same sample."""
        return self.batch == 1 or torch.equal(self.samples(), other.samples())


class _Strided(Grouping):
    def __init__(self, lead: tuple[int, ...], batch: int, dim: int, outer: bool) -> None:
        super().__init__(lead, batch, prod(lead) // batch)
        repeats = lead[dim] // batch
        parts: tuple[int, ...] = (batch, repeats) if outer else (repeats, batch)
        if repeats == 1:
            parts, outer = (batch,), True
        self._split = (*lead[:dim], *parts, *lead[dim + 1 :])
        self._batch_dim = dim if outer else dim + 1

    def same(self, other: Grouping) -> bool:
        if isinstance(other, _Strided) and (self._split, self._batch_dim) == (other._split, other._batch_dim):
            return True  # the common case, at every call of every step: no tensors
        return super().same(other)

    def group(self, rows: Tensor) -> Tensor:
        rest = rows.shape[1:]
        moved = rows.reshape(*self._split, *rest).movedim(self._batch_dim, 0)
        return moved.reshape(self.batch, self.width, *rest)

    def ungroup(self, grouped: Tensor) -> Tensor:
        others = self._split[: self._batch_dim] + self._split[self._batch_dim + 1 :]
        rest = grouped.shape[2:]
        moved = grouped.reshape(self.batch, *others, *rest).movedim(0, self._batch_dim)
        return moved.reshape(*self.lead, *rest)


class _Listed(Grouping):
    def __init__(self, index: Tensor, batch: int) -> None:
        counts = torch.bincount(index, minlength=batch)
        super().__init__(tuple(index.shape), batch, int(counts.max()))
        order = torch.argsort(index, stable=True)
        starts = counts.cumsum(0) - counts
        positions = torch.empty_like(index)
        positions[order] = torch.arange(len(index), device=index.device) - starts[index[order]]
        self._where = (index, positions)

    def group(self, rows: Tensor) -> Tensor:
        grouped = rows.new_zeros(self.batch, self.width, *rows.shape[1:])
        return grouped.index_put(self._where, rows)

    def ungroup(self, grouped: Tensor) -> Tensor:
        return grouped[self._where]

    def samples(self) -> Tensor:
        return self._where[0].cpu()


@dataclass(frozen=True)
class Layout:
    """Where the sample's index sits among a call's leading dimensions.

    Attributes:
        dim: that dimension. Its size is k·B.
        outer: for k > 1: rows b·k + j belong to sample b; otherwise rows j·B + b do.
        listed: for rows in no order: which of the caller's lists names the sample of each.
    """

    dim: int = 0
    outer: bool = True
    listed: int | None = None

    def bind(self, lead: tuple[int, ...], batch: int, rows: Sequence[Tensor]) -> Grouping | None:
        """The rows of a call with these sizes, or None where the layout is impossible.

        Args:
            lead: sizes of the call's leading dimensions.
            batch: B.
            rows: lists of the sample of each row (N,), from the caller.
        """
        if self.listed is not None:
            fits = self.listed < len(rows) and lead == tuple(rows[self.listed].shape)
            return _Listed(rows[self.listed], batch) if fits else None
        if self.dim >= len(lead) or lead[self.dim] == 0 or lead[self.dim] % batch:
            return None
        return _Strided(lead, batch, self.dim, self.outer)


def conceivable(rank: int, lists: int) -> list[Layout]:
    """Every layout of a call with so many leading dimensions, where the caller has given so many lists of rows."""
    strided = [Layout(dim, outer) for dim in range(rank) for outer in (True, False)]
    return strided + [Layout(listed=which) for which in range(lists if rank == 1 else 0)]


def agreed(groupings: Sequence[Grouping]) -> Grouping | None:
    """The grouping on which all candidates agree, row by row, or None where they do not or there are none."""
    if groupings and all(groupings[0].same(other) for other in groupings[1:]):
        return groupings[0]
    return None


def consistent(grouping: Grouping, owners: Tensor) -> bool:
    """Whether rows belong to their owners.

    Args:
        grouping: candidate.
        owners: sample of each row (N,), NOBODY where it is not known.
    """
    known = owners != NOBODY
    return bool((grouping.samples().flatten()[known] == owners[known]).all())
