"""Which parameters of each call are perturbed, and in which form their per-sample gradients are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from deltasam_plugin.instance.coverage import Coverage
from deltasam_plugin.instance.layers.base import Form, PlannedCall
from deltasam_plugin.instance.layout import Grouping, one_sample
from deltasam_plugin.instance.recording import RecordedCall
from deltasam_plugin.instance.slices import ParameterSlice

TRAFFIC = 90  # measured by benchmarks/forms.py, on a CPU


def plan_calls(
    calls: Sequence[RecordedCall],
    groupings: Sequence[Grouping | None],
    coverage: Coverage,
    affine: bool = True,
) -> list[PlannedCall]:
    """Decide for every call what is perturbed, and for every matrix in which form its gradients are kept.

    Args:
        calls: of the first pass.
        groupings: of their rows; None where no loss depends on them.
        coverage: of the parameters.
        affine: whether a bias may be part of the factors of its layer's matrix.
    """
    planned = [_planned(call, grouping, coverage) for call, grouping in zip(calls, groupings)]
    uses: defaultdict[ParameterSlice, list[int]] = defaultdict(list)
    for i, call in enumerate(planned):
        for part in (call.weight, call.bias):
            if part is not None:
                uses[part.upright].append(i)
    for part, indices in uses.items():
        users = [planned[i] for i in indices]
        linear = [call for call in users if call.layer.name == "linear" and call.weight is not None]
        if not linear or any(call not in linear and call.layer.name != "embedding" for call in users):
            continue
        if any(call.weight is None or call.weight.upright != part for call in users):
            continue  # a bias
        rows = sum(call.grouping.rows_per_sample for call in linear)
        # In half precision the sum of weight and perturbation would lose what is below the spacing of numbers.
        summed = all(calls[i].dtype in (torch.float32, torch.float64) for i in indices)
        outputs, inputs = users[0].weight_shape
        form = cheapest_form(rows, outputs, inputs, summed)
        bias = users[0].bias
        turned = any(call.weight is not None and call.weight.transposed for call in users)
        together = (
            affine
            and not turned
            and bias is not None
            and all(call.bias == bias for call in users)
            and len(uses[bias]) == len(users)
        )
        for i in indices:
            planned[i] = replace(planned[i], form=form, affine=together and form is Form.FACTORED)
    return planned


def cheapest_form(rows: int, outputs: int, inputs: int, summed: bool = True) -> Form:
    r"""In which form the per-sample gradients of an (n, m) matrix cost least, for T rows of each sample.

    In products, norms and perturbed layer with its derivative cost :math:`3 T^2 (m + n)` with factors. Formed
    gradients cost :math:`T m n` for the forming, and memory traffic that takes as long as :math:`90\, m n` products. If
    they cannot be added to W, the perturbed layer takes :math:`2 T m n` more. What has to be kept is
    :math:`T (m + n)` numbers or :math:`m n`, of which at most half as many again are spent to save time.

    Args:
        rows: T, of all uses.
        outputs: n.
        inputs: m.
        summed: whether W + sG is precise enough.
    """
    factored = 3 * rows * rows * (inputs + outputs)
    formed = (rows * (1 if summed else 3) + TRAFFIC) * inputs * outputs
    if factored <= formed or inputs * outputs > 1.5 * rows * (inputs + outputs):
        return Form.FACTORED
    return Form.OWN if summed else Form.BESIDE


def _planned(call: RecordedCall, grouping: Grouping | None, coverage: Coverage) -> PlannedCall:
    weight, bias = (
        part if grouping is not None and coverage.covers(part) else None for part in (call.key.weight, call.key.bias)
    )
    grouping = grouping or one_sample(call.leading_shape)
    return PlannedCall(
        call.layer, call.key, call.leading_shape, call.options, call.weight_shape, weight, bias, grouping
    )
