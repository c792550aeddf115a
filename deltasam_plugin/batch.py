r"""One perturbation for the whole batch: SAM, and δ-SAM's reweighted ascent.

Order within one (micro-)batch: probes, while no graph is alive; ascent forward; then in backward: weights, ascent
gradient, perturbation; the second pass; restoration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deltasam_plugin.gradient import Objective, Statistics, checked, leaves_of
from deltasam_plugin.perturbation import Weight, ascended, origins
from deltasam_plugin.probing import probe_losses
from deltasam_plugin.replay import Conditions, observed_autocast
from deltasam_plugin.settings import Settings
from deltasam_plugin.weighting import (
    curvature_weights,
    effective_sample_size,
    rounding_floor,
    second_difference,
    uniform_weights,
)
from deltasam_plugin.workers import ALONE, Workers


class BatchPerturbation:
    r""":math:`\epsilon = \rho \sum_i v_i g_i / \|\sum_i v_i g_i\|` for one (micro-)batch.

    A shared part s of the loss is ascended with the mean weight, :math:`\sum_i v_i \ell_i + s/B`, so that uniform
    weights ascend the whole loss.

    Args:
        weights: what is perturbed.
        leaves: every parameter that the ascent's backward pass may reach; their ``.grad`` is kept free of it.
            None where the caller does not know them: `weights` and what the graph shows, all but what lies behind
            activation checkpointing.
        settings: validated settings.
        step: of the caller's own counting; makes the probes of steps differ where nothing else draws random numbers.
        workers: those that share one perturbation; alone by default.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        leaves: Sequence[Tensor] | None,
        settings: Settings,
        step: int = 0,
        workers: Workers = ALONE,
    ) -> None:
        self._weights = weights
        self._leaves = leaves
        self._settings = settings
        self._step = step
        self._workers = workers
        self._starts: list[Tensor | None] = []
        self._dtype = torch.float32
        self._objective: Objective | None = None
        self._differences: Tensor | None = None
        self._floor: Tensor | None = None

    def first_pass(self, forward: Callable[[], Objective], conditions: Conditions) -> Tensor:
        """Probe, then run the ascent forward. See :class:`deltasam_plugin.gradient.Perturbation`."""
        self._starts = origins(self._weights)
        plus = minus = None
        if self._settings.weighting == "curvature":

            def probe() -> Tensor:
                with conditions.replayed():
                    return forward().losses

            settings = self._settings
            seed = self._workers.same(conditions.random.seed() + self._step * settings.probes)
            plus, minus = probe_losses(probe, self._weights, settings.probes, settings.probe_scale, seed)
        with observed_autocast({weight.parameter.device.type for weight in self._weights}) as autocast:
            self._objective = checked(forward())
        self._dtype = coarsest(autocast | {weight.parameter.dtype for weight in self._weights})
        if plus is not None and minus is not None:
            center = self._objective.losses
            self._differences = second_difference(plus, minus, center)
            self._floor = rounding_floor(plus, minus, center, torch.finfo(self._dtype).eps)
        return self._objective.loss.detach()

    @contextmanager
    def perturbed(self, scale: Tensor, statistics: Statistics) -> Iterator[Tensor]:
        """Ascend and be there. See :class:`deltasam_plugin.gradient.Perturbation`."""
        objective, self._objective = self._objective, None
        assert objective is not None
        sample_weights, everybodys = self._sample_weights(objective.losses, scale)
        largest = everybodys.amax()
        gradients = self._ascent_gradients(objective, sample_weights / largest, scale)
        del objective  # frees what is left of the first graph
        with ascended(self._weights, gradients, self._settings.rho, self._starts) as ascent:
            norm = ascent.gradient_norm * largest / scale.abs()
            statistics.fill(
                ess=effective_sample_size(everybodys),
                weight_max=everybodys.numel() * largest,
                ascent_gnorm=torch.where((ascent.skipped > 0) | (scale == 0), 0, norm),
                eps_norm=ascent.moved,
                skipped=ascent.skipped,
            )
            yield torch.where(ascent.overflowed, torch.inf, scale) if self._dtype == torch.float16 else scale

    def _sample_weights(self, losses: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """v of this worker's samples, and of all samples that share the perturbation."""
        if self._differences is None or self._floor is None:
            everybodys = uniform_weights(max(1, self._workers.total(losses.numel(), scale)), losses.device)
            return everybodys[:1].expand(losses.shape), everybodys
        differences, floor, own = self._workers.gathered(self._differences, self._floor, scale)
        everybodys = curvature_weights(differences, floor)
        return everybodys[own], everybodys

    def _ascent_gradients(self, objective: Objective, relative: Tensor, scale: Tensor) -> list[Tensor | None]:
        r"""The gradient of the reweighted loss, relative to the largest weight: exactly 1 each where weights are
        uniform, so that uniform weights are SAM to the bit. It carries the loss scale, without which a
        half-precision gradient would underflow.
        """
        losses = objective.losses
        with torch.enable_grad():
            ascended_loss = (relative.to(losses.dtype) * losses).sum()
            if objective.shared is not None:
                ascended_loss = ascended_loss + relative.mean().to(losses.dtype) * objective.shared
        leaves = self._leaves
        if leaves is None:
            leaves = [*(weight.parameter for weight in self._weights), *leaves_of(ascended_loss)]
        with gradients_aside(leaves):
            ascended_loss.backward(scale.to(ascended_loss.dtype))
            gradients = [weight.parameter.grad for weight in self._weights]
        return self._workers.summed(gradients, self._weights)


@contextmanager
def gradients_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Within this context ``.grad`` is empty; afterwards it is what it was.

    A plain ``backward()`` under this context, and not :func:`torch.autograd.grad`, because activation checkpointing
    refuses the latter.
    """
    kept = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient


def coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The type with the widest spacing of numbers."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
