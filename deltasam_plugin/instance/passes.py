"""The backward passes from one batch's losses to the outputs of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from deltasam_plugin.errors import Refused
from deltasam_plugin.instance.coverage import REMEDY
from deltasam_plugin.instance.recording import RecordedCall

CHECKPOINTED = (
    "Instance mode with activation checkpointing, which runs layers again in backward, where they are not recorded. "
    f"Leave it out, or {REMEDY}."
)

OutputGradients = Sequence[Tensor | None]  # of each call; None where no loss depends on it


class MarkedPass(NamedTuple):
    """A pass that finds where a loss leads, see ``entanglement``.

    Attributes:
        marks: the samples whose losses have NaN, (B,) bool.
        gradients: back from these.
    """

    marks: Tensor
    gradients: OutputGradients


@dataclass(frozen=True)
class Passes:
    """What one pass gives, and in a batch that is compared, what others give.

    Attributes:
        gradients: from the losses.
        scaled: from the losses times each of ``Ownership.factors``; empty in a batch that is not compared.
        marked: from NaN at some samples' losses and 0 at the others'; None in most batches.
        of_parameters: autograd's gradients by name, for ``Coverage.verify``.
    """

    gradients: OutputGradients
    scaled: Sequence[OutputGradients]
    marked: MarkedPass | None
    of_parameters: dict[str, Tensor]


def output_gradients(
    losses: Tensor,
    calls: Sequence[RecordedCall],
    seed: Tensor,
    parameters: Sequence[Tensor] = (),
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of the calls' outputs and of parameters; None where no loss depends on them.

    Args:
        losses: per-sample losses with graph, (B,).
        calls: of the pass that computed them.
        seed: gradient of the losses, (B,).
        parameters: beside the calls.
        retain_graph: whether another pass follows.

    Raises:
        Refused: layers were checkpointed.
    """
    inputs: list[Any] = [*(call.output for call in calls), *parameters]
    if not inputs or not losses.requires_grad:
        return [None] * len(inputs)
    try:
        return list(torch.autograd.grad(losses, inputs, seed, retain_graph=retain_graph, allow_unused=True))
    except RuntimeError as error:
        if isinstance(error, CheckpointError) or "use_reentrant" in str(error):
            raise Refused(CHECKPOINTED) from error
        raise
