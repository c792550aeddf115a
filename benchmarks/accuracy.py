"""What sharpness-aware training brings: one study, in slices that can be run in any number of sittings.

    python -m benchmarks.accuracy                     # goes on where it was; Ctrl-C stops it, and nothing is lost
    python -m benchmarks.accuracy --list              # what is done and what is left
    python -m benchmarks.accuracy --report            # the tables of both READMEs, from the rows that are there
    python -m benchmarks.accuracy --again SLICE       # runs a slice of --list once more, and prints both results

A slice is one training run of fairseq-train: a task (see tasks.py), a share of flipped labels, a method, a value of the
method's own parameter, and a seed. Its result is one row of accuracy.csv, written when the run is complete. First every
method is tried with three values of its parameter and seed 1 (phase "tuning"). The value with the best validation score
after the last epoch, the least one among equals, is then trained with other seeds (phase "final"). Only these rows
enter the report, and only they look at the test part. The radius grows over the first quarter of the usual updates.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import logging
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.study import Method, Row, append, best_value
from benchmarks.study_figure import draw
from benchmarks.study_tables import overview, summary, tables, tuning
from benchmarks.tasks import BEST, LAST, TASKS
from examples.common.experiment import delta_sam, table

RESULTS = Path(__file__).with_name("accuracy.csv")
TUNING_SEED = 1

BASE = "--optimizer adam --criterion {criterion}"
RIVAL = "--user-dir benchmarks/rivals --optimizer adam --criterion {criterion}_with_rdrop"
DELTA_SAM = f"{delta_sam('{criterion}')} --sam-warmup-updates {{warmup}}"
SAM = f"{DELTA_SAM} --sam-weighting uniform"
INSTANCE = f"{DELTA_SAM} --sam-perturbation instance"
METHODS = {  # most important first
    "adam": Method(BASE, ()),
    "sam": Method(f"{SAM} --sam-rho {{value}}", (0.05, 0.1, 0.2)),
    "instance": Method(f"{INSTANCE} --sam-rho {{value}}", (0.01, 0.02, 0.05)),
    "delta_sam": Method(f"{DELTA_SAM} --sam-rho {{value}}", (0.05, 0.1, 0.2)),
    "adam, twice the updates": Method(BASE, (), length=2),
    "sam at 0.05": Method(f"{SAM} --sam-rho 0.05", ()),  # added when delta_sam at 0.05 was seen to gain
    "adam, more dropout": Method(f"{BASE} --dropout {{value}}", (0.4, 0.5, 0.6)),
    "adam, moving average": Method(f"{BASE} --store-ema --ema-decay {{value}}", (0.98, 0.99, 0.995)),
    "adam, label smoothing": Method(f"{RIVAL} --label-smoothing {{value}}", (0.1, 0.3, 0.6)),
    "adam, r-drop": Method(f"{RIVAL} --rdrop-alpha {{value}}", (0.5, 1, 5)),
    "momentum_sam": Method(f"{DELTA_SAM} --sam-ascent momentum --sam-rho {{value}}", (0.1, 0.3, 1.0)),
    "delta_sam, kl": Method(f"{DELTA_SAM} --sam-weighting kl --sam-rho {{value}}", (0.05, 0.1, 0.2)),
    "instance, loss budget": Method(f"{INSTANCE} --sam-rho 0.1 --sam-loss-budget {{value}}", (0.03, 0.1, 0.3)),
    "instance, groups of 4": Method(f"{INSTANCE} --sam-group 4 --sam-rho {{value}}", (0.02, 0.05, 0.1)),
    "sam_on": Method(f"{SAM} --sam-parameters layer_norm --sam-rho {{value}}", (0.1, 0.2, 0.5)),
    "rw_sam": Method(f"{DELTA_SAM} --sam-weighting gradient_norm --sam-rho {{value}}", (0.05, 0.1, 0.2)),
}
MAIN = ("adam", "sam", "instance", "delta_sam", "adam, twice the updates")  # these are run on every task first
STUDIED = {  # by task and share of flipped labels: what fits into 12 hours of two cores
    ("sentiment", 0.3): tuple(METHODS),
    ("sentiment", 0.0): MAIN,
    ("finetune", 0.3): MAIN,
    ("finetune", 0.0): MAIN,
    ("translation", 0.0): MAIN,  # with label smoothing
}


class Slice(NamedTuple):
    """One training run; its text form names it on the command line."""

    task: str
    noise: float
    method: str
    value: float | None
    seed: int

    @property
    def phase(self) -> str:
        """What the run is for."""
        return "tuning" if self.seed == TUNING_SEED else "final"

    def command(self) -> list[str]:
        """The options of fairseq-train."""
        task, method = TASKS[self.task], METHODS[self.method]
        options = method.options.format(value=self.value, criterion=task.criterion, warmup=task.updates // 4)
        return task.command(self.noise, options, self.seed, method.length)


def rows() -> list[Row]:
    """The results so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [Row.read(row) for row in csv.DictReader(file)]


