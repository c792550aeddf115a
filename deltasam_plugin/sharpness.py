r"""``python -m deltasam_plugin.sharpness DATA --path CHECKPOINT…``: how sharp is the loss around these checkpoints?

Any checkpoint of fairseq will do, trained with δ-SAM or without it, if its criterion gives per-sample losses. Sharpness
is :math:`(L(w+\epsilon) - L(w)) / \text{sample size}` in base 2, as ``sam_sharpness`` is, but without dropout.

==============  ======================================================================================
``random``      :math:`\epsilon = \pm\rho\,u/\|u\|`, u ~ N(0, I): the mean over both signs and several u
``batch``       :math:`\epsilon = \rho\,g/\|g\|`, g the gradient of a batch: what SAM flattens
``per sample``  :math:`\epsilon_i = \rho\,g_i/\|g_i\|`, each sample's own: what instance mode flattens
==============  ======================================================================================
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from fairseq import utils

from deltasam_plugin.tools import sharpness_plot
from deltasam_plugin.tools.checkpoints import load
from deltasam_plugin.tools.console import BadInput, Parser, console, count, labels, one_line_for, radius, table
from deltasam_plugin.tools.profile import Profile, measure

PROGRAM = "deltasam-sharpness"
RADII = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def parser() -> Parser:
    """The program's options."""
    made = Parser(PROGRAM, description="Sharpness of checkpoints of fairseq over a grid of radii.")
    add = made.add_argument
    add("data", metavar="DATA", help="folder of the data, as for fairseq-train")
    add("--path", type=Path, nargs="+", required=True, metavar="CHECKPOINT", help="checkpoints to compare")
    add("--gen-subset", "--split", default="valid", metavar="SPLIT", help="part of the data (default: valid)")
    add("--radii", type=radius, nargs="+", default=RADII, metavar="RHO", help=f"default: {' '.join(map(str, RADII))}")
    add("--batch-size", type=count, metavar="N", help="samples in a batch (default: as the first was trained)")
    add("--max-batches", type=count, default=8, metavar="N", help="at most so many, evenly spread (default: 8)")
    add("--directions", type=count, default=2, metavar="K", help="random directions, each in both senses (default: 2)")
    add("--plot", type=Path, metavar="FILE", help="also draw it: .pdf, .png or .svg")
    add("--user-dir", metavar="DIR", help="your own fairseq components, if the checkpoints need them")
    add("--cpu", action="store_true", help="use no GPU")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        SystemExit: bad input, with one line and status 2.
    """
    given = parser().parse_args(arguments)
    with console(PROGRAM):
        if given.plot is not None:
            sharpness_plot.check(given.plot)
        profiles = measure_all(given)
        print(report(profiles, given))
        if given.plot is not None:
            sharpness_plot.draw(profiles, given.radii, given.plot)


def measure_all(given: Namespace) -> list[Profile]:
    """Measure the checkpoints on the same samples, one after another."""
    with one_line_for(f"Cannot import {given.user_dir} (--user-dir)"):
        utils.import_user_module(given)
    profiles: list[Profile] = []
    limits = seed = first = None
    for path, label in zip(given.path, labels(given.path)):
        checkpoint = load(path, given.data, given.cpu, seed)
        if limits is None:
            trained, seed = checkpoint.config.dataset, checkpoint.config.common.seed
            limits = (None, given.batch_size) if given.batch_size else (trained.max_tokens, trained.batch_size)
        dataset, batches = checkpoint.batches(given.gen_subset, *limits)
        step = max(1, len(batches) / given.max_batches)
        chosen = [batches[int(i * step)] for i in range(min(len(batches), given.max_batches))]
        first = chosen if first is None else first
        if chosen != first:
            raise BadInput(
                f"{path} (--path) takes other samples of {given.gen_subset} than {given.path[0]}: their sharpness "
                "cannot be compared. Measure it alone."
            )
        profiles.append(measure(checkpoint, label, dataset, chosen, given.radii, given.directions))
    return profiles


def report(profiles: Sequence[Profile], given: Namespace) -> str:
    """What is printed."""
    rows: list[tuple[str, ...]] = [
        ("ρ", "checkpoint", "loss", "random", "batch", "per sample", "half in, batch", "half in, per sample")
    ]
    for index, rho in enumerate(given.radii):
        for profile in profiles:
            random, *along = [profile.sharpness(direction)[index] for direction in profile.rises]
            sharpness = [f"{random:.1e}", *(f"{value:.4f}" for value in along)]
            shares = [f"{profile.half_shares(direction)[index]:.0%}" for direction in ("batch", "per sample")]
            rows.append((f"{rho:g}", profile.label, f"{profile.loss:.3f}", *sharpness, *shares))
    return (
        f"{table(rows)}\n\n"
        f"{len(profiles[0].losses)} samples of {given.gen_subset}, without dropout. Loss and sharpness are in base 2, "
        "divided by the sample size.\nSharpness is by how much the loss rises at distance ρ: along random directions, "
        "along the gradient of each batch, and\nfor each sample along its own gradient. Half of the rise is in so many "
        "of the samples."
    )


if __name__ == "__main__":
    main()
