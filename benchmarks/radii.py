"""What find_rho suggests, beside what a grid over ρ finds on validation.

    python -m benchmarks.radii                # goes on where it was; Ctrl-C stops it, and nothing is lost
    python -m benchmarks.radii --report       # the table of benchmarks/README.md; runs find_rho, some minutes

A run is one ρ of the grid in one mode on one task of tasks.py, without noise: a row of radii.csv. ρ = 0 is the base
optimizer alone. One seed; the test part is not looked at.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.accuracy import BASE, INSTANCE, SAM, TUNING_SEED
from benchmarks.study import append
from benchmarks.tasks import LAST, TASKS, Task
from examples.common.experiment import ENVIRONMENT, table

RESULTS = Path(__file__).with_name("radii.csv")
GRIDS = {"batch": (0.02, 0.05, 0.15, 0.5), "instance": (0.005, 0.015, 0.05, 0.15)}  # of equal ratios, about 3
OPTIONS = {"batch": SAM, "instance": INSTANCE}


class Radius(NamedTuple):
    """One run."""

    task: str
    mode: str
    rho: float

    def command(self) -> list[str]:
        """The options of fairseq-train."""
        task = TASKS[self.task]
        options = f"{OPTIONS[self.mode]} --sam-rho {self.rho}" if self.rho else BASE
        return task.command(0.0, options.format(criterion=task.criterion, warmup=0), TUNING_SEED)


def radii() -> Iterator[Radius]:
    """All runs."""
    for task in TASKS:
        yield Radius(task, "batch", 0.0)
        for mode, grid in GRIDS.items():
            yield from (Radius(task, mode, rho) for rho in grid)


def results() -> dict[Radius, dict[str, float | None]]:
    """Validation score and relative sharpness of the runs so far; see tasks.Scores."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {
            Radius(row["task"], row["mode"], float(row["rho"])): {
                name: float(row[name]) if row[name] else None for name in ("valid", "relative_sharpness")
            }
            for row in csv.DictReader(file)
        }


def run(radius: Radius) -> None:
    """Train, measure, and keep the result."""
    print(*radius, flush=True)
    task, command = TASKS[radius.task], radius.command()
    with task.trained(command) as left:
        valid, _, _ = task.measure(left.folder / LAST, Path(command[0]), False)
    rise = left.relative_sharpness
    cells = [f"{valid:.6g}", "" if rise is None else f"{rise:.6g}"]
    append(RESULTS, [*Radius._fields, "valid", "relative_sharpness"], [[*radius, *cells]])


def suggestions(task: Task) -> str:
    """The last lines of find_rho for the base optimizer's command, from a start."""
    command = ["fairseq-train", *task.command(0.0, BASE.format(criterion=task.criterion), TUNING_SEED)]
    done = subprocess.run(
        [sys.executable, "-m", "deltasam_plugin.find_rho", "--", *command],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nfind_rho failed on {task.title}.")
    return done.stdout.strip()


def grid(name: str) -> str:
    """The table of one task's runs."""
    found = results()
    rows: list[tuple[str, ...]] = [("mode", "ρ", "validation", "rise in the last epoch")]
    for radius in (radius for radius in radii() if radius.task == name and radius in found):
        valid, rise = found[radius].values()
        mode = radius.mode if radius.rho else "adam"
        rows.append((mode, f"{radius.rho:g}", f"{valid:.3f}", "" if rise is None else f"{rise:.1%}"))
    return table(rows)


def report() -> str:
    """For each task: the grid, and what find_rho printed."""
    return "\n\n".join(f"{task.title}\n\n{grid(name)}\n\n{suggestions(task)}" for name, task in TASKS.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="print the table")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS), help="run no others")
    parser.add_argument("--processes", type=int, default=2, help="how many runs at a time, of one thread each")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.report:
        print(report())
        return
    for name in arguments.tasks:
        TASKS[name].data(0.0)
    left = [radius for radius in radii() if radius.task in arguments.tasks and radius not in results()]
    with ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(run, left))


if __name__ == "__main__":
    main()
