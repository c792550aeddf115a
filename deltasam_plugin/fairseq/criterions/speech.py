"""Criterions of speech models: CTC, and the contrastive and masked predictions of pre-training.

The model returns the predictions of all samples as one list of frames. The functions here find the sample of each
frame. Penalties that are means over the whole batch (diversity of the code book, size of the features) are shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.data.data_utils import lengths_to_mask
from torch import Tensor

from deltasam_plugin.fairseq.criterions.registry import per_sample_losses
from deltasam_plugin.fairseq.criterions.tokens import _token_losses, summed_by_sample
from deltasam_plugin.fairseq.errors import InvalidValue


@per_sample_losses("ctc", calls=["get_normalized_probs"])
def _ctc(criterion: Any, model: Any, sample: Any, net_output: Any, lprobs: Tensor) -> Tensor:
    if "src_lengths" in sample["net_input"]:
        input_lengths = sample["net_input"]["src_lengths"]
    elif net_output["padding_mask"] is not None:
        input_lengths = (~net_output["padding_mask"]).long().sum(-1)
    else:
        input_lengths = lprobs.new_full((lprobs.size(1),), lprobs.size(0), dtype=torch.long)
    symbols = (sample["target"] != criterion.pad_idx) & (sample["target"] != criterion.eos_idx)
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            lprobs.contiguous(),
            sample["target"].masked_select(symbols),
            input_lengths,
            sample["target_lengths"] if "target_lengths" in sample else symbols.sum(-1),
            blank=criterion.blank_idx,
            reduction="none",
            zero_infinity=criterion.zero_infinity,
        )


@per_sample_losses("label_smoothed_cross_entropy_with_ctc", calls=["get_normalized_probs", "get_ctc_output"])
def _with_ctc(criterion: Any, model: Any, sample: Any, net_output: Any, lprobs: Tensor, *more: Any) -> Tensor:
    losses = _token_losses(criterion, model, sample, net_output, lprobs)
    if criterion.ctc_weight <= 0:
        return losses
    ctc_lprobs, input_lengths = more[0]
    targets, target_lengths = model.get_ctc_target(sample)
    symbols = targets.masked_select(lengths_to_mask(target_lengths))
    return losses + criterion.ctc_weight * F.ctc_loss(
        ctc_lprobs, symbols, input_lengths, target_lengths, reduction="none", zero_infinity=True
    )


@per_sample_losses("wav2vec", calls=["apply_mask", "feature_aggregator"])
def _contrastive(criterion: Any, model: Any, sample: Any, *outputs: Any) -> tuple[Tensor, Tensor | None]:
    *before, net_output = outputs
    logits, target = model.get_logits(net_output).float(), model.get_targets(sample, net_output)
    if "cpc_logits" in net_output:
        batch = sample["net_input"]["source"].size(0)
        samples = _samples_of_steps(criterion, model, logits, before[0].size(-1), batch)
    elif "x" in net_output and before:
        samples, batch = _samples_of_masked(net_output["x"], before[0][1]), net_output["x"].size(1)
    else:
        raise InvalidValue(
            f"Criterion 'wav2vec' with the model {type(model).__name__}: its predictions cannot be assigned to "
            "samples. Use a model of wav2vec or wav2vec 2.0, or register a criterion of your own with a per-sample "
            "loss function."
        )
    if criterion.infonce:
        losses = F.cross_entropy(logits, target, reduction="none")
    else:
        weights = model.get_target_weights(target, net_output) if hasattr(model, "get_target_weights") else None
        weights = weights.float() if torch.is_tensor(weights) else None
        losses = F.binary_cross_entropy_with_logits(logits, target.float(), weights, reduction="none")
    if "sample_size" in sample:
        size = sample["sample_size"]
    elif "mask_indices" in sample["net_input"]:
        size = sample["net_input"]["mask_indices"].sum()
    else:
        size = target.numel() if criterion.infonce else target.long().sum()
    penalties = model.get_extra_losses(net_output) if criterion.loss_weights is not None else None
    return summed_by_sample(losses, samples, batch), _shared(criterion, penalties, size)


def _samples_of_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """wav2vec 2.0: logits are (M·B, N + 1), time first. The model reshaped the masked frames to (B, M)."""
    _, batch, frames = x.shape
    if mask is None:
        return torch.arange(batch, device=x.device).repeat(frames)
    return mask.nonzero()[:, 0].view(batch, frames).t().flatten()


def _samples_of_steps(criterion: Any, model: Any, logits: Tensor, frames: int, batch: int) -> Tensor:
    """wav2vec: one block for each step that is predicted, (T, B, N + 1) with InfoNCE, else (N + 1, B, T)."""
    samples = torch.arange(batch, device=logits.device)
    if criterion.infonce:
        return samples.repeat(len(logits) // batch)
    head = model.wav2vec_predictions
    candidates = 1 + head.n_negatives + head.cross_sample_negatives
    reach = frames - head.offset
    lengths = [reach - step for step in range(min(head.project_to_steps.kernel_size[1], reach))]
    return torch.cat([samples.repeat_interleave(length).repeat(candidates) for length in lengths])


@per_sample_losses("hubert", calls=["apply_mask"])
def _masked_units(
    criterion: Any, model: Any, sample: Any, masking: Any, net_output: Any
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    mask, padding = masking[1], net_output["padding_mask"]
    if hasattr(model, "downsample_modules"):
        raise InvalidValue(
            f"Criterion 'hubert' with the model {type(model).__name__}: it masks every resolution in another way, and "
            "its predictions cannot be assigned to samples. Use the model hubert."
        )
    total, size = torch.zeros(len(mask), device=mask.device), 0
    rows = [(~padding & chosen).nonzero()[:, 0] for chosen in (mask, ~mask)]
    weights = (criterion.pred_masked_weight, criterion.pred_nomask_weight)
    for masked, samples, weight in zip((True, False), rows, weights):
        if weight <= 0:
            continue
        targets = model.get_targets(net_output, masked)
        for logits, target in zip(model.get_logits(net_output, masked), targets):
            losses = F.cross_entropy(logits, target, reduction="none")
            total = total + weight * summed_by_sample(losses, samples, len(mask))
        size += targets[0].numel()
    penalties = model.get_extra_losses(net_output)[0] if criterion.loss_weights is not None else None
    return total, _shared(criterion, penalties, size), rows


def _shared(criterion: Any, penalties: Tensor | Iterable[Tensor | None] | None, size: Tensor | int) -> Tensor | None:
    """The sum of the penalties with the criterion's weights. It has extended these to one for each penalty."""
    if penalties is None:
        return None
    if torch.is_tensor(penalties):
        penalties = [penalties]
    terms = [
        weight * penalty.float() * size
        for penalty, weight in zip(penalties, criterion.loss_weights)
        if weight != 0 and penalty is not None
    ]
    return torch.stack(terms).sum() if terms else None