def slices(done: list[Row]) -> set[Slice]:
    """Those whose results these are."""
    return {Slice(row.task, row.noise, row.method, row.value, row.seed) for row in done}


def wanted(done: list[Row], tasks: Collection[str] = tuple(TASKS)) -> Iterator[Slice]:
    """All slices of some tasks that can be run now, in order: tuning, then the chosen value with other seeds."""
    for task, noise, method in sorted(studied(tasks), key=_rank):
        values = METHODS[method].values
        for value in values:
            yield Slice(task, noise, method, value, TUNING_SEED)
        tried = [row for row in done if (row.task, row.noise, row.method, row.phase) == (task, noise, method, "tuning")]
        if len(tried) == len(values):
            for seed in TASKS[task].seeds:
                yield Slice(task, noise, method, best_value(tried), seed)


def studied(tasks: Collection[str]) -> Iterator[tuple[str, float, str]]:
    """Task, share of flipped labels and method of all that is compared."""
    for task in tasks:
        for noise in TASKS[task].noises:
            for method in STUDIED[task, noise]:
                yield task, noise, method


def _rank(compared: tuple[str, float, str]) -> tuple[bool, float]:
    """What matters most comes first: of the main methods, then of the others, noisy labels before clean ones."""
    _, noise, method = compared
    return method not in MAIN, -noise


def run(chosen: Slice) -> Row:
    """Train, and measure the last and the best checkpoint."""
    task = TASKS[chosen.task]
    command = chosen.command()
    with task.trained(command) as left:
        scores = [task.measure(left.folder / name, Path(command[0]), chosen.phase == "final") for name in (LAST, BEST)]
    return Row(
        *(*chosen, chosen.phase, int(left.logged["train_num_updates"])),
        *(score for of_checkpoint in scores for score in of_checkpoint),
        left.relative_sharpness,
        left.cpu_seconds,
    )


def keep(row: Row) -> None:
    """Add a row to the results, and draw the figure of all."""
    append(RESULTS, Row._fields, [row.written()])
    with RESULTS.open() as file:  # runs that end together would write the same figure
        fcntl.flock(file, fcntl.LOCK_EX)
        draw(rows(), RESULTS.with_suffix(".png"), {name: task.score for name, task in TASKS.items()})


def legend() -> str:
    """A table of the methods: the options in which they differ, and the values tried."""
    lines = [("training", "options", "values tried")]
    for name, method in METHODS.items():
        options = method.options
        for common in (DELTA_SAM, RIVAL, BASE):
            options = options.removeprefix(common)
        if method.length > 1:
            options = f"--max-update × {method.length}"
        shown = options.strip().format(value="VALUE")
        lines.append((name, f"`{shown}`" if shown else "", ", ".join(f"{value:g}" for value in method.values)))
    return table(lines)


def again(chosen: Slice) -> str:
    """Run a slice a second time. Nothing is kept.

    Returns:
        A table of its row and of the new one.

    Raises:
        SystemExit: it was not run yet.
    """
    kept = [row for row in rows() if slices([row]) == {chosen}]
    if not kept:
        sys.exit(f"{json.dumps(chosen)} is no slice that is done. Give one that --list calls done.")
    return table([("", *Row._fields), *(("kept", *row.written()) for row in kept), ("again", *run(chosen).written())])


def work(tasks: Collection[str], number: int, pause_file: Path | None) -> None:
    """Run the slices of these tasks until none is left, so many at a time, each in a process of its own.

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
            begun = {*slices(done), *running}
            left = [chosen for chosen in wanted(done, tasks) if chosen not in begun]
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
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS), help="run no others")
    parser.add_argument("--processes", type=int, default=2, help="how many runs at a time, of one thread each")
    parser.add_argument("--pause-file", type=Path, help="no run is started while this file exists")
    parser.add_argument("--again", type=json.loads, metavar="SLICE", help="run a slice again and print both results")
    parser.add_argument("--slice", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.slice or arguments.again:
        logging.disable(logging.WARNING)
    if arguments.slice:
        chosen = Slice(*arguments.slice)
        if chosen in slices(rows()):
            sys.exit(f"{json.dumps(chosen)} is done, and would count twice. --again runs it once more.")
        keep(run(chosen))
    elif arguments.again:
        print(again(Slice(*arguments.again)))
    elif arguments.report:
        print("\n\n".join([overview(rows()), legend(), summary(rows()), tables(rows()), tuning(rows())]))
    elif arguments.list:
        done = rows()
        known = slices(done)
        for chosen in wanted(done, arguments.tasks):
            print("done" if chosen in known else "left", json.dumps(chosen))
    else:
        for name in arguments.tasks:
            for noise in TASKS[name].noises:
                TASKS[name].data(noise)
        work(arguments.tasks, arguments.processes, arguments.pause_file)


if __name__ == "__main__":
    main()
