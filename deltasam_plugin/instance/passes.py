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
from deltasam_plugin.instance.recording import OutputGradients, RecordedCall

CHECKPOINTED = (
    "Instance mode with activation checkpointing, which runs layers again in backward, where they are not recorded. "
    f"Leave it out, or {REMEDY}."
)


class MarkedPass(NamedTuple):
    """A pass that finds where a loss leads, see ``entanglement``.

    Attributes:
        marks: the samples whose losses have NaN, (B,) bool.
        gradients: of the calls' outputs, from these losses.
    """

    marks: Tensor
    gradients: OutputGradients


@dataclass(frozen=True)
class Passes:
    """What one pass gives, and in a batch that is compared, what others give.

    Attributes:
        gradients: of the calls' outputs, from the losses.
        scaled: the same from the losses times each of ``Ownership.factors``; empty if the batch is not compared.
        marked: the same from NaN at some samples' losses and 0 at the others'; None if mixing is not looked for.
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
