"""What a closure of :class:`~deltasam_plugin.DeltaSAM` may do, and what it may return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltasam_plugin.hooks import before_forward
from deltasam_plugin.loss import Logits, Objective, check_losses


def checked(closure: Callable[[], Any], parameters: Sequence[Tensor], instance: bool) -> Callable[[], Objective]:
    """A closure as a forward pass that finds out what it must not do.

    Args:
        closure: see :meth:`deltasam_plugin.DeltaSAM.step`.
        parameters: of the optimizer. Their gradients have just been cleared.
        instance: whether it is run in instance mode.
    """
    cleared = _gradients(parameters)

    def forward() -> Objective:
        with before_forward(_refuse_static_graph) if instance else nullcontext():
            objective = objective_of(closure())
        if _gradients(parameters) != cleared:
            raise ValueError(
                "The closure called backward(): it must only return the per-sample losses, from which step() takes "
                "gradients itself. Take gradients at the inputs by torch.autograd.grad."
            )
        return objective

    return forward


def _gradients(parameters: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """What tells whether gradients were written to: the tensors and their versions."""
    gradients = (parameter.grad for parameter in parameters)
    return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]


def _refuse_static_graph(module: nn.Module) -> None:
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        raise ValueError(
            "DistributedDataParallel with static_graph=True: in instance mode it would exchange gradients after the "
            "first pass, which computes none. Leave static_graph out, or use perturbation='batch'."
        )


def objective_of(returned: Any) -> Objective:
    """The mean loss, and what else a closure returned: losses, or a tuple of losses, logits and what is counted.

    Raises:
        ValueError: types or shapes do not fit; the message names value, rule and remedy.
    """
    if isinstance(returned, tuple) and len(returned) > 3:
        raise ValueError(
            f"The closure returned a tuple of {len(returned)}. Must be losses, or (losses, logits), or (losses, "
            "logits, counted). Keep other results in a variable of your own."
        )
    losses, logits, counted = (*returned, None, None)[:3] if isinstance(returned, tuple) else (returned, None, None)
    if not isinstance(losses, Tensor):
        raise ValueError(
            f"Invalid per-sample losses: the closure returned {_kind(losses)}. Must be a tensor (B,), e.g. from a "
            "loss function with reduction='none'."
        )
    check_losses(losses)
    if not losses.is_floating_point():
        raise ValueError(f"The closure returned losses of {losses.dtype}. Must be floating-point numbers.")
    if torch.is_grad_enabled() and not losses.requires_grad:  # probes need none
        raise ValueError(
            "The closure returned losses without a graph. Must depend on the parameters: leave out detach(), no_grad() "
            "and inference_mode() in it."
        )
    factor = 1 / losses.numel()
    if logits is None:
        return Objective(losses.mean(), losses, factor=factor)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.size(0) != losses.numel():
        raise ValueError(
            f"Invalid logits: the closure returned {_kind(logits)} beside {losses.numel()} losses. Must be a tensor "
            "(B, …, V), the predictions of each sample over V classes."
        )
    if counted is not None and (
        not isinstance(counted, Tensor) or counted.shape != logits.shape[:-1] or counted.dtype != torch.bool
    ):
        raise ValueError(
            f"Invalid counted: the closure returned {_kind(counted)} beside logits {tuple(logits.shape)}. Must be a "
            f"boolean tensor {tuple(logits.shape[:-1])}, e.g. target != padding."
        )
    return Objective(losses.mean(), losses, logits=Logits.by_sample(logits.detach(), counted), factor=factor)


def _kind(value: object) -> str:
    """What it is, for messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"
