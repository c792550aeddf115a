"""What sharpness-aware training brings: one study, in slices that can be run in any number of sittings.

    python -m benchmarks.accuracy                     # goes on where it was; Ctrl-C stops it, and nothing is lost
    python -m benchmarks.accuracy --list              # what is done and what is left
    python -m benchmarks.accuracy --report            # the tables of benchmarks/README.md, from the rows that are there

A slice is one training run of fairseq-train: a task, a method, a value of the method's own parameter, and a seed. Its
result is one row of accuracy.csv, written when the run is complete. First every method is tried with three values of
its parameter and seed 1 (phase "tuning"). The value with the best validation accuracy after the last epoch, the least
one among equals, is then trained with five other seeds (phase "final"). Only these rows enter the report. The test part
is never looked at for a choice.

Task: sentiment of movie reviews from scratch, with the options of examples/sentiment. With noise, 30 % of the labels of
the training and validation parts are flipped, chosen by a hash of the sentence. The labels of the test part are clean.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.study import Method, Row, append, best_value, tables
from benchmarks.study_figure import draw
from examples.common.experiment import ENVIRONMENT, program
from examples.sentiment import prepare
from examples.sentiment.recipe import DELTA_SAM, SHARED, WORK

RESULTS = Path(__file__).with_name("accuracy.csv")
UPDATES = 1060  # 4 epochs
BEST = "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --log-format json"
TUNING_SEED, SEEDS = 1, (2, 3, 4, 5, 6)
NOISES = (0.3, 0.0)

SAM = f"{DELTA_SAM} --sam-weighting uniform"
INSTANCE = f"{DELTA_SAM} --sam-perturbation instance"
ADAM = "--optimizer adam --criterion sentence_prediction"
METHODS = {  # most important first
    "adam": Method(ADAM, ()),
    "sam": Method(f"{SAM} --sam-rho {{}}", (0.05, 0.1, 0.2)),
    "instance": Method(f"{INSTANCE} --sam-rho {{}}", (0.01, 0.02, 0.05)),
    "delta_sam": Method(f"{DELTA_SAM} --sam-rho {{}}", (0.05, 0.1, 0.2)),
    "adam, twice the updates": Method(ADAM, (), length=2),
    "adam, more dropout": Method(f"{ADAM} --dropout {{}}", (0.4, 0.5, 0.6)),
    "adam, moving average": Method(f"{ADAM} --store-ema --ema-decay {{}}", (0.98, 0.99, 0.995)),
    "momentum_sam": Method(f"{DELTA_SAM} --sam-ascent momentum --sam-rho {{}}", (0.1, 0.3, 1.0)),
    "delta_sam, kl": Method(f"{DELTA_SAM} --sam-weighting kl --sam-rho {{}}", (0.05, 0.1, 0.2)),
    "instance, loss budget": Method(f"{INSTANCE} --sam-rho 0.1 --sam-loss-budget {{}}", (0.03, 0.1, 0.3)),
    "instance, groups of 4": Method(f"{INSTANCE} --sam-group 4 --sam-rho {{}}", (0.02, 0.05, 0.1)),
    "sam_on": Method(f"{SAM} --sam-parameters layer_norm --sam-rho {{}}", (0.1, 0.2, 0.5)),
    "rw_sam": Method(f"{DELTA_SAM} --sam-weighting gradient_norm --sam-rho {{}}", (0.05, 0.1, 0.2)),
}


class Slice(NamedTuple):
    """One training run; its text form names it on the command line."""

    noise: float
    method: str
    value: float | None
    seed: int

    @property
    def phase(self) -> str:
        """What the run is for."""
        return "tuning" if self.seed == TUNING_SEED else "final"

    def options(self, folder: Path) -> list[str]:
        """The options of fairseq-train."""
        method = METHODS[self.method]
        updates = UPDATES * method.length
        length = f"--total-num-update {updates} --max-update {updates}"
        own = f"{method.options.format(self.value)} {length} --seed {self.seed} --save-dir {folder}"
        return [str(data(self.noise)), *f"{SHARED} {BEST} {own}".split()]


def data(noise: float) -> Path:
    """The folder of the binary data with so many labels flipped."""
    return WORK / "accuracy" / f"data-bin-{noise}"


def flipped(pairs: list[tuple[str, int]], noise: float) -> list[tuple[str, int]]:
    """The same sentences with a share of the labels changed, chosen by a hash of the sentence."""

    def chosen(sentence: str) -> bool:
        digest = hashlib.sha256(f"flip {sentence.casefold()}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < noise * 2**64

    return [(sentence, 1 - label if chosen(sentence) else label) for sentence, label in pairs]


def make_data(noise: float) -> None:
    """Write the binary data, if it is not there."""
    if data(noise).exists():
        return
    data(noise).parent.mkdir(parents=True, exist_ok=True)
    splits = prepare.split(prepare.clean(prepare.source().decode("utf-8")))
    splits |= {name: flipped(splits[name], noise) for name in ("train", "valid")}
    with tempfile.TemporaryDirectory(dir=data(noise).parent, prefix="prepare-") as folder:
        prepare.encode(splits, Path(folder))
        prepare.binarize(Path(folder)).rename(data(noise))


def rows() -> list[Row]:
    """The results so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [Row.read(row) for row in csv.DictReader(file)]


