"""Measure all trained models by the same commands: loss on the validation part, BLEU on the test part."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sacrebleu

from ..common.experiment import ENVIRONMENT, program
from .recipe import DATA, EXPERIMENT, PLUGIN

BEAM = 5
RESAMPLES = 1000  # of the test part, for the interval

# By default fairseq makes batches of a multiple of 8 sentences and leaves out the rest.
SHARED = "--cpu --num-workers 0 --batch-size 64 --required-batch-size-multiple 1"
COMMANDS = {
    "fairseq-validate": f"{SHARED} --task translation --valid-subset valid --log-format json",
    "fairseq-generate": f"{SHARED} --gen-subset test --beam {BEAM} --remove-bpe sentencepiece",
}


@dataclass
class Result:
    """The measures of a run.

    Attributes:
        valid_loss: cross-entropy per target token in base 2, without smoothing and dropout.
        bleu: of detokenized text.
        interval: half the width of its 95 % interval.
        signature: how sacrebleu computed it.
    """

    valid_loss: float
    bleu: float
    interval: float
    signature: str


def evaluate_all() -> dict[str, Result]:
    """Return the measures of the last checkpoint of every run. Uses all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = dict(zip(EXPERIMENT.commands, pool.map(evaluate, EXPERIMENT.commands)))
    return {run: Result(loss(validation), *bleu(hypotheses(test))) for run, (validation, test) in logs.items()}


def evaluate(run: str) -> list[str]:
    return [output(run, name) for name in COMMANDS]


def output(run: str, name: str) -> str:
    """Return the output of a command of COMMANDS for the run's last checkpoint. Reuses an earlier output.

    Raises:
        SystemExit: the command has failed.
    """
    command = COMMANDS[name]
    record = EXPERIMENT.folder(run) / f"{name}.txt"
    if record.exists():
        known, _, text = record.read_text(encoding="utf-8").partition("\n")
        if known == command:
            print(f"{run:9} | {name} is there", flush=True)
            return text
    print(f"{run:9} | {name}", flush=True)
    text = printed(name, EXPERIMENT.folder(run) / "checkpoint_last.pt")
    partial = record.with_suffix(".partial")
    partial.write_text(f"{command}\n{text}", encoding="utf-8")
    partial.rename(record)
    return text


def printed(name: str, checkpoint: Path, *own: str) -> str:
    """Run a command of COMMANDS for a checkpoint and return its output.

    Args:
        name: of the command.
        checkpoint: what to measure.
        own: further options; they win over those of COMMANDS.

    Raises:
        SystemExit: the command has failed.
    """
    options = [str(DATA), "--user-dir", str(PLUGIN), *COMMANDS[name].split(), "--path", str(checkpoint), *own]
    log = subprocess.run(
        [program(name), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **ENVIRONMENT, "PYTHONIOENCODING": "utf-8"},
    )
    if log.returncode:
        sys.exit(f"{log.stdout[-3000:]}\n{checkpoint}: {name} failed ({log.returncode}).")
    return log.stdout


def loss(log: str, split: str = "valid") -> float:
    """Return the loss in the last line of fairseq-validate's output for this part of the data."""
    return float(json.loads(log.strip().split(" | ")[-1])[f"{split}_nll_loss"])


def hypotheses(log: str) -> list[str]:
    """Return the detokenized translations in the data's order, from fairseq-generate's lines `D-<number>`."""
    fields = [line.split("\t") for line in log.split("\n") if line.startswith("D-")]
    return [text for _, text in sorted((int(name[2:]), text) for name, _, text in fields)]


def bleu(translation: list[str]) -> tuple[float, float, str]:
    """Return BLEU against the plain text of the test part, half the width of its 95 % interval, and the signature."""
    metric = sacrebleu.BLEU()
    references = (DATA / "test.target").read_text(encoding="utf-8").split("\n")[:-1]
    if len(translation) != len(references):  # sacrebleu would compare them with the wrong references
        sys.exit(f"fairseq-generate translated {len(translation)} of {len(references)} segments of the test part.")
    score = metric.corpus_score(translation, [references], n_bootstrap=RESAMPLES)
    return score.score, score._ci, str(metric.get_signature())


if __name__ == "__main__":
    for name, result in evaluate_all().items():
        print(name, result, flush=True)
