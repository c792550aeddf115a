"""The engine against the per-sample loop in float64, on fairseq's own models and with their random numbers replayed."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models.bart import BARTModel
from fairseq.models.fconv import FConvModel
from fairseq.models.lstm import LSTMModel
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fairseq.modules import Fp32LayerNorm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltasam_plugin.instance import InstanceEngine, planning
from deltasam_plugin.instance.layers.base import Form
from tests.helpers.instance_oracle import correction_error, trainable

WIDTH, VOCABULARY, RHO, TOLERANCE = 8, 13, 0.3, 1e-9
PAD = 1


def dictionary() -> Dictionary:
    """Thirteen symbols, padding among them."""
    words = Dictionary()
    for word in "abcdefghi"[: VOCABULARY - 4]:
        words.add_symbol(word)
    return words


def task() -> SimpleNamespace:
    """What a model's build_model reads of a task."""
    words = dictionary()
    return SimpleNamespace(source_dictionary=words, target_dictionary=words, dictionary=words, mask_idx=None)


SMALL = {
    **{f"{side}_embed_dim": WIDTH for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": 12 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "max_positions": 16,
    "tokens_per_sample": 16,
    "checkpoint_activations": False,
    "offload_activations": False,
}


def built(model: type, architecture: Callable[[Namespace], None] | None = None, **options: object) -> nn.Module:
    """A small model in float64, training."""
    torch.manual_seed(1)
    arguments = Namespace(**{**SMALL, **options})
    if architecture is not None:
        architecture(arguments)
    module = model.build_model(arguments, task()).double().train()
    with torch.no_grad():  # trained models have no zero biases and no unit scales
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight.data[part.padding_idx].zero_()
    return module


def translation(**options: object) -> nn.Module:
    from fairseq.models.transformer.transformer_legacy import base_architecture

    return built(TransformerModel, base_architecture, **options)


TRANSLATION = {
    "post-norm": {},
    "pre-norm": {"encoder_normalize_before": True, "decoder_normalize_before": True},
    "all tied": {"share_all_embeddings": True},
    "output tied": {"share_decoder_input_output_embed": True},
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
    "embedding norm": {"layernorm_embedding": True},
    "LayerDrop": {"encoder_layerdrop": 0.4, "decoder_layerdrop": 0.4},
    "everything": {
        "encoder_normalize_before": True,
        "share_all_embeddings": True,
        "encoder_learned_pos": True,
        "decoder_learned_pos": True,
        "layernorm_embedding": True,
        "encoder_layerdrop": 0.3,
    },
}


@st.composite
def sentences(draw: st.DrawFn, batch: int | None = None) -> Tensor:
    """(B, T) tokens, right-padded, each with at least one word; duplicates and T = B happen."""
    batch = draw(st.integers(1, 4)) if batch is None else batch
    lengths = draw(st.lists(st.integers(1, 5), min_size=batch, max_size=batch))
    words = st.integers(3, VOCABULARY - 1)
    rows = [draw(st.lists(words, min_size=n, max_size=n)) for n in lengths]
    if batch > 1 and draw(st.booleans()):
        rows[-1] = rows[0]
    return torch.tensor([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows])


def per_sentence(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy summed over each sentence's tokens, (B,)."""
    lost = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=PAD, reduction="none")
    return lost.sum(1)


def seeded(function: Callable[[], Tensor], seed: int) -> Callable[[], Tensor]:
    """With the same dropout and LayerDrop every time."""

    def run() -> Tensor:
        torch.manual_seed(seed)
        numpy.random.seed(seed)  # wav2vec's LayerDrop draws from it
        return function()

    return run


def shifted(tokens: Tensor) -> Tensor:
    return torch.cat([torch.full_like(tokens[:, :1], 2), tokens[:, :-1]], 1)


# One engine a model, over many batches: layouts must hold for later sizes.
MODELS = {name: translation(**options) for name, options in TRANSLATION.items()}
ENGINES = {name: InstanceEngine(model, RHO) for name, model in MODELS.items()}


def translated(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    logits, _ = model(source, source.ne(PAD).sum(1), shifted(target))
    return per_sentence(logits, target)


@pytest.mark.parametrize("name", TRANSLATION)
@given(st.data())
@settings(max_examples=5)
def test_translation(name: str, data: st.DataObject) -> None:
    source = data.draw(sentences())
    target = data.draw(sentences(batch=len(source)))
    model = MODELS[name]
    run = seeded(lambda: translated(model, source, target), data.draw(st.integers(0, 9)))
    assert correction_error(ENGINES[name], run, trainable(model)) <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
@given(st.data())
@settings(max_examples=4)
def test_language_model(tied: bool, data: st.DataObject) -> None:
    model, engine = language_model(tied)
    tokens = data.draw(sentences())
    run = seeded(lambda: continued(model, tokens), data.draw(st.integers(0, 9)))
    assert correction_error(engine, run, trainable(model)) <= TOLERANCE


def continued(model: nn.Module, tokens: Tensor) -> Tensor:
    return per_sentence(model(shifted(tokens))[0], tokens)


@functools.cache
def language_model(tied: bool) -> tuple[nn.Module, InstanceEngine]:
    from fairseq.models.transformer_lm import base_lm_architecture

    model = built(
        TransformerLanguageModel, base_lm_architecture, share_decoder_input_output_embed=tied, decoder_output_dim=WIDTH
    )
    return model, InstanceEngine(model, RHO)


@functools.cache
def roberta(**options: object) -> tuple[nn.Module, InstanceEngine]:
    from fairseq.models.roberta.model import base_architecture

    model = built(RobertaModel, base_architecture, pooler_dropout=0.1, **options)
    model.register_classification_head("sentence", num_classes=3)
    model.double()
    return model, InstanceEngine(model, RHO)


@pytest.mark.parametrize("options", [{}, {"encoder_layerdrop": 0.3, "encoder_normalize_before": True}])
@given(st.data())
@settings(max_examples=4)
def test_roberta_classification(options: dict, data: st.DataObject) -> None:
    model, engine = roberta(**options)
    tokens = data.draw(sentences())
    assert correction_error(engine, seeded(lambda: classified(model, tokens), 3), trainable(model)) <= TOLERANCE


def classified(model: nn.Module, tokens: Tensor) -> Tensor:
    classes = torch.tensor([int(row[0]) % 3 for row in tokens])
    logits, _ = model(tokens, features_only=True, classification_head_name="sentence")
    return F.cross_entropy(logits, classes, reduction="none")


@pytest.mark.parametrize("untied", [False, True])
@given(st.data())
@settings(max_examples=4)
def test_roberta_masked_language_model(untied: bool, data: st.DataObject) -> None:
    model, engine = roberta(untie_weights_roberta=untied)
    tokens = data.draw(sentences())
    masked = tokens.ne(PAD) & torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=tokens.numel(), max_size=tokens.numel()))
    ).view_as(tokens)
    masked[:, 0] = True
    run = seeded(lambda: unmasked(model, tokens, masked), 4)
    assert correction_error(engine, run, trainable(model), rows=[masked.nonzero()[:, 0]]) <= TOLERANCE


