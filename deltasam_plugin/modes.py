"""The choice that ``--sam-perturbation`` makes: one perturbation for the batch, or one for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from deltasam_plugin.batch.momentum import MomentumDisplacement, MomentumOf
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.workers import NO_SYNC, Workers
from deltasam_plugin.checks import Checks
from deltasam_plugin.errors import Refused, listing
from deltasam_plugin.instance import InstanceEngine, InstancePerturbation
from deltasam_plugin.loss import Objective, Perturbation, Statistics, displaced_loss, sharpness_aware_loss
from deltasam_plugin.settings import Settings


def chosen_parameters(
    parameters: Mapping[str, PerturbedParameter], settings: Settings
) -> dict[str, PerturbedParameter]:
    """Those that ``--sam-parameters`` chooses.

    Args:
        parameters: all that are trained, by name.
        settings: validated settings.

    Raises:
        ValueError: it chooses none, or not all of those that forward passes rewrite.
        Refused: a chosen one is complex.
    """
    chosen = {name: parameter for name, parameter in parameters.items() if settings.chooses(name)}
    rule = f"Invalid parameters={settings.parameters!r} (--sam-parameters)"
    if parameters and not chosen:
        raise ValueError(f"{rule}: found in no parameter's name. They are {listing(parameters)}.")
    if rewritten := [name for name, item in parameters.items() if item.rewritten and name not in chosen]:
        raise ValueError(
            f"{rule}: not found in {listing(rewritten)}, which quantization noise rewrites in every forward pass. "
            "Choose these parameters too, or leave quantization noise out."
        )
    for name, item in chosen.items():
        if item.parameter.is_complex():
            raise Refused(
                f"{name} is {item.parameter.dtype}. Must be real: keep it as view_as_real, or choose others by "
                "parameters= (--sam-parameters)."
            )
    return chosen


class Perturbations:
    """Makes the perturbation of each (micro-)batch, and keeps what lasts from batch to batch.

    Args:
        parameters: what is perturbed, by name.
        settings: validated settings. A radius of zero needs no perturbation for each sample.
        leaves, held: see :class:`~deltasam_plugin.batch.perturbation.BatchPerturbation`.
        workers: those that share one perturbation; by default this one alone.
        checks: those of the run, if it goes on with other parameters; by default a run begins.
        momentum: the base optimizer's momentum of a parameter; None where there is none yet.
        loss_scaler: whether dynamic loss scaling skips updates that overflow.
    """

    def __init__(
        self,
        parameters: Mapping[str, PerturbedParameter],
        settings: Settings,
        leaves: Sequence[Tensor] | None = None,
        held: Sequence[Tensor] = (),
        workers: Workers = NO_SYNC,
        checks: Checks | None = None,
        momentum: MomentumOf = lambda parameter: None,
        loss_scaler: bool = False,
    ) -> None:
        self._settings = settings
        self._loss_scaler = loss_scaler
        self._momentum = momentum
        self._parameters = list(parameters.values())
        self._leaves, self._held, self._workers = leaves, held, workers
        self.checks = Checks() if checks is None else checks
        self._engine: InstanceEngine | None = None
        if settings.perturbs_samples:
            named = ((name, perturbed.parameter) for name, perturbed in parameters.items())
            self._engine = InstanceEngine(
                named,  # type: ignore[arg-type]
                settings.radius,
                settings.loss_budget,
                settings.group,
                settings.adaptive,
            )

    @property
    def parameters(self) -> list[Tensor]:
        """What is perturbed."""
        return [perturbed.parameter for perturbed in self._parameters]

    @property
    def devices(self) -> set[torch.device]:
        """Where the parameters are."""
        return {perturbed.parameter.device for perturbed in self._parameters}

    @property
    def uncovered(self) -> list[Tensor]:
        """The parameters that instance mode leaves unperturbed, as far as is known."""
        return [] if self._engine is None else self._engine.uncovered

    def fit(self, held: Sequence[Tensor], settings: Settings) -> bool:
        """Whether these were made for the parameters `held`, and for `settings`."""
        return settings == self._settings and [*map(id, held)] == [*map(id, self._held)]

    def of_batch(self, step: int = 0, rho: float | None = None) -> Perturbation:
        """The perturbation of one (micro-)batch, along a gradient.

        Args:
            step: the caller's count of steps, if it has one.
            rho: its radius, by default that of the settings.
        """
        rho = self._settings.radius if rho is None else rho
        self.checks.next_batch()
        if self._engine is not None:
            return InstancePerturbation(self._engine, self.checks, rho, self._loss_scaler)
        return BatchPerturbation(
            self._parameters,
            self._leaves,
            self._settings,
            step,
            self._workers,
            self.checks,
            self._held,
            rho,
            self._momentum,
            self._loss_scaler,
        )

    def loss(
        self,
        first: Callable[[], Objective],
        second: Callable[[], Tensor],
        step: int,
        rho: float,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[Tensor, Statistics]:
        """The loss of one (micro-)batch, and its statistics.

        Args:
            first, second, guard: see :func:`~deltasam_plugin.loss.sharpness_aware_loss`. Against the momentum there is
                only the second pass, and the loss is that at the displaced parameters.
            step, rho: as for :meth:`of_batch`.
        """
        if self._settings.ascent != "momentum":
            return sharpness_aware_loss(first, second, self.of_batch(step, rho), self.devices, guard)
        statistics = Statistics.zeros(self._parameters[0].parameter.device)
        momenta = [self._momentum(parameter) for parameter in self._parameters]
        displacement = MomentumDisplacement(self._parameters, momenta, rho, self._settings.adaptive)
        return displaced_loss(
            second, partial(displacement.forward, statistics), displacement.backward, self.devices, guard
        ), statistics
