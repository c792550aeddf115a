"""Features of fairseq's trainer and models that act on the loss or the passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.runs import ADAM, TRANSLATION, assert_same_model, base, delta, distance, fairseq_train, trained

SURROUNDINGS: dict[str, list[object]] = {
    "activation checkpointing": ["--checkpoint-activations"],
    "quantization noise": ["--quant-noise-pq", 0.3, "--quant-noise-pq-block-size", 8],
    "average of the weights": ["--store-ema", "--ema-decay", 0.9],
    "attention dropout": ["--attention-dropout", 0.1, "--activation-dropout", 0.1, "--layernorm-embedding"],
    "accumulation schedule": ["--update-freq", "1,3"],
    "learning-rate schedule": ["--lr-scheduler", "inverse_sqrt", "--warmup-updates", 4],
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_radius_zero_is_the_base_run(translation_data: Path, tmp_path: Path, name: str) -> None:
    options = [*TRANSLATION, *ADAM, *SURROUNDINGS[name], "--label-smoothing", 0.1]
    one = fairseq_train(translation_data, tmp_path / "base", *options, *base())
    other = fairseq_train(translation_data, tmp_path / "delta", *options, *delta(rho=0))
    assert_same_model(one, other)
    averages = [trained(checkpoint["extra_state"].get("ema", {})) for checkpoint in (one, other)]
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(average, averages[1][key]) for key, average in averages[0].items())
    assert bool(averages[0]) == (name == "average of the weights")


def test_activation_checkpointing_changes_nothing_but_rounding(translation_data: Path, tmp_path: Path) -> None:
    """As in the base run: gradients are added in another order."""
    options = [*TRANSLATION, *delta(optimizer="sgd"), "--label-smoothing", 0.1]
    plain = fairseq_train(translation_data, tmp_path / "plain", *options)
    saving = fairseq_train(translation_data, tmp_path / "saving", *options, "--checkpoint-activations")
    unlike = fairseq_train(translation_data, tmp_path / "unlike", *options, "--sam-rho", 0.04)
    assert 5 * distance(plain, saving) < distance(plain, unlike)
