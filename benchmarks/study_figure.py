"""The figure of the study of accuracies: every seed a dot, beside it the mean and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from benchmarks.study import Row, case_title, cases, interval

matplotlib.use("Agg")
from matplotlib import pyplot

COLUMNS = 3


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
    methods = list(dict.fromkeys(row.method for own in found.values() for row in own))
    down, across = math.ceil(len(found) / COLUMNS), min(COLUMNS, len(found))
    size = (3.6 * across + 1.5, (0.32 * len(methods) + 1.1) * down)
    figure, grid = pyplot.subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for (case, own), panel in zip(found.items(), panels):
        for place, method in enumerate(methods):
            values = [row.test_last for row in own if row.method == method]
            if values:
                centre, half = interval(values)
                panel.plot(values, [place] * len(values), "o", color="#1b9e77", alpha=0.45, markeredgewidth=0)
                panel.errorbar(centre, place + 0.22, xerr=half, fmt="|", color="#444444", capsize=3)
        adam = [row.test_last for row in own if row.method == "adam"]
        if adam:
            panel.axvline(interval(adam)[0], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(case_title(*case), fontsize="medium")
        panel.set_xlabel(f"{scores[case[0]]}, test part, last epoch")
        panel.spines[["top", "right"]].set_visible(False)
    for empty in panels[len(found) :]:
        empty.remove()
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
    partial.replace(path)
    return True
