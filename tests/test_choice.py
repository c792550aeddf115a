"""Which parameters are perturbed, how far, for which samples together, and in which norm."""

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

MODES = [{"weighting": "uniform"}, {"perturbation": "instance"}, {"perturbation": "instance", "group": 2}]


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


Radius = Callable[[float], float]
Scale = Callable[[Tensor], Tensor]


def steps_of(
    model: nn.Module, chosen: list[nn.Parameter], radius: Radius, group: int, scale: Scale = torch.ones_like
) -> list[tuple[Tensor, list[Tensor]]]:
    """The samples of each group, and their perturbation of the chosen parameters."""
    steps = []
    for part in torch.arange(5).split(group):
        scales = [scale(p.detach()) for p in chosen]
        ascent = [t * g for t, g in zip(scales, gradients(losses_of(model)()[part].mean(), chosen))]
        length = norm(ascent)
        steps.append((part, [radius(length) / length * t * g for t, g in zip(scales, ascent)]))
    return steps


def expected(
    model: nn.Module, chosen: list[nn.Parameter], radius: Radius, group: int, scale: Scale = torch.ones_like
) -> list[Tensor]:
    """The gradient of the mean loss by a loop: samples ascend in groups, along the chosen parameters."""
    losses, parameters = losses_of(model), list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for part, steps in steps_of(model, chosen, radius, group, scale):
        kept = [p.detach().clone() for p in chosen]
        for p, step in zip(chosen, steps):
            p.data.add_(step)
        for sums, g in zip(total, gradients(losses()[part].sum() / 5, parameters)):
            sums.add_(g)
        for p, k in zip(chosen, kept):
            p.data.copy_(k)
    return total


def group_of(mode: dict[str, object]) -> int:
    """How many samples share a perturbation."""
    return int(mode.get("group", 1)) if "perturbation" in mode else 5


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
    by_loop = expected(model, chosen, lambda length: 0.3, group_of(mode))
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
    by_loop = expected(model, list(model.leave.parameters()), lambda length: 0.3, group=1)
    gradient, _ = found(model, rho=0.3, parameters="leave", perturbation="instance")
    assert norm([f - e for f, e in zip(gradient, by_loop)]) <= 1e-9 * norm(by_loop)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("budget", [1e-3, 0.5, 2.0])
def test_the_radius_keeps_the_budget(budget: float, mode: dict[str, str]) -> None:
    model = Net()
    by_loop = expected(model, list(model.parameters()), lambda length: min(budget / length, 0.3), group_of(mode))
    gradient, optimizer = found(model, rho=0.3, loss_budget=budget, **mode)
    assert norm([f - e for f, e in zip(gradient, by_loop)]) <= 1e-9 * norm(by_loop)
    if budget == 1e-3:  # small enough for the first order
        assert optimizer.statistics.sharpness.item() == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize("mode", [*MODES, {"weighting": "curvature"}], ids=str)
def test_a_budget_that_is_never_reached_changes_nothing(mode: dict[str, str]) -> None:
    for limited, plain in zip(found(Net(), loss_budget=1e9, **mode)[0], found(Net(), **mode)[0]):
        assert torch.equal(limited, plain)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6])
def test_samples_of_a_group_share_a_perturbation(group: int) -> None:
    """The last group has what is left. Groups of one are instance mode, a single group is SAM."""
    model = Net()
    by_loop = expected(model, list(model.parameters()), lambda length: 0.3, group)
    gradient, optimizer = found(model, rho=0.3, perturbation="instance", group=group)
    assert norm([f - e for f, e in zip(gradient, by_loop)]) <= 1e-9 * norm(by_loop)
    assert optimizer.statistics.eps_norm.item() == pytest.approx(0.3, rel=1e-6)
    means = [losses_of(model)()[part].mean() for part in torch.arange(5).split(group)]
    norms = [norm(gradients(mean, list(model.parameters()))) for mean in means]
    assert optimizer.statistics.ascent_gnorm.item() == pytest.approx(sum(norms) / len(norms), rel=1e-6)


def test_the_limits_of_a_group() -> None:
    """Rows of several kinds: whole sentences, and a list of chosen positions."""
    one = found(Net(), perturbation="instance", group=1)[0]
    assert all(map(torch.equal, one, found(Net(), perturbation="instance")[0]))
    sam = found(Net(), rho=0.3, **MODES[0])[0]
    for size in (5, 64):
        whole = found(Net(), rho=0.3, perturbation="instance", group=size)[0]
        assert norm([a - b for a, b in zip(whole, sam)]) <= 1e-9 * norm(sam)


@pytest.mark.parametrize("group", [0, -1, 1.5, True, "all"])
def test_a_group_is_a_number_of_samples(group: object) -> None:
    message = f"Invalid group={group!r} (--sam-group). Must be an integer >= 1."
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(perturbation="instance", group=group)


def test_groups_without_instances_are_refused() -> None:
    message = "Invalid group=4 (--sam-group) with perturbation='batch': there all samples share one. Use --sam-pertur"
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(group=4)


def filters(weight: Tensor) -> Tensor:
    """The scale of ASAM: the norm of a matrix' row, the size of a vector's element, and 0.01."""
    return (weight.abs() if weight.dim() < 2 else weight.flatten(1).norm(dim=1)[:, None].expand_as(weight)) + 0.01


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("limits", [{}, {"loss_budget": 0.4}], ids=str)
def test_adaptive(mode: dict[str, str], limits: dict[str, float]) -> None:
    model = Net()
    radius = lambda length: min(limits.get("loss_budget", math.inf) / length, 0.3)  # noqa: E731
    by_loop = expected(model, list(model.parameters()), radius, group_of(mode), filters)
    steps = steps_of(model, list(model.parameters()), radius, group_of(mode), filters)
    gradient, optimizer = found(model, rho=0.3, adaptive=True, **mode, **limits)
    assert norm([f - e for f, e in zip(gradient, by_loop)]) <= 1e-9 * norm(by_loop)
    moved = sum(norm(step) for _, step in steps) / len(steps)
    assert optimizer.statistics.eps_norm.item() == pytest.approx(moved, rel=1e-6)


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
