r"""A loss whose gradient is the sharpness-aware one.

The value is :math:`L(w)`, the gradient :math:`\nabla L(w + \epsilon)`. Whatever surrounds the loss - loss scaling,
gradient accumulation, ``no_sync``, a dummy batch multiplied by zero - acts on it as on any other loss, because both
passes hide behind one :class:`torch.autograd.Function`.

Order within one (micro-)batch: probes, while no graph is alive; ascent forward; weights; then in backward: ascent
gradient, perturbation, second forward and backward at the perturbed weights, restoration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.perturbation import Weight, ascended
from deltasam_plugin.probing import probe_losses
from deltasam_plugin.replay import Conditions
from deltasam_plugin.settings import Settings
from deltasam_plugin.weighting import (
    curvature_weights,
    effective_sample_size,
    rounding_floor,
    second_difference,
    uniform_weights,
)


@dataclass(frozen=True)
class Statistics:
    """What one (micro-)batch went through; scalars on its device, zero until its backward pass fills them.

    Attributes:
        sharpness: L(w+ε) − L(w), in the unit of the loss (a sum over the batch, natural logarithm).
        ess: effective sample size of the weights as a share of the batch.
        weight_max: B · max v.
        ascent_gnorm: ‖Σ vᵢgᵢ‖.
        eps_norm: L2 norm by which the weights really moved.
        skipped: 1 if the ascent was skipped, else 0.
    """

    sharpness: Tensor
    ess: Tensor
    weight_max: Tensor
    ascent_gnorm: Tensor
    eps_norm: Tensor
    skipped: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> Statistics:
        """Statistics to be filled later."""
        return cls(*(torch.zeros((), device=device) for _ in fields(cls)))

    def fill(self, **values: Tensor) -> None:
        """Set the named statistics in place, so that whoever holds the tensors already sees them."""
        for name, value in values.items():
            getattr(self, name).copy_(value.detach())


@dataclass
class Pass:
    """One micro-batch on its way from the ascent forward to the restoration.

    Attributes:
        loss: the objective at w, scalar.
        losses: per-sample losses with graph, shape (B,).
        sample_weights: v, shape (B,).
        second: runs the objective once more with gradient, returns a scalar.
        conditions: of the ascent forward.
        weights: all that may move.
        leaves: every parameter that a backward pass may reach.
        rho: radius.
        statistics: filled on the way.
    """

    loss: Tensor
    losses: Tensor
    sample_weights: Tensor
    second: Callable[[], Tensor]
    conditions: Conditions
    weights: Sequence[Weight]
    leaves: Sequence[Tensor]
    rho: float
    statistics: Statistics

    def backward(self, grad_output: Tensor) -> None:
        """Ascend, run the second pass, add its gradient to ``.grad``, put the weights back."""
        # Relative to the largest weight: exactly 1 each where they are uniform, so that uniform is SAM to the bit.
        largest = self.sample_weights.amax()
        relative = self.sample_weights / largest
        with torch.enable_grad(), gradients_aside(self.leaves):
            # grad_output carries the loss scale, without which a half-precision gradient would underflow.
            objective = (relative.to(self.losses.dtype) * self.losses).sum()
            objective.backward(grad_output.to(self.losses.dtype))
            gradients = [weight.parameter.grad for weight in self.weights]
        del objective
        self.losses = self.losses.detach()  # frees what the first graph still holds
        with ascended(self.weights, gradients, self.rho) as ascent, torch.enable_grad(), self.conditions.replayed():
            loss = self.second()
            loss.backward(grad_output.to(loss.dtype))
        self.statistics.fill(
            sharpness=loss.detach() - self.loss,
            ascent_gnorm=torch.where(ascent.skipped > 0, 0, ascent.gradient_norm * largest / grad_output.abs()),
            eps_norm=ascent.moved,
            skipped=ascent.skipped,
        )


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


class _SharpnessAware(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, current: Pass) -> Tensor:
        ctx.current = current
        return current.loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None]:  # type: ignore[override]
        current, ctx.current = ctx.current, None
        if current is None:
            raise RuntimeError(
                "backward() through a sharpness-aware loss a second time. It runs two passes and frees their graphs; "
                "compute the loss again instead of passing retain_graph=True."
            )
        current.backward(grad_output)
        return None, None


def sharpness_aware_loss(
    first: Callable[[], tuple[Tensor, Tensor]],
    second: Callable[[], Tensor],
    weights: Sequence[Weight],
    leaves: Sequence[Tensor],
    settings: Settings,
    step: int = 0,
) -> tuple[Tensor, Statistics]:
    r"""The loss at w, whose gradient is :math:`\nabla L(w + \epsilon)`,
    :math:`\epsilon = \rho \sum_i v_i g_i / \|\sum_i v_i g_i\|`.

    Args:
        first: forward pass; returns the objective (scalar, its value is returned) and the per-sample losses (B,) whose
            weighted sum is ascended. Run 1 + 2K times (probes).
        second: forward pass; returns the objective (scalar) whose gradient at w + ε is taken. Run in backward.
        weights: what is perturbed.
        leaves: every parameter that the backward passes may reach; their ``.grad`` is kept free of the ascent.
        settings: validated settings.
        step: of the caller's own counting; makes the probes of steps differ where nothing else draws random numbers.

    Returns:
        The loss, to be used as any loss, once; and the statistics, which its backward pass completes.

    Raises:
        ValueError: the per-sample losses are not of shape (B,), B >= 1.
        RuntimeError: from backward, when it is run a second time. Whatever an inner pass raises comes through, with
            the weights as they were.
    """
    devices = {weight.parameter.device for weight in weights}
    conditions = Conditions.capture(devices)
    plus = minus = None
    if settings.weighting == "curvature":

        def probe() -> Tensor:
            with conditions.replayed():
                return first()[1]

        seed = conditions.random.seed() + step * settings.probes
        plus, minus = probe_losses(probe, weights, settings.probes, settings.probe_scale, seed)
    loss, losses = first()
    if losses.dim() != 1 or losses.numel() == 0:
        raise ValueError(
            f"Invalid per-sample losses of shape {tuple(losses.shape)}. Must be (B,) with B >= 1: one loss for each "
            "sample of the batch, e.g. from a loss function with reduction='none', summed over the sample's tokens."
        )
    statistics = Statistics.zeros(losses.device)
    if plus is None or minus is None:
        sample_weights = uniform_weights(losses)
    else:
        eps = torch.finfo(computing_dtype(weights)).eps
        sample_weights = curvature_weights(
            second_difference(plus, minus, losses), rounding_floor(plus, minus, losses, eps)
        )
    statistics.fill(ess=effective_sample_size(sample_weights), weight_max=losses.numel() * sample_weights.amax())
    current = Pass(loss.detach(), losses, sample_weights, second, conditions, weights, leaves, settings.rho, statistics)
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    return _SharpnessAware.apply(anchor, current), statistics


def computing_dtype(weights: Sequence[Weight]) -> torch.dtype:
    """The coarsest precision that a forward pass computes in: the autocast type where it is on, else the weights'."""
    kinds = {weight.parameter.device.type for weight in weights}
    dtypes = {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    dtypes |= {weight.parameter.dtype for weight in weights}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
