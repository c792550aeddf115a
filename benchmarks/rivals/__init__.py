"""A user-dir for fairseq-train: label smoothing and R-Drop for classification; fairseq has them for translation."""

from dataclasses import dataclass, field
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from torch import Tensor
from torch.nn import functional as F


@dataclass
class RegularizedConfig(SentencePredictionConfig):
    """Options of fairseq's criterion, and two more."""

    label_smoothing: float = field(default=0.0, metadata={"help": "share of the target that all classes get alike"})
    rdrop_alpha: float = field(default=0.0, metadata={"help": "weight of R-Drop's divergence; 0 means no R-Drop"})


@register_criterion("sentence_prediction_with_rdrop", dataclass=RegularizedConfig)
class Regularized(SentencePredictionCriterion):  # type: ignore[misc]  # fairseq has no types
    r"""Cross-entropy with smoothed labels; with R-Drop that of two passes with other dropout, and their divergence.

    .. math:: \sum_i H_i(p_i) + H_i(q_i) + \alpha\, (KL(p_i \| q_i) + KL(q_i \| p_i)) / 2

    Validation is that of ``sentence_prediction``.

    Reference:
        Liang et al. 2021, R-Drop: Regularized Dropout for Neural Networks. https://arxiv.org/abs/2106.14448
    """

    def __init__(self, cfg: RegularizedConfig, task: Any) -> None:
        super().__init__(cfg, task)
        self.label_smoothing, self.rdrop_alpha = cfg.label_smoothing, cfg.rdrop_alpha

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """The sum over the sentences, their number, and what is logged."""
        if not model.training:
            return super().forward(model, sample, reduce)
        passes = [self._logits(model, sample) for _ in range(2 if self.rdrop_alpha > 0 else 1)]
        target = sample["target"].view(-1)
        loss = sum(F.cross_entropy(z, target, reduction="sum", label_smoothing=self.label_smoothing) for z in passes)
        if self.rdrop_alpha > 0:
            loss = loss + self.rdrop_alpha * divergence(*passes)
        logged = {"loss": loss.detach(), "ntokens": sample["ntokens"], "nsentences": len(target)}
        return loss, len(target), {**logged, "sample_size": len(target), "ncorrect": _correct(passes[0], target)}

    def _logits(self, model: Any, sample: dict[str, Any]) -> Tensor:
        options = {"features_only": True, "classification_head_name": self.classification_head_name}
        return model(**sample["net_input"], **options)[0].float()


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """The mean of both KL divergences between softmax distributions, summed over the sentences.

    Args:
        first: logits, shape (B, classes).
        second: logits, shape (B, classes).
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return ((p - q) * (p.exp() - q.exp())).sum() / 2


def _correct(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.argmax(-1) == target).sum()
