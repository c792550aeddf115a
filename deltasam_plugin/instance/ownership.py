r"""Learn from gradients which rows of a call belong to which sample.

A second backward pass starts from the losses times distinct factors, :math:`2^{-k_i} \ell_i`. A row that belongs to
sample i has :math:`2^{-k_i}` times the output gradient that it has in the first one. This names its owner. A row that
several samples' losses depend on has no such factor. Powers of two make the comparison exact up to nondeterministic
kernels. Where B samples need more factors than the precision has, their index is spelled in several passes.

Rows that fit a layout keep it. The check is repeated as the engine says, and for calls that are new or whose sizes
leave the layout open. Rows that fit no layout are looked up in every batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltasam_plugin.graphs import nodes_of
from deltasam_plugin.instance.coverage import MIXED, UNKNOWN
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
from deltasam_plugin.instance.recording import OutputGradients, RecordedCall
from deltasam_plugin.precision import coarsest


class Ownership:
    """The layouts of all calls that were ever seen, as far as they are known."""

    def __init__(self) -> None:
        self._layouts: dict[CallKey, list[Layout]] = {}  # an empty list: rows in no order

    def leaves_open(self, calls: Sequence[RecordedCall], losses: Tensor, rows: Sequence[Listed]) -> bool:
        """Whether known layouts and the sizes of this batch leave open which rows belong to which sample.

        Args:
            calls: of the pass.
            losses: per-sample losses with graph, (B,).
            rows: lists of the sample of each row, from the caller.
        """
        batch = losses.numel()
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
        gradients: OutputGradients,
        scaled: Sequence[OutputGradients],
        batch: int,
        rows: Sequence[Listed],
    ) -> tuple[list[Grouping | None], dict[str, str]]:
        """The rows of every call, by sample.

        Args:
            calls: of the pass.
            gradients: output gradient of each call, None where no loss depends on it.
            scaled: the same from the losses times each of :meth:`factors`; empty if this batch is not checked.
            batch: B.
            rows: lists of the sample of each row, from the caller.

        Returns:
            A grouping for each call, None where there is nothing to be perturbed; and the parameters whose rows cannot
            be told apart by sample, with the reason.
        """
        found = [None if g is None else self._bound(call, batch, rows) for call, g in zip(calls, gradients)]
        if not scaled:
            return found, {}
        # Under autocast, gradients in fp32 come from operations in half precision.
        dtype = coarsest([call.dtype for call in calls])
        levels, silent, reasons = _levels(calls), [], {}
        ambiguous: dict[int, list[Grouping]] = {}
        for i, (call, gradient) in enumerate(zip(calls, gradients)):
            if gradient is None or 0 in call.leading_shape:
                continue
            owners = _owners(call, gradient, [factor[i] for factor in scaled], levels, batch, torch.finfo(dtype))
            if bool((owners == SEVERAL).any()):
                reasons.update(dict.fromkeys(call.names, MIXED))
            elif not bool((owners != NOBODY).any()):
                silent.append(i)
            elif fitting := [pair for pair in self._candidates(call, batch, rows) if consistent(pair[1], owners)]:
                self._layouts[call.key] = [layout for layout, _ in fitting]
                found[i] = agreed([grouping for _, grouping in fitting])
                if found[i] is None:
                    ambiguous[i] = [grouping for _, grouping in fitting]
            else:
                self._layouts[call.key] = []
                found[i] = _grouping(call, owners, batch)
                if found[i] is None:
                    reasons.update(dict.fromkeys(call.names, UNKNOWN))
        for i, candidates in ambiguous.items():  # they differ on rows without gradient
            alike = _of_shape(calls[i].leading_shape, found)
            likely = [grouping for grouping in candidates if any(grouping.same(other) for other in alike)]
            found[i] = (likely or candidates)[0]
        moved = {part for call, grouping in zip(calls, found) if grouping is not None for part in call.parts}
        for i in silent:  # of a parameter that gets a gradient elsewhere, and perturbs these rows too
            found[i] = found[i] or agreed(_of_shape(calls[i].leading_shape, found))
            if found[i] is None and moved.intersection(calls[i].parts):
                reasons.update(dict.fromkeys(calls[i].names, UNKNOWN))
        return found, reasons

    def _candidates(self, call: RecordedCall, batch: int, rows: Sequence[Listed]) -> Iterator[tuple[Layout, Grouping]]:
        layouts = self._layouts.get(call.key) if batch > 1 else None
        for layout in conceivable(call.key.rank, len(rows)) if layouts is None else layouts:
            grouping = layout.bind(call.leading_shape, batch, rows)
            if grouping is not None:
                yield layout, grouping

    def _bound(self, call: RecordedCall, batch: int, rows: Sequence[Listed]) -> Grouping | None:
        """The grouping on which all known layouts agree."""
        if batch > 1 and call.key not in self._layouts:
            return None  # sizes alone prove nothing
        return agreed([grouping for _, grouping in self._candidates(call, batch, rows)])


def _of_shape(leading_shape: tuple[int, ...], groupings: Sequence[Grouping | None]) -> list[Grouping]:
    return [grouping for grouping in groupings if grouping is not None and grouping.leading_shape == leading_shape]


def _levels(calls: Sequence[RecordedCall]) -> int:
    """How many factors 1, 1/2, 1/4, … leave a gradient in range: fp16 has few exponents."""
    return 4 if any(call.dtype == torch.float16 for call in calls) else 32


def _owners(
    call: RecordedCall,
    gradient: Tensor,
    scaled: Sequence[Tensor | None],
    levels: int,
    batch: int,
    limits: torch.finfo,
) -> Tensor:
    """The sample of each row, (N,), on the CPU; NOBODY where the gradient is zero, too small or not finite.

    A scaled gradient is too small if subnormal numbers, of which some hundred are added up, may have spoilt its factor.
    """
    smallest = 32 * limits.smallest_normal * limits.eps**0.5
    count = math.prod(call.leading_shape)
    rows, *others = (
        torch.zeros(count, 1, dtype=torch.double) if g is None else g.detach().reshape(count, -1).double()
        for g in (gradient, *scaled)
    )
    peaks = torch.stack([g.abs().amax(1) for g in (rows, *others)])
    peak = peaks.amax(0)
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
    large = (peak > limits.eps * torch.where(finite, peak, 0).max()) & (peaks.amin(0) > smallest)
    owners = torch.where(several | (owners >= batch), SEVERAL, owners)
    return torch.where(finite & large, owners, NOBODY).cpu()


def _grouping(call: RecordedCall, owners: Tensor, batch: int) -> Grouping | None:
    """The grouping of rows that fit no known layout, or None if it cannot be told.

    A row that has no gradient at w may have one at the perturbed weights. If exactly one regular order, (r // n) mod B,
    agrees with all known rows, it tells the owner. Otherwise the rows of each sample must follow each other. The row
    then belongs to the sample of the rows around it, and between two samples, where padding is, to the first. If some
    sample has no known row at all, a row between two others must be one that no perturbation moves.
    """
    count = len(owners)
    known = (owners != NOBODY).nonzero().flatten().tolist()
    if len(known) < count:
        rows = torch.arange(count)
        enough = batch if call.layer.name == "linear" and call.key.bias is None else count + 1  # projected embeddings
        orders = {n: rows // n % batch for n in range(1, count // batch + 1) if count % (batch * n) == 0}
        fitting = [order for order in orders.values() if torch.equal(order[known], owners[known])]
        if len(fitting) == 1:
            owners = fitting[0]
        elif (filled := _filled(owners, known, enough, _unperturbed_rows(call))) is None:
            return None
        else:
            owners = filled
    return Listed(owners.reshape(call.leading_shape).to(call.x.device), batch)


def _filled(owners: Tensor, known: list[int], enough: int, unperturbed: Tensor) -> Tensor | None:
    """Owners of all rows, where those of each sample follow each other; None if they do not, or one is left open."""
    values = owners.tolist()
    runs = [values[i] for n, i in enumerate(known) if n == 0 or values[i] != values[known[n - 1]]]
    if len(set(runs)) < len(runs):
        return None
    for before, after in itertools.pairwise([-1, *known, len(values)]):
        inside = before >= 0 and after < len(values) and values[before] == values[after]
        if not inside and len(runs) < enough and not bool(unperturbed[before + 1 : after].all()):
            return None
        values[before + 1 : after] = [values[before if before >= 0 else after]] * (after - before - 1)
    return torch.tensor(values)


def _unperturbed_rows(call: RecordedCall) -> Tensor:
    """Rows (N,) to which no perturbation of the parameters adds anything."""
    count = math.prod(call.leading_shape)
    if call.layer.name == "embedding" and call.options[0] is not None:
        return (call.x.reshape(count) == call.options[0]).cpu()
    if call.layer.name == "linear" and call.key.bias is None:
        return (call.x.reshape(count, -1) == 0).all(1).cpu()
    return torch.zeros(count, dtype=torch.bool)
