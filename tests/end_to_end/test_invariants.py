"""Invariants of whole runs of the real fairseq-train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging.meters import AverageMeter

from tests.helpers.runs import (
    ADAM,
    SMOOTHED,
    TRANSLATION,
    USER_DIR,
    assert_same_model,
    base,
    delta,
    fairseq_train,
)

DROPPED = ["--encoder-layerdrop", 0.2, "--decoder-layerdrop", 0.2, "--update-freq", 2]
TIMING = {"wps", "ups", "wall", "train_wall", "gb_free"}


def logged(checkpoint: dict[str, Any]) -> dict[str, float]:
    """The averages of the training log, without timings and δ-SAM's own scalars."""
    values = {}
    for _, name, kind, state in checkpoint["extra_state"]["metrics"]["train"]:
        if kind == AverageMeter.__name__ and name not in TIMING and not name.startswith("sam_"):
            values[name] = float(state["sum"]) / max(float(state["count"]), 1)
    return values


CRITERIONS: dict[str, list[object]] = {
    "cross_entropy sentence_avg": ["--sentence-avg"],
    f"{SMOOTHED} report": ["--label-smoothing", 0.1, "--report-accuracy", "--ignore-prefix-size", 1],
}


@pytest.mark.parametrize("variant", CRITERIONS)
def test_radius_zero_is_the_base_run(translation_data: Path, tmp_path: Path, variant: str) -> None:
    """Bit for bit, log included, with dropout, LayerDrop, gradient accumulation and curvature probes."""
    criterion = variant.split()[0]
    options = [*TRANSLATION, *ADAM, *DROPPED, *CRITERIONS[variant]]
    one = fairseq_train(translation_data, tmp_path / "base", *options, *base(criterion))
    other = fairseq_train(translation_data, tmp_path / "delta", *options, *delta(criterion, rho=0))
    assert_same_model(one, other)
    assert logged(one) == logged(other)
    assert {"loss", "gnorm"} <= logged(one).keys()


@pytest.mark.parametrize("optimizer", ["sgd", "nag", "adagrad", "adafactor", "adamax", "adadelta"])
def test_radius_zero_with_other_base_optimizers(translation_data: Path, tmp_path: Path, optimizer: str) -> None:
    """Each keeps its own defaults, which differ: momentum is 0 in sgd and 0.99 in nag."""
    options = [*TRANSLATION, "--weight-decay", 0.01]
    one = fairseq_train(translation_data, tmp_path / "base", *options, *base(optimizer=optimizer))
    other = fairseq_train(translation_data, tmp_path / "delta", *options, *delta(optimizer=optimizer, rho=0))
    assert_same_model(one, other)
    groups = [checkpoint["last_optimizer_state"]["param_groups"][0] for checkpoint in (one, other)]
    assert groups[0] == groups[1]


def test_radius_makes_a_difference(translation_data: Path, tmp_path: Path) -> None:
    """Otherwise the tests above would compare equal runs."""
    runs = [
        fairseq_train(translation_data, tmp_path / name, *TRANSLATION, *ADAM, *options)["model"]
        for name, options in {
            "base": base(),
            "uniform": [*delta(), "--sam-weighting", "uniform"],
            "curvature": delta(),
        }.items()
    ]
    name = "decoder.layers.1.fc1.weight"
    assert not torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[1][name], runs[2][name])


def test_resumed_run_is_the_uninterrupted_one(translation_data: Path, tmp_path: Path) -> None:
    options = [*TRANSLATION, *ADAM, *DROPPED, *delta(), "--save-interval-updates", 1]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, updates=7)
    fairseq_train(translation_data, tmp_path / "parts", *options, updates=3)  # in the middle of an epoch
    resumed = fairseq_train(translation_data, tmp_path / "parts", *options, updates=7)
    assert_same_model(whole, resumed)


