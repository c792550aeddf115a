"""The scalars that δ-SAM adds to fairseq's log and to TensorBoard."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from fairseq.logging import metrics

from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.loss import Statistics
from deltasam_plugin.settings import Settings

PREFIX = "sam_"
BATCHES, SIZE, SHARPNESS = PREFIX + "batches", PREFIX + "sample_size", PREFIX + "sharpness"
ENTRIES = {BATCHES, SIZE, PREFIX + "rho", *(PREFIX + item.name for item in fields(Statistics))}  # ours
HIDDEN = "_"  # fairseq does not show what begins with it
OF_PROBES = {"ess", "weight_max", "probes_failed", "probes_lost"}
# Over micro-batches and workers.
MEANS = ("rho", "ess", "weight_max", "ascent_gnorm", "ascent_gnorm_std", "eps_norm", "probes_lost")
SUMS = tuple(item.name for item in fields(Statistics) if item.name not in (*MEANS, "sharpness"))


# What README and reports say of them.
MEANINGS = {
    "loss": "unchanged: the loss at w, not at the perturbed point. With `--sam-ascent momentum` at the perturbed point",
    "sam_sharpness": "(L(w+ε) − L(w)) / sample size, base 2. Not with `momentum`",
    "sam_rho": "the radius, if it varies from update to update",
    "sam_ess": "effective sample size as a fraction, (Σv)²/(B Σv²): 1 when the weights are uniform. Where probes weigh "
    "samples",
    "sam_weight_max": "B · max v: 1 when the weights are uniform. Where probes weigh samples",
    "sam_ascent_gnorm": "‖Σ vᵢgᵢ‖; in instance mode the mean of the ‖gᵢ‖. With `noise` and `momentum` the norm of that",
    "sam_ascent_gnorm_std": "standard deviation of the ‖gᵢ‖. In instance mode only",
    "sam_eps_norm": "how far the parameters actually moved: in single precision the radius. In half precision rounding "
    "changes it. In instance mode the mean radius",
    "sam_skipped": "micro-batches without a perturbation, because their gradient was zero or not finite",
    "sam_probes_failed": "probes that gave a non-finite loss although the loss at w is finite. Where probes weigh "
    "samples",
    "sam_probes_lost": "share of the samples in which the probes saw nothing but rounding. Where probes weigh samples",
}


def constant_scalars(settings: Settings) -> set[str]:
    """The statistics that never change with these settings. They are not logged."""
    of_probes = set() if settings.weighs and WEIGHTINGS[settings.weighting].measure is not None else OF_PROBES
    if settings.ascent == "momentum":
        return of_probes | {"ascent_gnorm_std", "sharpness"}
    return of_probes | (set() if settings.perturbs_samples else {"ascent_gnorm_std"})


def log_entries(statistics: Statistics, settings: Settings, rho: float, size: Any) -> dict[str, Any]:
    """What the criterion adds to its logging output for one micro-batch: tensors, which backward fills in later.

    Args:
        statistics: of the micro-batch.
        settings: of the run.
        rho: radius of the update.
        size: the sample size that the criterion returns. It need not log it.
    """
    names = [item.name for item in fields(Statistics) if item.name not in constant_scalars(settings)]
    varying = {PREFIX + "rho": rho} if settings.rho_varies else {}
    return {BATCHES: 1, SIZE: size, **varying, **{PREFIX + name: getattr(statistics, name) for name in names}}


def log_scalars(logging_outputs: list[dict[str, Any]]) -> None:
    """Log the scalars of all micro-batches and workers.

    fairseq asks for the value of every meter at every update. A rounding meter would wait for the device to give it. So
    sums are kept under hidden names, and what is shown is derived from them on the device.

    Args:
        logging_outputs: one of each micro-batch, or their sum.
    """
    names = ENTRIES & {key for log in logging_outputs for key in log}
    if BATCHES not in names:
        return
    totals = {name: _total([log[name] for log in logging_outputs if name in log]) for name in names}
    means = {PREFIX + name: (BATCHES, 1.0, 620) for name in MEANS}
    for name, (count, unit, priority) in (means | {SHARPNESS: (SIZE, math.log(2), 610)}).items():
        if name in names and (torch.is_tensor(totals[count]) or totals[count] > 0):
            metrics.log_scalar_sum(HIDDEN + name, totals[name])
            metrics.log_scalar_sum(HIDDEN + name + "_count", totals[count] * unit)
            metrics.log_derived(name, partial(_mean, name), priority)
    for name in (PREFIX + name for name in SUMS):
        if name in names:
            metrics.log_scalar_sum(name, totals[name], 630)


def _total(values: list[Any]) -> Any:
    """Their sum; one value as it is."""
    return sum(values[1:], values[0])


def _mean(name: str, meters: Any) -> Any:
    """The mean of what was logged, to six decimals: a tensor on its device. None if no update was sharpness-aware."""
    count = meters[HIDDEN + name + "_count"].sum
    if not torch.is_tensor(count) and count == 0:
        return None
    mean = torch.as_tensor(meters[HIDDEN + name].sum / count, dtype=torch.double)
    return mean.round(decimals=6)
