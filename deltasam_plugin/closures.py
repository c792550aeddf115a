"""What a closure of :class:`~deltasam_plugin.DeltaSAM` may return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.loss import Logits, Objective, check_losses


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
