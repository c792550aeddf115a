"""When parameters are perturbed, and how far: interval, warm-up, and a radius that follows the learning rate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.schedule import perturbs, radius
from tests.helpers.runs import INSTANCE, TRANSLATION, assert_same_model, delta, fairseq_train, scalars

counts = st.integers(1, 50)


@given(counts, st.integers(0, 1000))
def test_one_update_of_each_interval_is_perturbed(interval: int, first: int) -> None:
    settings = Settings(interval=interval)
    assert sum(perturbs(settings, update) for update in range(first, first + interval)) == 1
    assert perturbs(settings, 0)


@given(counts, st.integers(0, 100), st.floats(0, 1))
def test_the_radius_grows_to_rho_and_then_follows_the_learning_rate(warmup: int, update: int, lr: float) -> None:
    settings = Settings(0.3, warmup_updates=warmup)
    assert 0 < radius(settings, update, lr) <= radius(settings, update + 1, lr) <= 0.3
    assert radius(settings, warmup - 1, lr) == pytest.approx(0.3)
    assert radius(settings, warmup + update, lr) == 0.3
    following = Settings(0.3, warmup_updates=warmup, rho_schedule="lr")
    assert radius(following, warmup + update, lr) == 0.3 * lr
    assert radius(following, warmup - 1, lr) == pytest.approx(0.3)
    assert radius(Settings(0.3), update, lr) == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, r"Invalid interval=0 \(--sam-interval\)\. Must be an integer >= 1\."),
        ({"interval": 1.5}, r"Invalid interval=1\.5 \(--sam-interval\)\. Must be an integer >= 1\."),
        ({"warmup_updates": -1}, r"Invalid warmup_updates=-1 \(--sam-warmup-updates\)\. Must be an integer >= 0\."),
        ({"rho_schedule": "cosine"}, r"Unknown rho_schedule='cosine' \(--sam-rho-schedule\)\. Choose one of: const"),
    ],
)
def test_what_breaks_its_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)


class Classifier(nn.Linear):
    """Counts its forward passes."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().forward(x)


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
MODES = [{"weighting": "uniform"}, {"perturbation": "instance"}]


def steps(count: int, base: bool = False, **options: Any) -> tuple[list[torch.Tensor], list[float | None], list[int]]:
    """After each step: the weight, how far parameters were moved to ascend, and the forward passes so far."""
    torch.manual_seed(0)
    model, weights, moved, passes = Classifier(4, 3), [], [], []
    sgd = {"lr": 0.1, "momentum": 0.9}
    optimizer: Any = torch.optim.SGD(model.parameters(), **sgd)
    if not base:
        optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, **options, **sgd)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(count):
        if base:
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y, reduction="none").mean().backward()
            optimizer.step()
        else:
            optimizer.step(lambda: F.cross_entropy(model(X), Y, reduction="none"))
            moved.append(None if optimizer.statistics is None else round(optimizer.statistics.eps_norm.item(), 6))
        scheduler.step()
        weights.append(model.weight.detach().clone())
        passes.append(model.passes)
    return weights, moved, passes


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_steps_between_perturbed_ones_are_those_of_the_base(mode: dict[str, str]) -> None:
    weights, moved, passes = steps(7, rho=0.2, interval=3, **mode)
    assert moved == [0.2, None, None, 0.2, None, None, 0.2]
    assert [passes[i] - passes[i - 1] for i in (1, 2, 4, 5)] == [1] * 4
    plain, *_ = steps(7, base=True)
    assert not torch.equal(weights[0], plain[0])
    assert all(map(torch.equal, steps(7, rho=0.0, interval=3, **mode)[0], plain))
    assert all(map(torch.equal, steps(7, rho=0.2, interval=1, **mode)[0], steps(7, rho=0.2, **mode)[0]))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_radius_of_each_step(mode: dict[str, str]) -> None:
    """The learning rate is 0.1 for two steps, then 0.05, then 0.025."""
    assert steps(5, rho=0.2, warmup_updates=4, **mode)[1] == [0.05, 0.1, 0.15, 0.2, 0.2]
    assert steps(6, rho=0.2, rho_schedule="lr", **mode)[1] == [0.2, 0.2, 0.1, 0.1, 0.05, 0.05]
    assert steps(6, rho=0.2, rho_schedule="lr", warmup_updates=4, **mode)[1] == [0.05, 0.1, 0.15, 0.2, 0.05, 0.05]


