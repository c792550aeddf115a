"""What a user can set, checked once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from deltasam_plugin.batch.weighting import WEIGHTINGS

PERTURBATIONS = ("batch", "instance")
SCHEDULES = ("constant", "lr")
# Samples of a batch cancel out in its gradient, and in instance mode they do not: the loss rises more at one radius.
DEFAULT_RHO = {"batch": 0.05, "instance": 0.01}


@dataclass(frozen=True)
class Settings:
    r"""The settings of δ-SAM, validated on construction.

    Args:
        rho: radius :math:`\rho \ge 0`, the L2 norm of the perturbation in parameter space. By default 0.05, in
            instance mode 0.01.
        weighting: name of the weighting of the samples in the ascent, one of ``WEIGHTINGS``.
        probes: number K >= 1 of probes that the weighting averages.
        probe_scale: expected length of a probe's displacement, as a fraction of the L2 norm of the parameters
            (dimensionless): :math:`E\|\sigma u\|^2 = (\text{probe\_scale}\,\|w\|)^2`. In half precision it may be
            longer, see :class:`~deltasam_plugin.batch.measures.Measure`.
        perturbation: ``batch``, one perturbation for the whole batch; ``instance``, one for each sample, exactly. The
            latter does not use weighting, probes and sync.
        sync: data-parallel workers share one perturbation, that of the union of their batches. By default each worker
            perturbs by its own batch (m-sharpness).
        parameters: regular expression. Only parameters with a name in which it is found are perturbed, probed and
            counted; by default all are.
        loss_budget: C > 0, in nats a sample. The radius is at most :math:`C/\|g\|`, so that to first order the mean
            loss of the samples rises by no more than C; in instance mode each loss. By default there is no budget.
        group: M >= 1. In instance mode so many samples in a row of a batch share a perturbation, that of their summed
            loss (m-sharpness). With M = B it is SAM.
        adaptive: filters are perturbed in proportion to their size, and the radius is measured in that proportion. See
            :func:`~deltasam_plugin.adaptive.filter_scale`.
        interval: N >= 1. Every N-th update is sharpness-aware; those between are the base optimizer's own.
        warmup_updates: N >= 0. The radius grows linearly over the first N updates.
        rho_schedule: ``constant``; or ``lr``, proportional to the learning rate after the warm-up.

    Reference: for the budget, arXiv 2605.10183 (LE-SAM).

    Raises:
        ValueError: a value breaks its rule; the message names value, rule and remedy.
    """

    rho: float | None = None
    weighting: str = "curvature"
    probes: int = 1
    probe_scale: float = 0.01
    perturbation: str = "batch"
    sync: bool = False
    parameters: str | None = None
    loss_budget: float | None = None
    group: int = 1
    adaptive: bool = False
    interval: int = 1
    warmup_updates: int = 0
    rho_schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(
                f"Unknown perturbation={self.perturbation!r} (--sam-perturbation). "
                f"Choose one of: {', '.join(PERTURBATIONS)}."
            )
        if self.rho is None:  # equal settings are equal, whether given or not
            object.__setattr__(self, "rho", self.radius)
        if not (_finite(self.rho) and self.radius >= 0):
            raise ValueError(
                f"Invalid rho={self.rho!r} (--sam-rho). Must be a finite number >= 0; "
                f"{DEFAULT_RHO[self.perturbation]} is the usual start."
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"Unknown weighting={self.weighting!r} (--sam-weighting). Choose one of: {', '.join(WEIGHTINGS)}; "
                "or register one of your own, with @deltasam_plugin.weighting."
            )
        if not _integer(self.probes, 1):
            raise ValueError(
                f"Invalid probes={self.probes!r} (--sam-probes). Must be an integer >= 1; "
                "for no probes at all use the weighting 'uniform'."
            )
        if not (_finite(self.probe_scale) and 0 < self.probe_scale < 1):
            raise ValueError(
                f"Invalid probe_scale={self.probe_scale!r} (--sam-probe-scale). Must be a fraction of the norm of the "
                "weights, between 0 and 1 exclusive; 0.01 is the default."
            )
        for name, flag, least in (
            ("group", "group", 1),
            ("interval", "interval", 1),
            ("warmup_updates", "warmup-updates", 0),
        ):
            value = getattr(self, name)
            if not _integer(value, least):
                raise ValueError(f"Invalid {name}={value!r} (--sam-{flag}). Must be an integer >= {least}.")
        if self.group > 1 and self.perturbation == "batch":
            raise ValueError(
                f"Invalid group={self.group} (--sam-group) with perturbation='batch': there all samples share one. Use "
                "--sam-perturbation instance, or leave it out."
            )
        if self.rho_schedule not in SCHEDULES:
            raise ValueError(
                f"Unknown rho_schedule={self.rho_schedule!r} (--sam-rho-schedule). "
                f"Choose one of: {', '.join(SCHEDULES)}."
            )
        if self.parameters is not None:
            try:
                re.compile(self.parameters)
            except re.error as error:
                raise ValueError(
                    f"Invalid parameters={self.parameters!r} (--sam-parameters). Must be a regular expression that "
                    f"Python understands: {error}."
                ) from error
        if self.loss_budget is not None and not (_finite(self.loss_budget) and self.loss_budget > 0):
            raise ValueError(
                f"Invalid loss_budget={self.loss_budget!r} (--sam-loss-budget). Must be a finite number > 0, in nats a "
                "sample; leave it out for none."
            )

    @property
    def radius(self) -> float:
        """rho, given or by default."""
        return DEFAULT_RHO[self.perturbation] if self.rho is None else self.rho

    @property
    def rho_varies(self) -> bool:
        """Whether the radius is not the same in all updates."""
        return self.warmup_updates > 0 or self.rho_schedule != "constant"

    def chooses(self, name: str) -> bool:
        """Whether the parameter of this name is to be perturbed."""
        return self.parameters is None or re.search(self.parameters, name) is not None

    @property
    def compares_logits(self) -> bool:
        """Whether the forward pass must give logits. At a radius of zero instance mode probes as batch mode does."""
        return WEIGHTINGS[self.weighting].by_logits and (self.perturbation == "batch" or self.radius == 0)


def _integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
