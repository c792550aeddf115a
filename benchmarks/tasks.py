"""The tasks of the studies: their data, the options of fairseq-train, and how a checkpoint is measured."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from examples.common.binary import binarize
from examples.common.evaluation import accuracy_and_loss, load
from examples.common.experiment import ENVIRONMENT, program
from examples.common.reviews import flipped, parts
from examples.finetune import recipe as finetune
from examples.sentiment import recipe as sentiment
from examples.translation import recipe as translation

LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"
WITHOUT_R_DROP = ("--model-overrides", "{'rdrop_alpha': 0}")  # it runs every sentence twice, and adds up both losses
BY_ACCURACY = "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric"  # after each epoch


class Scores(NamedTuple):
    """Of one checkpoint, without dropout; higher is better.

    Attributes:
        valid: accuracy in percent; for translation minus the cross-entropy per target piece, base 2.
        test: accuracy in percent, or BLEU; None if the test part was not looked at.
        test_loss: cross-entropy per sentence or per target piece, base 2.
    """

    valid: float
    test: float | None
    test_loss: float | None


class Trained(NamedTuple):
    """What a run of fairseq-train leaves: its folder, the statistics of its last epoch, the processor time it took."""

    folder: Path
    logged: dict[str, float]
    cpu_seconds: float

    @property
    def relative_sharpness(self) -> float | None:
        """The rise of the loss as a share of it; None for a base run."""
        rise = self.logged.get("train_sam_sharpness")
        return None if rise is None else rise / self.logged["train_loss"]


@dataclass(frozen=True)
class Task:
    """Something to be learned.

    Attributes:
        title: for tables.
        work: a folder for data and for runs.
        options: of fairseq-train, without those for the method, the length, the seed and the folders.
        score: on the test part, with its unit.
        criterion: the base criterion.
        updates: the usual number.
        noises: the shares of flipped labels.
        seeds: of the runs that count.
        data: makes the binary data, if they are not there, and returns their folder; takes the share of flipped labels.
        measure: scores of a checkpoint, given the data; takes whether to look at the test part.
    """

    title: str
    work: Path
    options: Sequence[str]
    score: str
    criterion: str
    updates: int
    noises: tuple[float, ...]
    seeds: tuple[int, ...]
    data: Callable[[float], Path]
    measure: Callable[[Path, Path, bool], Scores]

    def command(self, noise: float, options: str, seed: int, length: int = 1) -> list[str]:
        """The options of fairseq-train, except for the folder of its checkpoints.

        Args:
            noise: share of flipped labels.
            options: of the method.
            seed: of everything random.
            length: how many times the usual number of updates.
        """
        updates = self.updates * length
        own = f"{options} --total-num-update {updates} --max-update {updates} --seed {seed}"
        return [str(self.data(noise)), *self.options, "--log-format", "json", *own.split()]

    @contextmanager
    def trained(self, command: Sequence[str]) -> Iterator[Trained]:
        """Train in a folder that is removed afterwards.

        Yields:
            what the run left.

        Raises:
            SystemExit: fairseq-train has failed.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work, prefix="run-") as folder:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [program("fairseq-train"), *command, "--save-dir", folder],
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{done.stdout[-3000:]}\n{' '.join(command)}: fairseq-train failed ({done.returncode}).")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            lines = [line for line in done.stdout.splitlines() if "| INFO | train | {" in line]
            logged = {name: float(value) for name, value in json.loads(lines[-1].split(" | ")[-1]).items()}
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            yield Trained(Path(folder), logged, seconds)


def noisy_reviews(noise: float) -> Path:
    """Movie reviews: labels of the training and the validation part are flipped, those of the test part are clean."""
    from examples.sentiment.prepare import encode

    folder = sentiment.WORK / "accuracy" / f"data-bin-{noise}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        splits = parts(sentiment.WORK)
        splits |= {name: flipped(splits[name], noise) for name in ("train", "valid")}
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="prepare-") as name:
            encode(splits, Path(name))
            binarize(Path(name)).rename(folder)
    return folder


def few_reviews(noise: float) -> Path:
    """The same for the pretrained model, with 500 sentences for training."""
    from examples.finetune import prepare

    folder = finetune.WORK / "accuracy" / f"data-bin-{noise}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not finetune.MODEL.exists():
        prepare.write_model(finetune.MODEL)
    if not folder.exists():
        prepare.write_data(folder, noise=noise)
    return folder


def classification(checkpoint: Path, data: Path, with_test: bool) -> Scores:
    """Accuracy and loss; of a run with a moving average, those of the average."""
    model, task = load(checkpoint, data)
    averaged = torch.load(checkpoint)["extra_state"].get("ema")
    if averaged is not None:  # --store-ema
        model.load_state_dict(averaged)
    task.load_dataset("valid")
    valid, _ = accuracy_and_loss(model, task.dataset("valid"))
    if not with_test:
        return Scores(valid, None, None)
    task.load_dataset("test")
    return Scores(valid, *accuracy_and_loss(model, task.dataset("test")))


def parallel_text(noise: float) -> Path:
    """Debian's help pages and dictionary in German and English; there are no labels to flip."""
    from examples.translation import prepare

    if not translation.DATA.exists():
        translation.WORK.mkdir(parents=True, exist_ok=True)
        prepare.main()
    return translation.DATA


def translating(checkpoint: Path, data: Path, with_test: bool) -> Scores:
    """Loss by fairseq-validate, BLEU by fairseq-generate and sacrebleu."""
    from examples.translation.evaluate import bleu, hypotheses, loss, printed

    def measured(split: str) -> float:
        return loss(printed("fairseq-validate", checkpoint, "--valid-subset", split, *WITHOUT_R_DROP), split)

    valid = -measured("valid")
    if not with_test:
        return Scores(valid, None, None)
    score, _, _ = bleu(hypotheses(printed("fairseq-generate", checkpoint)))
    return Scores(valid, score, measured("test"))


TASKS = {
    "sentiment": Task(
        title="sentiment from scratch",
        work=sentiment.WORK / "accuracy",
        options=[*sentiment.SHARED, *BY_ACCURACY.split()],
        score="accuracy, %",
        criterion="sentence_prediction",
        updates=1060,  # 4 epochs
        noises=(0.3, 0.0),
        seeds=(2, 3, 4, 5, 6),
        data=noisy_reviews,
        measure=classification,
    ),
    "finetune": Task(
        title="sentiment fine-tuned on 500 sentences",
        work=finetune.WORK / "accuracy",
        options=[*finetune.SHARED, "--validate-interval", "1", *BY_ACCURACY.split()],
        score="accuracy, %",
        criterion="sentence_prediction",
        updates=155,  # 5 epochs
        noises=(0.3, 0.0),
        seeds=(2, 3, 4, 5, 6),
        data=few_reviews,
        measure=classification,
    ),
    "translation": Task(
        title="translation from German",
        work=translation.WORK / "accuracy",
        options=[*translation.SHARED, "--best-checkpoint-metric", "nll_loss"],
        score="BLEU",
        criterion=translation.BASE,
        updates=1000,
        noises=(0.0,),
        seeds=(2, 3, 4),
        data=parallel_text,
        measure=translating,
    ),
}
