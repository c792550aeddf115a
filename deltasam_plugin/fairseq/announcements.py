"""What the log says about δ-SAM at the start of a run."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.precision import Rounding, observed_dtypes, spacing
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
    mode: dict[str, Any] = {"rho": settings.radius, "perturbation": settings.perturbation}
    if settings.weighs:
        mode["weighting"] = settings.weighting
        if WEIGHTINGS[settings.weighting].measure is not None:
            mode["probes"] = settings.probes
    further = [item for item in fields(Settings) if item.name not in ("rho", "perturbation", "weighting", "probes")]
    mode |= {item.name: value for item in further if (value := getattr(settings, item.name)) != item.default}
    total, left_out = (sum(parameter.numel() for parameter in group) for group in (perturbed, uncovered))
    count = f"{total - left_out:,} parameters perturbed"
    if settings.perturbation == "instance":
        count += f", {left_out:,} ({left_out / max(total, 1):.2%}) not covered"
    listed = ", ".join(f"{name}={value}" for name, value in mode.items())
    return f"δ-SAM: {names.optimizer} minimizes {names.criterion}, {listed}, {count}"


def warn_of_half_precision(parameters: Sequence[PerturbedParameter], settings: Settings) -> None:
    """Warn in numbers: in half precision perturbations fall below the spacing of numbers, and probes below rounding."""
    with observed_dtypes(item.parameter for item in parameters) as dtypes:
        rounding = Rounding.of(dtypes, [item.parameter for item in parameters])
    dtype = rounding.dtype
    name = str(dtype).removeprefix("torch.") if dtype != torch.float32 else "TF32"
    if settings.perturbation != "batch" or not rounding.coarse:
        return
    measure = WEIGHTINGS[settings.weighting].measure
    if settings.weighs and measure is not None:
        least = measure.least_scale.get(dtype, 0)
        details = ""
        if least > settings.probe_scale:
            details += f"Probes are {least} of the weights' norm long, to rise above it. "
        if measure.noise is not None:
            details += "One more forward pass in each batch measures its size. "
        logger.warning(
            f"δ-SAM: in {name} rounding hides a part of what probes measure for the weighting {settings.weighting!r}. "
            f"{details}sam_probes_lost is the share of the samples in which nothing rose above it; where it is "
            "near 1, the weights are nearly uniform. Then try --sam-weighting kl, or save the probes with "
            "--sam-weighting uniform."
        )
    without_master = [p.parameter for p in parameters if p.master is None and p.parameter.dtype == dtype]
    if without_master:
        step, size, distance = spacing(without_master, settings.radius)
        logger.warning(
            f"δ-SAM: in {name} without fp32 master weights a perturbation of rho={settings.radius} is {step:.1e} per "
            f"parameter, and the spacing of numbers is about {distance:.1e} (at their root mean square, {size:.1e}). "
            f"sam_eps_norm shows what rounding loses: it should be {settings.radius}. To lose nothing, use --fp16 "
            "without --memory-efficient-fp16, or --amp."
        )