SCHEDULERS: dict[str, tuple[float, Callable[[Any], Any], list[float]]] = {  # rate at the start, and radii of 0.2
    "one cycle": (0.1, lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=4, anneal_strategy="linear"), []),
    "cyclic": (0.1, lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, step_size_up=3, cycle_momentum=False), [0.2] * 4),
    "linear": (0.1, lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, total_iters=3), [0.05, 0.1, 0.15, 0.2]),
    "constant": (0.0, lambda o: lr_scheduler.ConstantLR(o), [0.2] * 4),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_radius_is_never_above_rho(name: str, tensor: bool) -> None:
    """It follows the learning rate as a fraction of the greatest so far, or of a greater one that is announced."""
    lr, make, radii = SCHEDULERS[name]
    torch.manual_seed(0)
    model = Classifier(4, 3)
    rate: Any = torch.tensor(lr) if tensor else lr
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.2, rho_schedule="lr", weighting="uniform", lr=rate)
    scheduler, moved, rates = make(optimizer), [], []
    for _ in range(4):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step(lambda: F.cross_entropy(model(X), Y, reduction="none"))
        assert optimizer.statistics is not None
        moved.append(optimizer.statistics.eps_norm.item())
        scheduler.step()
    assert moved == pytest.approx(radii or [0.2 * rate / 0.4 for rate in rates], rel=1e-4, abs=1e-6)
    assert max(moved) <= 0.2001


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_radius_that_becomes_zero_is_no_skipped_perturbation(mode: dict[str, str]) -> None:
    model = Classifier(4, 3)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.2, rho_schedule="lr", lr=0.1, **mode)
    for lr, moved in ((0.1, 0.2), (0.0, 0.0)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(lambda: F.cross_entropy(model(X), Y, reduction="none"))
        assert optimizer.statistics is not None
        assert optimizer.statistics.eps_norm.item() == pytest.approx(moved)
        assert optimizer.statistics.ascent_gnorm.item() > 0
        assert optimizer.statistics.skipped.item() == 0


@pytest.mark.parametrize("mode", [["--sam-weighting", "uniform"], INSTANCE], ids=["batch", "instance"])
def test_a_run_and_the_same_run_resumed(
    translation_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: list[object]
) -> None:
    options: list[object] = [*TRANSLATION, *delta(rho=0.2), *mode, "--sam-interval", 2, "--sam-warmup-updates", 4]
    options += ["--sam-rho-schedule", "lr", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 2]
    options += ["--save-interval-updates", 3]
    logs = ["--tensorboard-logdir", tmp_path / "logs"]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, *logs, updates=8)
    values = scalars(tmp_path / "logs", "sam_sharpness", "sam_rho", "loss")
    assert {name: len(series) for name, series in values.items()} == {"sam_sharpness": 4, "sam_rho": 4, "loss": 8}
    # Updates 0, 2, 4 and 6. The learning rate falls with the square root from update 2 on.
    assert values["sam_rho"] == pytest.approx([0.05, 0.15, 0.2 * (2 / 4) ** 0.5, 0.2 * (2 / 6) ** 0.5], abs=1e-6)
    (tmp_path / "resumed").mkdir()
    (checkpoint,) = (tmp_path / "whole").glob("checkpoint_*_3.pt")
    shutil.copy(checkpoint, tmp_path / "resumed" / "checkpoint_last.pt")
    caplog.clear()
    assert_same_model(whole, fairseq_train(translation_data, tmp_path / "resumed", *options, updates=8))
    # Update 3, the first, is not sharpness-aware.
    (line,) = (message for message in caplog.messages if message.startswith("δ-SAM: adam minimizes"))
    assert "interval=2, warmup_updates=4, rho_schedule=lr, 139,008 parameters perturbed" in line
