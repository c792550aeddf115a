"""The figure of the study of accuracies: every seed a dot, beside it the mean and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from benchmarks.study import Row, case_title, cases, interval

matplotlib.use("Agg")
from matplotlib import pyplot

ACROSS = 2  # beside the case with the most methods


def draw(rows: Sequence[Row], path: Path, scores: Mapping[str, str]) -> bool:
    """Draw the runs that were not for tuning; nothing if no method has two of them.

    Args:
        rows: of the study.
        path: of the figure.
        scores: what the test scores of each task are, with their unit.

    Returns:
        Whether there was something to draw.
    """
    found = cases(rows)
    if not found:
        return False
    methods = {case: list(dict.fromkeys(row.method for row in own)) for case, own in found.items()}
    widest, *others = sorted(found, key=lambda case: -len(methods[case]))
    down = max(1, math.ceil(len(others) / ACROSS))
    size = (4.2 * (1 + min(ACROSS, len(others))), max(0.3 * len(methods[widest]) + 1.2, 2.7 * down))
    figure = pyplot.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(down, 1 + min(ACROSS, len(others)))
    places = {widest: grid[:, 0]} | {case: grid[n // ACROSS, 1 + n % ACROSS] for n, case in enumerate(others)}
    for case, own in found.items():
        panel = figure.add_subplot(places[case])
        for place, method in enumerate(methods[case]):
            values = [row.test_last for row in own if row.method == method]
            centre, half = interval(values)
            panel.plot(values, [place] * len(values), "o", color="#1b9e77", alpha=0.45, markeredgewidth=0)
            panel.errorbar(centre, place + 0.22, xerr=half, fmt="|", color="#444444", capsize=3)
        adam = [row.test_last for row in own if row.method == "adam"]
        if adam:
            panel.axvline(interval(adam)[0], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(case_title(*case), fontsize="medium")
        panel.set_xlabel(f"{scores[case[0]]}, test part, last epoch")
        panel.set_yticks(range(len(methods[case])), methods[case])
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
    partial.replace(path)
    return True
