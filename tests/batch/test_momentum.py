"""Ascents that the base optimizer's momentum gives, against loops that are written out."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.batch.momentum import momentum_of
from tests.helpers.instance_oracle import gradients, norm
from tests.test_choice import Net, filters, found, losses_of

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}
RHO = 0.3
Direction = Callable[[list[Tensor], list[Tensor]], list[Tensor]]  # of gradient and momentum


def against_momentum(gradient: list[Tensor], momentum: list[Tensor]) -> list[Tensor]:
    return [-m for m in momentum]


def noise(gradient: list[Tensor], momentum: list[Tensor]) -> list[Tensor]:
    squared = norm(momentum) ** 2
    along = sum(float((g * m).sum()) for g, m in zip(gradient, momentum)) / squared if squared else 0.0
    return [g - along * m for g, m in zip(gradient, momentum)]


DIRECTIONS: dict[str, Direction] = {"momentum": against_momentum, "noise": noise}


def by_hand(
    base: str,
    direction: Direction,
    steps: int = 4,
    chosen: str = "",
    scale: Callable[[Tensor], Tensor] = torch.ones_like,
    radius: Callable[[int, float], float] = lambda step, length: RHO,
) -> list[list[Tensor]]:
    """The parameters after each step of a loop that displaces them, takes the gradient there and restores them."""
    model, weights = Net(), []
    kind, options = BASES[base]
    optimizer, parameters = kind(model.parameters(), **options), list(model.parameters())
    perturbed = [p for name, p in model.named_parameters() if re.search(chosen, name)]
    for step in range(steps):
        names = ("exp_avg", "momentum_buffer")
        momenta = [next((optimizer.state[p][n] for n in names if n in optimizer.state[p]), 0 * p) for p in perturbed]
        scales = [scale(p.detach()) for p in perturbed]
        along = direction(gradients(losses_of(model)().mean(), perturbed), [m.detach() for m in momenta])
        along = [s * a for s, a in zip(scales, along)]
        length = norm(along)
        kept = [p.detach().clone() for p in perturbed]
        for p, s, a in zip(perturbed, scales, along):
            p.data.add_(radius(step, length) / length * s * a if length else 0 * a)
        for p, g in zip(parameters, gradients(losses_of(model)().mean(), parameters)):
            p.grad = g
        for p, k in zip(perturbed, kept):
            p.data.copy_(k)
        optimizer.step()
        weights.append([p.detach().clone() for p in parameters])
    return weights


def trained(base: str, ascent: str, steps: int = 4, **settings: Any) -> tuple[list[list[Tensor]], DeltaSAM]:
    """The parameters after each step of DeltaSAM."""
    model, weights = Net(), []
    kind, options = BASES[base]
    settings = {"rho": RHO, "weighting": "uniform", **settings}
    optimizer = DeltaSAM(model.named_parameters(), kind, ascent=ascent, **settings, **options)
    for _ in range(steps):
        optimizer.step(losses_of(model))
        weights.append([p.detach().clone() for p in model.parameters()])
    return weights, optimizer


def assert_close(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    for step, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        assert norm([a - b for a, b in zip(ours, theirs)]) <= 1e-9 * norm(theirs), f"step {step}"


@pytest.mark.parametrize("ascent", DIRECTIONS)
@pytest.mark.parametrize("base", BASES)
def test_every_step_is_that_of_a_loop(base: str, ascent: str) -> None:
    weights, optimizer = trained(base, ascent)
    assert_close(weights, by_hand(base, DIRECTIONS[ascent]))
    assert optimizer.statistics.eps_norm.item() == pytest.approx(RHO, rel=1e-6)
    other = DIRECTIONS["noise" if ascent == "momentum" else "momentum"]
    with pytest.raises(AssertionError):
        assert_close(weights, by_hand(base, other))


@pytest.mark.parametrize("ascent", DIRECTIONS)
def test_together_with_other_choices(ascent: str) -> None:
    direction = DIRECTIONS[ascent]
    weights, _ = trained("adam", ascent, parameters="leave|norm")
    assert_close(weights, by_hand("adam", direction, chosen="leave|norm"))
    weights, _ = trained("adam", ascent, adaptive=True)
    assert_close(weights, by_hand("adam", direction, scale=filters))
    weights, _ = trained("adam", ascent, warmup_updates=3, interval=2)
    assert_close(weights, by_hand("adam", direction, radius=lambda step, _: (RHO / 3, 0.0, RHO, 0.0)[step]))


@pytest.mark.parametrize("budget", [1e-3, 1e9])
def test_noise_keeps_a_budget(budget: float) -> None:
    """Along the noise d the loss rises by ‖d‖ for each unit of length, as along a gradient."""
    weights, optimizer = trained("adam", "noise", loss_budget=budget)
    assert_close(weights, by_hand("adam", noise, radius=lambda step, length: min(budget / length, RHO)))
    if budget < 1:
        assert optimizer.statistics.sharpness.item() == pytest.approx(budget, rel=0.01)


def test_before_the_first_step_noise_is_the_gradient_and_momentum_moves_nothing() -> None:
    sam, _ = found(Net(), rho=RHO, weighting="uniform")
    assert all(map(torch.equal, found(Net(), rho=RHO, weighting="uniform", ascent="noise", momentum=0.9)[0], sam))
    model = Net()
    plain = gradients(losses_of(model)().mean(), list(model.parameters()))
    gradient, optimizer = found(Net(), rho=RHO, ascent="momentum", momentum=0.9)
    assert all(map(torch.equal, gradient, plain))
    assert optimizer.statistics.skipped == 1
    assert optimizer.statistics.eps_norm == 0


@pytest.mark.parametrize("base", BASES)
def test_at_radius_zero_momentum_is_the_base_optimizer(base: str) -> None:
    model = Net()
    kind, options = BASES[base]
    optimizer = kind(model.parameters(), **options)
    for weights in trained(base, "momentum", rho=0.0)[0]:
        optimizer.zero_grad()
        losses_of(model)().mean().backward()
        optimizer.step()
        assert all(map(torch.equal, weights, model.parameters()))


def test_there_is_one_forward_pass_and_the_loss_is_the_one_at_the_displaced_parameters() -> None:
    model, seen = Net(), []
    optimizer = DeltaSAM(model.parameters(), torch.optim.Adam, rho=RHO, ascent="momentum")
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()]

        def closure(step: int = step) -> Tensor:
            seen.append((step, [p.detach().clone() for p in model.parameters()]))
            return losses_of(model)()

        loss = optimizer.step(closure)
        moved = norm([p - b for p, b in zip(seen[-1][1], before)])
        assert moved == pytest.approx(RHO if step else 0.0, rel=1e-9)
        displaced = Net()
        displaced.load_state_dict(dict(zip((name for name, _ in displaced.named_parameters()), seen[-1][1])))
        assert loss == losses_of(displaced)().mean()
    assert [step for step, _ in seen] == [0, 1, 2]


@pytest.mark.parametrize("ascent", DIRECTIONS)
def test_a_resumed_run_is_the_uninterrupted_one(ascent: str) -> None:
    whole, _ = trained("adam", ascent, steps=5)
    model = Net()
    first = DeltaSAM(model.parameters(), torch.optim.Adam, RHO, "uniform", ascent=ascent, lr=0.01)
    for _ in range(2):
        first.step(losses_of(model))
    resumed = DeltaSAM(model.parameters(), torch.optim.Adam, RHO, "uniform", ascent=ascent, lr=0.01)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for weights in whole[2:]:
        resumed.step(losses_of(model))
        assert all(map(torch.equal, weights, model.parameters()))


class Failing(torch.autograd.Function):
    """Fails in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_the_parameters_are_what_they_were(where: str) -> None:
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.Adam, rho=RHO, ascent="momentum")
    optimizer.step(losses_of(model))
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        losses = losses_of(model)()
        if where == "forward":
            raise KeyboardInterrupt
        return Failing.apply(losses)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("ascent", DIRECTIONS)
