"""Momentum-SAM: the base optimizer's momentum says where the one pass of an update runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.adaptive import filter_scale
from deltasam_plugin.batch.displacement import PerturbedParameter
from deltasam_plugin.batch.momentum import MOMENTA
from deltasam_plugin.fairseq.parameters import TrainedParameters

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 0, 1, 2])
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, SGD),
    (torch.optim.SGD, {**SGD, "nesterov": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
]


class Net(nn.Sequential):
    """Two layers with dropout, and a count of their forward passes."""

    passes = 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


def losses(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y, reduction="none")


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, rho: float, adaptive: bool) -> Tensor:
    """One update: the gradient at w − ρ m/‖m‖, then a step from w. Returns the loss there."""
    parameters, kept = list(model.parameters()), weights(model)
    states = [optimizer.state[p] for p in parameters]
    momenta = [next((state[name] for name in MOMENTA if name in state), torch.zeros_like(p)) for state, p in
               zip(states, parameters)]  # fmt: skip
    scales = [filter_scale(p) if adaptive else torch.ones_like(p) for p in parameters]
    length = norm([t * m for t, m in zip(scales, momenta)])
    if length > 0:
        for p, t, m in zip(parameters, scales, momenta):
            p.data.sub_(rho / length * t * t * m)
    optimizer.zero_grad()
    loss = losses(model)().mean()
    loss.backward()
    for p, before in zip(parameters, kept):
        p.data.copy_(before)
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES, ids=lambda base: f"{base[0].__name__}, {len(base[1])} options")
def test_updates_are_those_by_hand(base: tuple[type[torch.optim.Optimizer], dict[str, Any]], adaptive: bool) -> None:
    kind, options = base
    model, expected = Net(), Net()
    optimizer = DeltaSAM(model.parameters(), kind, rho=0.3, ascent="momentum", adaptive=adaptive, **options)
    reference = kind(expected.parameters(), **options)
    for step in range(5):
        torch.manual_seed(step)
        loss = optimizer.step(losses(model))
        torch.manual_seed(step)
        at_perturbed = by_hand(expected, reference, 0.3, adaptive)
        assert loss.item() == pytest.approx(at_perturbed.item(), rel=1e-12)
        assert norm([a - b for a, b in zip(weights(model), weights(expected))]) <= 1e-12 * norm(weights(expected))
        assert optimizer.statistics is not None
        assert bool(optimizer.statistics.skipped) == (step == 0)  # there is no momentum before the first step
        if not adaptive:
            assert optimizer.statistics.eps_norm.item() == pytest.approx(0.3 if step else 0, abs=1e-7)
    assert model.passes == 5


def test_radius_zero_is_the_base_bit_for_bit() -> None:
    model, expected = Net(), Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.0, ascent="momentum", **SGD)
    reference = torch.optim.SGD(expected.parameters(), **SGD)
    torch.manual_seed(1)
    for _ in range(4):
        optimizer.step(losses(model))
    torch.manual_seed(1)
    for _ in range(4):
        reference.zero_grad()
        losses(expected)().mean().backward()
        reference.step()
    assert all(map(torch.equal, weights(model), weights(expected)))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_weights_are_restored_whatever_fails(where: str) -> None:
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.3, ascent="momentum", **SGD)
    optimizer.step(losses(model))
    before, seen = weights(model), []

    def fail(*_: Any) -> None:
        seen.append(weights(model))
        raise KeyboardInterrupt

    if where == "forward":
        model[0].register_forward_hook(fail)
    else:
        model[0].weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(losses(model))
    assert not torch.equal(seen[0][0], before[0])  # the pass ran at other weights
    assert all(map(torch.equal, weights(model), before))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_a_base_without_momentum_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = Net()
    optimizer = DeltaSAM(model.parameters(), kind, ascent="momentum", lr=0.1)
    with pytest.raises(ValueError, match=rf"with the base optimizer {kind.__name__}: it keeps no momentum"):
        optimizer.step(losses(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ascent": "moment"}, r"Unknown ascent='moment' \(--sam-ascent\)\. Choose one of: gradient, momentum\."),
        ({"perturbation": "instance"}, r"Invalid ascent='momentum' \(--sam-ascent\) with perturbation='instance'"),
        ({"loss_budget": 0.1}, r"Invalid loss_budget=0\.1 \(--sam-loss-budget\) with ascent='momentum'"),
    ],
)
def test_what_has_no_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"ascent": "momentum", **options})


@pytest.mark.parametrize("flat", [True, False])
def test_the_momentum_of_fp32_copies(flat: bool) -> None:
    """fairseq gives an optimizer fp32 copies of half-precision parameters, one by one or in one tensor."""
    model = nn.Linear(3, 2).half()
    copies = [p.detach().float() for p in model.parameters()]
    given = [torch.cat([copy.flatten() for copy in copies])] if flat else copies
    trained = TrainedParameters(given)
    states = {tensor: {"exp_avg": 7 * tensor} for tensor in given}
    found: list[PerturbedParameter] = trained.of(model)
    for item, copy in zip(found, copies, strict=True):
        momentum = trained.momentum_of(states, item)
        assert momentum is not None
        assert torch.equal(momentum, 7 * copy)
        assert trained.momentum_of({}, item) is None
