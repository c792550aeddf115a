"""Unusual models, criterions and tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import homemade
from tests.helpers.runs import (
    ADAM,
    HALF,
    SMOOTHED,
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


def test_a_part_of_the_model_at_a_time_in_half_precision_is_refused(translation_data: Path, tmp_path: Path) -> None:
    """Nothing tells which fp32 copies belong to the part."""
    with pytest.raises(RuntimeError, match=r"For a task that trains a part of the model at a time .* --amp instead"):
        fairseq_train(translation_data, tmp_path, *MULTILINGUAL, *ADAM, *delta(), *HALF)
