"""In which form per-sample gradients cost least: the measurement behind `TRAFFIC` in instance/planning.py.

    python -m benchmarks.forms [--rounds 5]

Eight linear layers are trained by SAM and by instance mode, with the gradients of all matrices in one form. A row shows
the seconds of either form as ratios to SAM's, in alternation: median, least and greatest. Then the value of TRAFFIC at
which `cheapest_form` would change at just this number of rows. Take one between those of the last row in which factors
are faster and of the first in which they are slower.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from deltasam_plugin import DeltaSAM
from deltasam_plugin.instance import planning
from deltasam_plugin.instance.layers.base import Form

SHAPES = ((256, 256), (256, 1024), (512, 512))
ROWS = (32, 64, 96, 128, 192, 256, 512)


def update_by(form: Form | None, inputs: int, outputs: int, rows: int) -> Callable[[], None]:
    """Return an update in instance mode with this form, or by SAM."""
    torch.manual_seed(0)
    pairs = (nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, inputs)) for _ in range(4))
    model, x = nn.Sequential(*pairs), torch.randn(rows, max(4, 2048 // rows), inputs, requires_grad=True)
    optimizer = DeltaSAM(
        model.parameters(), torch.optim.SGD, weighting="uniform", perturbation="instance" if form else "batch", lr=0.0
    )

    def update() -> None:
        planning.cheapest_form = lambda *arguments: form
        optimizer.step(lambda: model(x).square().sum((0, 2)))

    for _ in range(17):  # the first batches are checked
        update()
    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| matrix | rows | factors | formed, W + sG | TRAFFIC |\n|---|---|---|---|---|", flush=True)
    for inputs, outputs in SHAPES:
        for rows in ROWS:
            updates = {form: update_by(form, inputs, outputs, rows) for form in (None, Form.FACTORED, Form.OWN)}
            seconds: dict[Form | None, list[float]] = {form: [] for form in updates}
            for _ in range(rounds):
                for form, update in updates.items():
                    start = time.process_time()
                    update()
                    seconds[form].append(time.process_time() - start)
            cells = [f"{inputs} × {outputs}", str(rows)]
            for form in (Form.FACTORED, Form.OWN):
                ratios = [own / sam for own, sam in zip(seconds[form], seconds[None], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
            cells.append(f"{3 * rows * rows * (inputs + outputs) / (inputs * outputs) - rows:.0f}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
