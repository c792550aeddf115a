"""A model inside a model, a criterion with parameters, and tasks that freeze layers, as users write them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, tiny_architecture
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor, nn

from deltasam_plugin import per_sample_losses, weighting

MODEL, CRITERION = "wrapping", "normalizing_label_smoothed_cross_entropy"
TERSE = "terse_label_smoothed_cross_entropy"
WEIGHTING = "inverse_curvature"
REGULARIZED, LATE_REGULARIZED = "regularized_translation", "late_regularized_translation"
SEEDING = "seeding_translation"
THAWING, FREEZING = "thawing_translation", "freezing_translation"


@register_model(MODEL)
class Wrapping(BaseFairseqModel):
    """A Transformer called ``module``, as in a distributed wrapper, and a layer after it.

    It draws random numbers from Python and numpy.
    """

    @staticmethod
    def add_args(parser: Any) -> None:
        TransformerModel.add_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Wrapping:
        random.seed(1)  # fairseq does not
        model = cls()
        model.module = TransformerModel.build_model(args, task)
        model.norm = nn.LayerNorm(len(task.target_dictionary))
        return model

    def forward(self, **inputs: Any) -> tuple[Tensor, Any]:
        logits, extra = self.module(**inputs)
        return self.norm(logits) * (random.uniform(0.9, 1.1) + np.random.uniform(0, 0.1)), extra

    def get_normalized_probs(self, *arguments: Any, **options: Any) -> Tensor:
        return self.module.get_normalized_probs(*arguments, **options)

    def get_targets(self, *arguments: Any) -> Tensor:
        return self.module.get_targets(*arguments)

    def max_positions(self) -> Any:
        return self.module.max_positions()


register_model_architecture(MODEL, MODEL)(tiny_architecture)


@register_criterion(CRITERION, dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class NormalizingCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy with a layer that has the same name as the model's."""

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> NormalizingCriterion:
        criterion = super().build_criterion(cfg, task)
        criterion.norm = nn.LayerNorm(len(task.target_dictionary))
        return criterion

    def compute_loss(self, model: Any, net_output: Any, sample: Any, reduce: bool = True) -> Any:
        logits = net_output[0] + self.norm(net_output[0])
        return super().compute_loss(model, (logits, *net_output[1:]), sample, reduce)


@per_sample_losses(CRITERION)
def smoothed_losses(criterion: Any, model: Any, sample: Any, net_output: Any) -> Tensor:
    """As for label-smoothed cross-entropy."""
    losses, _ = criterion.compute_loss(model, net_output, sample, reduce=False)
    return losses.view(sample["target"].size(0), -1).sum(dim=1)


@register_criterion(TERSE, dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class TerseCriterion(LabelSmoothedCrossEntropyCriterion):
    """It logs its loss, and no sizes."""

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        return loss, sample_size, {"loss": logging_output["loss"] / sample_size}

    @staticmethod
    def reduce_metrics(logging_outputs: Any) -> None:
        metrics.log_scalar("loss", sum(log["loss"] for log in logging_outputs) / len(logging_outputs))


per_sample_losses(TERSE)(smoothed_losses)


@weighting(WEIGHTING, measures="second_difference")
def inverse(magnitudes: Tensor, probes: int) -> Tensor:
    """Samples whose gradient changes slowly count more."""
    return 1 / magnitudes


@register_task(THAWING, dataclass=TranslationConfig)
class ThawingTask(TranslationTask):
    """Translation with a frozen encoder in the first epoch."""

    frozen_epoch = 1

    def begin_epoch(self, epoch: int, model: Any) -> None:
        model.encoder.requires_grad_(epoch != self.frozen_epoch)


@register_task(FREEZING, dataclass=TranslationConfig)
class FreezingTask(ThawingTask):
    """Translation with a frozen encoder in the second epoch."""

    frozen_epoch = 2


@register_task(SEEDING, dataclass=TranslationConfig)
class SeedingTask(TranslationTask):
    """Translation with the same random numbers in every update."""

    def train_step(self, *arguments: Any, **options: Any) -> Any:
        torch.manual_seed(42)
        return super().train_step(*arguments, **options)


@register_task(REGULARIZED, dataclass=TranslationConfig)
class RegularizedTask(TranslationTask):
    """Translation that pulls the encoder's parameters to zero."""

    begins = 0

    def train_step(self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, **_: Any) -> Any:
        model.train()
        loss, sample_size, logging_output = criterion(model, sample)
        if update_num >= self.begins:
            loss += sum(parameter.square().sum() for parameter in model.encoder.parameters())
        optimizer.backward(loss)
        return loss, sample_size, logging_output


@register_task(LATE_REGULARIZED, dataclass=TranslationConfig)
class LateRegularizedTask(RegularizedTask):
    """The same from the third update on."""

    begins = 2
