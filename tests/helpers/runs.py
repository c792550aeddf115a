"""Run the real fairseq-train inside this process, on small text."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.logging import progress_bar
from fairseq_cli import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deltasam_plugin  # noqa: F401  (lets torch read fairseq's checkpoints)

USER_DIR = Path(__file__).resolve().parents[2] / "deltasam_plugin"

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "finds", "big", "small", "red", "old", "today", "here"]

TRANSLATION: list[object] = ["--task", "translation", "--arch", "transformer_tiny", "--dropout", 0.3]
SENTENCES: list[object] = ["--task", "sentence_prediction", "--arch", "roberta", "--encoder-layers", 2]
SENTENCES += ["--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64, "--encoder-attention-heads", 2]
SENTENCES += ["--max-positions", 32, "--init-token", 0, "--separator-token", 2, "--dropout", 0.2]
ADAM: list[object] = ["--adam-betas", "(0.9, 0.98)", "--clip-norm", 1.0]
HALF: list[object] = ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4]
INSTANCE: list[object] = ["--sam-perturbation", "instance"]
SMOOTHED = "label_smoothed_cross_entropy"


def base(criterion: str = SMOOTHED, optimizer: str = "adam") -> list[object]:
    """The two options of an ordinary run."""
    return ["--optimizer", optimizer, "--criterion", criterion]


def delta(criterion: str = SMOOTHED, optimizer: str = "adam", rho: float = 0.05) -> list[object]:
    """The same run under δ-SAM."""
    changed = ["--optimizer", "delta_sam", "--base-optimizer", optimizer, "--criterion", "delta_sam"]
    return [*changed, "--base-criterion", criterion, "--sam-rho", rho]


def write_translation(prefix: Path, count: int, seed: int) -> None:
    """A toy language: every word spelled backwards, sentences of 3 to 9 words."""
    draw = random.Random(seed)
    sentences = [draw.choices(WORDS, k=draw.randint(3, 9)) for _ in range(count)]
    prefix.with_suffix(".src").write_text("".join(" ".join(words) + "\n" for words in sentences))
    prefix.with_suffix(".tgt").write_text("".join(" ".join(w[::-1] for w in words) + "\n" for words in sentences))


def write_labels(prefix: Path, count: int, seed: int) -> None:
    """Sentences with a class (is there a cat before a dog?) and a score (the share of animals)."""
    draw = random.Random(seed)
    sentences = [draw.choices(WORDS, k=draw.randint(3, 12)) for _ in range(count)]
    prefix.with_suffix(".txt").write_text("".join(" ".join(words) + "\n" for words in sentences))
    classes = ["cat" in words and "dog" not in words[: words.index("cat")] for words in sentences]
    prefix.with_suffix(".class").write_text("".join(f"{int(c)}\n" for c in classes))
    shares = [sum(word in ("cat", "dog", "bird") for word in words) / len(words) for words in sentences]
    prefix.with_suffix(".score").write_text("".join(f"{share:.4f}\n" for share in shares))


def run(main: Callable[[], None], *arguments: object) -> None:
    """Call a fairseq entry point with these command-line arguments."""
    argv = sys.argv
    sys.argv = [main.__module__, *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = argv


def fairseq_train(data: Path, save_dir: Path, *arguments: object, updates: int = 6) -> dict[str, Any]:
    """Run the real fairseq-train on CPU and return its last checkpoint.

    Args:
        data: binarized data.
        save_dir: where checkpoints go.
        arguments: further options; they override the ones below where they name the same.
        updates: number of updates.
    """
    options: list[object] = ["--save-dir", save_dir, "--max-update", updates, "--cpu", "--seed", 3, "--lr", 0.01]
    options += ["--batch-size", 16, "--num-workers", 0, "--log-format", "json", "--log-interval", 1]
    # No buffer thread: it crops audio by numpy's generator while the model may draw from it too.
    options += ["--data-buffer-size", 0]
    options += ["--user-dir", USER_DIR]
    try:
        run(train.cli_main, data, *options, *arguments)
    finally:  # fairseq opens TensorBoard's files once per process; here every run has its own
        for writer in progress_bar._tensorboard_writers.values():
            writer.close()
        progress_bar._tensorboard_writers.clear()
        vars(checkpoint_utils.save_checkpoint).pop("best", None)  # its best score so far, also of another run
    return torch.load(save_dir / "checkpoint_last.pt")


def scalars(logdir: Path, *names: str) -> dict[str, list[float]]:
    """Scalars of the training log, one value per update, read from the event files."""
    events = EventAccumulator(str(logdir / "train_inner"))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in names}


# fairseq 0.12.2 saves an uninitialised buffer, and copies of an encoder layer's weights for fast inference. Training
# does not change the copies: they are zero until a checkpoint is loaded, then that checkpoint's weights.
_UNTRAINED = re.compile(r".*\._float_tensor|.*\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")


def trained(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights and statistics of a model that training determines."""
    return {name: value for name, value in weights.items() if not _UNTRAINED.fullmatch(name)}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The L2 norm of the difference between two checkpoints' weights."""
    weights = trained(other["model"])
    differences = [(weight - weights[name]).double().square().sum() for name, weight in trained(one["model"]).items()]
    return float(sum(differences)) ** 0.5


def assert_same_model(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints hold the same weights and the same optimizer state, bit for bit."""
    assert one["model"].keys() == other["model"].keys()
    weights = trained(other["model"])
    different = [name for name, weight in trained(one["model"]).items() if not torch.equal(weight, weights[name])]
    assert not different
    states = [checkpoint["last_optimizer_state"]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, values in states[0].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), (key, name)


def assert_batches_of_one_are_sam(train: Callable[..., dict[str, Any]]) -> None:
    """With batches of one sample, instance mode is SAM.

    Args:
        train: called with a name and further options; returns the last checkpoint of a run with batches of one.
    """
    sam = train("sam", "--sam-weighting", "uniform")
    instance = train("instance", *INSTANCE)
    plain = train("plain", "--sam-rho", 0)
    assert 100 * distance(sam, instance) < distance(sam, plain)
