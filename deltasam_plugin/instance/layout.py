r"""Which rows of a layer's output belong to which sample.

Sequence models move the batch about: (T, B, C) inside, (B, T, C) outside, (T·B, C) in attention's output projection,
(B, C) in a classification head, and a list of masked positions in a masked language model's head. T may equal B. So the
batch dimension is not guessed from sizes: gradients tell (see ``ownership``). A layout is symbolic and holds for later
batches with other T and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from deltasam_plugin.instance.arrival import arriving

# Owners of a row that no sample's loss depends on, and of one that several do.
NOBODY, SEVERAL = -1, -2


class Grouping:
    """Rows of one call, by sample.

    Attributes:
        leading_shape: sizes of the leading dimensions, whose product is N.
        batch: B.
        rows_per_sample: T, the most rows that one sample has.
    """

    leading_shape: tuple[int, ...]
    batch: int
    rows_per_sample: int

    def group(self, rows: Tensor) -> Tensor:
        """(N, ...) to (B, T, ...), missing rows as zeros. A view where strides allow it."""
        raise NotImplementedError

    def ungroup(self, grouped: Tensor) -> Tensor:
        """(B, T, ...) to (\\*leading_shape, ...): the inverse of :meth:`group`."""
        raise NotImplementedError

    def owners(self) -> Tensor:
        """The sample of each row, shape leading_shape, on the CPU."""
        return self.ungroup(torch.arange(self.batch).unsqueeze(1).expand(-1, self.rows_per_sample))

    def same(self, other: Grouping) -> bool:
        """Whether both assign every row to the same sample."""
        return self == other or self.batch == 1 or torch.equal(self.owners(), other.owners())


def grouped(grouping: Grouping, rows: Tensor) -> Tensor:
    """``grouping.group(rows)``, as a function for :class:`Memo`."""
    return grouping.group(rows)


@dataclass(frozen=True)
class _Strided(Grouping):
    leading_shape: tuple[int, ...]
    batch: int
    split: tuple[int, ...]  # the leading dimensions, with a dimension of size B
    batch_dim: int  # of `split`

    @classmethod
    def of(cls, leading_shape: tuple[int, ...], batch: int, dim: int, outer: bool) -> _Strided:
        repeats = leading_shape[dim] // batch
        parts: tuple[int, ...] = (batch, repeats) if outer else (repeats, batch)
        if repeats == 1:
            parts, outer = (batch,), True
        split = (*leading_shape[:dim], *parts, *leading_shape[dim + 1 :])
        return cls(leading_shape, batch, split, dim if outer else dim + 1)

    @property
    def rows_per_sample(self) -> int:  # type: ignore[override]
        return prod(self.leading_shape) // self.batch

    def group(self, rows: Tensor) -> Tensor:
        rest = rows.shape[1:]
        moved = rows.reshape(*self.split, *rest).movedim(self.batch_dim, 0)
        return moved.reshape(self.batch, self.rows_per_sample, *rest)

    def ungroup(self, grouped: Tensor) -> Tensor:
        others = self.split[: self.batch_dim] + self.split[self.batch_dim + 1 :]
        rest = grouped.shape[2:]
        moved = grouped.reshape(self.batch, *others, *rest).movedim(0, self.batch_dim)
        return moved.reshape(*self.leading_shape, *rest)


def one_sample(leading_shape: tuple[int, ...]) -> Grouping:
    """All rows of a call as those of a single sample."""
    return _Strided.of(leading_shape, 1, 0, True)


class Listed(Grouping):
    """Rows in no order. Make one for each list, and share it: the device is asked how many rows a sample has.

    Args:
        owners: the sample of each row, integer, shape leading_shape.
        batch: B.
    """

    def __init__(self, owners: Tensor, batch: int) -> None:
        index = owners.flatten()
        counts = index.new_zeros(batch).index_add_(0, index, torch.ones_like(index))  # bincount() waits for the device
        starts = counts.cumsum(0) - counts
        order = torch.argsort(index, stable=True)
        positions = torch.empty_like(index)
        positions[order] = torch.arange(len(index), device=index.device) - starts[index[order]]
        self.leading_shape, self.batch = tuple(owners.shape), batch
        self._where, self._most = (index, positions), arriving(counts.max())

    @cached_property
    def rows_per_sample(self) -> int:  # type: ignore[override]
        return int(self._most())

    def group(self, rows: Tensor) -> Tensor:
        grouped = rows.new_zeros(self.batch, self.rows_per_sample, *rows.shape[1:])
        return grouped.index_put(self._where, rows)

    def ungroup(self, grouped: Tensor) -> Tensor:
        return grouped[self._where].reshape(*self.leading_shape, *grouped.shape[2:])

    def owners(self) -> Tensor:
        return self._owners

    @cached_property
    def _owners(self) -> Tensor:
        return self._where[0].cpu().reshape(self.leading_shape)


@dataclass(frozen=True)
class _Merged(Grouping):
    """Several samples in a row as one; what the last one lacks are missing rows."""

    base: Grouping
    size: int

    @property
    def leading_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.leading_shape

    @property
    def batch(self) -> int:  # type: ignore[override]
        return -(-self.base.batch // self.size)

    @property
    def rows_per_sample(self) -> int:  # type: ignore[override]
        return self.base.rows_per_sample * self.size

    def group(self, rows: Tensor) -> Tensor:
        grouped = self.base.group(rows)
        lacking = self.batch * self.size - self.base.batch
        if lacking:
            grouped = torch.cat([grouped, grouped.new_zeros(lacking, *grouped.shape[1:])])
        return grouped.reshape(self.batch, self.rows_per_sample, *grouped.shape[2:])

    def ungroup(self, grouped: Tensor) -> Tensor:
        parts = grouped.reshape(self.batch * self.size, self.base.rows_per_sample, *grouped.shape[2:])
        return self.base.ungroup(parts[: self.base.batch])


def merged(grouping: Grouping, size: int) -> Grouping:
    """The rows of `size` samples, one after the other, as those of one."""
    size = min(size, grouping.batch)
    return grouping if size == 1 else _Merged(grouping, size)


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

    def bind(self, leading_shape: tuple[int, ...], batch: int, rows: Sequence[Listed]) -> Grouping | None:
        """The rows of a call with these sizes, or None where the layout is impossible.

        Args:
            leading_shape: of the call.
            batch: B.
            rows: the caller's lists of the sample of each row (N,).
        """
        if self.listed is not None:
            fits = self.listed < len(rows) and leading_shape == rows[self.listed].leading_shape
            return rows[self.listed] if fits else None
        if self.dim >= len(leading_shape) or leading_shape[self.dim] == 0 or leading_shape[self.dim] % batch:
            return None
        return _Strided.of(leading_shape, batch, self.dim, self.outer)


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
    return bool((grouping.owners().flatten()[known] == owners[known]).all())
