"""fairseq's trainer with δ-SAM on a device that is not the CPU. CUDA is rehearsed: see tests/helpers/rehearsal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fairseq.trainer import Trainer

from deltasam_plugin.batch import measures, norms
from deltasam_plugin.randomness import RandomState
from tests.helpers import corpora
from tests.helpers.rehearsal import Rehearsal, plain
from tests.helpers.rehearsed_runs import kept, steady, updates
from tests.helpers.runs import ADAM, INSTANCE, SENTENCES, TRANSLATION, base, delta

MODES: dict[str, tuple[list[object], int]] = {  # options, forward passes
    "uniform": (["--sam-weighting", "uniform"], 2),
    "curvature": (["--sam-weighting", "curvature"], 4),
    "instance": (INSTANCE, 2),
}
PRECISIONS: dict[str, list[object]] = {
    "fp32": [],
    "fp16": ["--fp16", "--fp16-init-scale", 128],
    "bf16": [],
    "amp": ["--amp", "--fp16-init-scale", 128],
}
MASKED: list[object] = ["--task", "masked_lm", "--arch", "roberta_base", "--encoder-layers", 2, "--dropout", 0.2]
MASKED += ["--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64, "--encoder-attention-heads", 2]
MASKED += ["--tokens-per-sample", 32, "--max-positions", 32, "--sample-break-mode", "eos"]
TASKS: dict[str, tuple[str, str, list[object]]] = {  # corpus, criterion, options
    "translation": ("aligned", "label_smoothed_cross_entropy", TRANSLATION),
    "masked_lm": ("text", "masked_lm", MASKED),
    "sentence_prediction": ("sentences", "sentence_prediction", [*SENTENCES, "--num-classes", 2]),
}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpora")


def weights(trainers: Iterator[Trainer]) -> dict[str, torch.Tensor]:
    for trainer in trainers:
        model = trainer.get_model()
    return {name: plain(parameter.detach()).clone() for name, parameter in model.named_parameters()}


CASES = [("translation", mode, "fp32") for mode in MODES]
CASES += [("masked_lm", "instance", "fp32"), ("sentence_prediction", "curvature", "fp32")]
CASES += [
    ("translation", mode, precision) for mode in ("curvature", "instance") for precision in ("fp16", "bf16", "amp")
]


@pytest.mark.parametrize(("task", "mode", "precision"), CASES)
def test_same_weights_as_on_the_cpu(
    root: Path, monkeypatch: pytest.MonkeyPatch, task: str, mode: str, precision: str
) -> None:
    monkeypatch.setattr(RandomState, "seed", lambda self: 1234)  # of the probes: it depends on the device's generator
    for module in (norms, measures):
        monkeypatch.setattr(module, "lot_size", lambda device: 2**22)  # sums are rounded lot by lot
    monkeypatch.setattr(norms, "_unscaled_norm", lambda value: torch.tensor(math.nan))  # only a CPU takes it
    corpus, criterion, options = TASKS[task]
    arguments = [
        corpora.corpus(corpus, root),
        *options,
        *PRECISIONS[precision],
        *ADAM,
        *delta(criterion),
        *MODES[mode][0],
    ]
    train = partial(updates, *arguments, count=3, bf16=precision == "bf16")
    rehearsal = Rehearsal()
    with rehearsal.active():
        on_device = weights(train())
    assert rehearsal.launches.total() > 0
    if precision != "fp32":  # fairseq asks for CUDA even on a CPU
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
        monkeypatch.setattr(torch.cuda.amp, "GradScaler", partial(torch.amp.GradScaler, "cpu"))
        monkeypatch.setattr(torch.cuda.amp, "autocast", partial(torch.autocast, "cpu", dtype=torch.float16))
    on_cpu = weights(train("--cpu"))
    assert on_cpu.keys() == on_device.keys()
    assert [name for name, weight in on_cpu.items() if not torch.equal(weight, on_device[name])] == []


STEADY = [("translation", mode, "fp32") for mode in MODES]
STEADY += [("translation", "curvature", "amp"), ("sentence_prediction", "instance", "fp16")]
STEADY += [("masked_lm", "curvature", "fp32"), ("masked_lm", "instance", "fp32"), ("masked_lm", "instance", "fp16")]


@pytest.mark.parametrize(("task", "mode", "precision"), STEADY)
def test_a_steady_update_waits_no_more_often_than_the_base_run(
    root: Path, task: str, mode: str, precision: str
) -> None:
    """Its passes wait as those of the base run do, and nothing else does."""
    corpus, criterion, options = TASKS[task]
    arguments = [corpora.corpus(corpus, root), *options, *PRECISIONS[precision], *ADAM]
    chosen, forwards = MODES[mode]
    forwards += mode == "curvature" and precision != "fp32"  # rounding is measured
    counts = []
    for command in (base(criterion), [*delta(criterion), *chosen]):
        rehearsal = Rehearsal()
        with rehearsal.active():
            trainers = updates(*arguments, *command, count=4, bf16=precision == "bf16")
            counts.append(steady(rehearsal, map(kept, trainers)))
    of_base, own = counts
    assert own.added_waits(of_base, forwards, backwards=2) == 0, own.waits
