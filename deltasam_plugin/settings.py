"""What a user can set, checked once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from deltasam_plugin.batch.descent import DESCENTS
from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.clashes import CLASHES

PERTURBATIONS = ("batch", "instance")
ASCENTS = ("gradient", "noise", "momentum")
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
        ascent: along the ``gradient``; along its ``noise``, the part orthogonal to the base optimizer's momentum; or
            against the ``momentum`` itself, which needs no pass of its own and uses neither weighting nor probes and
            sync. See :mod:`deltasam_plugin.batch.momentum`.
        descent: what the base optimizer gets: the ``perturbed`` gradient; its ``weighted`` sum with the gradient at
            w; or without what widens the ``surrogate_gap``. The latter two need the gradient at w, and with
            it uniform weights. See :mod:`deltasam_plugin.batch.descent`.
        descent_weight: >= 0, for the latter two; by default 9 and 0.4.
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
    ascent: str = "gradient"
    descent: str = "perturbed"
    descent_weight: float | None = None
    interval: int = 1
    warmup_updates: int = 0
    rho_schedule: str = "constant"

    def __post_init__(self) -> None:
        self._check_names()
        # Equal settings are equal, whether given or not.
        if self.rho is None:
            object.__setattr__(self, "rho", self.radius)
        if self.descent_weight is None:
            object.__setattr__(self, "descent_weight", DESCENTS[self.descent].weight)
        self._check_values()
        self._check_combinations()

    def _check_names(self) -> None:
        choices = {"perturbation": PERTURBATIONS, "ascent": ASCENTS, "descent": DESCENTS, "rho_schedule": SCHEDULES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in tuple(allowed):
                raise ValueError(f"Unknown {name}={value!r} ({_flag(name)}). Choose one of: {', '.join(allowed)}.")
        if self.weighting not in tuple(WEIGHTINGS):
            raise ValueError(
                f"Unknown weighting={self.weighting!r} (--sam-weighting). Choose one of: {', '.join(WEIGHTINGS)}; "
                "or register one of your own, with @deltasam_plugin.weighting."
            )

    def _check_values(self) -> None:
        if not (_finite(self.rho) and self.radius >= 0):
            raise ValueError(
                f"Invalid rho={self.rho!r} (--sam-rho). Must be a finite number >= 0; "
                f"{DEFAULT_RHO[self.perturbation]} is the usual start."
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
        for name, least in {"group": 1, "interval": 1, "warmup_updates": 0}.items():
            if not _integer(value := getattr(self, name), least):
                raise ValueError(f"Invalid {name}={value!r} ({_flag(name)}). Must be an integer >= {least}.")
        for name in ("sync", "adaptive"):
            if not isinstance(value := getattr(self, name), bool | np.bool_):
                raise ValueError(f"Invalid {name}={value!r} ({_flag(name)}). Must be True or False.")
        if self.parameters is not None:
            try:
                re.compile(self.parameters)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"Invalid parameters={self.parameters!r} (--sam-parameters). Must be a regular expression that "
                    f"Python understands: {error}."
                ) from error
        if self.loss_budget is not None and not (_finite(self.loss_budget) and self.loss_budget > 0):
            raise ValueError(
                f"Invalid loss_budget={self.loss_budget!r} (--sam-loss-budget). Must be a finite number > 0, in nats a "
                "sample; leave it out for none."
            )
        if self.descent_weight is not None and not (_finite(self.descent_weight) and self.descent_weight >= 0):
            raise ValueError(
                f"Invalid descent_weight={self.descent_weight!r} (--sam-descent-weight). Must be a finite number >= 0; "
                "leave it out for the default."
            )

    def _check_combinations(self) -> None:
        for clash in CLASHES:
            if clash.found(self):
                values = [f"{name}={getattr(self, name)!r}" for name in (clash.name, clash.other)]
                raise ValueError(
                    f"Invalid {values[0]} ({_flag(clash.name)}) with {values[1]}: {clash.reason} {clash.remedy}, "
                    "or leave it out."
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
    def perturbs_samples(self) -> bool:
        """Whether every sample is perturbed by itself. At a radius of zero instance mode works as batch mode does."""
        return self.perturbation == "instance" and self.radius > 0

    @property
    def weighs(self) -> bool:
        """Whether samples are weighted."""
        return self.ascent != "momentum" and not self.perturbs_samples

    @property
    def compares_logits(self) -> bool:
        """Whether the forward pass must give logits."""
        return self.weighs and WEIGHTINGS[self.weighting].by_logits


def _flag(name: str) -> str:
    return "--sam-" + name.replace("_", "-")


def _integer(value: object, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least


def _finite(value: object) -> bool:
    is_number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
