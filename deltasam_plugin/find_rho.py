"""``python -m deltasam_plugin.find_rho -- fairseq-train DATA …``: a range test for ρ, before a long run is paid for.

The command is yours, with δ-SAM in it or without. A few of its first updates are run, or a few after the checkpoint
that it restores. Then every ρ of a grid is measured at these parameters, in both modes. Nothing is written to the
command's folders. See :mod:`deltasam_plugin.tools.range_test`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice

from fairseq.logging import metrics
from tqdm import tqdm

from deltasam_plugin.fairseq.errors import InvalidValue, Unsupported
from deltasam_plugin.fairseq.optimizer import active_optimizer
from deltasam_plugin.tools.command import trainer_of
from deltasam_plugin.tools.console import BadInput, Parser, console, count, first_sentence, one_line_for, radius, table
from deltasam_plugin.tools.range_test import NEVER, RELATIVE_SHARPNESS, Point, measure, suggestion

PROGRAM = "deltasam-find-rho"
GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MODES = ("batch", "instance")


def parser() -> Parser:
    """The program's own options."""
    made = Parser(
        PROGRAM, usage="%(prog)s [options] -- fairseq-train DATA …", description="A range test for ρ (--sam-rho)."
    )
    add = made.add_argument
    add("--updates", type=count, default=20, metavar="N", help="updates before the measurement (default: 20)")
    add("--batches", type=count, default=8, metavar="N", help="batches that are measured (default: 8)")
    add("--grid", type=radius, nargs="+", default=GRID, metavar="RHO", help=f"default: {' '.join(map(str, GRID))}")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        SystemExit: bad input, with one line and status 2.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given, command = parser().parse_args(arguments[:end]), arguments[end + 1 :]
    with console(PROGRAM), trainer_of(command) as (trainer, updates), metrics.aggregate(new_root=True):
        optimizer = active_optimizer()
        if optimizer.settings.ascent == "momentum":
            raise BadInput(
                "With --sam-ascent momentum no pass runs at w, and there is no rise to measure. Leave it out."
            )
        optimizer.change(**NEVER)
        with one_line_for("fairseq-train fails on this command"):
            for samples in tqdm(islice(updates, given.updates), "updates", given.updates, leave=False, file=sys.stderr):
                trainer.train_step(samples)
            samples = next(updates)
            while len(samples) < given.batches:
                samples = [*samples, *next(updates)]
        found: dict[str, list[Point]] = {}
        settings = optimizer.settings
        for mode in MODES:
            optimizer.settings = settings  # the mode before lacks some, and may have failed
            try:
                with one_line_for("fairseq-train fails on this command"):
                    found[mode] = measure(trainer, optimizer, mode, sorted(set(given.grid)), samples[: given.batches])
            except (InvalidValue, Unsupported) as error:
                print(f"{mode} is left out. {first_sentence(error)}.", file=sys.stderr)
        if not found:
            raise BadInput("No mode could be measured.")
        print(report(found, trainer.get_num_updates(), given.batches))


def report(found: dict[str, list[Point]], updates: int, batches: int) -> str:
    """What is printed.

    Args:
        found: points of each mode.
        updates: before the measurement.
        batches: in the measurement.
    """
    rows = [("ρ", *(f"{mode}: {column}" for mode in found for column in ("rise", "loss", "gradient")))]
    for points in zip(*found.values()):
        cells = [(f"{point.relative:.1%}", f"{point.loss:.3f}", f"{point.change:.3f}") for point in points]
        rows.append((f"{points[0].rho:g}", *(cell for group in cells for cell in group)))
    least, greatest = RELATIVE_SHARPNESS
    suggestions = "\n".join(suggestion(points, mode) for mode, points in found.items())
    return (
        f"{table(rows)}\n\n"
        f"After {updates} updates, on {batches} batches. rise: relative sharpness, (L(w + ε) − L(w)) / L(w). "
        "loss: L(w + ε), base 2.\ngradient: ‖g' − g‖ / ‖g‖ of the sharpness-aware gradient g' and the plain g.\n\n"
        f"{suggestions}\n\n"
        f"There the loss rises by {least:.0%} to {greatest:.0%}, as in some runs of ours that learned; in others\n"
        "it rose by 1% or by more than 100%. This is a suggestion, not a promise."
    )


if __name__ == "__main__":
    main()
