"""The engine as a perturbation of one (micro-)batch, behind the same loss as the shared perturbation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from deltasam_plugin.checks import Checks
from deltasam_plugin.errors import Refused
from deltasam_plugin.instance.compilation import uncompiled
from deltasam_plugin.instance.engine import InstanceEngine
from deltasam_plugin.loss import Ascend, Backward, Objective, Statistics, check_losses, plain_backward
from deltasam_plugin.precision import observed_dtypes
from deltasam_plugin.replay import Conditions, unchanged_versions


class InstancePerturbation:
    r""":math:`\epsilon_i = \rho\, g_i / \|g_i\|` for every sample of one (micro-)batch.

    Args:
        engine: of the model, kept from batch to batch.
        checks: of the run; by default none are made.
        rho: radius, by default the engine's.
        loss_scaler: whether dynamic loss scaling skips updates that overflow.
    """

    def __init__(
        self,
        engine: InstanceEngine,
        checks: Checks | None = None,
        rho: float | None = None,
        loss_scaler: bool = False,
    ) -> None:
        self._engine = engine
        self._loss_scaler = loss_scaler
        self._rho = engine.rho if rho is None else rho
        self._checks = checks

    def first_pass(self, forward: Callable[[], Objective], conditions: Conditions) -> tuple[Tensor, Ascend]:
        """Record the forward pass. See :class:`deltasam_plugin.loss.Perturbation`.

        Raises:
            ValueError: the per-sample losses are not of shape (B,).
            Refused: a part of the loss belongs to no sample.
        """
        with observed_dtypes(self._engine.parameters) as dtypes, self._engine.recording() as tape:
            objective = forward()
        check_losses(objective.losses)
        if self._checks is not None:
            with unchanged_versions(self._engine.parameters), uncompiled():
                self._checks.replay(objective, forward, conditions, dtypes)
        if objective.shared is not None:
            raise Refused(
                "Instance mode with a loss of which a part belongs to the batch and to no sample: no sample can be "
                "perturbed for it. Choose --sam-perturbation batch."
            )
        tape.rows, losses = objective.rows, objective.losses

        def replay() -> Tensor:
            with conditions.replayed():
                return forward().losses

        @contextmanager
        def ascend(scale: Tensor, statistics: Statistics) -> Iterator[Backward]:
            nonlocal tape, losses
            with torch.enable_grad():
                solution = self._engine.solve(tape, losses, scale, self._rho)
                at_w = losses.detach()
                del tape, losses  # frees what is left of the first graph
                solution.refuse_mixed_values(at_w, replay)
            norms, lengths = solution.perturbation.norms, solution.perturbation.lengths
            moved = lengths > 0 if self._rho > 0 else norms > 0  # skipped is what has no direction
            constant = self._engine.loss_budget is None and not self._engine.adaptive
            norms_at_w = torch.where(moved, norms / (scale.abs() * solution.sizes), 0)
            statistics.fill(
                ess=norms.new_ones(()),
                weight_max=norms.new_ones(()),
                ascent_gnorm=norms_at_w.mean(),
                ascent_gnorm_std=norms_at_w.std(correction=0),
                eps_norm=self._rho * moved.any() if constant else lengths.sum() / moved.sum().clamp(min=1),
                skipped=~moved.any(),
            )
            overflowed = ~torch.isfinite(norms).all()
            with solution.perturbed():
                if self._loss_scaler and torch.float16 in dtypes:
                    scale = torch.where(overflowed, torch.inf, scale)
                yield partial(plain_backward, scale)

        return objective.loss.detach(), ascend
