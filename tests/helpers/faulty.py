"""A criterion as a user would write it, that fails on demand: registered, with its adaptor, by importing this file."""

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
    "ascent": 0,
    "ascent backward": 0,
    "probe +": 1,
    "probe -": 2,
    "second forward": 3,
    "second backward": 3,
}


@dataclass
class Plan:
    """When to fail: in which batch's which pass, and how; counts the training passes as they come.

    Batches are counted from 0. The base criterion runs one pass for each of them. In half precision there is one more
    than in PASSES before the second one, to measure rounding.
    """

    batch: int = -1
    where: str = "ascent"
    base: bool = False
    half: bool = False
    error: Exception | None = None
    calls: int = 0
    poisoned: bool = False
    armed: bool = False

    def due(self) -> bool:
        """Called once per training pass; is this the one?"""
        call, self.calls = self.calls, self.calls + 1
        if self.base:
            return call == self.batch
        passes, checks = PASSES[self.where], self.batch.bit_length()  # the first pass of batches 1, 2, 4, … runs twice
        if passes > 0 and (self.batch + 1) & self.batch == 0:
            checks += 1
        passes += self.half and self.where.startswith("second")
        return call == self.batch * (4 + self.half) + passes + checks


plan = Plan()


@register_criterion(NAME, dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class FaultyCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy that fails by plan; without an error in the plan it gives a NaN loss."""

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, Any]:
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        if not self.training or not plan.due():
            return loss, sample_size, logging_output
        if plan.error is None:
            plan.poisoned = not plan.where.startswith("second")  # the adaptor runs in the first pass alone
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
