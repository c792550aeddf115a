"""The page of a report: a table with a row for each run, and the figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deltasam_plugin.fairseq.scalars import MEANINGS
from deltasam_plugin.tools.events import Run
from deltasam_plugin.tools.report_figures import Panel, draw, legend, shown, styles

COLUMNS = (
    "updates",
    "training loss",
    "validation loss",
    "best",
    "validation accuracy, %",
    "best",
    "sharpness",
    "relative sharpness",
    "effective sample size",
    "gradient norm",
    "length of ε",
    "s/update",
)


def cells(run: Run) -> list[str]:
    """The row of a run: values at its end, and the best of its validations."""
    loss, sharpness = run.at_end("loss"), run.at_end("sam_sharpness")
    valid, accuracy = run.validation("loss"), run.validation("accuracy")
    return [
        str(loss.updates[-1]) if loss.updates else "",
        _number(loss.last),
        _number(valid.last),
        _number(min(filter(math.isfinite, valid.values), default=None)),
        _number(accuracy.last, 1),
        _number(max(filter(math.isfinite, accuracy.values), default=None), 1),
        _number(sharpness.last),
        _number(sharpness.over(loss).last),
        _number(run.at_end("sam_ess").last),
        _number(run.at_end("gnorm").last),
        _number(run.at_end("sam_eps_norm").last, 4),
        _number(_seconds(run)),
    ]


def _seconds(run: Run) -> float | None:
    """Of an update, from words per update and per second: fairseq rounds updates per second to two decimals."""
    by_words = run.training("wpb").over(run.training("wps")).values
    by_updates = [1 / value for value in run.training("ups").values if value > 0]
    return median(by_words or by_updates) if by_words or by_updates else None


def page(runs: Sequence[Run], labels: Sequence[str], panels: Iterable[Panel]) -> str:
    """The page, in HTML without anything outside it.

    Args:
        runs: in the order in which they are listed.
        labels: their names.
        panels: those of the figures that are drawn, if any run has something for them.
    """
    environment = Environment(
        loader=PackageLoader("deltasam_plugin", "tools"), autoescape=True, undefined=StrictUndefined
    )
    rows: list[dict[str, Any]] = [
        {"label": label, "line": Markup(legend(style)), "cells": cells(run), "path": run.path}
        for run, label, style in zip(runs, labels, styles(len(runs)), strict=True)
    ]
    kept = [column for column in range(len(COLUMNS)) if any(row["cells"][column] for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][column] for column in kept]
    drawn = [panel for panel in panels if shown(panel, runs)]
    figures = [
        {
            "svg": Markup(draw(panel, runs)),
            "notes": [f"{name}: {MEANINGS[name]}".replace("`", "") for name in panel.scalars],
        }
        for panel in drawn
    ]
    torn = [str(file) for run in runs for file in run.torn]
    heads = [COLUMNS[column] for column in kept]
    return environment.get_template("report.html").render(rows=rows, heads=heads, figures=figures, torn=torn)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