def unmasked(model: nn.Module, tokens: Tensor, masked: Tensor) -> Tensor:
    logits, _ = model(tokens.masked_fill(masked, 3), masked_tokens=masked)
    lost = F.cross_entropy(logits, tokens[masked], reduction="none")
    return lost.new_zeros(len(tokens)).index_add(0, masked.nonzero()[:, 0], lost)


@functools.cache
def bart(kind: str) -> tuple[nn.Module, InstanceEngine]:
    from fairseq.models.bart.model import bart_base_architecture, mbart_base_architecture

    architecture = {"bart": bart_base_architecture, "mbart": mbart_base_architecture}[kind]
    model = built(BARTModel, architecture, pooler_dropout=0.0)
    return model, InstanceEngine(model, RHO)


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@given(st.data())
@settings(max_examples=4)
def test_bart(kind: str, data: st.DataObject) -> None:
    model, engine = bart(kind)
    source = data.draw(sentences())
    target = data.draw(sentences(batch=len(source)))
    run = seeded(lambda: translated(model, source, target), 5)
    assert correction_error(engine, run, trainable(model)) <= TOLERANCE


# T = B, a sentence twice, in it a word twice, and padding: on the left, as fairseq pads sources, and on the right.
SQUARE = {"left": [[4, 5, 4], [1, 1, 7], [4, 5, 4]], "right": [[4, 5, 4], [7, 1, 1], [4, 5, 4]]}

EVERY_MODEL: dict[str, Callable[[], tuple[nn.Module, InstanceEngine]]] = {
    **{name: functools.partial(lambda name: (MODELS[name], ENGINES[name]), name) for name in TRANSLATION},
    **{kind: functools.partial(bart, kind) for kind in ("bart", "mbart")},
    "language model": functools.partial(language_model, False),
    "tied language model": functools.partial(language_model, True),
    "classification": roberta,
    "masked language model": functools.partial(roberta, untie_weights_roberta=False),
}


