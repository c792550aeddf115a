"""The whole example: prepare the data, train the runs, measure them, print the table."""

import signal
import sys

from ..common.experiment import program, shown, table
from ..common.timing import ROUNDS, UPDATES, measure, ratios
from ..common.training import train_all
from . import prepare
from .evaluate import SHARPNESS_SENTENCES, evaluate
from .recipe import EXPERIMENT, OPTIMIZERS, RHO, WORK

TITLES = ("run", "valid acc %", "test acc %", "test loss", "sharpness", "s/update : adam, median (min-max)")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped. Run it again to continue."))
    with EXPERIMENT.locked() as lock:
        prepare.main()
        train_all(EXPERIMENT, keep=[lock])
        results = {run: evaluate(run) for run in OPTIMIZERS}
        seconds = measure(EXPERIMENT)
    rows: list[tuple[str, ...]] = [TITLES]
    for run, result in results.items():
        accuracies = (f"{result.valid_accuracy:.1f}", f"{result.test_accuracy:.1f}")
        rows.append((run, *accuracies, f"{result.test_loss:.3f}", f"{result.sharpness:.4f}", ratios(seconds, run)))
    text = table(rows)
    (WORK / "table.md").write_text(text + "\n")
    print(
        f"\n{text}\n\n"
        f"Final models, without dropout. Loss and sharpness are per sentence in base 2. Sharpness is the rise of the\n"
        f"loss on the first {SHARPNESS_SENTENCES} training sentences along their gradient at distance {RHO}. Time: "
        f"{ROUNDS} rounds of {UPDATES}\nupdates each, taking turns.\n"
        f"One seed: small differences mean nothing. One sentence of the test part is 0.1 % of accuracy.\n\n"
        f"Curves: {shown(program('tensorboard'))} --logdir {shown(WORK / 'runs')}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run it again to continue.")
