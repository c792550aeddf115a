"""Criterions that sum or average over the target tokens of a sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.modules import cross_entropy
from torch import Tensor

from deltasam_plugin.fairseq.criterions.registry import per_sample_losses
from deltasam_plugin.fairseq.errors import InvalidValue
from deltasam_plugin.loss import Logits


class RecordedProbabilities:
    """A model whose probabilities are already computed. It returns them again.

    Args:
        model: answers everything else.
        log_probabilities: what the model returned.
        probabilities: what the model returned without the logarithm, if it was called so.
    """

    def __init__(self, model: Any, log_probabilities: Tensor, probabilities: Tensor | None = None) -> None:
        self._model = model
        self._answers = {True: log_probabilities, False: probabilities}

    def get_normalized_probs(self, net_output: Any, log_probs: bool, sample: Any = None) -> Tensor | None:
        """The recorded probabilities."""
        return self._answers[log_probs]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def summed_by_sample(losses: Tensor, samples: Tensor, batch: int) -> Tensor:
    """The sum of each sample's losses.

    Args:
        losses: (N,), in any order.
        samples: the sample of each loss, integer (N,).
        batch: B, the number of samples.

    Returns:
        The sums, shape (B,).
    """
    total = torch.zeros(batch, dtype=torch.float64, device=losses.device)
    return total.index_add(0, samples, losses.double()).to(losses.dtype)


def positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask is true, in order.

    Args:
        mask: any shape.
        count: N, how often it is true. ``nonzero()`` would ask the device, and wait for it.

    Returns:
        Indices of the flattened mask, (N,).
    """
    flat = mask.flatten()
    places = torch.where(flat, flat.cumsum(0) - 1, count).clamp(max=count)  # what is false goes to the end
    every = torch.arange(len(flat), device=mask.device)
    return every.new_zeros(count + 1).scatter_(0, places, every)[:count]


def _token_logits(criterion: Any, model: Any, sample: Any, net_output: Any, lprobs: Tensor, *_: Any) -> Logits:
    # Log-probabilities: what the model returns need not be logits (adaptive softmax).
    counted = sample["target"].ne(criterion.padding_idx)
    ignored = getattr(criterion, "ignore_prefix_size", 0)
    if ignored > 0:
        counted = counted & (torch.arange(counted.size(1), device=counted.device) >= ignored)
    batches = lprobs.size(0) // len(counted)  # R-Drop doubles the batch
    values = lprobs.detach().view(batches, *counted.shape, -1).transpose(0, 1)
    return Logits.by_sample(values, counted.unsqueeze(1).expand(values.shape[:-1]))


@per_sample_losses("cross_entropy", calls=["get_normalized_probs"], logits=_token_logits)
@per_sample_losses("label_smoothed_cross_entropy", calls=["get_normalized_probs"], logits=_token_logits)
def _token_losses(criterion: Any, model: Any, sample: Any, net_output: Any, lprobs: Tensor, *_: Any) -> Tensor:
    losses, _ = criterion.compute_loss(RecordedProbabilities(model, lprobs), net_output, sample, reduce=False)
    return losses.view(sample["target"].size(0), -1).sum(dim=1)


