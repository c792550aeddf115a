"""The whole example: prepare the data, train the runs, measure them, print the table."""

import argparse
import signal
import sys
from pathlib import Path

from ..common.experiment import program, shown, table
from ..common.timing import UPDATES, measure, ratios
from ..common.training import train_all
from . import prepare
from .evaluate import BEAM, RESAMPLES, evaluate_all
from .recipe import EXPERIMENT, WORK

TITLES = ("run", "valid loss", "test BLEU", "s/update : adam, median (min-max)")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped. Run it again to continue."))
    files = own_files()
    with EXPERIMENT.locked() as lock:
        prepare.main(files)
        train_all(EXPERIMENT, keep=[lock])
        results = evaluate_all()
        seconds = measure(EXPERIMENT)
    rows: list[tuple[str, ...]] = [TITLES]
    for run, result in results.items():
        bleu = f"{result.bleu:.1f} ± {result.interval:.1f}"
        rows.append((run, f"{result.valid_loss:.3f}", bleu, ratios(seconds, run)))
    text = table(rows)
    (WORK / "table.md").write_text(text + "\n")
    print(
        f"\n{text}\n\n"
        f"Final models, without dropout. Loss: cross-entropy per target token in base 2. BLEU: sacrebleu\n"
        f"({results['adam'].signature}), beam {BEAM}; ± is the 95 % interval over {RESAMPLES} resamples of the\n"
        f"test part. Time: {EXPERIMENT.timing_rounds} rounds of {UPDATES} updates each, taking turns.\n"
        "One seed: small differences mean nothing.\n\n"
        f"Curves: {shown(program('tensorboard'))} --logdir {shown(WORK / 'runs')}",
        flush=True,
    )


def own_files() -> tuple[Path, Path] | None:
    """Return the parallel files that the command line names, or None for Debian's packages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, metavar="FILE", help="text to translate, one segment a line")
    parser.add_argument("--target", type=Path, metavar="FILE", help="its translation, line by line")
    given = parser.parse_args()
    if (given.source is None) != (given.target is None):
        parser.error("--source needs --target and the reverse: line n of one file translates line n of the other")
    for file in (given.source, given.target):
        if file is not None and not file.is_file():
            parser.error(f"{file} is no file")
    return None if given.source is None else (given.source, given.target)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run it again to continue.")
