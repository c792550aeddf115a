"""Training loops, parameters and closures that DeltaSAM must serve or refuse in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin import DeltaSAM, weighting
from deltasam_plugin.errors import Refused
from tests.helpers.rehearsed_runs import skip_checks

MOMENTUM = {"ascent": "momentum", "momentum": 0.9}


def classified(model: nn.Module, size: int = 6) -> Callable[[], Tensor]:
    """A closure."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)
    return lambda: F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 0.05}, {"rho": 1e-3, "perturbation": "instance"}])
def test_large_losses_in_half_precision_train_as_under_the_base_optimizer(options: dict[str, Any]) -> None:
    """No loss scaler is there to skip the update. Summed over the batch, the gradient would overflow."""
    torch.manual_seed(0)
    x, y = torch.randn(512, 16).abs() * 4, torch.full((512, 4), -60.0)
    base = nn.Linear(16, 4)
    model = copy.deepcopy(base)

    def losses(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return (net(x) - y).square().sum(1)

    stepped = torch.optim.SGD(base.parameters(), lr=1e-4)
    losses(base).mean().backward()
    stepped.step()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, **{"weighting": "uniform"} | options, lr=1e-4)
    optimizer.step(lambda: losses(model))
    torch.testing.assert_close(model.weight, base.weight, rtol=0, atol=0 if options["rho"] == 0 else 1e-3)


@pytest.mark.parametrize("perturbation", ["batch", "instance"])
def test_a_gradient_that_overflows_in_half_precision_leaves_the_parameters_finite(perturbation: str) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 16), nn.Linear(16, 4)

    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, weighting="uniform", perturbation=perturbation, lr=1e-4)
    at_w, seen = copy.deepcopy(model.state_dict()), []

    def closure() -> Tensor:  # only the gradient at w overflows
        seen.append(None)
        with torch.autocast("cpu", dtype=torch.float16):
            y = model(x)
        return (y.float() * (3e4 if len(seen) == 1 else 1)).square().sum(1)

    skip_checks(optimizer._current_perturbations())
    optimizer.step(closure)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert any(bool((value != at_w[name]).any()) for name, value in model.state_dict().items())


def test_a_forward_pass_before_the_step_under_autocast_changes_nothing_for_momentum() -> None:
    """Autocast keeps the weights it has cast. They are those of before the displacement."""
    torch.manual_seed(1)
    start, x = nn.Linear(64, 64), torch.randn(8, 64)

    def losses_of(before: bool) -> list[float]:
        model = copy.deepcopy(start)
        optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=5.0, lr=0.1, **MOMENTUM)
        found = []
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if before:
                    model(x)
                found.append(optimizer.step(lambda: model(x).float().square().mean(1)).item())
        return found

    assert losses_of(before=True) == losses_of(before=False)


def test_a_weighting_that_measures_nothing_is_refused() -> None:
    """Its function would never be called."""
    with pytest.raises(ValueError, match=r"Unknown measures=None of weighting 'nothing'. Choose one of: second_"):
        weighting("nothing", measures=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("ascent", ["momentum", "noise"])
def test_a_resumed_optimizer_without_momentum_is_refused(ascent: str) -> None:
    model = nn.Linear(4, 3)
    plain = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    plain.step(classified(model))
    options = MOMENTUM | {"ascent": ascent, "weighting": "uniform"}
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)
    optimizer.step(classified(model))
    optimizer.load_state_dict(plain.state_dict())  # and its groups, without momentum
    with pytest.raises(ValueError, match=rf"Invalid ascent='{ascent}' \(--sam-ascent\): the base optimizer keeps"):
        optimizer.step(classified(model))


@pytest.mark.parametrize("options", [{}, MOMENTUM])
def test_a_closure_that_calls_backward_is_refused_in_every_ascent(options: dict[str, Any]) -> None:
    model = nn.Linear(4, 3)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, weighting="uniform", **options)

    def closure() -> Tensor:
        losses = classified(model)()
        losses.mean().backward(retain_graph=True)
        return losses

    with pytest.raises(ValueError, match=r"The closure called backward\(\)"):
        optimizer.step(closure)


