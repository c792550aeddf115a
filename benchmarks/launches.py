"""How many kernels an update launches on CUDA, and how often the host waits for the device.

    python -m benchmarks.launches [--layers 6] [--only TASK] [--precision PRECISION] [--places]

No GPU is needed: CUDA is rehearsed on the CPU (tests/helpers/rehearsal.py). Nothing here was measured on a real GPU.
Launches are counted as torch's operations are known to make them.

fairseq's own trainer makes the updates. The base optimizer is fairseq's Adam, which launches its kernels for each
parameter; in the rows "Python", it is torch's Adam, which launches them for many parameters at once. What is counted is
an update that checks nothing: the checks come on batches 1 to 16, 32, 64, … and every thousandth.

A cell shows the launches as a multiple of the base optimizer's, their number, and the waits that δ-SAM adds. Waits of
the base run, which repeat with each forward and backward pass, are not counted.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import utils

from deltasam_plugin import DeltaSAM
from deltasam_plugin.modes import Perturbations
from tests.helpers import corpora
from tests.helpers.rehearsal import Rehearsal
from tests.helpers.rehearsed_runs import Counts, built, kept, steady, updates
from tests.helpers.runs import ADAM, SMOOTHED, base, delta

UPDATES = 4  # two that check, two that do not


class Method(NamedTuple):
    """How the gradient is found.

    Attributes:
        options: of fairseq-train.
        settings: of DeltaSAM.
        forwards, backwards: passes of an update.
    """

    options: list[object]
    settings: dict[str, Any]
    forwards: int
    backwards: int


METHODS = {
    "uniform": Method(["--sam-weighting", "uniform"], {"weighting": "uniform"}, 2, 2),
    "curvature": Method(["--sam-weighting", "curvature"], {"weighting": "curvature"}, 4, 2),
    "instance": Method(["--sam-perturbation", "instance"], {"perturbation": "instance"}, 2, 2),
}
PRECISIONS: dict[str, list[object]] = {
    "fp32": [],
    "fp16": ["--fp16", "--fp16-init-scale", 128],
    "bf16": [],
    "amp": ["--amp", "--fp16-init-scale", 128],
}


def encoder(layers: int) -> list[object]:
    """Options of a narrow encoder: width changes nothing here."""
    sizes: list[object] = ["--encoder-layers", layers, "--encoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128]
    return [*sizes, "--encoder-attention-heads", 2]


def tasks(layers: int) -> dict[str, tuple[str, str, list[object]]]:
    """By name: corpus, criterion and further options of fairseq-train."""
    decoder = ["--decoder-layers", layers, "--decoder-embed-dim", 64, "--decoder-ffn-embed-dim", 128]
    translation = ["--task", "translation", "--arch", "transformer", *decoder, "--decoder-attention-heads", 2]
    translation += ["--share-decoder-input-output-embed", "--label-smoothing", 0.1]
    roberta = ["--arch", "roberta", "--max-positions", 64]
    masked = ["--task", "masked_lm", *roberta, "--tokens-per-sample", 32, "--sample-break-mode", "eos"]
    sentences = ["--task", "sentence_prediction", *roberta, "--num-classes", 2]
    sentences += ["--init-token", 0, "--separator-token", 2]
    return {
        "translation": ("aligned", SMOOTHED, translation + encoder(layers)),
        "masked_lm": ("text", "masked_lm", masked + encoder(layers)),
        "sentence_prediction": ("sentences", "sentence_prediction", sentences + encoder(layers)),
    }


def through_fairseq(data: Path, criterion: str, options: list[object], precision: str) -> dict[str, Counts]:
    """A steady update of the base optimizer ("Adam") and of every method, by fairseq's trainer."""
    commands = {"Adam": base(criterion)}
    commands |= {name: [*delta(criterion), *method.options] for name, method in METHODS.items()}
    found = {}
    for name, command in commands.items():
        arguments = [*options, *PRECISIONS[precision], *ADAM, "--dropout", 0.1, *command]
        rehearsal = Rehearsal()
        with rehearsal.active():
            trainers = updates(data, *arguments, count=UPDATES, bf16=precision == "bf16")
            try:
                found[name] = steady(rehearsal, map(kept, trainers))
            except RuntimeError as error:
                print(f"{name}, {precision}: {error}", file=sys.stderr)
    return found


def in_python(data: Path, criterion: str, options: list[object]) -> dict[str, Counts]:
    """The same with torch's Adam and a loop of one's own."""
    found = {}
    for name in ("Adam", *METHODS):
        rehearsal = Rehearsal()
        with rehearsal.active():
            trainer = built(data, *options, *ADAM, "--dropout", 0.1, *base(criterion))
            model = trainer.model.train()
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            samples = [utils.move_to_cuda(s) for s in trainer.get_train_iterator(1).next_epoch_itr(shuffle=False)]

            def losses(sample: Any, model: Any = model) -> torch.Tensor:
                logits, target = model(**sample["net_input"])[0], sample["target"]
                lost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
                return lost.view(target.shape).sum(1)

            found[name] = steady(rehearsal, loop(name, parameters, [partial(losses, sample) for sample in samples]))
    return found


def loop(
    name: str, parameters: list[torch.nn.Parameter], batches: Sequence[Callable[[], torch.Tensor]]
) -> Iterator[Perturbations | None]:
    """Updates by a training loop. Each batch is a function that gives its per-sample losses."""
    adam: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "foreach": True}
    if name == "Adam":
        plain = torch.optim.Adam(parameters, **adam)
        for losses in batches[:UPDATES]:
            plain.zero_grad()
            losses().mean().backward()
            plain.step()
            yield None
    else:
        optimizer = DeltaSAM(parameters, torch.optim.Adam, **METHODS[name].settings, **adam)
        for losses in batches[:UPDATES]:
            optimizer.step(losses)
            yield optimizer._perturbations


def row(title: str, counts: dict[str, Counts], half: bool) -> str:
    """A row of the table."""
    adam = counts["Adam"]
    cells = [title, str(adam.launches)]
    for name, method in METHODS.items():
        if name not in counts:
            cells.append("refused")
            continue
        forwards = method.forwards + (half and name == "curvature")  # rounding is measured
        added = counts[name].added_waits(adam, forwards, method.backwards)
        cells.append(f"{counts[name].launches / adam.launches:.2f} ({counts[name].launches}), {added}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", choices=tasks(1))
    parser.add_argument("--precision", choices=[*PRECISIONS, "Python"])
    parser.add_argument("--places", action="store_true", help="also print where the host waits")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    print(
        "| task, precision | launches, Adam | " + " | ".join(METHODS) + " |\n|" + "---|" * (2 + len(METHODS)),
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for task, (corpus, criterion, options) in tasks(arguments.layers).items():
            if arguments.only not in (None, task):
                continue
            data = corpora.corpus(corpus, Path(folder))
            for precision in [*PRECISIONS, *(["Python"] if task == "translation" else [])]:
                if arguments.precision not in (None, precision):
                    continue
                if precision == "Python":
                    counts = in_python(data, criterion, options)
                else:
                    counts = through_fairseq(data, criterion, options, precision)
                print(row(f"{task}, {precision}", counts, precision in ("fp16", "bf16", "amp")), flush=True)
                for name, own in counts.items() if arguments.places else ():
                    for wait, number in Counter(own.waits).most_common():
                        print(f"    {name}: {number} × {wait.kind} in {wait.owner} {wait.place}")


if __name__ == "__main__":
    main()
