"""The figure of the study of accuracies: every seed a dot, beside it the mean and its 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.study import Row, case_title, cases, interval

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw the runs that were not for tuning; nothing if no method has two of them.

    Returns:
        Whether there was something to draw.
    """
    found = cases(rows)
    if not found:
        return False
    methods = list(dict.fromkeys(row.method for own in found.values() for row in own))
    size = (3.6 * len(found) + 1.5, 0.32 * len(methods) + 1.1)
    figure, panels = pyplot.subplots(1, len(found), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for (case, own), panel in zip(found.items(), panels[0]):
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
        panel.set_xlabel(f"{'BLEU' if case[0] == 'translation' else 'accuracy, %'}, test part, last epoch")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(methods)), methods)
    panels[0][0].invert_yaxis()
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
    partial.replace(path)
    return True
