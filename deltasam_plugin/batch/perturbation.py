r"""One perturbation for the whole batch: SAM, and δ-SAM's reweighted ascent.

Order within one (micro-)batch: probes, while no graph is alive; ascent forward; then, in backward, weights, ascent
gradient, perturbation, second pass, restoration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import PerturbedParameter, ascended, originals_of_rewritten
from deltasam_plugin.batch.probing import probe_losses
from deltasam_plugin.batch.weighting import (
    curvature_weights,
    effective_sample_size,
    rounding_floor,
    second_difference,
    uniform_weights,
)
from deltasam_plugin.batch.workers import NO_SYNC, Workers
from deltasam_plugin.loss import Ascend, Objective, Statistics, check_losses, leaves_of
from deltasam_plugin.precision import coarsest, observed_dtypes
from deltasam_plugin.replay import Conditions
from deltasam_plugin.settings import Settings


class BatchPerturbation:
    r""":math:`\epsilon = \rho \sum_i v_i g_i / \|\sum_i v_i g_i\|` for one (micro-)batch.

    A shared part s of the loss is ascended with the mean weight, :math:`\sum_i v_i \ell_i + s/B`, so that uniform
    weights ascend the whole loss.

    Args:
        parameters: what is perturbed.
        leaves: every parameter that the ascent's backward pass may reach; their ``.grad`` is kept free of it. None if
            the caller does not know them: then `parameters`, and what the graph shows. It does not show what lies
            behind activation checkpointing.
        settings: validated settings.
        step: the caller's count of steps. Makes probes differ from step to step if nothing draws random numbers.
        workers: those that share one perturbation; by default this one alone.
    """

    def __init__(
        self,
        parameters: Sequence[PerturbedParameter],
        leaves: Sequence[Tensor] | None,
        settings: Settings,
        step: int = 0,
        workers: Workers = NO_SYNC,
    ) -> None:
        self._parameters = parameters
        self._leaves = leaves
        self._settings = settings
        self._step = step
        self._workers = workers

    def first_pass(self, forward: Callable[[], Objective], conditions: Conditions) -> tuple[Tensor, Ascend]:
        """Probe, then run the ascent forward. See :class:`deltasam_plugin.loss.Perturbation`."""
        rewritten = originals_of_rewritten(self._parameters)
        losses_around = self._probe(forward, conditions) if self._settings.weighting == "curvature" else None
        with observed_dtypes(p.parameter for p in self._parameters) as dtypes:
            objective = forward()
        check_losses(objective.losses)
        dtype = coarsest(dtypes)
        curvature: tuple[Tensor, Tensor] | None = None
        if losses_around is not None:
            around = *losses_around, objective.losses
            curvature = second_difference(*around), rounding_floor(*around, torch.finfo(dtype).eps)

        @contextmanager
        def ascend(scale: Tensor, statistics: Statistics) -> Iterator[Tensor]:
            nonlocal objective
            sample_weights, all_weights = self._sample_weights(objective.losses, curvature, scale)
            largest = all_weights.amax()
            gradients = self._ascent_gradients(objective, sample_weights / largest, scale)
            del objective  # frees what is left of the first graph
            with ascended(self._parameters, gradients, self._settings.rho, rewritten) as ascent:
                norm = ascent.gradient_norm * largest / scale.abs()
                statistics.fill(
                    ess=effective_sample_size(all_weights),
                    weight_max=all_weights.numel() * largest,
                    ascent_gnorm=torch.where((ascent.skipped > 0) | (scale == 0), 0, norm),
                    eps_norm=ascent.moved,
                    skipped=ascent.skipped,
                )
                yield torch.where(ascent.overflowed, torch.inf, scale) if dtype == torch.float16 else scale

        return objective.loss.detach(), ascend

    def _probe(self, forward: Callable[[], Objective], conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Losses at both ends of each probe, (K, B) each."""

        def losses() -> Tensor:
            with conditions.replayed():
                return forward().losses

        settings = self._settings
        seed = self._workers.broadcast_seed(conditions.random.seed() + self._step * settings.probes)
        return probe_losses(losses, self._parameters, settings.probes, settings.probe_scale, seed)

    def _sample_weights(
        self, losses: Tensor, curvature: tuple[Tensor, Tensor] | None, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """v of this worker's samples, and of all samples that share the perturbation."""
        if curvature is None:
            all_weights = uniform_weights(max(1, self._workers.total(losses.numel(), scale)), losses.device)
            return all_weights[:1].expand(losses.shape), all_weights
        differences, floor, own = self._workers.all_gather(*curvature, scale)
        all_weights = curvature_weights(differences, floor)
        return all_weights[own], all_weights

    def _ascent_gradients(self, objective: Objective, relative: Tensor, scale: Tensor) -> list[Tensor | None]:
        """The gradient of the reweighted loss, with weights relative to the largest.

        Uniform weights are exactly 1 there, and give SAM bit for bit. The gradient carries the loss scale; without it,
        half precision would underflow.
        """
        losses = objective.losses
        with torch.enable_grad():
            ascended_loss = (relative.to(losses.dtype) * losses).sum()
            if objective.shared is not None:
                ascended_loss = ascended_loss + relative.mean().to(losses.dtype) * objective.shared
        leaves = self._leaves
        if leaves is None:
            leaves = [*(p.parameter for p in self._parameters), *leaves_of(ascended_loss)]
        with stashed_gradients(leaves):
            ascended_loss.backward(scale.to(ascended_loss.dtype))
            gradients = [p.parameter.grad for p in self._parameters]
        return self._workers.all_reduce(gradients, self._parameters)


@contextmanager
def stashed_gradients(leaves: Sequence[Tensor]) -> Iterator[None]:
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
