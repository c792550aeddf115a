"""A criterion with options within an option. fairseq reads types, so that annotations must not be text."""

from dataclasses import dataclass, field
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from deltasam_plugin import per_sample_losses
from tests.helpers.homemade import smoothed_losses

NESTED = "nested_label_smoothed_cross_entropy"


@dataclass
class Inner(FairseqDataclass):
    """Options within an option."""

    strength: float = field(default=0.5, metadata={"help": "of nothing"})


@dataclass
class NestedConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Has a section of its own."""

    inner: Inner = field(default_factory=Inner)


@register_criterion(NESTED, dataclass=NestedConfig)
class NestedCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy that logs a scalar under a name that begins as ours do."""

    @classmethod
    def build_criterion(cls, cfg: NestedConfig, task: Any) -> "NestedCriterion":
        criterion = cls(task, cfg.sentence_avg, cfg.label_smoothing)
        criterion.strength = cfg.inner.strength
        return criterion

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:
        loss, size, logged = super().forward(model, sample, reduce)
        return loss, size, {**logged, "sam_score": self.strength}

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        super().reduce_metrics(logging_outputs)
        metrics.log_scalar("sam_score", logging_outputs[0]["sam_score"])


per_sample_losses(NESTED)(smoothed_losses)
