"""Find rows that a sample's loss depends on by a factor that is zero now, and may not be zero later.

A backward pass starts with NaN at some samples' losses and with 0 at the others'. Zero times NaN is NaN. It therefore
arrives wherever operations lead, whatever their factors are. A contrastive term whose factor grows from zero is seen
in the first batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltasam_plugin.checks import TOLERANCE
from deltasam_plugin.instance.coverage import Coverage
from deltasam_plugin.instance.layout import Grouping
from deltasam_plugin.instance.passes import MarkedPass
from deltasam_plugin.instance.recording import OutputGradients, RecordedCall
from deltasam_plugin.precision import SINGLE, Rounding


def halves(count: int, device: torch.device) -> list[Tensor]:
    """Masks of about half of the samples, (count,) bool each. Any two samples are told apart by one of them.

    Args:
        count: of the samples.
        device: of the result.
    """
    index = torch.arange(count, device=device)
    return [(index >> digit) % 2 == 0 for digit in range(max(1, (count - 1).bit_length()))]


def half_in_turn(count: int, number: int, device: torch.device) -> Tensor:
    """One of the halves, or after an even number its complement. A few in a row tell every sample from every other.

    Args:
        count: of the samples. It may differ from turn to turn.
        number: of the turn.
        device: of the result.
    """
    ways = halves(count, device)
    half = ways[number // 2 % len(ways)]
    return ~half if number % 2 else half


def allowed_change(losses: Tensor, rounding: Rounding) -> Tensor:
    """By how much rounding may change each loss, (B,), when other samples are perturbed.

    A perturbation of zero keeps a row what it is, but for the order in which products are added up. In half precision
    that cannot be told for a sample alone, and the largest loss is the measure.

    Args:
        losses: (B,).
        rounding: of the forward pass.
    """
    sizes = torch.where(losses.isfinite(), losses.abs(), 0)
    if rounding.coarse:
        return SINGLE**0.5 * sizes.amax().expand_as(sizes)
    return TOLERANCE[rounding.dtype] * (1 + sizes)


def entangled(
    calls: Sequence[RecordedCall],
    groupings: Sequence[Grouping | None],
    gradients: OutputGradients,
    marked: MarkedPass,
    coverage: Coverage,
) -> bool:
    """Whether NaN has arrived at rows of samples that have none.

    Args:
        calls: of the pass.
        groupings: of their rows.
        gradients: of the calls' outputs.
        marked: the same from NaN.
        coverage: of the parameters. Where none is perturbed, samples may share rows.
    """
    marks = marked.marks.cpu()
    for call, grouping, gradient, found in zip(calls, groupings, gradients, marked.gradients):
        if grouping is None or gradient is None or found is None or not found.numel():
            continue
        if not any(coverage.covers(part) for part in call.parts):
            continue
        count = grouping.owners().numel()
        arrived = found.isnan().reshape(count, -1).any(1) & gradient.isfinite().reshape(count, -1).all(1)
        if bool((arrived.cpu() & ~marks[grouping.owners().flatten()]).any()):
            return True
    return False
