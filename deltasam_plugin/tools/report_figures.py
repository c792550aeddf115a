"""The figures of a report: one for each quantity, with a curve for each run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deltasam_plugin.tools.events import Curve, Run

# Colours that the colour-blind can tell apart, from dark to light; with strokes and markers grey prints can, too.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STROKES = ("solid", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WINDOW = 15  # values that are averaged, at most a tenth of all
SIZE = (4.6, 3.0)  # inches


class Panel(NamedTuple):
    """A figure of the report.

    Attributes:
        title: of the figure.
        unit: of its vertical axis.
        curve: what is drawn of a run.
        scalars: the names whose meaning is told below it.
        points: whether there are so few values that each is marked, and none averaged.
    """

    title: str
    unit: str
    curve: Callable[[Run], Curve]
    scalars: tuple[str, ...]
    points: bool = False


def training(name: str) -> Callable[[Run], Curve]:
    """A scalar of the training log."""
    return lambda run: run.training(name)


def validation(name: str) -> Callable[[Run], Curve]:
    """A scalar of the validation log."""
    return lambda run: run.validation(name)


PANELS = [
    Panel("Training loss", "loss, base 2", training("loss"), ("loss",)),
    Panel("Validation loss", "loss, base 2", validation("loss"), (), points=True),
    Panel("Validation accuracy", "accuracy, %", validation("accuracy"), (), points=True),
    Panel("Validation BLEU", "BLEU", validation("bleu"), (), points=True),
    Panel("Sharpness", "L(w + ε) − L(w), base 2", training("sam_sharpness"), ("sam_sharpness",)),
    Panel(
        "Relative sharpness",
        "sharpness as a share of the loss",
        lambda run: run.training("sam_sharpness").over(run.training("loss")),
        ("sam_sharpness",),
    ),
    Panel("Effective sample size", "share of the batch", training("sam_ess"), ("sam_ess",)),
    Panel("Ascent gradient norm", "L2 norm", training("sam_ascent_gnorm"), ("sam_ascent_gnorm",)),
    Panel("Gradient norm", "L2 norm, before clipping", training("gnorm"), ()),
    Panel("Length of the perturbation", "L2 norm", training("sam_eps_norm"), ("sam_eps_norm",)),
    Panel("Radius", "ρ, L2 norm", training("sam_rho"), ("sam_rho",)),
    Panel("Skipped", "micro-batches", training("sam_skipped"), ("sam_skipped",)),
]


class Style(NamedTuple):
    """How the curves of one run look."""

    colour: str
    stroke: Any
    marker: str


def styles(count: int) -> list[Style]:
    """One for each run. Strokes and markers change with every run, so that no two are alike before 28."""
    return [Style(*parts) for parts in islice(zip(cycle(COLOURS), cycle(STROKES), cycle(MARKERS)), count)]


def shown(panel: Panel, runs: Sequence[Run]) -> bool:
    """Whether any run has something to be drawn. Scalars that are always zero are not worth a figure."""
    return any(any(panel.curve(run).values) for run in runs)


def draw(panel: Panel, runs: Sequence[Run]) -> str:
    """The figure as SVG, to be put into a page."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for run, style in zip(runs, styles(len(runs))):
        curve = panel.curve(run)
        values = curve.values if panel.points else averaged(curve.values)
        if not panel.points:
            axis.plot(curve.updates, curve.values, color=style.colour, alpha=0.2, linewidth=0.7)
        axis.plot(curve.updates, values, markevery=1 if panel.points else max(1, len(values) // 6), **_line(style))
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("updates", fontsize=9)
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    return _svg(figure, panel.title)


def legend(style: Style) -> str:
    """A piece of a run's curve as SVG."""
    figure = Figure(figsize=(0.6, 0.18))
    figure.add_artist(Line2D([0.02, 0.5, 0.98], [0.5, 0.5, 0.5], markevery=[1], **_line(style)))
    return _svg(figure, str(style))


def averaged(values: Sequence[float]) -> list[float]:
    """Running means over the values before and after each, over fewer at both ends."""
    reach = min(WINDOW, len(values) // 10) // 2
    parts = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _line(style: Style) -> dict[str, Any]:
    return {"color": style.colour, "linestyle": style.stroke, "marker": style.marker, "markersize": 4, "linewidth": 1.4}


def _svg(figure: Figure, salt: str) -> str:
    file = io.StringIO()
    # Text as outlines looks the same everywhere. The salt keeps the names in several figures of one page apart.
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
