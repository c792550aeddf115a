"""Hugging Face's models, tiny and with random weights, in instance mode: exact on every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from tests.helpers.verdict import Comparison

WORDS, PAD, CLASSES, RHO = 13, 1, 3, 0.3
SIZES = [(3, 4), (2, 5), (4, 4), (1, 3), (3, 2), (5, 1)]  # B, T of the batches; one is square
ATTENTION = ["eager", "sdpa"]
SINGLE = 1e-5  # tolerance of models that compute their softmax or their norm in fp32, whatever their weights are
ENCODER = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "pad_token_id": PAD,
    "num_labels": CLASSES,
}
GPT2 = {"vocab_size": WORDS, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}
T5 = {"vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "pad_token_id": PAD}
T5 = {**T5, "decoder_start_token_id": PAD, "relative_attention_num_buckets": 4, "relative_attention_max_distance": 6}
VIT = {**ENCODER, "image_size": 6, "patch_size": 3, "num_channels": 2}


def made(model: type, config: type, options: dict[str, Any], attention: str = "eager") -> nn.Module:
    """A model with random weights, in training mode: dropout is on."""
    torch.manual_seed(0)
    built = model(config(**options, attn_implementation=attention)).double().train()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter) / 4)  # biases and norms, too, are not what they started as
    return built


def check(
    model: nn.Module,
    losses: Callable[[Tensor, Tensor], Tensor],
    tolerance: float | None = None,
    kinds: tuple[str, ...] = ("exact",),
) -> None:
    """Every step is exact, or of one of the given kinds.

    Args:
        model: is trained.
        losses: tokens (B, T) and the mask of what is no padding (B, T) to losses (B,).
        tolerance: of the correction.
        kinds: of verdicts.
    """
    comparison = Comparison(model.parameters(), RHO, *([] if tolerance is None else [tolerance]))
    for number, (batch, length) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(2, WORDS, (batch, length), generator=generator)
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        mask = torch.arange(length) < lengths.unsqueeze(1)
        tokens = tokens.masked_fill(~mask, PAD)
        verdict = comparison.step(lambda: losses(tokens, mask), seed=number)  # noqa: B023
        assert verdict.kind in kinds, (number, verdict)


def cubed(states: Tensor, mask: Tensor) -> Tensor:
    """A loss of hidden states (B, T, C), (B,)."""
    return (states.pow(3).mean(2) * mask).sum(1)


def tokenwise(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy summed over tokens, (B,)."""
    return (F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * mask).sum(1)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("kind", "config"), [(BertModel, BertConfig), (RobertaModel, RobertaConfig)])
def test_bert_and_roberta(kind: type, config: type, attention: str) -> None:
    model = made(kind, config, ENCODER, attention)

    def losses(tokens: Tensor, mask: Tensor) -> Tensor:
        found = model(tokens, attention_mask=mask.long())
        return cubed(found.last_hidden_state, mask) + found.pooler_output.square().sum(1)

    check(model, losses)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(BertForSequenceClassification, BertConfig), (RobertaForSequenceClassification, RobertaConfig)],
)
def test_classification(kind: type, config: type) -> None:
    model = made(kind, config, ENCODER, "sdpa")

    def losses(tokens: Tensor, mask: Tensor) -> Tensor:
        logits = model(tokens, attention_mask=mask.long()).logits
        return F.cross_entropy(logits, tokens[:, 0] % CLASSES, reduction="none")

    check(model, losses)


@pytest.mark.parametrize("selected", [False, True])
def test_masked_language_model(selected: bool) -> None:
    """With its head on all positions, or on the labelled ones only."""
    model = made(BertForMaskedLM, BertConfig, ENCODER, "sdpa")

    def losses(tokens: Tensor, mask: Tensor) -> Tensor:
        if not selected:
            return tokenwise(model(tokens, attention_mask=mask.long()).logits, tokens, mask)
        states = model.bert(tokens, attention_mask=mask.long()).last_hidden_state
        lost = F.cross_entropy(model.cls(states[mask]), tokens[mask], reduction="none")
        return lost.new_zeros(len(tokens)).index_add(0, mask.nonzero()[:, 0], lost)

    check(model, losses)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("head", [False, True])
def test_gpt2(head: bool, attention: str) -> None:
    """Its linear layers are Conv1D: addmm with the weight transposed."""
    model = made(GPT2LMHeadModel if head else GPT2Model, GPT2Config, GPT2, attention)

    def losses(tokens: Tensor, mask: Tensor) -> Tensor:
        found = model(tokens, attention_mask=mask.long())
        if head:
            return tokenwise(found.logits[:, :-1], tokens[:, 1:], mask[:, 1:]) + found.logits[:, 0].square().sum(1)
        return cubed(found.last_hidden_state, mask)

    check(model, losses)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("variant", ["relu", "gated-gelu"])
def test_t5(head: bool, variant: str) -> None:
    """Its norms multiply by a vector. The table of relative positions, which all samples share, stays unperturbed."""
    model = made(T5ForConditionalGeneration if head else T5Model, T5Config, {**T5, "feed_forward_proj": variant})

    def losses(tokens: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": tokens, "attention_mask": mask.long(), "decoder_input_ids": tokens.flip(1)}
        found = model(**given)
        if head:
            return tokenwise(found.logits, tokens, mask)
        return cubed(found.last_hidden_state, mask)

    check(model, losses, SINGLE, ("exact", "warned"))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("head", [False, True])
def test_vit(head: bool, attention: str) -> None:
    """Its class token and its positions are parameters, added to all samples."""
    model = made(ViTForImageClassification if head else ViTModel, ViTConfig, VIT, attention)

    def losses(tokens: Tensor, mask: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        images = torch.randn(len(tokens), 2, 6, 6, generator=generator, dtype=torch.float64)
        found = model(images)
        if head:
            return F.cross_entropy(found.logits, tokens[:, 0] % CLASSES, reduction="none")
        return cubed(found.last_hidden_state, torch.ones(())) + found.pooler_output.square().sum(1)

    check(model, losses, SINGLE if attention == "eager" else None)
