"""Draw the figures of README.md and of benchmarks/README.md.

  python benchmarks/figures.py

idea.png   perturbations of three samples, computed from a logistic regression with two parameters
panel.png  ratios over all cases of the table in benchmarks/README.md, which benchmarks/cost.py measured
cost.png   the same table over width, tokens and batch
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor
from torch.nn import functional as F

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
SIZES = ("width", "tokens", "batch")
LABELS = {"tokens": "tokens per sentence", "batch": "sentences per batch"}
UNIT = "SAM"
NAMES = {"SAM": "SAM, uniform weights", "δ-SAM": "δ-SAM, curvature", "instance": "instance, exact"}
METHODS = ("Adam", UNIT, "SAM of pytorch_optimizer", "δ-SAM", "instance", "δ-SAM, kl")
COLORS = dict(zip(METHODS, pyplot.cm.tab10.colors))
SAMPLES, DESCENT = ("#1b9e77", "#d95f02", "#7570b3"), "#444444"


class Cell(NamedTuple):
    """Ratios of one method to SAM in one case."""

    seconds: float
    least: float
    greatest: float
    memory: float


Row = tuple[dict[str, int], dict[str, Cell]]  # the sizes; the ratios by method


def table() -> list[Row]:
    """Return the rows of the table in benchmarks/README.md."""
    lines = [line.strip("| ") for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines()]
    head = next(line.split(" | ") for line in lines if line.startswith("width | "))
    rows = []
    for cells in (dict(zip(head, line.split(" | "))) for line in lines if re.match(r"\d+ \| \d+ \| \d+ \|", line)):
        ratios = {UNIT: Cell(1, 1, 1, 1)}
        for name in cells.keys() & COLORS.keys():
            ratios[name] = Cell(*map(float, re.findall(r"[\d.]+", cells[name])))
        rows.append(({size: int(cells[size]) for size in SIZES}, ratios))
    return rows


def draw_cost(rows: list[Row]) -> Any:
    """Draw seconds above and memory below, over each of the sizes."""
    values = {size: [sizes[size] for sizes, _ in rows] for size in SIZES}
    centre = {size: statistics.mode(values[size]) for size in SIZES}
    figure, axes = pyplot.subplots(2, len(SIZES), figsize=(12, 6), sharex="col", sharey="row")
    for size, column in zip(SIZES, axes.T):
        fixed = {other: value for other, value in centre.items() if other != size}
        chosen = sorted((row for row in rows if fixed.items() <= row[0].items()), key=lambda row: row[0][size])
        x = [sizes[size] for sizes, _ in chosen]
        for name, color in COLORS.items():
            cells = [ratios[name] for _, ratios in chosen]
            column[0].plot(x, [c.seconds for c in cells], marker="o", color=color, label=NAMES.get(name, name))
            column[0].fill_between(x, [c.least for c in cells], [c.greatest for c in cells], color=color, alpha=0.15)
            column[1].plot(x, [c.memory for c in cells], marker="o", color=color)
        column[0].set_title(", ".join(f"{other} {value}" for other, value in fixed.items()), fontsize=10)
        column[1].set_xlabel(LABELS.get(size, size))
        for axis in column:
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(value) for value in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    ratio_axis(axes[0, 0].yaxis, axes[0, 0].set_yscale, (0.5, 1, 2, 3))
    axes[0, 0].set_ylabel("seconds / SAM's")
    axes[1, 0].set_ylabel("peak memory / SAM's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def draw_panel(rows: list[Row]) -> Any:
    """Draw each method's ratios over all cases: the median as a point, the range as a bar."""
    figure, axis = pyplot.subplots(figsize=(8, 3.2))
    names = list(COLORS)[::-1]
    for place, name in enumerate(names):
        cells = [ratios[name] for _, ratios in rows]
        measures = {"seconds": [c.seconds for c in cells], "peak memory": [c.memory for c in cells]}
        for (measure, ratios), shift, marker in zip(measures.items(), (0.15, -0.15), "os"):
            color = COLORS["instance"] if measure == "seconds" else COLORS["Adam"]
            axis.plot([min(ratios), max(ratios)], [place + shift] * 2, color=color, alpha=0.5, linewidth=3)
            label = measure if place == 0 else None
            axis.plot(statistics.median(ratios), place + shift, marker, color=color, label=label)
    axis.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    axis.axvline(1, color="grey", linewidth=1)
    ratio_axis(axis.xaxis, axis.set_xscale, (0.5, 0.75, 1, 1.5, 2, 3))
    axis.set_xlabel("ratio to SAM: median and range over all cases")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="upper right", frameon=False)
    return figure


def ratio_axis(axis: Any, set_scale: Any, ticks: tuple[float, ...]) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks."""
    set_scale("log")
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def draw_idea(rho: float = 1.0) -> Any:
    """Draw the perturbations of SAM and of instance mode, and how much the loss of each sample changes."""
    w = torch.tensor([0.2, 0.1], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[-1.6, -0.5], [-0.3, -1.2], [1.1, 0.1]], dtype=torch.float64)

    def losses(at: Tensor) -> Tensor:
        return F.softplus(-(at @ x.T))  # logistic regression, all labels positive

    gradients = torch.autograd.functional.jacobian(losses, w)
    total = gradients.sum(0)
    choices = {
        "SAM: one perturbation for the batch": (rho * total / total.norm()).expand(3, 2),
        "instance: each sample has its own": rho * gradients / gradients.norm(dim=1, keepdim=True),
    }
    axis = torch.linspace(-1.45 * rho, 1.45 * rho, 60, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    figure, axes = pyplot.subplots(1, 4, figsize=(11, 3), width_ratios=(3, 2, 3, 2))
    for (title, epsilons), plane, bars in zip(choices.items(), axes[::2], axes[1::2]):
        plane.contour(axis, axis, losses(w.detach() + grid).sum(-1), levels=12, colors="lightgrey", linewidths=0.8)
        plane.add_patch(pyplot.Circle((0, 0), rho, fill=False, linestyle="--", color="grey"))
        shared = bool((epsilons == epsilons[0]).all())
        for index, (epsilon, color) in enumerate(zip(epsilons.tolist(), SAMPLES)):
            arrow(plane, epsilon, DESCENT if shared else color, "ε" if shared else f"ε{'₁₂₃'[index]}")
        plane.plot(0, 0, "o", color="black")
        plane.annotate("w", (0, 0), (-9, 4), textcoords="offset points")
        plane.annotate("ρ", (0.75 * rho, -0.85 * rho), color="grey", ha="center", va="center", fontsize=12)
        plane.set(aspect="equal", xticks=[], yticks=[], title=title)
        changes = [losses(w + epsilon)[index] - losses(w)[index] for index, epsilon in enumerate(epsilons)]
        bars.bar(["ℓ₁", "ℓ₂", "ℓ₃"], [change.item() for change in changes], color=SAMPLES)
        bars.axhline(0, color="black", linewidth=0.8)
        bars.set_title("change of each loss", fontsize=10)
        bars.margins(y=0.1)
        bars.spines[["top", "right"]].set_visible(False)
    axes[3].sharey(axes[1])
    return figure


def arrow(plane: Any, tip: list[float], color: str, label: str) -> None:
    plane.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2})
    plane.annotate(label, [1.2 * value for value in tip], ha="center", va="center", color=color, fontsize=12)


def main() -> None:
    rows = table()
    figures = {"idea.png": draw_idea(), "panel.png": draw_panel(rows), "cost.png": draw_cost(rows)}
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(HERE / name, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
