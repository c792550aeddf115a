"""What the plugin itself registers: tests that register more may have run before, in the same process."""

from __future__ import annotations

from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.fairseq.criterions.registry import PER_SAMPLE_LOSSES


def _ours(function: object) -> bool:
    return function.__module__.startswith("deltasam_plugin.")


BUILT_IN_WEIGHTINGS = {name: own for name, own in WEIGHTINGS.items() if _ours(own.weigh)}
BUILT_IN_LOSSES = {name: losses for name, losses in PER_SAMPLE_LOSSES.items() if _ours(losses)}