@per_sample_losses("label_smoothed_cross_entropy_with_alignment", calls=["get_normalized_probs"], logits=_token_logits)
def _aligned(criterion: Any, model: Any, sample: Any, net_output: Any, lprobs: Tensor, *_: Any) -> Tensor:
    losses = _token_losses(criterion, model, sample, net_output, lprobs)
    alignments = sample.get("alignments")
    if alignments is None or len(alignments) == 0:
        return losses
    attention = net_output[1]["attn"][0]
    batch, length, _ = attention.shape
    source, target = alignments.unbind(1)  # target: position in the flattened (B, T)
    surprise = -attention.view(batch * length, -1)[target, source].log() * sample["align_weights"].float()
    return losses + criterion.alignment_lambda * summed_by_sample(surprise, target // length, batch)


@per_sample_losses("label_smoothed_cross_entropy_with_rdrop", calls=["get_normalized_probs"], logits=_token_logits)
def _twice(criterion: Any, model: Any, sample: Any, net_output: Any, lprobs: Tensor, *answers: Any) -> Tensor:
    # The criterion doubles the batch for two dropout masks: sample i has rows i and B + i.
    batch = sample["target"].size(0)
    flat, target = criterion.get_lprobs_and_target(RecordedProbabilities(model, lprobs), net_output, sample)
    losses, _ = label_smoothed_nll_loss(flat, target, criterion.eps, criterion.padding_idx, reduce=False)
    total = losses.view(-1, batch, losses.numel() // lprobs.size(0)).sum(dim=(0, 2))
    if criterion.rdrop_alpha <= 0:
        return total
    from fairseq.criterions.label_smoothed_cross_entropy_with_rdrop import compute_kl_loss  # not in fairseq 0.12.2

    padding = target[: target.size(0) // 2].unsqueeze(-1).eq(criterion.padding_idx)
    divergence = compute_kl_loss(RecordedProbabilities(model, *answers[:2]), net_output, padding, reduce=False)
    return total + criterion.rdrop_alpha * divergence.view(batch, -1).sum(dim=1)


@per_sample_losses("adaptive_loss", calls=["decoder.adaptive_softmax"])
def _adaptive(
    criterion: Any, model: Any, sample: Any, net_output: Any, softmax: Any
) -> tuple[Tensor, None, list[Tensor]]:
    target = model.get_targets(sample, net_output)
    _, selections = model.decoder.adaptive_softmax.adapt_target(target.view(-1))  # the rarer words, by cluster
    all_tokens = torch.arange(target.numel(), device=target.device)
    rows = [None if chosen is None else chosen // target.size(1) for chosen in [all_tokens, *selections]]
    total = net_output[0].new_zeros(target.size(0))
    for logits, labels, samples in zip(*softmax, rows):
        if samples is not None:
            losses = F.cross_entropy(logits, labels, ignore_index=criterion.padding_idx, reduction="none")
            total = total + summed_by_sample(losses, samples, target.size(0))
    return total, None, [samples for samples in rows[1:] if samples is not None]


def _masked_logits(criterion: Any, model: Any, sample: Any, net_output: Any) -> Logits:
    target, logits = sample["target"], net_output[0].detach().view(-1, net_output[0].size(-1))
    selected = _selected(criterion, target, logits)
    return Logits(logits, selected // target.size(1), target.flatten()[selected].ne(criterion.padding_idx))


def _selected(criterion: Any, target: Tensor, logits: Tensor) -> Tensor:
    """The positions of the target that the model predicts, of B·T."""
    if len(logits) == target.numel():  # no token is masked: the model predicts all of them
        return torch.arange(target.numel(), device=target.device)
    return positions(target.ne(criterion.padding_idx), len(logits))


@per_sample_losses("masked_lm", logits=_masked_logits)
def _masked(criterion: Any, model: Any, sample: Any, net_output: Any) -> tuple[Tensor, None, list[Tensor]]:
    target, logits = sample["target"], net_output[0].view(-1, net_output[0].size(-1))
    selected = _selected(criterion, target, logits)
    labels, rows = target.flatten()[selected], selected // target.size(1)
    losses = cross_entropy(logits, labels, ignore_index=criterion.padding_idx, reduction="none")
    return summed_by_sample(losses, rows, target.size(0)), None, [rows]


@per_sample_losses("nat_loss")
def _imitation(criterion: Any, model: Any, sample: Any, net_output: Any) -> Tensor:
    # The loss is a sum of means over tokens. A sample's loss is the share of its own tokens in each mean.
    batch = sample["target"].size(0)
    total = torch.zeros(batch, device=sample["target"].device)
    for name, part in net_output.items():
        if part.get("loss") is not None:
            raise InvalidValue(
                f"Criterion 'nat_loss' with a model that returns {name!r} already averaged over the batch "
                f"({type(model).__name__}): it cannot be split into samples. Use another architecture, such as "
                "nonautoregressive_transformer."
            )
        outputs, targets, mask = part["out"], part["tgt"], part.get("mask")
        samples = torch.arange(outputs.size(0), device=outputs.device) % batch  # several steps are stacked
        if mask is not None:
            outputs, targets, samples = outputs[mask], targets[mask], mask.nonzero()[:, 0] % batch
        if len(outputs) == 0:
            continue
        lprobs, smoothing = F.log_softmax(outputs, dim=-1), part.get("ls", 0.0)
        if targets.dim() == 1:
            losses = F.nll_loss(lprobs, targets, reduction="none")
        else:
            losses = F.kl_div(lprobs, targets, reduction="none").sum(dim=-1)
        losses = losses.float()
        if smoothing > 0:
            losses = losses * (1 - smoothing) - lprobs.float().mean(dim=-1) * smoothing
        share = part.get("factor", 1.0) / len(losses)
        total = total + summed_by_sample(losses, samples, batch) * share
    return total
