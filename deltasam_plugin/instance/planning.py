"""Which parameters of each call are perturbed, and in which form their per-sample gradients are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from deltasam_plugin.instance.coverage import Coverage
from deltasam_plugin.instance.factored import forming_is_cheaper
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layers.base import PlannedCall
from deltasam_plugin.instance.layout import Grouping, one_sample
from deltasam_plugin.instance.recording import RecordedCall


def plan_calls(
    calls: Sequence[RecordedCall], groupings: Sequence[Grouping | None], coverage: Coverage
) -> list[PlannedCall]:
    """Decide for every call what is perturbed, and for every matrix in which form its gradients are kept.

    Args:
        calls: of the first pass.
        groupings: of their rows; None where no loss depends on them.
        coverage: of the parameters.
    """
    planned = [_planned(call, grouping, coverage) for call, grouping in zip(calls, groupings)]
    uses: defaultdict[ParameterSlice, list[int]] = defaultdict(list)
    for i, call in enumerate(planned):
        for part in (call.weight, call.bias):
            if part is not None:
                uses[part.upright].append(i)
    for part, indices in uses.items():
        users = [planned[i] for i in indices]
        if any(call.weight is None or call.weight.upright != part or call.layer.name != "linear" for call in users):
            continue
        formed = forming_is_cheaper(sum(call.grouping.rows_per_sample for call in users), *users[0].weight_shape)
        bias = users[0].bias
        turned = any(call.weight is not None and call.weight.transposed for call in users)
        together = (
            not turned
            and bias is not None
            and all(call.bias == bias for call in users)
            and len(uses[bias]) == len(users)
        )
        for i in indices:
            planned[i] = replace(planned[i], formed=formed, affine=together and not formed)
    return planned


def _planned(call: RecordedCall, grouping: Grouping | None, coverage: Coverage) -> PlannedCall:
    weight, bias = (
        part if grouping is not None and coverage.covers(part) else None for part in (call.key.weight, call.key.bias)
    )
    grouping = grouping or one_sample(call.leading_shape)
    return PlannedCall(
        call.layer, call.key, call.leading_shape, call.options, call.weight_shape, weight, bias, grouping
    )
