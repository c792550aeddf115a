"""The logged scalars, in fairseq's log and in TensorBoard's event files."""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.logging import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deltasam_plugin.fairseq.announcements import TrainedBy, start_line
from deltasam_plugin.fairseq.criterion import sharpness_aware
from deltasam_plugin.loss import Statistics
from deltasam_plugin.settings import Settings
from tests.helpers.runs import ADAM, INSTANCE, TRANSLATION, delta, fairseq_train, scalars

SCALARS = [f"sam_{name}" for name in ("sharpness", "ess", "weight_max", "ascent_gnorm", "eps_norm", "skipped")]


def test_event_files(translation_data: Path, tmp_path: Path) -> None:
    """Every scalar at every update, read by TensorBoard's own reader."""
    options = [*TRANSLATION, *ADAM, *delta(rho=0.03), "--update-freq", 2, "--tensorboard-logdir", tmp_path / "logs"]
    fairseq_train(translation_data, tmp_path, *options, updates=4)
    values = scalars(tmp_path / "logs", *SCALARS)
    assert all(len(series) == 4 for series in values.values())
    assert values["sam_eps_norm"] == pytest.approx([0.03] * 4, rel=1e-4)
    assert values["sam_skipped"] == [0] * 4
    assert all(0 < ess <= 1 for ess in values["sam_ess"])
    assert all(1 <= largest <= 16 for largest in values["sam_weight_max"])
    assert all(value > 0 for value in values["sam_sharpness"] + values["sam_ascent_gnorm"])
    # To first order (L(w+ε) − L(w)) per target token is at most ρ‖∇L‖.
    assert max(values["sam_sharpness"]) < 1.0


LINES = {
    "curvature": (
        ["--sam-probes", 2],
        "perturbation=batch, weighting=curvature, probes=2, 139,008 parameters perturbed",
    ),
    "kl": (["--sam-weighting", "kl"], "perturbation=batch, weighting=kl, probes=1, 139,008 parameters perturbed"),
    "uniform": (["--sam-weighting", "uniform"], "perturbation=batch, weighting=uniform, 139,008 parameters perturbed"),
    "instance": (INSTANCE, "perturbation=instance, 139,008 parameters perturbed, 0 (0.00%) not covered"),
    "normalization": (
        ["--sam-weighting", "uniform", "--sam-parameters", "layer_norm"],
        "perturbation=batch, weighting=uniform, parameters=layer_norm, 1,280 parameters perturbed",
    ),
    "instances within a budget": (
        [*INSTANCE, "--sam-parameters", "decoder", "--sam-loss-budget", 0.1],
        "perturbation=instance, parameters=decoder, loss_budget=0.1, 87,040 parameters perturbed, "
        "0 (0.00%) not covered",
    ),
    "adaptive groups": (
        [*INSTANCE, "--sam-group", 4, "--sam-adaptive"],
        "perturbation=instance, group=4, adaptive=True, 139,008 parameters perturbed, 0 (0.00%) not covered",
    ),
    "against the momentum": (
        ["--sam-ascent", "momentum", "--momentum", 0.9],
        "perturbation=batch, ascent=momentum, 139,008 parameters perturbed",
    ),
    "weighted descent": (
        ["--sam-weighting", "uniform", "--sam-descent", "weighted", "--sam-descent-weight", 2],
        "perturbation=batch, weighting=uniform, descent=weighted, descent_weight=2.0, 139,008 parameters perturbed",
    ),
}


@pytest.mark.parametrize("mode", LINES)
def test_one_line_at_the_start(
    translation_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    options, line = LINES[mode]
    with caplog.at_level(logging.INFO, logger="deltasam_plugin"):
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *delta(optimizer="sgd"), *options, updates=2)
    (message,) = [record.message for record in caplog.records if record.name.startswith("deltasam_plugin")]
    assert message == f"δ-SAM: sgd minimizes label_smoothed_cross_entropy, rho=0.05, {line}"


