"""Which parameters are perturbed, and how far: by name, and within a budget for the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.settings import DEFAULT_RHO
from tests.helpers.instance_oracle import gradients, norm

MODES = [{"weighting": "uniform"}, {"perturbation": "instance"}]


class Net(nn.Module):
    """Embedding, two layers, a normalization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.enter, self.leave = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9)
        self.norm = nn.LayerNorm(8)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.leave(self.norm(torch.tanh(self.enter(self.table(tokens)))))


TOKENS = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(1))


def losses_of(model: nn.Module) -> Callable[[], Tensor]:
    """Sums over the tokens of each sentence."""
    return lambda: F.cross_entropy(model(TOKENS).transpose(1, 2), TOKENS.flip(1), reduction="none").sum(1)


def expected(
    model: nn.Module, chosen: list[nn.Parameter], radius: Callable[[float], float], per_sample: bool
) -> list[Tensor]:
    """The gradient of the mean loss by a loop: every sample, or the batch, ascends along the chosen parameters."""
    losses, parameters = losses_of(model), list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for part in [[i] for i in range(5)] if per_sample else [list(range(5))]:
        ascent = gradients(losses()[part].mean(), chosen)
        kept = [p.detach().clone() for p in chosen]
        length = norm(ascent)
        for p, g in zip(chosen, ascent):
            p.data.add_(radius(length) / length * g)
        for sums, g in zip(total, gradients(losses()[part].sum() / 5, parameters)):
            sums.add_(g)
        for p, k in zip(chosen, kept):
            p.data.copy_(k)
    return total


def found(model: nn.Module, **options: object) -> tuple[list[Tensor], DeltaSAM]:
    """The gradient that DeltaSAM hands to its base."""
    optimizer = DeltaSAM(model.named_parameters(), torch.optim.SGD, lr=0.0, **options)
    optimizer.step(losses_of(model))
    return [p.grad for p in model.parameters()], optimizer


REGEXES = {
    "norm": ["norm.weight", "norm.bias"],
    r"^(?!table)": ["enter.weight", "enter.bias", "leave.weight", "leave.bias", "norm.weight", "norm.bias"],
    r"leave\.weight|table": ["table.weight", "leave.weight"],
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("regex", REGEXES)
def test_only_parameters_in_whose_name_it_is_found_are_perturbed(regex: str, mode: dict[str, str]) -> None:
    model = Net()
    chosen = [p for name, p in model.named_parameters() if name in REGEXES[regex]]
    assert len(chosen) == len(REGEXES[regex])
    by_loop = expected(model, chosen, lambda length: 0.3, "perturbation" in mode)
    gradient, optimizer = found(model, rho=0.3, parameters=regex, **mode)
    assert norm([f - e for f, e in zip(gradient, by_loop)]) <= 1e-9 * norm(by_loop)
    assert optimizer.statistics.eps_norm.item() == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("mode", [*MODES, {"weighting": "curvature"}], ids=str)
def test_all_are_perturbed_as_without_a_choice(mode: dict[str, str]) -> None:
    for chosen, plain in zip(found(Net(), parameters="", **mode)[0], found(Net(), **mode)[0]):
        assert torch.equal(chosen, plain)


@pytest.mark.parametrize("parts", [["table"], ["enter", "leave"]])
def test_probes_move_and_are_measured_by_what_is_chosen(parts: list[str]) -> None:
    """Others may hold anything that leaves the loss as it is."""
    model, seen = Net(), []
    hook = model.norm.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.tolist()))
    found(model, parameters="|".join(parts), weighting="curvature")
    hook.remove()
    assert len(seen) >= 4
    assert all(weight == seen[0] for weight in seen)


def test_a_recurrent_model_perturbs_its_projection() -> None:
    """Only what is chosen needs coverage."""

    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.LSTM(6, 8, batch_first=True).double()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.leave(self.norm(self.enter(self.table(tokens))[0]))

    model = Recurrent()
    with pytest.raises(RuntimeError, match="does not cover"):
        found(Recurrent(), perturbation="instance")
    by_loop = expected(model, list(model.leave.parameters()), lambda length: 0.3, per_sample=True)
    gradient, _ = found(model, rho=0.3, parameters="leave", perturbation="instance")
    assert norm([f - e for f, e in zip(gradient, by_loop)]) <= 1e-9 * norm(by_loop)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("budget", [1e-3, 0.5, 2.0])
def test_the_radius_keeps_the_budget(budget: float, mode: dict[str, str]) -> None:
    model = Net()
    radius = lambda length: min(budget / length, 0.3)  # noqa: E731
    by_loop = expected(model, list(model.parameters()), radius, "perturbation" in mode)
    gradient, optimizer = found(model, rho=0.3, loss_budget=budget, **mode)
    assert norm([f - e for f, e in zip(gradient, by_loop)]) <= 1e-9 * norm(by_loop)
    if budget == 1e-3:  # small enough for the first order
        assert optimizer.statistics.sharpness.item() == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize("mode", [*MODES, {"weighting": "curvature"}], ids=str)
def test_a_budget_that_is_never_reached_changes_nothing(mode: dict[str, str]) -> None:
    for limited, plain in zip(found(Net(), loss_budget=1e9, **mode)[0], found(Net(), **mode)[0]):
        assert torch.equal(limited, plain)


@pytest.mark.parametrize("mode", DEFAULT_RHO)
def test_the_default_radius_is_that_of_the_mode(mode: str) -> None:
    assert Settings(perturbation=mode) == Settings(DEFAULT_RHO[mode], perturbation=mode)
    assert found(Net(), perturbation=mode)[1].statistics.eps_norm.item() == pytest.approx(DEFAULT_RHO[mode], rel=1e-6)


@pytest.mark.parametrize("budget", [0, -1.0, math.inf, math.nan, "much"])
def test_a_budget_must_be_positive(budget: object) -> None:
    message = f"Invalid loss_budget={budget!r} (--sam-loss-budget). Must be a finite number > 0, in nats a sample"
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(loss_budget=budget)


def test_a_choice_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=re.escape("Invalid parameters='(' (--sam-parameters). Must be a regular exp")):
        Settings(parameters="(")
    message = "Invalid parameters='attention' (--sam-parameters): found in no parameter's name. They are table.weight, "
    with pytest.raises(ValueError, match=re.escape(message) + ".* and 2 more"):
        found(Net(), parameters="attention")
    nameless = DeltaSAM(Net().parameters(), torch.optim.SGD, parameters="norm", lr=0.0)
    with pytest.raises(ValueError, match=r"without names to look at\. Pass named parameters"):
        nameless.step(lambda: torch.ones(2))
