"""The four runs that an example of the task sentence_prediction compares, and the table of their measures."""

import signal
import sys
from collections.abc import Callable

from .evaluation import SHARPNESS_SENTENCES, evaluate_all
from .experiment import Experiment, delta_sam, program, shown, table
from .timing import UPDATES, measure, ratios
from .training import train_all

RHO = 0.05  # the plugin's default, not tuned; the sharpness of the final models is measured at this radius
INSTANCE_RHO = 0.01  # about RHO / √B, B sentences in a batch; not tuned

BASE = "sentence_prediction"
DELTA_SAM = delta_sam(BASE)

OPTIMIZERS = {
    "adam": f"--optimizer adam --criterion {BASE}",
    "sam": f"{DELTA_SAM} --sam-rho {RHO} --sam-weighting uniform",
    "delta_sam": f"{DELTA_SAM} --sam-rho {RHO} --sam-weighting curvature",
    "instance": f"{DELTA_SAM} --sam-rho {INSTANCE_RHO} --sam-perturbation instance",
}

TITLES = ("run", "valid acc %", "test acc %", "test loss", "sharpness", "s/update : adam, median (min-max)")


def compare(experiment: Experiment, prepare: Callable[[], None]) -> None:
    """Prepare the data, train the runs, measure them, print the table.

    Raises:
        SystemExit: a part failed, or the process was interrupted. What is done is kept.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped. Run it again to continue."))
    try:
        with experiment.locked() as lock:
            prepare()
            train_all(experiment, keep=[lock])
            results = evaluate_all(experiment, RHO)
            seconds = measure(experiment)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run it again to continue.")
    rows: list[tuple[str, ...]] = [TITLES]
    for run, result in results.items():
        accuracies = (f"{result.valid_accuracy:.1f}", f"{result.test_accuracy:.1f}")
        rows.append((run, *accuracies, f"{result.test_loss:.3f}", f"{result.sharpness:.4f}", ratios(seconds, run)))
    text = table(rows)
    (experiment.work / "table.md").write_text(text + "\n")
    print(
        f"\n{text}\n\n"
        f"Final models, without dropout. Loss and sharpness are per sentence in base 2. Sharpness is the rise of the\n"
        f"loss on the training sentences, at most {SHARPNESS_SENTENCES}, along their gradient at distance {RHO}. Time: "
        f"{experiment.timing_rounds} rounds of\n{UPDATES} updates each, taking turns.\n"
        f"One seed: small differences mean nothing. One sentence of the test part is 0.1 % of accuracy.\n\n"
        f"Curves: {shown(program('tensorboard'))} --logdir {shown(experiment.work / 'runs')}",
        flush=True,
    )