def test_the_line_names_what_is_not_covered() -> None:
    names, settings = TrainedBy("task", "cross_entropy", "adam"), Settings(perturbation="instance")
    parameters = [torch.zeros(1000), torch.zeros(24)]
    assert start_line(names, settings, parameters, parameters[1:]).endswith(
        "1,000 parameters perturbed, 24 (2.34%) not covered"
    )


WEIGHTS, SPREAD = ["sam_ess", "sam_weight_max"], ["sam_ascent_gnorm_std"]
PROBES = ["sam_probes_failed", "sam_probes_lost"]
CONSTANT = {"uniform": ["--sam-weighting", "uniform"], "instance": INSTANCE, "radius zero": [*INSTANCE, "--sam-rho", 0]}
LEFT_OUT = {"uniform": [*WEIGHTS, *SPREAD, *PROBES], "instance": [*WEIGHTS, *PROBES], "radius zero": SPREAD}


@pytest.mark.parametrize("mode", CONSTANT)
def test_constants_are_not_logged(translation_data: Path, tmp_path: Path, mode: str) -> None:
    """At radius zero no sample is perturbed, and the batch is probed as in batch mode."""
    options = [*TRANSLATION, *ADAM, *delta(), *CONSTANT[mode], "--tensorboard-logdir", tmp_path / "logs"]
    fairseq_train(translation_data, tmp_path, *options, "--update-freq", 2, updates=2)
    expected = {f"sam_{item.name}" for item in fields(Statistics)} - set(LEFT_OUT[mode])
    events = EventAccumulator(str(tmp_path / "logs" / "train_inner"))
    events.Reload()
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("sam_")} == expected
    assert all(len(series) == 2 for series in scalars(tmp_path / "logs", *expected).values())


def test_sums_over_micro_batches_and_workers() -> None:
    """One dictionary per micro-batch gives the same scalars as their sum, which fairseq takes over workers."""
    first = {"loss": 20.0, "ntokens": 10, "sample_size": 10, "nll_loss": 18.0, "nsentences": 2, "sam_batches": 1}
    second = {"loss": 50.0, "ntokens": 30, "sample_size": 30, "nll_loss": 45.0, "nsentences": 4, "sam_batches": 1}
    first |= {"sam_sharpness": 2.0, "sam_ess": 0.5, "sam_weight_max": 3.0, "sam_ascent_gnorm": 4.0}
    second |= {"sam_sharpness": 6.0, "sam_ess": 1.0, "sam_weight_max": 1.0, "sam_ascent_gnorm": 2.0}
    first |= {"sam_eps_norm": 0.05, "sam_skipped": 0.0, "sam_sample_size": 10}
    second |= {"sam_eps_norm": 0.0, "sam_skipped": 1.0, "sam_sample_size": 30}
    together = {key: torch.tensor(float(first[key] + second[key])) for key in first}
    expected = {"sam_sharpness": 8 / 40 / math.log(2), "sam_ess": 0.75, "sam_weight_max": 2.0}
    expected |= {"sam_ascent_gnorm": 3.0, "sam_eps_norm": 0.025, "sam_skipped": 1.0, "loss": 70 / 40 / math.log(2)}
    criterion = sharpness_aware(CRITERION_REGISTRY["label_smoothed_cross_entropy"])
    for outputs in ([first, second], [together]):
        with metrics.aggregate(new_root=True) as aggregated:
            criterion.reduce_metrics(outputs)
        for name, value in expected.items():
            assert float(aggregated.get_smoothed_value(name)) == pytest.approx(value, abs=1e-3), name


def test_validation_logs_nothing_of_it() -> None:
    criterion = sharpness_aware(CRITERION_REGISTRY["cross_entropy"])
    with metrics.aggregate(new_root=True) as aggregated:
        criterion.reduce_metrics([{"loss": torch.tensor(3.0), "ntokens": 4, "sample_size": 4, "nsentences": 1}])
    assert not [name for name in aggregated if name.startswith("sam_")]
