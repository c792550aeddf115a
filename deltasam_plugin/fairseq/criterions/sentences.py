"""Criterions that predict a class, a rank or numbers for each sentence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.fairseq.criterions.registry import per_sample_losses
from deltasam_plugin.fairseq.errors import InvalidValue
from deltasam_plugin.loss import Logits

REGULARIZERS = ["_get_adaptive_head_loss", "_get_adaptive_ffn_loss"]


def _classes(criterion: Any, model: Any, sample: Any, net_output: Any, *_: Any) -> Logits | None:
    return None if criterion.regression_target else Logits.by_sample(net_output[0].detach())


def _ranks(criterion: Any, model: Any, sample: Any, *candidates: Any) -> Logits:
    return Logits.by_sample(torch.cat([scores.detach() for scores, _ in candidates], dim=1))


@per_sample_losses("sentence_prediction", calls=REGULARIZERS, logits=_classes)
@per_sample_losses("sentence_prediction_adapters", logits=_classes)
def _classified(
    criterion: Any, model: Any, sample: Any, net_output: Any, *regularizers: Tensor
) -> tuple[Tensor, Tensor | None]:
    logits = net_output[0]
    targets = model.get_targets(sample, [logits]).view(-1)
    if criterion.regression_target:
        errors = F.mse_loss(logits.view(-1).float(), targets.float(), reduction="none")
        losses = errors.view(len(logits), -1).sum(dim=1)  # a sentence may have several targets
    else:
        losses = F.nll_loss(F.log_softmax(logits, dim=-1, dtype=torch.float32), targets, reduction="none")
    return losses, torch.stack(regularizers).sum() if regularizers else None


@per_sample_losses("sentence_ranking", logits=_ranks)
def _ranked(criterion: Any, model: Any, sample: Any, *candidates: Any) -> Tensor:
    if criterion.prediction_h is not None:
        raise InvalidValue(
            f"Invalid save_predictions={criterion.prediction_h.name!r} (--save-predictions): in training every pass of "
            "δ-SAM would write its predictions there. Remove the option, and give it to fairseq-validate instead."
        )
    logits = torch.cat([scores for scores, _ in candidates], dim=1)
    targets = model.get_targets(sample, [logits]).view(-1)
    return F.nll_loss(F.log_softmax(logits, dim=-1, dtype=torch.float32), targets, reduction="none")
