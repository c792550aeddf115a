"""A criterion as a user would write it, that fails on demand. Importing this file registers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from torch import Tensor

from deltasam_plugin import per_sample_losses

NAME = "faulty_label_smoothed_cross_entropy"
PASSES = {
    "probe +": 0,
    "probe -": 1,
    "ascent": 2,
    "ascent backward": 2,
    "second forward": 3,
    "second backward": 3,
}


@dataclass
class Plan:
    """When to fail, by batch and pass, and how. Counts the training passes."""

    batch: int = -1
    where: str = "ascent"
    error: Exception | None = None
    calls: int = 0
    poisoned: bool = False
    armed: bool = False

    def due(self) -> bool:
        """Whether this training pass fails; called once for each."""
        call, self.calls = self.calls, self.calls + 1
        return call == self.batch * 4 + PASSES[self.where]


plan = Plan()


@register_criterion(NAME, dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class FaultyCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy that fails by plan. Without an error in the plan its loss is NaN."""

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, Any]:
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        if not self.training or not plan.due():
            return loss, sample_size, logging_output
        if plan.error is None:
            plan.poisoned = not plan.where.startswith("second")  # per-sample losses are computed in the first pass only
            return loss * torch.nan, sample_size, logging_output
        if plan.where == "ascent backward":
            plan.armed = True
            return loss, sample_size, logging_output
        if plan.where == "second backward":
            loss.register_hook(_fail)
            return loss, sample_size, logging_output
        raise plan.error


def _fail(gradient: Tensor) -> Tensor:
    assert plan.error is not None
    raise plan.error


@per_sample_losses(NAME)
def faulty_losses(criterion: Any, model: Any, sample: Any, net_output: Any) -> Tensor:
    """As for label-smoothed cross-entropy."""
    losses, _ = criterion.compute_loss(model, net_output, sample, reduce=False)
    poison, plan.poisoned = plan.poisoned, False
    if plan.armed:
        losses.register_hook(_fail)
    plan.armed = False
    return losses.view(sample["target"].size(0), -1).sum(dim=1) * (torch.nan if poison else 1)
