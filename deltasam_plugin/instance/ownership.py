"""Learn from gradients which rows of a call belong to which sample, and remember it for later batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.instance.coverage import mixed_samples, no_layout
from deltasam_plugin.instance.layers.base import RecordedCall
from deltasam_plugin.instance.layout import NOBODY, SEVERAL, Grouping, Layout, agreed, conceivable, consistent

Probe = Callable[[Tensor], dict[int, Tensor]]  # which losses count (B,), bool, to output gradients by site


class Ownership:
    """The layouts of all calls that were ever seen, as far as they are known."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], list[Layout]] = {}

    def settle(self, sites: Sequence[RecordedCall], batch: int, rows: Sequence[Tensor], probe: Probe) -> None:
        """Give every site its grouping for this batch; where sizes leave it open, let gradients tell.

        Args:
            sites: of one pass.
            batch: B.
            rows: lists of the sample of each row, from the caller.
            probe: costs a backward pass. Called when a site is new, or when its known layouts disagree on these sizes.

        Raises:
            RuntimeError: a row belongs to several samples, or rows are in no order that is known.
        """
        unknown = [i for i, site in enumerate(sites) if not self._bind(site, batch, rows)]
        if not unknown:
            return
        for i, owner in self._owners(sites, unknown, batch, probe).items():
            site = sites[i]
            if not bool((owner != NOBODY).any()):
                continue  # no gradient, no part in the loss: nothing can be learned, and nothing needs to be
            if bool((owner < NOBODY).any()):
                raise RuntimeError(mixed_samples(site))
            fitting = [pair for pair in self._groupings(site, batch, rows) if consistent(pair[1], owner)]
            if not fitting:
                raise RuntimeError(no_layout(site, batch))
            self._layouts[site.key] = [layout for layout, _ in fitting]
            site.grouping = fitting[0][1]  # where they differ, it is on rows without gradient

    @staticmethod
    def _owners(sites: Sequence[RecordedCall], unknown: Sequence[int], batch: int, probe: Probe) -> dict[int, Tensor]:
        """The sample whose loss has a gradient in each row, (N,).

        One backward pass for each binary digit of the sample's index, from the losses that have it set, and one from
        the others: which of the two a row has a gradient in spells its owner, and a row that has both has several.
        Zero is exact in every precision.
        """
        index = torch.arange(batch)
        owners = {i: torch.zeros(math.prod(sites[i].lead), dtype=torch.long) for i in unknown}
        for digit in range(max(1, (batch - 1).bit_length())):
            bits = (index >> digit & 1).bool()
            ones, zeros = probe(bits), probe(~bits)
            for i, owner in owners.items():
                one, zero = _touched(sites[i], ones.get(i)), _touched(sites[i], zeros.get(i))
                owner |= one.long() << digit
                owner[~(one | zero)] = NOBODY
                owner[one & zero] = SEVERAL
        return owners

    def _groupings(self, site: RecordedCall, batch: int, rows: Sequence[Tensor]) -> Iterator[tuple[Layout, Grouping]]:
        for layout in self._layouts.get(site.key, conceivable(len(site.lead), len(rows))):
            grouping = layout.bind(site.lead, batch, rows)
            if grouping is not None:
                yield layout, grouping

    def _bind(self, site: RecordedCall, batch: int, rows: Sequence[Tensor]) -> bool:
        site.grouping = agreed([grouping for _, grouping in self._groupings(site, batch, rows)])
        if site.key not in self._layouts and batch > 1:
            site.grouping = None  # sizes alone prove nothing
        return site.grouping is not None


def _touched(site: RecordedCall, gradient: Tensor | None) -> Tensor:
    rows = math.prod(site.lead)
    if gradient is None:
        return torch.zeros(rows, dtype=torch.bool)
    return site.operation.touched(gradient, rows).cpu()
