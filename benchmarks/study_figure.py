"""The figure of the study of accuracies: every seed a dot, beside it the mean and its 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.study import Row, interval

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw the runs that were not for tuning; nothing if no method has two of them.

    Returns:
        Whether there was something to draw.
    """
    runs: dict[tuple[float, str], list[float]] = {}
    for row in rows:
        if row.phase == "final":
            runs.setdefault((row.noise, row.method), []).append(row.test_last)
    runs = {case: values for case, values in runs.items() if len(values) > 1}
    if not runs:
        return False
    noises = sorted({noise for noise, _ in runs})
    methods = list(dict.fromkeys(method for _, method in runs))
    size = (4.5 * len(noises) + 1.5, 0.32 * len(methods) + 1.1)
    figure, panels = pyplot.subplots(1, len(noises), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for noise, panel in zip(noises, panels[0]):
        for place, method in enumerate(methods):
            if (noise, method) in runs:
                values = runs[noise, method]
                centre, half = interval(values)
                panel.plot(values, [place] * len(values), "o", color="#1b9e77", alpha=0.45, markeredgewidth=0)
                panel.errorbar(centre, place + 0.22, xerr=half, fmt="|", color="#444444", capsize=3)
        if (noise, "adam") in runs:
            panel.axvline(interval(runs[noise, "adam"])[0], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(f"{noise:.0%} of the labels flipped")
        panel.set_xlabel("test accuracy after the last epoch, %")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(methods)), methods)
    panels[0][0].invert_yaxis()
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
    partial.replace(path)
    return True