@pytest.mark.parametrize(
    ("base", "options", "kept"),
    [(torch.optim.SGD, {"lr": 0.1}, "nothing"), (torch.optim.Adagrad, {}, "step, sum")],
    ids=["sgd", "adagrad"],
)
def test_an_optimizer_without_momentum_is_refused(
    base: type[torch.optim.Optimizer], options: dict[str, float], kept: str, ascent: str
) -> None:
    model = Net()
    optimizer = DeltaSAM(model.parameters(), base, ascent=ascent, weighting="uniform", **options)
    message = (
        f"Invalid ascent={ascent!r} (--sam-ascent): the base optimizer keeps {kept}, and no momentum (exp_avg or "
        "momentum_buffer). Give it momentum, or use another one such as adam."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step(losses_of(model))


@pytest.mark.parametrize("ascent", ["gradient", *DIRECTIONS])
def test_an_optimizer_that_nobody_uses_is_gone_at_once(ascent: str) -> None:
    """With its momentum and all else that it holds; no collector of cycles is waited for."""
    gone = weakref.ref(trained("adam", ascent)[1])
    assert gone() is None


def test_what_is_taken_for_a_momentum() -> None:
    exp_avg, scale = torch.tensor([1.0, 2.0]).half(), torch.tensor(3.0)
    assert momentum_of({"exp_avg": exp_avg, "exp_avg_scale": scale}).tolist() == [3.0, 6.0]
    assert momentum_of({"momentum_buffer": exp_avg}) is exp_avg
    assert momentum_of({"momentum_buffer": None}) is None
    assert momentum_of({}) is None


def test_a_parameter_that_no_batch_reaches_has_no_momentum() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    optimizer = DeltaSAM(model.parameters(), torch.optim.Adam, rho=RHO, ascent="momentum")
    for _ in range(2):
        optimizer.step(lambda: model["used"](torch.ones(4, 3)).square().sum(1))
    assert optimizer.statistics.eps_norm.item() == pytest.approx(RHO, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ascent": "up"}, "Unknown ascent='up' (--sam-ascent). Choose one of: gradient, noise, momentum."),
        (
            {"ascent": "noise", "perturbation": "instance"},
            "Invalid ascent='noise' (--sam-ascent) with perturbation='instance': a momentum belongs to no sample. Use "
            "--sam-perturbation batch, or leave it out.",
        ),
        (
            {"ascent": "momentum", "loss_budget": 0.1},
            "Invalid loss_budget=0.1 (--sam-loss-budget) with ascent='momentum': without a gradient at w nothing tells "
            "how far the loss rises. Use --sam-ascent gradient, or leave it out.",
        ),
    ],
    ids=["name", "instance", "budget"],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**settings)
