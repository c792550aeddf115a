"""Shared by all tests: Hypothesis profiles, small real data, and the real fairseq-train, run inside this process."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fairseq_cli import preprocess, train
from hypothesis import settings

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

USER_DIR = str(Path(__file__).resolve().parent.parent / "deltasam_plugin")

WORDS = "the a cat dog bird sees hears finds big small red old quickly slowly today here".split()
REVERSED = {word: word[::-1] for word in WORDS}


def write_sentences(prefix: Path, count: int, seed: int) -> None:
    """A toy translation: every word spelled backwards, sentences of 3 to 9 words."""
    draw = random.Random(seed)
    sentences = [draw.choices(WORDS, k=draw.randint(3, 9)) for _ in range(count)]
    prefix.with_suffix(".src").write_text("".join(" ".join(words) + "\n" for words in sentences))
    prefix.with_suffix(".tgt").write_text("".join(" ".join(REVERSED[w] for w in words) + "\n" for words in sentences))


@pytest.fixture(scope="session")
def translation_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binarized toy translation corpus, made by fairseq-preprocess."""
    root = tmp_path_factory.mktemp("translation")
    for seed, (split, count) in enumerate({"train": 160, "valid": 24}.items()):
        write_sentences(root / split, count, seed)
    run(
        preprocess.cli_main,
        ["--source-lang", "src", "--target-lang", "tgt", "--trainpref", root / "train", "--validpref", root / "valid"]
        + ["--destdir", root / "bin", "--workers", 1],
    )
    return root / "bin"


def run(main: Callable[[], None], arguments: list[object]) -> None:
    """Call a fairseq entry point with these command-line arguments."""
    argv = sys.argv
    sys.argv = [main.__module__, *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = argv


def fairseq_train(data: Path, save_dir: Path, *arguments: object, updates: int = 6) -> dict:
    """Run the real fairseq-train on CPU and return its last checkpoint.

    Args:
        data: binarized data.
        save_dir: where checkpoints go.
        arguments: further options; they override the ones below where they name the same.
        updates: number of updates.
    """
    options: list[object] = [data, "--save-dir", save_dir, "--max-update", updates, "--cpu", "--seed", 3]
    options += ["--batch-size", 16, "--num-workers", 0, "--lr", 0.01, "--log-format", "json", "--log-interval", 1]
    options += ["--user-dir", USER_DIR]
    run(train.cli_main, options + list(arguments))
    return torch.load(save_dir / "checkpoint_last.pt")


TRANSLATION: list[object] = ["--task", "translation", "--arch", "transformer_tiny", "--dropout", 0.3]
ADAM: list[object] = ["--adam-betas", "(0.9, 0.98)", "--clip-norm", 1.0]
SMOOTHED: list[object] = ["--label-smoothing", 0.1]
BASE: list[object] = ["--optimizer", "adam", *ADAM, "--criterion", "label_smoothed_cross_entropy", *SMOOTHED]
DELTA: list[object] = ["--optimizer", "delta_sam", "--base-optimizer", "adam", *ADAM]
DELTA += ["--criterion", "delta_sam", "--base-criterion", "label_smoothed_cross_entropy", *SMOOTHED]


def assert_same_model(one: dict, other: dict) -> None:
    """Two checkpoints hold the same weights and the same optimizer state, bit for bit."""
    assert one["model"].keys() == other["model"].keys()
    different = [name for name, weight in one["model"].items() if not torch.equal(weight, other["model"][name])]
    assert not different
    states = one["last_optimizer_state"]["state"], other["last_optimizer_state"]["state"]
    assert states[0].keys() == states[1].keys()
    for key, values in states[0].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), (key, name)
