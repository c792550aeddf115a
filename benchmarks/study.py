"""The rows of a study, their file, and their statistics: tensors and models are elsewhere."""

from __future__ import annotations

import csv
import fcntl
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from scipy import stats

ALPHA = 0.05


class Method(NamedTuple):
    """A way of training.

    Attributes:
        options: of fairseq-train, with {value} for the value of the method's own parameter and {criterion} for the
            task's.
        values: of this parameter that are tried; empty if there is none.
        length: how many times the usual number of updates.
    """

    options: str
    values: tuple[float, ...]
    length: int = 1


class Row(NamedTuple):
    """The result of one run, with the scores and losses of its last and its best checkpoint (tasks.Scores)."""

    task: str
    noise: float
    method: str
    value: float | None
    seed: int
    phase: str
    updates: int
    valid_last: float
    test_last: float | None  # of runs that are not for tuning
    test_loss_last: float | None
    valid_best: float
    test_best: float | None
    test_loss_best: float | None
    relative_sharpness: float | None  # in training, last epoch: sharpness as a share of the loss
    cpu_seconds: float

    @classmethod
    def read(cls, row: dict[str, str]) -> Row:
        """From a row of the file."""
        texts = ("task", "method", "phase")
        numbers = {name: int(row[name]) if name in ("seed", "updates") else _number(row[name]) for name in row
                   if name not in texts}  # fmt: skip
        return cls(**{**numbers, **{name: row[name] for name in texts}})

    def written(self) -> list[str]:
        """As a row of the file."""
        return ["" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x) for x in self]


def _number(text: str) -> float | None:
    return float(text) if text else None


def append(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Add rows to a file, all at once, also if other processes add theirs; a new file begins with the head."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.writer(file, lineterminator="\n")
        if file.seek(0, 2) == 0:
            writer.writerow(head)
        writer.writerows(rows)


def best_value(tried: Sequence[Row]) -> float | None:
    """The value with the best validation score after the last epoch, the least one among equals."""
    best = max(tried, key=lambda row: (row.valid_last, -(row.value or 0)), default=None)
    return None if best is None else best.value


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t. Needs two values at least."""
    half = stats.t.ppf(1 - ALPHA / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), float(half)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method."""
    count, corrected, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def differences(rows: Sequence[Row], method: str, reference: str, score: str = "test_last") -> list[float]:
    """A score less that of the reference, over the seeds that both have."""
    of = {name: {row.seed: getattr(row, score) for row in rows if row.method == name} for name in (method, reference)}
    return [of[method][seed] - of[reference][seed] for seed in sorted(of[method].keys() & of[reference].keys())]


def cases(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """The runs that were not for tuning, by task and noise, of methods that have two of them at least.

    Tasks with noise come first. Methods are in the same order everywhere.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    counts = Counter((row.task, row.noise, row.method) for row in rows if row.phase == "final")
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.phase == "final" and counts[row.task, row.noise, row.method] > 1:
            found.setdefault((row.task, row.noise), []).append(row)
    for own in found.values():
        own.sort(key=lambda row: methods.index(row.method))
    tasks = list(dict.fromkeys(task for task, _ in found))
    return {case: found[case] for case in sorted(found, key=lambda case: (-case[1], tasks.index(case[0])))}


def case_title(task: str, noise: float) -> str:
    """As it is shown."""
    return f"{task}, {noise:.0%} of the labels flipped" if noise else task


def gains(rows: Sequence[Row], reference: str, score: str = "test_last") -> dict[str, tuple[float, float, float]]:
    """Of each method: mean difference to the reference, half its interval, p-value corrected for their number."""
    paired = _all_paired(rows, reference, score)
    corrected = holm([p_value for _, _, p_value in paired.values()])
    return {name: (centre, half, p) for (name, (centre, half, _)), p in zip(paired.items(), corrected)}


def corrected(found: dict[tuple[str, float], list[Row]]) -> dict[tuple[tuple[str, float], str], float]:
    """P-values of each method against Adam in each case, corrected for all of them."""
    raw = {(case, name): p for case, own in found.items() for name, (_, _, p) in _all_paired(own, "adam").items()}
    return dict(zip(raw, holm(list(raw.values()))))


def _all_paired(rows: Sequence[Row], reference: str, score: str = "test_last") -> dict[str, tuple[float, float, float]]:
    """What :func:`_paired` gives for each method, where it gives anything."""
    names = dict.fromkeys(row.method for row in rows)
    return {name: found for name in names if (found := _paired(rows, name, reference, score))}


def _paired(rows: Sequence[Row], name: str, other: str, score: str) -> tuple[float, float, float] | tuple[()]:
    """Mean difference, half its interval and the p-value of a paired t-test; nothing for less than two pairs."""
    values = differences(rows, name, other, score)
    if name == other or len(values) < 2:
        return ()
    centre, half = interval(values)
    if stdev(values) == 0:
        return centre, half, 1.0 if centre == 0 else 0.0
    return centre, half, float(stats.ttest_1samp(values, 0).pvalue)