def wanted(done: list[Row]) -> Iterator[Slice]:
    """All slices that can be run now, in order: tuning, then the chosen value with other seeds."""
    for noise in NOISES:
        for name, method in METHODS.items():
            for value in method.values:
                yield Slice(noise, name, value, TUNING_SEED)
            tried = [row for row in done if (row.noise, row.method, row.phase) == (noise, name, "tuning")]
            if len(tried) == len(method.values):
                for seed in SEEDS:
                    yield Slice(noise, name, best_value(tried), seed)


def run(chosen: Slice) -> Row:
    """Train, and measure the last and the best checkpoint without dropout; of a moving average, the average."""
    from examples.sentiment.evaluate import accuracy_and_loss, load

    make_data(chosen.noise)
    with tempfile.TemporaryDirectory(dir=data(chosen.noise).parent, prefix="run-") as name:
        folder = Path(name)
        done = subprocess.run(
            [program("fairseq-train"), *chosen.options(folder)],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{done.stdout[-3000:]}\n{chosen}: fairseq-train failed ({done.returncode}).")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        measured = []
        for checkpoint in ("checkpoint_last.pt", "checkpoint_best.pt"):
            model, task = load(folder / checkpoint, data(chosen.noise))
            averaged = torch.load(folder / checkpoint)["extra_state"].get("ema")
            if averaged is not None:  # --store-ema
                model.load_state_dict(averaged)
            for split in ("valid", "test"):
                task.load_dataset(split)
            valid, _ = accuracy_and_loss(model, task.dataset("valid"))
            measured += [valid, *accuracy_and_loss(model, task.dataset("test"))]
    logged = [json.loads(line.split(" | ")[-1]) for line in done.stdout.splitlines() if "| INFO | train | {" in line]
    last = {name: float(value) for name, value in logged[-1].items()}
    relative = last["train_sam_sharpness"] / last["train_loss"] if "train_sam_sharpness" in last else None
    return Row(
        *(chosen.noise, chosen.method, chosen.value, chosen.seed, chosen.phase, int(last["train_num_updates"])),
        *measured,
        relative,
        used.ru_utime + used.ru_stime,
    )


def keep(row: Row) -> None:
    """Add a row to the results, and draw the figure of all."""
    append(RESULTS, Row._fields, [row.written()])
    draw(rows(), RESULTS.with_suffix(".png"))


def work(number: int, pause_file: Path | None) -> None:
    """Run slices until none is left, so many at a time, each in a process of its own.

    Raises:
        SystemExit: a slice has failed. The others that run then are finished before.
    """
    running: dict[Slice, Future[None]] = {}

    def one(chosen: Slice) -> None:
        subprocess.run([sys.executable, "-m", "benchmarks.accuracy", "--slice", json.dumps(chosen)], check=True)

    with ThreadPoolExecutor(number) as pool:
        while True:
            for ended in [chosen for chosen, future in running.items() if future.done()]:
                if running.pop(ended).exception():
                    sys.exit(f"{ended} failed, see above. Run it again when this is fixed: it goes on where it was.")
            done = rows()
            left = [s for s in wanted(done) if s not in {Slice(*row[:4]) for row in done} and s not in running]
            if not left and not running:
                return
            if left and len(running) < number and not (pause_file and pause_file.exists()):
                print(f"{time.strftime('%H:%M')} starts {left[0]}", flush=True)
                running[left[0]] = pool.submit(one, left[0])
            time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list what is done and what is left")
    parser.add_argument("--report", action="store_true", help="print the tables")
    parser.add_argument("--processes", type=int, default=2, help="how many runs at a time, of one thread each")
    parser.add_argument("--pause-file", type=Path, help="no run is started while this file exists")
    parser.add_argument("--slice", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.slice:
        logging.disable(logging.WARNING)
        keep(run(Slice(*arguments.slice)))
    elif arguments.report:
        print(tables(rows()))
    elif arguments.list:
        done = rows()
        known = {Slice(*row[:4]) for row in done}
        for chosen in wanted(done):
            print("done" if chosen in known else "left", *chosen)
    else:
        for noise in NOISES:
            make_data(noise)
        work(arguments.processes, arguments.pause_file)


if __name__ == "__main__":
    main()
