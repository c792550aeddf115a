r"""One perturbation for the whole batch: SAM, and δ-SAM's reweighted ascent.

Order within one (micro-)batch: ascent forward; probes of what its graph reaches; then, in backward, weights, ascent
gradient, perturbation, second pass, restoration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from deltasam_plugin.batch.descent import DESCENTS, backward_along
from deltasam_plugin.batch.displacement import ascended
from deltasam_plugin.batch.measures import Measure
from deltasam_plugin.batch.momentum import MomentumOf, gradient_noise
from deltasam_plugin.batch.probing import probe
from deltasam_plugin.batch.restoration import PerturbedParameter, originals_of_rewritten, rewound
from deltasam_plugin.batch.weighting import (
    WEIGHTINGS,
    Weighting,
    effective_sample_size,
    root_mean_square,
    sample_weights,
    uniform_weights,
)
from deltasam_plugin.batch.workers import NO_SYNC, Workers
from deltasam_plugin.checks import Checks
from deltasam_plugin.graphs import leaves_of, visible_leaves
from deltasam_plugin.loss import Ascend, Backward, Objective, Statistics, check_losses, plain_backward
from deltasam_plugin.precision import Rounding, at_least_float32, observed_dtypes
from deltasam_plugin.replay import Conditions, unchanged_versions
from deltasam_plugin.settings import Settings


class BatchPerturbation:
    r""":math:`\epsilon = \rho \sum_i v_i g_i / \|\sum_i v_i g_i\|` for one (micro-)batch.

    A shared part s of the loss is ascended with the mean weight, :math:`\sum_i v_i \ell_i + s/B`, so that uniform
    weights ascend the whole loss.

    Args:
        parameters: what is perturbed.
        leaves: every parameter that the ascent's backward pass may reach; their ``.grad`` is kept free of it. None if
            the caller does not know them: then `parameters`, `held`, and what the graph shows. It does not show what
            lies behind activation checkpointing.
        settings: validated settings.
        step: the caller's count of steps. Makes probes differ from step to step if nothing draws random numbers.
        workers: those that share one perturbation; by default this one alone.
        checks: of the run; by default none are made.
        held: further parameters of the optimizer.
        rho: radius, by default that of the settings.
        momentum: the base optimizer's momentum of a parameter; None where there is none yet.
        loss_scaler: whether dynamic loss scaling skips updates that overflow.
    """

    def __init__(
        self,
        parameters: Sequence[PerturbedParameter],
        leaves: Sequence[Tensor] | None,
        settings: Settings,
        step: int = 0,
        workers: Workers = NO_SYNC,
        checks: Checks | None = None,
        held: Sequence[Tensor] = (),
        rho: float | None = None,
        momentum: MomentumOf = lambda parameter: None,
        loss_scaler: bool = False,
    ) -> None:
        self._momentum = momentum
        self._loss_scaler = loss_scaler
        self._rho = settings.radius if rho is None else rho
        self._parameters = parameters
        self._held = held
        self._leaves = leaves
        self._settings = settings
        self._step = step
        self._workers = workers
        self._checks = checks
        self._weighting = WEIGHTINGS[settings.weighting]

    def first_pass(self, forward: Callable[[], Objective], conditions: Conditions) -> tuple[Tensor, Ascend]:
        """Run the ascent forward, then the probes. See :class:`deltasam_plugin.loss.Perturbation`."""
        rewritten = originals_of_rewritten(self._parameters)
        with observed_dtypes(p.parameter for p in self._parameters) as dtypes:
            objective = forward()
        check_losses(objective.losses)
        tensors = [p.parameter for p in self._parameters]
        if self._checks is not None:
            with unchanged_versions(tensors), rewound(self._parameters, rewritten):
                self._checks.replay(objective, forward, conditions, dtypes)
        rounding = Rounding.of(dtypes, tensors)
        probed: tuple[Tensor, Tensor] | None = None
        failed = torch.zeros((), device=objective.losses.device)
        if self._weighting.measure is not None:
            check_logits(objective, self._weighting)
            with unchanged_versions(tensors):
                probed = self._probe(self._weighting.measure, objective, forward, conditions, rewritten, rounding)
            failed = (~probed[0].isfinite() & objective.losses.isfinite()).any(dim=1).sum()
            if self._checks is not None:
                self._checks.probes(failed)
        objective = objective._replace(logits=None)  # frees them

        @contextmanager
        def ascend(scale: Tensor, statistics: Statistics) -> Iterator[Backward]:
            nonlocal objective
            own_weights, all_weights, lost = self._sample_weights(objective.losses, probed, scale)
            uniform = 1 / all_weights.numel()
            if self._checks is not None and probed is not None and all_weights.numel() > 1:
                self._checks.lost((lost >= 1) & (scale != 0))
            at_w = self._gradients_at_w(objective, own_weights / uniform, scale)
            unit = at_least_float32(scale).abs() * objective.factor / uniform  # of these gradients
            del objective  # frees what is left of the first graph
            gradients, second_backward = self._direction(at_w), self._second_backward(at_w)
            del at_w  # frees what is not needed twice
            budget = self._settings.loss_budget
            rise = None if budget is None else budget * unit
            adaptive = self._settings.adaptive
            with ascended(self._parameters, gradients, self._rho, rewritten, rise, adaptive) as found:
                ascent = found.to(scale.device)
                norm = ascent.gradient_norm / unit
                statistics.fill(
                    ess=effective_sample_size(all_weights),
                    weight_max=all_weights.amax() / uniform,
                    ascent_gnorm=torch.where((ascent.skipped > 0) | (scale == 0), 0, norm),
                    eps_norm=ascent.moved,
                    skipped=ascent.skipped,
                    probes_failed=failed,
                    probes_lost=lost,
                )
                if self._loss_scaler and rounding.dtype == torch.float16:
                    scale = torch.where(ascent.overflowed, torch.inf, scale)
                yield partial(second_backward, scale)

        return objective.loss.detach(), ascend

    def _probe(
        self,
        measure: Measure,
        objective: Objective,
        forward: Callable[[], Objective],
        conditions: Conditions,
        rewritten: Sequence[Tensor | None],
        rounding: Rounding,
    ) -> tuple[Tensor, Tensor]:
        """What each probe measures, and the size below which it is rounding noise, (K, B) each."""

        def replayed() -> Objective:
            with conditions.replayed():
                return forward()

        settings = self._settings
        seed = self._workers.broadcast_seed(conditions.random.seed() + self._step * settings.probes)
        leaves, complete = visible_leaves(objective.losses, objective.shared)
        visible = set(map(id, leaves))
        reached = self._workers.any_of([not complete or id(p.parameter) in visible for p in self._parameters])
        return probe(
            replayed,
            objective,
            self._parameters,
            measure,
            settings.probes,
            settings.probe_scale,
            seed,
            reached=reached,
            rewritten=rewritten,
            rounding=rounding,
        )

    def _sample_weights(
        self, losses: Tensor, probed: tuple[Tensor, Tensor] | None, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v of this worker's samples and of all that share the perturbation; the share in which probes saw nothing."""
        if probed is None:
            all_weights = uniform_weights(max(1, self._workers.total(losses.numel(), scale)), losses.device)
            return all_weights[:1].expand(losses.shape), all_weights, torch.zeros((), device=losses.device)
        measured, floor, own = self._workers.all_gather(*probed, scale)
        all_weights = sample_weights(self._weighting, measured, floor)
        return all_weights[own], all_weights, (root_mean_square(measured) <= floor.amax()).double().mean()

    def _gradients_at_w(self, objective: Objective, relative: Tensor, scale: Tensor) -> dict[Tensor, Tensor | None]:
        """The gradient of the reweighted loss, by leaf, with weights relative to uniform ones.

        Uniform weights are exactly 1 there, and give SAM bit for bit. If workers add up their gradients, each counts
        by its number of samples. The gradient carries the loss scale and the loss's factor: in half precision it
        overflows and underflows where the loss's own does.
        """
        with torch.enable_grad():
            losses = at_least_float32(objective.losses)
            ascended_loss = (relative.to(losses.dtype) * losses).sum()
            if objective.shared is not None:
                ascended_loss = ascended_loss + relative.mean().to(losses.dtype) * objective.shared
        leaves = self._leaves
        if leaves is None:
            leaves = [*(p.parameter for p in self._parameters), *self._held, *leaves_of(ascended_loss)]
        with stashed_gradients(leaves):
            ascended_loss.backward((scale * objective.factor).to(ascended_loss.dtype))
            return {leaf: leaf.grad for leaf in leaves}

    def _direction(self, at_w: Mapping[Tensor, Tensor | None]) -> list[Tensor | None]:
        """Along which the parameters ascend; common to all workers that share a perturbation."""
        gradients = self._workers.all_reduce([at_w.get(p.parameter) for p in self._parameters], self._parameters)
        if self._settings.ascent == "noise":
            return gradient_noise(gradients, [self._momentum(p) for p in self._parameters])
        return gradients

    def _second_backward(self, at_w: Mapping[Tensor, Tensor | None]) -> Callable[[Tensor, Tensor], None]:
        """The backward pass at the perturbed weights, from a scale and a loss."""
        descent, weight = DESCENTS[self._settings.descent], self._settings.descent_weight
        if weight is None or self._rho == 0:  # both gradients are equal, up to the order of sums
            return plain_backward
        return partial(backward_along, descent.function, weight, at_w)


def check_logits(objective: Objective, weighting: Weighting) -> None:
    """Refuse a weighting by logits where there are none.

    Raises:
        ValueError: the weighting needs logits, and the forward pass gives none.
    """
    if weighting.by_logits and objective.logits is None:
        others = ", ".join(name for name, other in WEIGHTINGS.items() if not other.by_logits)
        raise ValueError(
            f"Invalid weighting={weighting.name!r} (--sam-weighting): it compares logits, and the forward pass gives "
            f"only losses. Return (losses, logits) from the closure of DeltaSAM, or choose one of: {others}."
        )


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
