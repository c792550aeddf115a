"""Random models, batches of changing shape: every step is exact, or refused in words, and never silently wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin import DeltaSAM
from tests.helpers.random_models import Model, Plan
from tests.helpers.verdict import Comparison

SEEDS, AT_ONCE = 150, 15
EXACT = 1 / 3  # of the models, at least: a fuzzer whose models are all refused proves nothing


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_random_models_are_exact_or_refused_in_words(first: int) -> None:
    plans = [Plan.drawn(seed) for seed in range(first, first + AT_ONCE)]
    last = [plan.run()[-1] for plan in plans]
    wrong = [f"{v.kind}: {v.detail}\n{plan.describe()}" for plan, v in zip(plans, last) if not v.allowed]
    assert not wrong, "\n\n".join([f"{len(wrong)} of {AT_ONCE} models", *wrong])
    assert sum(v.kind in ("exact", "warned") for v in last) >= EXACT * AT_ONCE, [v.reason for v in last]


def test_a_seed_makes_the_same_model_and_the_same_batches_twice() -> None:
    for seed in range(20):
        one, two = Plan.drawn(seed), Plan.drawn(seed)
        assert one.describe() == two.describe()
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one.batches(), two.batches()))
        assert all(torch.equal(a, b) for a, b in zip(Model(one).parameters(), Model(two).parameters()))
        assert [verdict.kind for verdict in one.run()] == [verdict.kind for verdict in two.run()]


def classifier(*middle: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def test_the_comparison_sees_another_radius() -> None:
    model, x, y = classifier()
    comparison = Comparison(model.parameters(), rho=0.2)
    assert comparison.step(lambda: F.cross_entropy(model(x), y, reduction="none")).kind == "exact"
    comparison.optimizer.base_optimizer.param_groups[0]["lr"] = 0.0
    comparison._rho = 0.2 * (1 + 1e-6)
    assert comparison.step(lambda: F.cross_entropy(model(x), y, reduction="none")).kind == "silent"


def test_the_comparison_sees_sam_of_the_batch() -> None:
    model, x, y = classifier()
    comparison = Comparison(model.parameters(), rho=0.2)
    comparison.optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.2, weighting="uniform", lr=1.0)
    comparison.optimizer.register_step_pre_hook(comparison._look)
    assert comparison.step(lambda: F.cross_entropy(model(x), y, reduction="none")).kind == "silent"


class Gained(nn.Module):
    """With a gain in plain arithmetic, of one weight in 300."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_what_a_warning_names_is_compared_without_its_perturbation() -> None:
    model, x, y = classifier(Gained(), nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 8))
    comparison = Comparison(model.parameters(), rho=0.2)
    for _ in range(3):
        assert comparison.step(lambda: F.cross_entropy(model(x), y, reduction="none")).kind == "warned"


def test_a_crash_is_no_refusal() -> None:
    model, x, y = classifier()
    comparison = Comparison(model.parameters(), rho=0.2)
    calls = iter(range(1000))

    def losses() -> Tensor:
        if next(calls) > 2 * len(y):
            raise RuntimeError("out of memory")
        return F.cross_entropy(model(x), y, reduction="none")

    assert comparison.step(losses).kind == "crashed"
