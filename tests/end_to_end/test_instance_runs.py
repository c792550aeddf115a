"""--sam-perturbation instance through the real fairseq-train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltasam_plugin import DeltaSAM
from tests.helpers.corpora import corpus, small
from tests.helpers.runs import (
    ADAM,
    HALF,
    INSTANCE,
    SENTENCES,
    TRANSLATION,
    assert_batches_of_one_are_sam,
    assert_same_model,
    base,
    delta,
    distance,
    fairseq_train,
    scalars,
)

SGD = ["--optimizer", "delta_sam", "--base-optimizer", "sgd", "--lr", 0.02]


BART: list[object] = ["--task", "translation", "--arch", "bart_base", *small("encoder", "decoder")]


@pytest.mark.parametrize("model", [TRANSLATION, BART], ids=["transformer", "bart"])
@pytest.mark.parametrize("clip", [0, 0.1])
def test_batches_of_one_are_sam(tmp_path_factory, tmp_path: Path, model: list[object], clip: float) -> None:
    """SAM, up to rounding, dropout and clipping included."""
    data = corpus("aligned", tmp_path_factory.getbasetemp())
    options = [*model, "--batch-size", 1, "--update-freq", 4, "--label-smoothing", 0.1, *delta(), *SGD]
    options += ["--clip-norm", clip, "--lr", 0.5 if clip else 0.02, "--disable-validation"]
    assert_batches_of_one_are_sam(lambda name, *own: fairseq_train(data, tmp_path / name, *options, *own))


SPLITS: dict[str, list[object]] = {
    "6 sentences at a time": ["--batch-size", 6, "--update-freq", 4],
    "one sentence at a time": ["--batch-size", 1, "--update-freq", 24],
    "at most 50 tokens at a time": ["--max-tokens", 50, "--update-freq", 24],
}


def test_the_update_does_not_depend_on_the_split(translation_data: Path, tmp_path: Path) -> None:
    """24 sentences at once or in micro-batches: without dropout the same update, which SAM's is not."""
    options = [*TRANSLATION, "--dropout", 0, "--label-smoothing", 0.1, *delta(), *SGD, "--sam-weighting", "uniform"]
    options += ["--train-subset", "valid", "--batch-size", 24, "--required-batch-size-multiple", 1]

    def update(name: str, *own: object) -> dict[str, Any]:
        return fairseq_train(translation_data, tmp_path / name, *options, *own, updates=1)

    whole, sam = update("whole", *INSTANCE), update("sam")
    unlike = update("unlike", *INSTANCE, "--sam-rho", 0.049)
    for name, sizes in SPLITS.items():
        instance = distance(whole, update(f"instance, {name}", *INSTANCE, *sizes))
        assert 300 * instance < distance(whole, unlike), name
        assert 300 * instance < distance(sam, update(f"sam, {name}", *sizes)), name


def test_half_precision_is_close_to_single_precision(translation_data: Path, tmp_path: Path) -> None:
    options = [*TRANSLATION, "--dropout", 0, "--label-smoothing", 0.1, *delta(), *SGD, *INSTANCE]
    changed = {"half": HALF, "plain": [*HALF, "--sam-rho", 0], "sam": [*HALF, "--sam-perturbation", "batch"]}
    single = fairseq_train(translation_data, tmp_path / "single", *options, updates=3)
    runs = {
        name: fairseq_train(translation_data, tmp_path / name, *options, *own, updates=3)
        for name, own in changed.items()
    }
    assert distance(single, runs["half"]) < 0.75 * distance(runs["half"], runs["sam"])
    assert distance(single, runs["half"]) < 0.5 * distance(runs["half"], runs["plain"])


@pytest.mark.parametrize("precision", [[], HALF, ["--amp"]], ids=["fp32", "fp16", "amp"])
def test_resumed_run_is_the_uninterrupted_one(translation_data: Path, tmp_path: Path, precision: list) -> None:
    options = [*TRANSLATION, *ADAM, *delta(), *INSTANCE, "--update-freq", 2, "--save-interval-updates", 1, *precision]
    options += ["--encoder-layerdrop", 0.2, "--decoder-layerdrop", 0.2]
    logs = ["--tensorboard-logdir", tmp_path / "logs"]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, *logs, updates=6)
    fairseq_train(translation_data, tmp_path / "parts", *options, updates=3)
    resumed = fairseq_train(translation_data, tmp_path / "parts", *options, updates=6)
    if "--fp16" not in precision:  # fairseq itself resumes fp16 from rounded weights
        assert_same_model(whole, resumed)
    logged = scalars(tmp_path / "logs", "sam_eps_norm", "sam_sharpness", "sam_ascent_gnorm_std")
    assert logged["sam_eps_norm"] == pytest.approx([0.05] * 6, rel=1e-3)
    assert all(value > 0 for value in logged["sam_sharpness"] + logged["sam_ascent_gnorm_std"])