@pytest.mark.parametrize("rho", [0, 0.05])
def test_checkpoints_go_from_adam_to_delta_sam_and_back(translation_data: Path, tmp_path: Path, rho: float) -> None:
    """Without --reset-optimizer. With radius zero the three parts are one adam run."""
    options = [*TRANSLATION, *ADAM, "--label-smoothing", 0.1]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, *base(), updates=6)
    fairseq_train(translation_data, tmp_path / "parts", *options, *base(), updates=2)
    fairseq_train(translation_data, tmp_path / "parts", *options, *delta(rho=rho), updates=4)
    parts = fairseq_train(translation_data, tmp_path / "parts", *options, *base(), updates=6)
    assert parts["optimizer_history"][-1]["num_updates"] == 6
    if rho == 0:
        assert_same_model(whole, parts)
    else:
        with pytest.raises(AssertionError):
            assert_same_model(whole, parts)


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python environment outside the repository."""
    program, *rest = map(str, arguments)
    return subprocess.run(
        [str(Path(sys.executable).parent / program), *rest],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=Path(rest[0]).parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_as_a_user_types_them(translation_data: Path, tmp_path: Path) -> None:
    """Train with the two changed words, resume, generate.

    Layers normalize first. With post-norm layers fairseq 0.12.2 cannot generate in torch 2.
    """
    save_dir = tmp_path / "checkpoints"
    common = ["--arch", "transformer_tiny", "--encoder-normalize-before", "--save-dir", save_dir]
    common += ["--lr", 0.01, "--max-tokens", 400, "--cpu"]
    common += ["--log-format", "simple", "--log-interval", 1, "--label-smoothing", 0.1]
    changed = ["--user-dir", USER_DIR, "--optimizer", "delta_sam", "--base-optimizer", "adam"]
    changed += ["--adam-betas", "(0.9, 0.98)", "--criterion", "delta_sam", "--base-criterion", SMOOTHED]
    for updates in (2, 4):
        trained = command("fairseq-train", translation_data, *common, *changed, "--max-update", updates)
        assert trained.returncode == 0, trained.stderr
        assert "sam_sharpness" in trained.stdout
    assert "Loaded checkpoint" in trained.stdout

    arguments = [translation_data, "--path", save_dir / "checkpoint_last.pt", "--batch-size", 8, "--cpu", "--beam", 2]
    generated = command("fairseq-generate", *arguments, "--user-dir", USER_DIR)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.count("\nH-") == 24


BLEU: list[object] = ["--eval-bleu", "--eval-bleu-args", '{"beam": 2}', "--eval-bleu-detok", "space"]
BLEU += ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"]


def test_bleu_in_validation(translation_data: Path, tmp_path: Path) -> None:
    """fairseq writes its counts into the checkpoint as numpy's numbers and arrays."""
    options = [*TRANSLATION, "--encoder-normalize-before", *ADAM, *BLEU, "--save-interval-updates", 1]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, *delta(), updates=4)
    fairseq_train(translation_data, tmp_path / "parts", *options, *delta(), updates=2)
    assert_same_model(whole, fairseq_train(translation_data, tmp_path / "parts", *options, *delta(), updates=4))
    path = ["--path", tmp_path / "parts" / "checkpoint_last.pt", "--user-dir", USER_DIR]
    generated = command("fairseq-generate", translation_data, *path, "--batch-size", 8, "--cpu", "--beam", 2)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.count("\nH-") == 24


def test_checkpoint_needs_no_plugin(translation_data: Path, tmp_path: Path) -> None:
    """If a base checkpoint is plain data, so is a δ-SAM checkpoint: fairseq's own tools read it without the plugin.

    A checkpoint of the translation Transformer is not, with or without δ-SAM: it holds an argparse.Namespace, which
    torch >= 2.6 reads only if it is allowed. The plugin allows it.
    """
    data = ["--task", "language_modeling", "--sample-break-mode", "eos", "--output-dictionary-size", -1]
    (tmp_path / "dict.txt").write_text((translation_data / "dict.tgt.txt").read_text())
    for split in ("train", "valid"):
        for suffix in ("bin", "idx"):
            source = translation_data / f"{split}.src-tgt.tgt.{suffix}"
            (tmp_path / f"{split}.{suffix}").write_bytes(source.read_bytes())
    options = [*data, "--arch", "transformer_lm", "--decoder-embed-dim", 32, "--decoder-layers", 1]
    options += ["--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32, "--tokens-per-sample", 32]
    for name, changed in {"base": base("cross_entropy"), "delta": delta("cross_entropy")}.items():
        fairseq_train(tmp_path, tmp_path / name, *options, *ADAM, *changed, updates=2)
        evaluated = command(
            "fairseq-eval-lm", tmp_path, "--path", tmp_path / name / "checkpoint_last.pt", "--gen-subset", "valid",
            "--cpu", "--batch-size", 8, "--sample-break-mode", "eos",
        )  # fmt: skip
        assert evaluated.returncode == 0, evaluated.stderr
        assert "Perplexity" in evaluated.stdout + evaluated.stderr
