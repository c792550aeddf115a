"""The engine as a perturbation of one (micro-)batch, behind the same loss as the shared perturbation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deltasam_plugin.gradient import Objective, Statistics, checked
from deltasam_plugin.instance.engine import InstancePerturbation
from deltasam_plugin.instance.tape import Tape
from deltasam_plugin.replay import Conditions, observed_autocast


class InstanceAscent:
    r""":math:`\epsilon_i = \rho\, g_i / \|g_i\|` for every instance of one (micro-)batch.

    Args:
        engine: of the model, kept from batch to batch.
    """

    def __init__(self, engine: InstancePerturbation) -> None:
        self._engine = engine
        self._half = False
        self._first: tuple[Tape, Tensor] | None = None

    def first_pass(self, forward: Callable[[], Objective], conditions: Conditions) -> Tensor:
        """Record the forward pass. See :class:`deltasam_plugin.gradient.Perturbation`.

        Raises:
            ValueError: the per-sample losses are not of shape (B,), or a part of the loss belongs to no sample.
        """
        dtypes = {parameter.dtype for parameter in self._engine.parameters}
        kinds = {parameter.device.type for parameter in self._engine.parameters}
        with observed_autocast(kinds) as autocast, self._engine.recording() as tape:
            objective = checked(forward())
        self._half = torch.float16 in autocast | dtypes
        if objective.shared is not None:
            raise ValueError(
                "Per-instance perturbation of a loss with a part that belongs to the batch and to no sample: it has no "
                "instance to be perturbed for. Choose --sam-perturbation batch."
            )
        tape.rows = objective.rows
        self._first = tape, objective.losses
        return objective.loss.detach()

    @contextmanager
    def perturbed(self, scale: Tensor, statistics: Statistics) -> Iterator[Tensor]:
        """Solve, and be there. See :class:`deltasam_plugin.gradient.Perturbation`."""
        assert self._first is not None
        (tape, losses), self._first = self._first, None
        with torch.enable_grad():
            correction = self._engine.solve(tape, losses, scale)
        del tape, losses
        moved = correction.steps > 0
        norms = torch.where(moved, correction.norms / scale.abs(), 0)
        statistics.fill(
            ess=torch.ones(()),
            weight_max=torch.ones(()),
            ascent_gnorm=norms.mean(),
            ascent_gnorm_std=norms.std(correction=0),
            eps_norm=self._engine.rho * moved.any(),
            skipped=~moved.any(),
        )
        overflowed = ~torch.isfinite(correction.norms).all()
        with self._engine.perturbed(correction):
            yield torch.where(overflowed, torch.inf, scale) if self._half else scale
