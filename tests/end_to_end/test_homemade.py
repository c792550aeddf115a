"""Unusual models, criterions and tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import homemade
from tests.helpers.runs import (
    ADAM,
    HALF,
    SMOOTHED,
    TRANSLATION,
    assert_batches_of_one_are_sam,
    assert_same_model,
    base,
    delta,
    fairseq_train,
    scalars,
)

HOMEMADE = ["--task", "translation", "--arch", homemade.MODEL, "--dropout", 0.3]

SIZES = [f"--{side}-{name}" for side in ("encoder", "decoder") for name in ("embed-dim", "ffn-embed-dim")]
MULTILINGUAL = ["--task", "multilingual_translation", "--lang-pairs", "src-tgt,tgt-src"]
MULTILINGUAL += ["--arch", "multilingual_transformer", "--encoder-layers", 1, "--decoder-layers", 1, "--dropout", 0.3]
MULTILINGUAL += ["--encoder-attention-heads", 2, "--decoder-attention-heads", 2]
MULTILINGUAL += [option for size in SIZES for option in (size, 16)]


@pytest.mark.parametrize("options", [HOMEMADE, MULTILINGUAL], ids=["a model inside a model", "several language pairs"])
def test_radius_zero_is_the_base_run(translation_data: Path, tmp_path: Path, options: list[object]) -> None:
    criterion = homemade.CRITERION if options is HOMEMADE else SMOOTHED
    finals, losses = [], []
    for name, changed in {"base": base(criterion), "delta": delta(criterion, rho=0)}.items():
        logs = ["--tensorboard-logdir", tmp_path / name / "logs"]
        finals.append(fairseq_train(translation_data, tmp_path / name, *options, *ADAM, *changed, *logs, updates=4))
        losses.append(scalars(tmp_path / name / "logs", "loss"))
    assert_same_model(*finals)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("options", [HOMEMADE, MULTILINGUAL], ids=["names in common", "several language pairs"])
def test_batches_of_one_are_sam(translation_data: Path, tmp_path: Path, options: list[object]) -> None:
    """The parameters of the model and of the criterion are perturbed."""
    changed = delta(homemade.CRITERION if options is HOMEMADE else SMOOTHED, optimizer="sgd")
    options = [*options, *changed, "--batch-size", 1, "--lr", 0.02]
    assert_batches_of_one_are_sam(
        lambda name, *own: fairseq_train(translation_data, tmp_path / name, *options, *own, updates=3)
    )


@pytest.mark.parametrize("task", [homemade.THAWING, homemade.FREEZING])
@pytest.mark.parametrize("perturbation", ["batch", "instance"])
def test_resumed_run_of_a_task_that_freezes_layers(
    translation_data: Path, tmp_path: Path, task: str, perturbation: str
) -> None:
    """The run is interrupted between two epochs. In both only what is trained is perturbed."""
    options = ["--arch", "transformer_tiny", "--task", task, *ADAM, *delta(), "--sam-perturbation", perturbation]
    options += ["--update-epoch-batch-itr", True, "--disable-validation"]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, updates=13)
    fairseq_train(translation_data, tmp_path / "parts", *options, "--max-epoch", 1, updates=13)
    assert_same_model(whole, fairseq_train(translation_data, tmp_path / "parts", *options, updates=13))


@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize("precision", [HALF, ["--fp16", "--fp16-init-scale", 4]], ids=["copies", "flat copy"])
def test_half_precision_with_a_task_that_freezes_layers(
    translation_data: Path, tmp_path: Path, precision: list[object]
) -> None:
    options = ["--arch", "transformer_tiny", "--task", homemade.THAWING, *delta(), *precision, "--disable-validation"]
    fairseq_train(translation_data, tmp_path, *options, "--tensorboard-logdir", tmp_path / "logs", updates=12)
    assert scalars(tmp_path / "logs", "sam_eps_norm")["sam_eps_norm"] == pytest.approx([0.05] * 12, rel=0.2)


@pytest.mark.parametrize("task", [homemade.REGULARIZED, homemade.LATE_REGULARIZED])
@pytest.mark.parametrize("perturbation", ["batch", "instance"])
def test_loss_terms_outside_the_criterion(translation_data: Path, tmp_path: Path, perturbation: str, task: str) -> None:
    options = ["--arch", "transformer_tiny", "--task", task, *delta()]
    message = rf"Task '{task}' adds .* to \d+ parameters \(encoder[^,]+(, encoder[^,]+){{4}}, …\)\. Use another"
    with pytest.raises(RuntimeError, match=message):
        fairseq_train(translation_data, tmp_path, *options, "--sam-perturbation", perturbation, "--update-freq", 2)


def test_a_criterion_that_logs_no_sizes(translation_data: Path, tmp_path: Path) -> None:
    """fairseq asks for none in the log: the size that counts is the one that the criterion returns."""
    sharpness = []
    for criterion in (SMOOTHED, homemade.TERSE):
        logs = tmp_path / criterion / "logs"
        options = [*TRANSLATION, *ADAM, *delta(criterion), "--disable-validation", "--tensorboard-logdir", logs]
        fairseq_train(translation_data, tmp_path / criterion, *options, updates=3)
        sharpness.append(scalars(logs, "sam_sharpness")["sam_sharpness"])
    assert sharpness[0] == sharpness[1]


def test_a_weighting_of_one_s_own(translation_data: Path, tmp_path: Path) -> None:
    """Registered in a user-dir, and named on the command line like any other."""
    runs = []
    for name in (homemade.WEIGHTING, "curvature", "uniform"):
        options = [*TRANSLATION, *ADAM, *delta(), "--sam-weighting", name]
        options += ["--tensorboard-logdir", tmp_path / name / "logs"]
        fairseq_train(translation_data, tmp_path / name, *options, updates=2)
        runs.append(scalars(tmp_path / name / "logs", "sam_sharpness")["sam_sharpness"])
    assert runs[0] != runs[1]
    assert runs[0] != runs[2]
    ess = scalars(tmp_path / homemade.WEIGHTING / "logs", "sam_ess")["sam_ess"]
    assert all(0 < share < 1 for share in ess)


def test_weighting_by_logits_is_refused_for_a_criterion_that_gives_none(translation_data: Path, tmp_path: Path) -> None:
    message = rf"Criterion '{homemade.CRITERION}' \(--base-criterion\) gives no logits, and the weighting \(--sam-weig"
    with pytest.raises(ValueError, match=message):
        fairseq_train(translation_data, tmp_path, *HOMEMADE, *delta(homemade.CRITERION), "--sam-weighting", "kl")


def test_a_part_of_the_model_at_a_time_in_half_precision_is_refused(translation_data: Path, tmp_path: Path) -> None:
    """Nothing tells which fp32 copies belong to the part."""
    with pytest.raises(RuntimeError, match=r"For a task that trains or freezes a part .* use --amp"):
        fairseq_train(translation_data, tmp_path, *MULTILINGUAL, *ADAM, *delta(), *HALF)