@pytest.mark.parametrize("form", Form, ids=lambda form: form.name)
@pytest.mark.parametrize("padding", SQUARE)
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_form_on_square_batches_with_duplicates_repeated_words_and_padding(
    name: str, padding: str, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "cheapest_form", lambda *arguments: form)
    model, engine = EVERY_MODEL[name]()
    tokens = torch.tensor(SQUARE[padding])
    masked = tokens.eq(4) | tokens.eq(7)
    losses: dict[str, Callable[[], Tensor]] = {
        "language model": lambda: continued(model, tokens),
        "tied language model": lambda: continued(model, tokens),
        "classification": lambda: classified(model, tokens),
        "masked language model": lambda: unmasked(model, tokens, masked),
    }
    run = seeded(losses.get(name, lambda: translated(model, tokens, torch.tensor(SQUARE["right"]))), 7)
    rows = [masked.nonzero()[:, 0]] if name == "masked language model" else []
    assert correction_error(engine, run, trainable(model), rows=rows) <= TOLERANCE


@pytest.mark.parametrize("kind", ["lstm", "fconv"])
def test_recurrent_and_gated_convolutional_models_are_refused(kind: str) -> None:
    if kind == "lstm":
        model = built(LSTMModel, criterion=Namespace(_name="cross_entropy"), encoder_layers=1, decoder_layers=1)
    else:
        model = built(FConvModel, encoder_layers="[(8, 3)] * 2", decoder_layers="[(8, 3)] * 2")
    engine = InstanceEngine(model, RHO)
    tokens = torch.tensor([[4, 5, 6], [7, 8, 2]])
    with engine.recording() as tape:
        losses = per_sentence(model(tokens, tokens.ne(PAD).sum(1), shifted(tokens))[0], tokens)
    with pytest.raises(RuntimeError, match=r"does not cover .*Remedy: choose --sam-perturbation batch"):
        engine.solve(tape, losses)


def wav2vec(**options: object) -> Wav2Vec2Model:
    """Without its pretraining head."""
    torch.manual_seed(0)
    layers = {f"encoder_{name}": size for name, size in [("layers", 2), ("embed_dim", WIDTH), ("attention_heads", 2)]}
    convolutions = {"conv_feature_layers": "[(8, 10, 5), (8, 3, 2)]", "conv_pos": 3, "conv_pos_groups": 2}
    config = Wav2Vec2Config(**layers, **convolutions, encoder_ffn_embed_dim=12, final_dim=8, **options)
    model = Wav2Vec2Model(config).double().train()
    model.remove_pretraining_modules()
    return model


def test_wav2vec_is_refused_for_its_normalized_positional_convolution() -> None:
    model = wav2vec()
    engine = InstanceEngine(model, RHO)
    with engine.recording() as tape:
        losses = model(torch.ones(2, 200).double(), mask=False, features_only=True)["x"].pow(3).sum((1, 2))
    with pytest.raises(
        RuntimeError, match=r"encoder.pos_conv.0.weight_v \(used by _weight_norm\(\)\).*perturbation batch"
    ):
        engine.solve(tape, losses)


@pytest.mark.parametrize("padded", [False, True])
def test_convolutions_over_a_waveform(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of wav2vec 2.0, without what is refused: the weight norm, and the embedding of masked steps."""
    monkeypatch.setattr(Fp32LayerNorm, "forward", nn.LayerNorm.forward)  # it would compute in fp32, whatever comes in
    model = wav2vec(extractor_mode="layer_norm", encoder_layerdrop=0.3)
    nn.utils.remove_weight_norm(model.encoder.pos_conv[0])
    model.mask_emb.requires_grad_(False)
    engine = InstanceEngine(model, RHO)
    generator = torch.Generator().manual_seed(1)
    for batch, length in [(3, 200), (2, 300), (1, 150)]:
        waveform = torch.randn(batch, length, generator=generator, dtype=torch.float64)
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[1:, 120:] = padded

        def losses() -> Tensor:
            features = model(waveform, padding_mask=padding, mask=False, features_only=True)["x"]  # noqa: B023
            return features.pow(3).sum((1, 2))

        assert correction_error(engine, seeded(losses, 6), trainable(model)) <= TOLERANCE
