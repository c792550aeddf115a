"""--sam-perturbation instance through the real fairseq-train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import ADAM, SENTENCES, TRANSLATION, assert_same_model, base, delta, distance, fairseq_train, scalars
from torch import nn
from torch.nn import functional as F

from deltasam_plugin import DeltaSAM

INSTANCE = ["--sam-perturbation", "instance"]
SGD = ["--optimizer", "delta_sam", "--base-optimizer", "sgd", "--lr", 0.02]


def test_batches_of_one_are_sam(translation_data: Path, tmp_path: Path) -> None:
    """With one sample in a batch its worst case is the batch's: SAM, up to rounding, dropout included."""
    options = [*TRANSLATION, "--batch-size", 1, "--update-freq", 4, "--label-smoothing", 0.1, *delta(), *SGD]
    sam = fairseq_train(translation_data, tmp_path / "sam", *options, "--sam-weighting", "uniform")
    instance = fairseq_train(translation_data, tmp_path / "instance", *options, *INSTANCE)
    plain = fairseq_train(translation_data, tmp_path / "plain", *options, "--sam-rho", 0)
    assert 100 * distance(sam, instance) < distance(sam, plain)


def test_batch_is_the_sum_of_its_samples(translation_data: Path, tmp_path: Path) -> None:
    """16 samples at once, or one after another with gradient accumulation: the same run without dropout."""
    options = [*TRANSLATION, "--dropout", 0, "--label-smoothing", 0.1, *delta(), *SGD, *INSTANCE]
    options += ["--required-batch-size-multiple", 1]
    together = fairseq_train(translation_data, tmp_path / "together", *options, "--batch-size", 160, updates=2)
    apart = fairseq_train(
        translation_data, tmp_path / "apart", *options, "--batch-size", 1, "--update-freq", 160, updates=2
    )
    sam = fairseq_train(
        translation_data, tmp_path / "sam", *options, "--batch-size", 160, "--sam-perturbation", "batch", updates=2
    )
    assert 100 * distance(together, apart) < distance(together, sam)


@pytest.mark.parametrize(
    "precision",
    [[], ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4], ["--amp"]],
    ids=["fp32", "fp16", "amp"],
)
def test_resumed_run_is_the_uninterrupted_one(translation_data: Path, tmp_path: Path, precision: list) -> None:
    options = [*TRANSLATION, *ADAM, *delta(), *INSTANCE, "--update-freq", 2, "--save-interval-updates", 1, *precision]
    options += ["--encoder-layerdrop", 0.2, "--decoder-layerdrop", 0.2]
    logs = ["--tensorboard-logdir", tmp_path / "logs"]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, *logs, updates=6)
    fairseq_train(translation_data, tmp_path / "parts", *options, updates=3)
    resumed = fairseq_train(translation_data, tmp_path / "parts", *options, updates=6)
    if "--fp16" not in precision:  # fairseq itself resumes fp16 from rounded weights
        assert_same_model(whole, resumed)
    logged = scalars(tmp_path / "logs", "sam_eps_norm", "sam_ess", "sam_sharpness", "sam_ascent_gnorm_std")
    assert logged["sam_eps_norm"] == pytest.approx([0.05] * 6, rel=1e-3)
    assert logged["sam_ess"] == [1.0] * 6
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


def test_activation_checkpointing_is_refused(translation_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid checkpoint_activations=True \(--checkpoint-activations\) with"):
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *delta(), *INSTANCE, "--checkpoint-activations")


def test_delta_sam_without_fairseq_equals_a_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    tokens, targets = torch.randint(11, (5, 4)), torch.randint(3, (5,))

    def losses() -> torch.Tensor:
        return F.cross_entropy(model(tokens).mean(dim=1), targets, reduction="none")

    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for index in range(5):
        gradients = torch.autograd.grad(losses()[index], list(model.parameters()))
        norm = torch.cat([gradient.view(-1) for gradient in gradients]).norm()
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
