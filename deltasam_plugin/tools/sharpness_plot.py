"""Sharpness over the radius, one curve for each checkpoint. Needs matplotlib: the extra ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from deltasam_plugin.tools.console import BadInput, missing
from deltasam_plugin.tools.profile import Profile

FORMATS = (".pdf", ".png", ".svg")
STYLES = ("-", "--", "-.", ":")  # with markers they tell curves apart in grey
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def check(path: Path) -> None:
    """To be called before anything is measured.

    Raises:
        BadInput: a figure cannot be written there.
    """
    if missing("matplotlib"):
        raise BadInput("--plot needs matplotlib: pip install 'deltasam-plugin[report]'.")
    if path.suffix not in FORMATS:
        raise BadInput(f"Invalid --plot {path}. Its name must end with {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise BadInput(f"No such folder: {path.parent} (--plot).")


def draw(profiles: Sequence[Profile], radii: Sequence[float], path: Path) -> None:
    """Draw a panel for each direction. Rises in random directions are far smaller, and have an axis of their own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(profiles[0].rises), sharex=True)
    axes[2].sharey(axes[1])
    for axis, direction in zip(axes, profiles[0].rises):
        for profile, style, marker in zip(profiles, cycle(STYLES), cycle(MARKERS)):
            axis.plot(radii, profile.sharpness(direction), style, marker=marker, markersize=4, label=profile.label)
        axis.set_title(f"{direction} directions" if direction == "random" else f"gradient, {direction}")
        axis.set_xlabel("radius ρ, L2 norm")
        axis.set_ylabel("L(w + ε) − L(w), base 2")
        axis.set_xscale("log")
        if direction == "random":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        else:
            axis.set_yscale("log", nonpositive="mask")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
