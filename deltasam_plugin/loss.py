r"""A loss whose gradient is the sharpness-aware one.

The value is :math:`L(w)`, the gradient :math:`\nabla L` at the perturbed weights. Both passes hide behind one
:class:`torch.autograd.Function`. Loss scaling, gradient accumulation, ``no_sync`` and a dummy batch multiplied by zero
therefore act on it as on any other loss.

A :class:`Perturbation` says where the second pass runs: at one point for the whole batch (``batch``), or at one for
each sample (``instance``).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deltasam_plugin.interrupts import closing_contexts
from deltasam_plugin.precision import at_least_float32
from deltasam_plugin.replay import Conditions, ThreadState


class Logits(NamedTuple):
    """Logits, or log-probabilities, of all predictions of a batch.

    Attributes:
        values: one prediction a row, shape (N, V).
        samples: the sample of each row, integer (N,).
        counted: which rows enter the loss, boolean (N,): no padding. None if all do.
    """

    values: Tensor
    samples: Tensor
    counted: Tensor | None = None

    @classmethod
    def by_sample(cls, values: Tensor, counted: Tensor | None = None) -> Logits:
        """Logits with the samples in the first dimension.

        Args:
            values: shape (B, …, V).
            counted: boolean (B, …), or None.
        """
        samples = torch.arange(values.size(0), device=values.device)
        samples = samples.view(-1, *[1] * (values.dim() - 2)).expand(values.shape[:-1])
        return cls(values.flatten(0, -2), samples.flatten(), None if counted is None else counted.flatten())


class Objective(NamedTuple):
    r"""Result of one forward pass: :math:`L = c\,(\sum_i \ell_i + s)`.

    Attributes:
        loss: L, scalar.
        losses: :math:`\ell_i`, the per-sample losses with graph, shape (B,).
        shared: s, scalar, if a part of the loss belongs to the batch and to no sample; else None.
        rows: if layers see a selection of all positions (masked tokens): the sample of each selected row, integer (N,),
            one tensor for each selection.
        logits: of the predictions, if a weighting needs them; else None.
        factor: c; 1/B if the loss is the mean of the losses.
    """

    loss: Tensor
    losses: Tensor
    shared: Tensor | None = None
    rows: Sequence[Tensor] = ()
    logits: Logits | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Statistics:
    """Measurements of one (micro-)batch: scalars on its device, zero until its backward pass fills them.

    Attributes:
        sharpness: L at the perturbed weights − L(w), in the unit of the loss (a sum over the batch, natural logarithm).
        ess: effective sample size of the weights as a share of the batch.
        weight_max: B · max v.
        ascent_gnorm: ‖Σ vᵢgᵢ‖; in instance mode: the mean of ‖gᵢ‖.
        ascent_gnorm_std: in instance mode: the standard deviation of ‖gᵢ‖; else 0.
        eps_norm: L2 norm by which the weights really moved; in instance mode: the mean radius.
        skipped: 1 if the ascent was skipped, else 0.
        probes_failed: number of probes that gave a non-finite measurement where the loss at w is finite.
        probes_lost: share of the samples in which the probes saw nothing but rounding.
    """

    sharpness: Tensor
    ess: Tensor
    weight_max: Tensor
    ascent_gnorm: Tensor
    ascent_gnorm_std: Tensor
    eps_norm: Tensor
    skipped: Tensor
    probes_failed: Tensor
    probes_lost: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> Statistics:
        """Statistics to be filled later."""
        return cls(*(torch.zeros((), device=device) for _ in fields(cls)))

    def fill(self, **values: Tensor) -> None:
        """Set the named statistics in place: they may have been handed out already."""
        for name, value in values.items():
            getattr(self, name).copy_(value.detach())


Backward = Callable[[Tensor], None]
Ascend = Callable[[Tensor, Statistics], AbstractContextManager[Backward]]


class Perturbation(Protocol):
    """Where the second pass runs. One object serves one (micro-)batch."""

    def first_pass(self, forward: Callable[[], Objective], conditions: Conditions) -> tuple[Tensor, Ascend]:
        """Run the forward pass at w, and the passes that must come before it.

        Returns:
            L(w), detached, and ``ascend(scale, statistics)``: a context, entered once, for the second pass. ``scale``
            is the factor on the loss in backward: a loss scale, or zero for a dummy batch. ``statistics`` are filled,
            except for the sharpness. The context yields the backward pass from the loss of the second pass. With
            dynamic loss scaling its scale is infinite if the ascent overflowed in fp16: the update is then skipped, as
            after any overflow.
        """


def plain_backward(scale: Tensor, loss: Tensor) -> None:
    """Accumulate the gradient of the loss times the scale in ``.grad``."""
    loss.backward(scale.to(loss.dtype))


class _SharpnessAware(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.run = backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        run, ctx.run = ctx.run, None
        if run is None:
            raise RuntimeError(
                "backward() through a sharpness-aware loss a second time. It runs two passes and frees their graphs; "
                "compute the loss again instead of passing retain_graph=True."
            )
        run(grad_output)
        return None, None, None


def sharpness_aware_loss(
    first: Callable[[], Objective],
    second: Callable[[], Tensor],
    perturbation: Perturbation,
    devices: set[torch.device],
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Tensor, Statistics]:
    """The loss at w, whose gradient is that at the perturbed weights.

    Args:
        first: forward pass; returns all that the ascent needs. May be run several times.
        second: forward pass, run in backward; returns the loss (scalar) whose gradient is taken.
        perturbation: of this batch.
        devices: where the model lives, for the replay of random numbers.
        guard: makes a context for each of the two passes, which may translate errors.

    Returns:
        The loss, to be used as any loss, once; and the statistics, which its backward pass completes.

    Raises:
        RuntimeError: from backward, when it is run a second time. Whatever an inner pass raises comes through, with
            the weights as they were.
    """
    conditions, variables = Conditions.capture(devices), contextvars.copy_context()
    with guard(), closing_contexts(), conditions.generators.replayed():
        value, ascend = perturbation.first_pass(first, conditions)
    statistics = Statistics.zeros(value.device)

    def backward(grad_output: Tensor) -> None:
        called_in = ThreadState.capture(devices)  # on a GPU this is a thread of autograd's own
        with (
            guard(),
            closing_contexts(),
            ascend(grad_output, statistics) as second_backward,
            torch.enable_grad(),
            conditions.replayed(),
        ):
            loss = variables.run(second)
            with called_in.replayed():
                second_backward(loss)
        statistics.fill(sharpness=at_least_float32(loss) - at_least_float32(value))

    anchor = torch.zeros((), device=value.device, requires_grad=True)
    return _SharpnessAware.apply(anchor, value, backward), statistics


def displaced_loss(
    forward: Callable[[], Tensor],
    displaced_forward: Callable[[], AbstractContextManager[None]],
    displaced_backward: Callable[[], AbstractContextManager[None]],
    devices: set[torch.device],
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """The loss at displaced parameters, with its gradient there, of one forward pass.

    Between the forward and the backward pass the parameters are where they were.

    Args:
        forward: forward pass; returns the loss, scalar.
        displaced_forward: makes the context in which it runs.
        displaced_backward: makes that of the backward pass, which reads parameters again: at the same values.
        devices, guard: as for :func:`sharpness_aware_loss`.

    Returns:
        The loss, to be used as any loss, once.
    """
    unchanged = ThreadState.capture(devices)  # but for autocast's cache, which may hold casts of other values
    with guard(), closing_contexts(), displaced_forward(), unchanged.replayed():
        loss = forward()

    def backward(grad_output: Tensor) -> None:
        with guard(), closing_contexts(), displaced_backward():
            plain_backward(grad_output, loss)

    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    return _SharpnessAware.apply(anchor, loss.detach(), backward)


def check_losses(losses: Tensor) -> None:
    """Refuse losses that are not one for each sample.

    Raises:
        ValueError: the shape is not (B,), B >= 1.
    """
    if losses.dim() != 1 or losses.numel() == 0:
        raise ValueError(
            f"Invalid per-sample losses of shape {tuple(losses.shape)}. Must be (B,) with B >= 1: one loss for each "
            "sample of the batch, e.g. from a loss function with reduction='none', summed over the sample's tokens."
        )
