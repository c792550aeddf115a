"""The scalars that δ-SAM adds to fairseq's log and to TensorBoard."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from fairseq import utils
from fairseq.logging import metrics

from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.loss import Statistics
from deltasam_plugin.settings import Settings

PREFIX = "sam_"
BATCHES = PREFIX + "batches"
OF_PROBES = {"ess", "weight_max", "probes_failed", "probes_lost"}
# Over micro-batches and workers.
MEANS = ("ess", "weight_max", "ascent_gnorm", "ascent_gnorm_std", "eps_norm", "probes_lost")
SUMS = tuple(item.name for item in fields(Statistics) if item.name not in (*MEANS, "sharpness"))


def constant_scalars(settings: Settings) -> set[str]:
    """The statistics that never change with these settings. They are not logged."""
    if settings.perturbation == "instance" and settings.rho > 0:
        return OF_PROBES
    return {"ascent_gnorm_std"} | (OF_PROBES if WEIGHTINGS[settings.weighting].measure is None else set())


def log_entries(statistics: Statistics, settings: Settings) -> dict[str, Any]:
    """What the criterion adds to its logging output for one micro-batch: tensors, which backward fills in later."""
    names = [item.name for item in fields(Statistics) if item.name not in constant_scalars(settings)]
    return {BATCHES: 1, **{PREFIX + name: getattr(statistics, name) for name in names}}


def log_scalars(logging_outputs: list[dict[str, Any]]) -> None:
    """Log the scalars of all micro-batches and workers.

    Args:
        logging_outputs: one of each micro-batch, or their sum.
    """
    names = {key for log in logging_outputs for key in log if key.startswith(PREFIX)}
    totals = {name: sum(log.get(name, 0) for log in logging_outputs) for name in (*names, "sample_size")}
    batches, sample_size = utils.item(totals.get(BATCHES, 0)), totals["sample_size"]
    if batches == 0:
        return
    if sample_size:
        sharpness = totals[PREFIX + "sharpness"] / sample_size / math.log(2)
        metrics.log_scalar(PREFIX + "sharpness", sharpness, sample_size, 610, round=6)
    for name in (PREFIX + name for name in MEANS):
        if name in names:
            metrics.log_scalar(name, totals[name] / batches, batches, 620, round=6)
    for name in (PREFIX + name for name in SUMS):
        if name in names:
            metrics.log_scalar_sum(name, totals[name], 630)
