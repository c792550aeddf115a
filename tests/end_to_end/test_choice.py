"""Directions and descents in whole runs of the real fairseq-train."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deltasam_plugin.fairseq.parameters import TrainedParameters, part_of
from tests.helpers.runs import ADAM, TRANSLATION, assert_same_model, base, delta, distance, fairseq_train, scalars

UNIFORM: list[object] = ["--sam-weighting", "uniform"]
VARIANTS: dict[str, list[object]] = {
    "momentum": ["--sam-ascent", "momentum"],
    "noise": ["--sam-ascent", "noise"],
    "weighted": [*UNIFORM, "--sam-descent", "weighted", "--sam-descent-weight", 2],
    "surrogate_gap": [*UNIFORM, "--sam-descent", "surrogate_gap"],
}
DROPPED = ["--encoder-layerdrop", 0.2, "--decoder-layerdrop", 0.2, "--update-freq", 2]
HALF: dict[str, list[object]] = {
    "fp16": ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4],
    "fp16 flattened": ["--fp16", "--fp16-init-scale", 4],
    "memory-efficient-fp16": ["--memory-efficient-fp16", "--fp16-init-scale", 4],
    "amp": ["--amp", "--fp16-init-scale", 4],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_radius_zero_is_the_base_run_and_another_is_not(translation_data: Path, tmp_path: Path, variant: str) -> None:
    """Bit for bit, with dropout, LayerDrop and gradient accumulation."""
    options = [*TRANSLATION, *ADAM, *DROPPED]
    plain = fairseq_train(translation_data, tmp_path / "base", *options, *base(), updates=3)
    options += VARIANTS[variant]
    assert_same_model(plain, fairseq_train(translation_data, tmp_path / "zero", *options, *delta(rho=0), updates=3))
    perturbed = fairseq_train(translation_data, tmp_path / "delta", *options, *delta(), updates=3)
    assert 0 < distance(plain, perturbed) < math.inf


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(translation_data: Path, tmp_path: Path, variant: str) -> None:
    options = [*TRANSLATION, *ADAM, *DROPPED, *delta(), *VARIANTS[variant], "--save-interval-updates", 2]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, updates=3)
    (tmp_path / "resumed").mkdir()
    (checkpoint,) = (tmp_path / "whole").glob("checkpoint_*_2.pt")
    shutil.copy(checkpoint, tmp_path / "resumed" / "checkpoint_last.pt")
    assert_same_model(whole, fairseq_train(translation_data, tmp_path / "resumed", *options, updates=3))


@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        *((variant, "fp16 flattened") for variant in VARIANTS),
        ("momentum", "memory-efficient-fp16"),
        ("weighted", "amp"),
    ],
)
def test_half_precision(translation_data: Path, tmp_path: Path, variant: str, precision: str) -> None:
    options = [*TRANSLATION, *ADAM, *HALF[precision]]
    plain = fairseq_train(translation_data, tmp_path / "base", *options, *base(), updates=3)
    options += VARIANTS[variant]
    assert_same_model(plain, fairseq_train(translation_data, tmp_path / "zero", *options, *delta(rho=0), updates=3))
    logs = ["--tensorboard-logdir", tmp_path / "logs"]
    perturbed = fairseq_train(translation_data, tmp_path / "delta", *options, *delta(rho=0.5), *logs, updates=3)
    assert 0 < distance(plain, perturbed) < math.inf
    moved = scalars(tmp_path / "logs", "sam_eps_norm")["sam_eps_norm"]
    first = 0.0 if variant == "momentum" else 0.5
    assert moved == pytest.approx([first, 0.5, 0.5], rel=0.05)


@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize("variant", ["momentum", "noise"])
def test_flat_masters_have_the_momentum_of_every_parameter(
    translation_data: Path, tmp_path: Path, variant: str
) -> None:
    """One flat copy of all parameters, and a copy of each: the same run up to the order of sums."""
    options = [*TRANSLATION, *ADAM, *VARIANTS[variant], *delta(rho=0.5)]
    whole, flat, plain = (
        fairseq_train(translation_data, tmp_path / name.replace(" ", "_"), *options, *HALF[name], *more, updates=3)
        for name, more in (("fp16", []), ("fp16 flattened", []), ("amp", ["--sam-rho", 0]))
    )
    assert 10 * distance(whole, flat) < distance(whole, plain)


def test_where_the_momentum_of_a_parameter_is() -> None:
    """In what the optimizer was given: the parameter, its copy, or a part of the flat copy of all."""
    model, criterion = nn.Linear(4, 3).half(), nn.Identity()
    copies = [p.detach().float() for p in model.parameters()]
    flat = torch.cat([copy.flatten() for copy in copies])
    for given in (list(model.parameters()), copies, [flat]):
        parameters = TrainedParameters(given)
        values = {holder: torch.arange(holder.numel()).view(holder.shape) for holder in given}
        found = [part_of(item, holder, values[holder]) for item in parameters.of(model, criterion)
                 for holder in [parameters.holder(item)]]  # fmt: skip
        assert [part.shape for part in found] == [p.shape for p in model.parameters()]
        assert found[1].tolist() == ([12, 13, 14] if given[0] is flat else [0, 1, 2])
        assert found[0].flatten().tolist() == list(range(12))


def test_one_pass_against_the_momentum_of_another_run(translation_data: Path, tmp_path: Path) -> None:
    """Adam's checkpoint brings a momentum. What one pass cannot measure is not logged; the loss is that at w + ε."""
    options = [*TRANSLATION, *ADAM, "--log-format", "json"]
    fairseq_train(translation_data, tmp_path, *options, *base(), updates=2)
    logs = ["--tensorboard-logdir", tmp_path / "logs"]
    fairseq_train(translation_data, tmp_path, *options, *delta(rho=0.03), *VARIANTS["momentum"], *logs, updates=4)
    moved = scalars(tmp_path / "logs", "sam_eps_norm", "sam_skipped", "loss")
    assert moved["sam_eps_norm"] == pytest.approx([0.03] * 2, rel=1e-4)
    assert moved["sam_skipped"] == [0, 0]
    events = EventAccumulator(str(tmp_path / "logs" / "train_inner"))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("sam_")}
    assert tags == {"sam_eps_norm", "sam_ascent_gnorm", "sam_skipped"}
    back = fairseq_train(translation_data, tmp_path, *options, *base(), updates=6)
    assert back["optimizer_history"][-1]["num_updates"] == 6


