"""What the base optimizer gets: against formulas as the papers print them, from gradients of a loop."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.batch.descent import DESCENTS
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.loss import Objective, sharpness_aware_loss
from tests.helpers.instance_oracle import gradients, norm
from tests.test_choice import Net, filters, found, losses_of

RHO = 0.3
Printed = Callable[[list[Tensor], list[Tensor], float], list[Tensor]]  # of the gradients at w and at w + ε


def wsam(at_w: list[Tensor], perturbed: list[Tensor], weight: float) -> list[Tensor]:
    """The gradient of L + γ/(1 − γ) · (L_SAM − L)."""
    return [g + weight * (p - g) for g, p in zip(at_w, perturbed)]


def gsam(at_w: list[Tensor], perturbed: list[Tensor], weight: float) -> list[Tensor]:
    """g̃ − α g⟂, with g = g∥ + g⟂ and g∥ along g̃."""
    along = sum(float((g * p).sum()) for g, p in zip(at_w, perturbed)) / norm(perturbed) ** 2
    return [p - weight * (g - along * p) for g, p in zip(at_w, perturbed)]


PRINTED: dict[str, Printed] = {"weighted": wsam, "surrogate_gap": gsam}
UNIFORM = {"rho": RHO, "weighting": "uniform"}


def both_gradients(chosen: str = "", scale: Callable[[Tensor], Tensor] = torch.ones_like) -> list[list[Tensor]]:
    """Of the mean loss, by a loop: at w, and where the chosen parameters have ascended."""
    model = Net()
    parameters = list(model.parameters())
    perturbed = [p for name, p in model.named_parameters() if re.search(chosen, name)]
    at_w, ascent = (gradients(losses_of(model)().mean(), which) for which in (parameters, perturbed))
    ascent = [scale(p.detach()) * g for p, g in zip(perturbed, ascent)]
    length = norm(ascent)
    for p, g in zip(perturbed, ascent):
        p.data.add_(RHO / length * scale(p.detach()) * g)
    return [at_w, gradients(losses_of(model)().mean(), parameters)]


def error(one: list[Tensor], other: list[Tensor]) -> float:
    return norm([a - b for a, b in zip(one, other, strict=True)]) / norm(other)


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("descent", PRINTED)
def test_the_formula_of_the_paper(descent: str, weight: float | None) -> None:
    defaults = {"weighted": 0.9 / (1 - 0.9), "surrogate_gap": 0.4}
    by_loop = PRINTED[descent](*both_gradients(), defaults[descent] if weight is None else weight)
    gradient, _ = found(Net(), descent=descent, descent_weight=weight, **UNIFORM)
    assert error(gradient, by_loop) <= 1e-9


@pytest.mark.parametrize("descent", PRINTED)
def test_together_with_other_choices(descent: str) -> None:
    printed, weight = PRINTED[descent], DESCENTS[descent].weight
    gradient, _ = found(Net(), descent=descent, parameters="leave|norm", **UNIFORM)
    assert error(gradient, printed(*both_gradients("leave|norm"), weight)) <= 1e-9
    gradient, _ = found(Net(), descent=descent, adaptive=True, **UNIFORM)
    assert error(gradient, printed(*both_gradients(scale=filters), weight)) <= 1e-9
    gradient, _ = found(Net(), descent=descent, ascent="noise", momentum=0.9, **UNIFORM)  # no momentum before the step
    assert error(gradient, printed(*both_gradients(), weight)) <= 1e-9


def test_the_limits_of_a_weight() -> None:
    at_w, _ = both_gradients()
    sam, _ = found(Net(), **UNIFORM)
    assert all(map(torch.equal, found(Net(), descent="weighted", descent_weight=1.0, **UNIFORM)[0], sam))
    assert all(map(torch.equal, found(Net(), descent="surrogate_gap", descent_weight=0.0, **UNIFORM)[0], sam))
    assert error(found(Net(), descent="weighted", descent_weight=0, **UNIFORM)[0], at_w) <= 1e-9
    assert error(at_w, sam) > 1e-3


@pytest.mark.parametrize("descent", PRINTED)
def test_at_radius_zero_it_is_the_base_optimizer(descent: str) -> None:
    model = Net()
    losses_of(model)().mean().backward()
    gradient, _ = found(Net(), rho=0.0, weighting="uniform", descent=descent)
    assert all(torch.equal(g, p.grad) for g, p in zip(gradient, model.parameters()))


numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5)


@given(numbers, numbers, st.floats(0, 20))
def test_properties(gradient: list[float], change: list[float], weight: float) -> None:
    """Nothing changes: the gradient itself, bit for bit. The gap: what is added is orthogonal to the gradient."""
    tensors, changes = ([t.view(-1) for t in torch.tensor(v).split((2, 3))] for v in (gradient, change))
    for descent in DESCENTS.values():
        assert all(map(torch.equal, descent.function(tensors, [0 * t for t in tensors], weight), tensors))
    added = [g - t for g, t in zip(DESCENTS["surrogate_gap"].function(tensors, changes, weight), tensors)]
    product = sum(float((a.double() * t.double()).sum()) for a, t in zip(added, tensors))
    size = norm(tensors) * (norm(tensors) + weight * norm(changes))
    assert abs(product) <= 1e-5 * size or norm(tensors) < 1e-30


@pytest.mark.parametrize("descent", PRINTED)
def test_gradients_add_up_and_carry_the_loss_scale_and_hooks_run_once(descent: str) -> None:
    """As for any loss: a second batch, a loss scale, and the hooks that tell distributed training of a gradient."""
    model = Net()
    parameters = list(model.parameters())
    settings = Settings(descent=descent, **UNIFORM)
    fired: list[int] = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: fired.append(id(p)))

    def backward(scale: float) -> None:
        def first() -> Objective:
            losses = losses_of(model)()
            return Objective(losses.mean(), losses, factor=1 / len(losses))

        perturbation = BatchPerturbation([PerturbedParameter(p) for p in parameters], None, settings)
        loss, _ = sharpness_aware_loss(first, lambda: losses_of(model)().mean(), perturbation, {torch.device("cpu")})
        fired.clear()
        (loss * scale).backward()

    backward(1.0)
    assert sorted(fired[-len(parameters) :]) == sorted(map(id, parameters))
    once = [p.grad.clone() for p in parameters]
    backward(1024.0)
    assert error([p.grad for p in parameters], [1025 * g for g in once]) <= 1e-9
    backward(0.0)  # a dummy batch
    assert error([p.grad for p in parameters], [1025 * g for g in once]) <= 1e-9


@pytest.mark.parametrize("descent", PRINTED)
def test_a_gradient_that_is_not_finite_stays_so(descent: str) -> None:
    """A loss scaler must see it."""
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.0, descent=descent, **UNIFORM)
    optimizer.step(lambda: losses_of(model)() * torch.tensor([math.inf, 1, 1, 1, 1]))
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": (
        {"descent": "gsam"},
        "Unknown descent='gsam' (--sam-descent). Choose one of: perturbed, weighted, surrogate_gap.",
    ),
    "weight": (
        {"descent": "weighted", "descent_weight": -1.0, "weighting": "uniform"},
        "Invalid descent_weight=-1.0 (--sam-descent-weight). Must be a finite number >= 0; leave it out for the "
        "default.",
    ),
    "no weight": (
        {"descent_weight": 0.5},
        "Invalid descent_weight=0.5 (--sam-descent-weight) with descent='perturbed': it has no weight. Use "
        "--sam-descent weighted or surrogate_gap, or leave it out.",
    ),
    "weighting": (
        {"descent": "weighted"},
        "Invalid descent='weighted' (--sam-descent) with weighting='curvature': the gradient at w is then a reweighted "
        "one. Use --sam-weighting uniform, or leave it out.",
    ),
    "instance": (
        {"descent": "surrogate_gap", "perturbation": "instance", "weighting": "uniform"},
        "Invalid descent='surrogate_gap' (--sam-descent) with perturbation='instance': its first pass gives no "
        "gradient of the parameters. Use --sam-perturbation batch, or leave it out.",
    ),
    "momentum": (
        {"descent": "weighted", "ascent": "momentum", "weighting": "uniform"},
        "Invalid descent='weighted' (--sam-descent) with ascent='momentum': no pass gives the gradient at w. Use "
        "--sam-ascent gradient, or leave it out.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**settings)


@pytest.mark.parametrize("weight", [math.inf, math.nan, "much"])
def test_a_weight_is_a_number(weight: object) -> None:
    with pytest.raises(ValueError, match=r"^Invalid descent_weight=.* Must be a finite number >= 0"):
        Settings(descent="weighted", weighting="uniform", descent_weight=weight)
