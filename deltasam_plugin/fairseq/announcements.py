"""What the log says about δ-SAM at the start of a run."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import PerturbedParameter
from deltasam_plugin.batch.weighting import ROUNDING_FACTOR
from deltasam_plugin.precision import coarsest, observed_dtypes, spacing
from deltasam_plugin.settings import Settings

logger = logging.getLogger(__name__)


class TrainedBy(NamedTuple):
    """The names in fairseq of what trains the model."""

    task: str | None
    criterion: str | None
    optimizer: str


def start_line(names: TrainedBy, settings: Settings, perturbed: Iterable[Tensor], uncovered: Iterable[Tensor]) -> str:
    """One line about the run.

    Args:
        names: of task, criterion and base optimizer.
        settings: of δ-SAM.
        perturbed: the trained parameters.
        uncovered: those of them that instance mode leaves unperturbed.
    """
    mode: dict[str, Any] = {"rho": settings.rho, "perturbation": settings.perturbation}
    if settings.perturbation == "batch":
        mode["weighting"] = settings.weighting
        if settings.weighting == "curvature":
            mode["probes"] = settings.probes
    total, left_out = (sum(parameter.numel() for parameter in group) for group in (perturbed, uncovered))
    count = f"{total - left_out:,} parameters perturbed"
    if settings.perturbation == "instance":
        count += f", {left_out:,} ({left_out / max(total, 1):.2%}) not covered"
    listed = ", ".join(f"{name}={value}" for name, value in mode.items())
    return f"δ-SAM: {names.optimizer} minimizes {names.criterion}, {listed}, {count}"


def warn_of_half_precision(parameters: Sequence[PerturbedParameter], settings: Settings) -> None:
    """Warn in numbers: in half precision perturbations fall below the spacing of numbers, and probes below rounding."""
    with observed_dtypes(item.parameter for item in parameters) as dtypes:
        dtype = coarsest(dtypes)
    name, eps = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps
    if settings.perturbation != "batch" or eps <= torch.finfo(torch.float32).eps:
        return
    if settings.weighting == "curvature":
        logger.warning(
            f"δ-SAM: in {name} a curvature probe sees nothing below {ROUNDING_FACTOR * eps:.1%} of a sample's loss, "
            "the rounding floor. A batch whose samples are all below it gets uniform weights, and sam_ess is 1. A "
            "larger --sam-probe-scale raises the signal. --sam-weighting uniform saves the probes."
        )
    without_master = [p.parameter for p in parameters if p.master is None and p.parameter.dtype == dtype]
    if without_master:
        step, size, distance = spacing(without_master, settings.rho)
        logger.warning(
            f"δ-SAM: in {name} without fp32 master weights a perturbation of rho={settings.rho} is {step:.1e} per "
            f"parameter, and the spacing of numbers is about {distance:.1e} (at their root mean square, {size:.1e}). "
            f"sam_eps_norm shows what rounding loses: it should be {settings.rho}. To lose nothing, use --fp16 "
            "without --memory-efficient-fp16, or --amp."
        )