REFUSED: dict[str, tuple[list[object], list[object], str]] = {
    "no momentum": (
        delta(optimizer="sgd"),
        ["--sam-ascent", "momentum"],
        "Invalid ascent='momentum' (--sam-ascent): the base optimizer keeps nothing, and no momentum (exp_avg or "
        "momentum_buffer). Give it momentum, or use another one such as adam.",
    ),
    "quantization noise": (
        delta(),
        ["--sam-ascent", "momentum", "--quant-noise-pq", 0.1],
        "Invalid quant_noise_pq=0.1 (--quant-noise-pq) with --sam-ascent momentum: the forward pass rewrites the "
        "weights, and no pass runs at w. Leave it out, or use --sam-ascent gradient.",
    ),
    "activation checkpointing": (
        delta(),
        [*VARIANTS["weighted"], "--checkpoint-activations"],
        "Invalid checkpoint_activations=True (--checkpoint-activations) with --sam-descent weighted: its backward pass "
        "cannot give a gradient without adding it up. Leave it out, or use --sam-descent perturbed.",
    ),
    "two descents at once": (
        delta(),
        ["--sam-descent", "weighted"],
        "Invalid descent='weighted' (--sam-descent) with weighting='curvature'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused(translation_data: Path, tmp_path: Path, case: str) -> None:
    changed, options, message = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *changed, *options, updates=2)
    if case == "no momentum":  # found out after the first step, and with momentum not at all
        options = [*options, "--momentum", 0.9]
        final = fairseq_train(translation_data, tmp_path / "with", *TRANSLATION, *changed, *options, updates=2)
        assert all(torch.isfinite(weight).all() for weight in final["model"].values())