def test_radius_zero_is_the_base_run(sentence_data: dict[str, Path], tmp_path: Path) -> None:
    options = [*SENTENCES, *ADAM, "--num-classes", 2]
    one = fairseq_train(sentence_data["class"], tmp_path / "base", *options, *base("sentence_prediction"))
    changed = [*delta("sentence_prediction", rho=0), *INSTANCE]
    assert_same_model(one, fairseq_train(sentence_data["class"], tmp_path / "delta", *options, *changed))


def test_sentences(sentence_data: dict[str, Path], tmp_path: Path) -> None:
    options = [*SENTENCES, *ADAM, "--num-classes", 2, *delta("sentence_prediction"), *INSTANCE]
    fairseq_train(sentence_data["class"], tmp_path, *options, "--tensorboard-logdir", tmp_path / "logs")
    assert scalars(tmp_path / "logs", "sam_skipped")["sam_skipped"] == [0] * 6


AGAIN = "it runs layers again in backward, where their output gradients are not recorded"
CHECKPOINTED = "checkpoint_activations=True (--checkpoint-activations)"  # offloading implies it
REFUSED: list[tuple[list[object], str, str]] = [
    (["--checkpoint-activations"], CHECKPOINTED, AGAIN),
    (["--offload-activations"], CHECKPOINTED, AGAIN),
    (["--quant-noise-pq", 0.1], "quant_noise_pq=0.1 (--quant-noise-pq)", "the forward pass rewrites the weights"),
]


@pytest.mark.parametrize(("options", "shown", "reason"), REFUSED)
def test_what_cannot_be_perturbed_by_instance_is_refused(
    translation_data: Path, tmp_path: Path, options: list[object], shown: str, reason: str
) -> None:
    message = (
        f"Invalid {shown} with --sam-perturbation instance: {reason}. Leave it out, or use --sam-perturbation batch."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *delta(), *INSTANCE, *options)


def test_delta_sam_without_fairseq_equals_a_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    tokens, targets = torch.randint(11, (5, 4)), torch.randint(3, (5,))

    def losses() -> torch.Tensor:
        return F.cross_entropy(model(tokens).mean(dim=1), targets, reduction="none")

    norms, expected = [], [torch.zeros_like(parameter) for parameter in model.parameters()]
    for index in range(5):
        gradients = torch.autograd.grad(losses()[index], list(model.parameters()))
        norm = torch.cat([gradient.view(-1) for gradient in gradients]).norm()
        norms.append(norm)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.data.add_(0.3 * gradient / norm)
        perturbed = torch.autograd.grad(losses()[index] / 5, list(model.parameters()))
        for total, gradient in zip(expected, perturbed, strict=True):
            total += gradient
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.data.copy_(value)

    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.3, perturbation="instance", lr=1.0)
    value = optimizer.step(losses)
    for parameter, begin, gradient in zip(model.parameters(), start, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), begin - gradient, rtol=1e-9, atol=1e-12)
    assert value > 0
    assert optimizer.statistics is not None
    assert float(optimizer.statistics.ascent_gnorm) == pytest.approx(float(torch.stack(norms).mean()))
    assert float(optimizer.statistics.ascent_gnorm_std) == pytest.approx(float(torch.stack(norms).std(correction=0)))


def test_the_norms_give_the_sharpness_to_first_order() -> None:
    """Mean of the losses: ρ times the mean norm; the rest is of order ρ²."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    for rho, tolerance in ((1e-2, 1e-2), (1e-4, 1e-4)):
        optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=rho, perturbation="instance", lr=0.0)
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
        assert optimizer.statistics is not None
        first_order = rho * float(optimizer.statistics.ascent_gnorm)
        assert float(optimizer.statistics.sharpness) == pytest.approx(first_order, rel=tolerance)