@pytest.mark.parametrize("options", [{}, MOMENTUM])
def test_a_closure_that_returns_a_mean_is_refused_in_every_ascent(options: dict[str, Any]) -> None:
    model = nn.Linear(4, 3)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)
    with pytest.raises(ValueError, match=r"Invalid per-sample losses of shape \(\)"):
        optimizer.step(lambda: classified(model)().mean())


@pytest.mark.parametrize("options", [{}, {"weighting": "uniform"}, {"perturbation": "instance"}, MOMENTUM])
def test_complex_parameters_are_refused(options: dict[str, Any]) -> None:
    model, phase = nn.Linear(4, 3), nn.Parameter(torch.randn(3, dtype=torch.complex64))
    optimizer = DeltaSAM([*model.parameters(), phase], torch.optim.SGD, lr=0.1, **options)
    with pytest.raises(Refused, match=r"parameter 2 is torch.complex64. Must be real: keep it as view_as_real"):
        optimizer.step(lambda: classified(model)() + phase.abs().sum())


def test_the_radius_follows_the_learning_rate_in_steps_between_too() -> None:
    """The greatest rate may come in a step that is not sharpness-aware."""
    lengths = []
    for interval in (1, 4):
        model = nn.Linear(4, 3)
        options = {"weighting": "uniform", "rho": 0.1, "rho_schedule": "lr", "interval": interval}
        optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)
        for lr in (0.01, 0.05, 0.1, 0.08, 0.02):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step(classified(model))
        assert optimizer.statistics is not None
        lengths.append(optimizer.statistics.eps_norm.item())
    assert lengths == pytest.approx([0.02, 0.02], rel=1e-5)


@pytest.mark.parametrize("name", ["curvature", "uniform"])
def test_an_empty_parameter_is_no_obstacle(name: str) -> None:
    weight, empty = nn.Parameter(torch.randn(256, 256) * 0.01), nn.Parameter(torch.empty(0))
    optimizer = DeltaSAM([weight, empty], torch.optim.SGD, weighting=name, lr=0.1)
    optimizer.step(lambda: (torch.ones(4, 256) @ weight).square().sum(1) + empty.sum())
    assert optimizer.statistics is not None
    assert optimizer.statistics.eps_norm == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("descent", ["weighted", "surrogate_gap"])
def test_descents_leave_sparse_gradients_sparse(descent: str) -> None:
    table, tokens = nn.Embedding(50, 8, sparse=True), torch.randint(50, (6, 3))
    options = {"weighting": "uniform", "descent": descent}
    optimizer = DeltaSAM(table.parameters(), torch.optim.SparseAdam, lr=0.1, **options)
    dense = nn.Embedding(50, 8)
    dense.load_state_dict(table.state_dict())
    other = DeltaSAM(dense.parameters(), torch.optim.SGD, lr=0.1, **options)
    optimizer.step(lambda: table(tokens).square().sum((1, 2)))
    other.step(lambda: dense(tokens).square().sum((1, 2)))
    assert table.weight.grad is not None
    assert dense.weight.grad is not None
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), dense.weight.grad)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses.detach(), "closure returned losses without a graph. Must depend on the parameters"),
        (lambda losses: losses > 0, r"closure returned losses of torch.bool. Must be floating"),
        (lambda losses: (losses, None, None, "loss"), "closure returned a tuple of 4. Must be losses, or"),
        (lambda losses: [losses], "closure returned a list. Must be a tensor"),
        (lambda losses: (losses, losses.unsqueeze(1), [True] * 6), "Invalid counted: the closure returned a list"),
    ],
)
@pytest.mark.parametrize("options", [{}, MOMENTUM], ids=["gradient", "momentum"])
def test_what_a_closure_may_not_return(returned: Any, message: str, options: dict[str, Any]) -> None:
    model = nn.Linear(4, 3)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: returned(classified(model)()))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("parameters", ["bias"], "Must be a regular expression"),
        ("adaptive", "no", "Must be True or False"),
        ("descent", ["weighted"], "Choose one of"),
        ("rho", True, "Must be a finite number"),
    ],
)
def test_settings_of_another_type_are_refused(name: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*{rule}"):
        DeltaSAM(nn.Linear(4, 3).parameters(), torch.optim.SGD, lr=0.1, **{name: value})
