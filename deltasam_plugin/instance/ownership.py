r"""Learn from gradients which rows of a call belong to which sample.

A second backward pass starts from the losses times distinct factors, :math:`2^{-k_i} \ell_i`. A row that belongs to
sample i has :math:`2^{-k_i}` times the output gradient that it has in the first one. This names its owner. A row that
several samples' losses depend on has no such factor. Powers of two make the comparison exact up to nondeterministic
kernels. Where B samples need more factors than the precision has, their index is spelled in several passes.

Rows that fit a layout keep it. The check is repeated in the first batches, then ever more rarely, and for calls that
are new or whose sizes leave the layout open. Rows that fit no layout are looked up in every batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltasam_plugin.instance.layers.base import CallKey
from deltasam_plugin.instance.layout import (
    NOBODY,
    SEVERAL,
    Grouping,
    Layout,
    Listed,
    agreed,
    conceivable,
    consistent,
)
from deltasam_plugin.instance.recording import RecordedCall
from deltasam_plugin.loss import nodes_of

ALWAYS_CHECKED = 16  # batches; later the powers of two,
CHECK_INTERVAL = 1000  # and the multiples of this


class Ownership:
    """The layouts of all calls that were ever seen, as far as they are known."""

    def __init__(self) -> None:
        self._layouts: dict[CallKey, list[Layout]] = {}  # an empty list: rows in no order
        self._batches = 0

    def must_check(self, calls: Sequence[RecordedCall], losses: Tensor, rows: Sequence[Tensor]) -> bool:
        """Whether the rows of this batch have to be compared with the factors of their losses.

        Args:
            calls: of the pass.
            losses: per-sample losses with graph, (B,).
            rows: lists of the sample of each row, from the caller.
        """
        batch = losses.numel()
        if batch == 1:
            return False
        self._batches += 1
        if self._batches <= ALWAYS_CHECKED or self._batches.bit_count() == 1 or self._batches % CHECK_INTERVAL == 0:
            return True
        unbound = {c.output.node for c in calls if 0 not in c.leading_shape and self._bound(c, batch, rows) is None}
        return bool(unbound) and any(node in unbound for node in nodes_of(losses))

    def factors(self, calls: Sequence[RecordedCall], losses: Tensor) -> list[Tensor]:
        """Factors of the losses, (B,), one tensor for each backward pass that is needed to tell samples apart."""
        batch, levels = losses.numel(), _levels(calls)
        index = torch.arange(batch, device=losses.device)
        digits = max(1, math.ceil(math.log(batch, levels) - 1e-9))
        return [torch.pow(2.0, -(index // levels**digit % levels).to(losses.dtype)) for digit in range(digits)]

    def groupings(
        self,
        calls: Sequence[RecordedCall],
        gradients: Sequence[Tensor | None],
        scaled: Sequence[Sequence[Tensor | None]],
        batch: int,
        rows: Sequence[Tensor],
    ) -> tuple[list[Grouping | None], list[RecordedCall]]:
        """The rows of every call, by sample.

        Args:
            calls: of the pass.
            gradients: output gradient of each call, None where no loss depends on it.
            scaled: the same from the losses times each of :meth:`factors`; empty if this batch is not checked.
            batch: B.
            rows: lists of the sample of each row, from the caller.

        Returns:
            A grouping for each call, None where there is nothing to be perturbed; and the calls with rows that several
            samples' losses depend on.
        """
        found = [None if g is None else self._bound(call, batch, rows) for call, g in zip(calls, gradients)]
        if not scaled:
            return found, []
        levels, mixed = _levels(calls), []
        listed: defaultdict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
        for i, (call, gradient) in enumerate(zip(calls, gradients)):
            if gradient is None or 0 in call.leading_shape:
                continue
            owners = _owners(call, gradient, [factor[i] for factor in scaled], levels, batch)
            if bool((owners == SEVERAL).any()):
                mixed.append(call)
                found[i] = None
            elif not bool((owners != NOBODY).any()):
                continue  # no gradient: nothing can be learned
            elif fitting := [pair for pair in self._candidates(call, batch, rows) if consistent(pair[1], owners)]:
                self._layouts[call.key] = [layout for layout, _ in fitting]
                found[i] = fitting[0][1]  # where they differ, it is on rows without gradient
            else:
                self._layouts[call.key] = []
                listed[call.leading_shape].append((i, owners))
        for shape, entries in listed.items():
            for i, owners in _completed(entries):
                found[i] = Listed(owners.reshape(shape).to(gradients[i].device), batch)  # type: ignore[union-attr]
        return found, mixed

    def _candidates(self, call: RecordedCall, batch: int, rows: Sequence[Tensor]) -> Iterator[tuple[Layout, Grouping]]:
        layouts = self._layouts.get(call.key) if batch > 1 else None
        for layout in conceivable(call.key.rank, len(rows)) if layouts is None else layouts:
            grouping = layout.bind(call.leading_shape, batch, rows)
            if grouping is not None:
                yield layout, grouping

    def _bound(self, call: RecordedCall, batch: int, rows: Sequence[Tensor]) -> Grouping | None:
        """The grouping on which all known layouts agree."""
        if batch > 1 and call.key not in self._layouts:
            return None  # sizes alone prove nothing
        return agreed([grouping for _, grouping in self._candidates(call, batch, rows)])


def _levels(calls: Sequence[RecordedCall]) -> int:
    """How many factors 1, 1/2, 1/4, … leave a gradient in range: fp16 has few exponents."""
    return 4 if any(call.dtype == torch.float16 for call in calls) else 32


def _owners(call: RecordedCall, gradient: Tensor, scaled: Sequence[Tensor | None], levels: int, batch: int) -> Tensor:
    """The sample of each row, (N,), on the CPU; NOBODY where the gradient is zero, too small or not finite."""
    limits = torch.finfo(gradient.dtype)
    smallest = 64 * levels * limits.smallest_normal * (limits.eps if gradient.dtype == torch.float16 else 1)
    count = math.prod(call.leading_shape)
    rows, *others = (
        torch.zeros(count, 1, dtype=torch.double) if g is None else g.detach().reshape(count, -1).double()
        for g in (gradient, *scaled)
    )
    peak = torch.stack([g.abs().amax(1) for g in (rows, *others)]).amax(0)
    unit = torch.where(peak > 0, peak, 1).unsqueeze(1)
    rows, owners = rows / unit, torch.zeros(count, dtype=torch.long, device=rows.device)
    several = torch.zeros_like(owners, dtype=torch.bool)
    for digit, other in enumerate(others):
        other = other / unit
        ratio = (rows * other).sum(1) / rows.square().sum(1)
        level = -ratio.nan_to_num(1).clamp(2.0 ** (1 - levels), 1).log2().round()
        residual = (other - torch.pow(2.0, -level).unsqueeze(1) * rows).norm(dim=1)
        several |= residual > limits.eps**0.5 * other.norm(dim=1)
        owners += level.long() * levels**digit
    finite = torch.isfinite(peak)
    floor = (limits.eps * torch.where(finite, peak, 0).max()).clamp(min=smallest)
    owners = torch.where(several | (owners >= batch), SEVERAL, owners)
    return torch.where(finite & (peak > floor), owners, NOBODY).cpu()


def _completed(entries: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """Calls on equally many rows, each completed by what the others know, if they do not contradict each other."""
    together = entries[0][1].clone()
    for _, owners in entries[1:]:
        known = (owners != NOBODY) & (together != NOBODY)
        if bool((owners[known] != together[known]).any()):
            return list(entries)
        together = torch.where(together == NOBODY, owners, together)
    return [(i, together) for i, _ in entries]
