"""DeltaSAM is SAM, is its base optimizer, and resumes: each bit for bit."""

import contextlib
import copy
import io
import os
import pickle
import site
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltasam_plugin import DeltaSAM
from deltasam_plugin.batch.norms import global_norm
from deltasam_plugin.errors import Refused
from tests.helpers.registries import BUILT_IN_WEIGHTINGS

SGD = torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
ADAM = torch.optim.Adam, {"lr": 0.01}
bases = pytest.mark.parametrize("base", [SGD, ADAM], ids=["sgd", "adam"])
STEPS = 24
WEIGHTINGS = list(BUILT_IN_WEIGHTINGS)


class Net(nn.Module):
    def __init__(self, dropout=0.3, recompute=lambda layer, x: layer(x)):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.recompute = nn.Linear(4, 8), nn.Linear(8, 3), recompute
        self.body = nn.Sequential(nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout))

    def forward(self, x):
        return self.leave(self.recompute(self.body, self.enter(x)))


def batch_of(step, size=6):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def closure_of(model, step, size=6):
    x, y = batch_of(step, size)
    return lambda: F.cross_entropy(model(x), y, reduction="none")


def with_logits(model, step, size=6):
    x, y = batch_of(step, size)

    def closure():
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="none"), logits

    return closure


def train(model, optimizer, steps, size=6, step=None):
    """Steps of either optimizer; returns the losses."""
    closure = with_logits if isinstance(optimizer, DeltaSAM) and optimizer.settings.compares_logits else closure_of
    return [(step or take_step)(optimizer, closure(model, number, size)).item() for number in steps]


def take_step(optimizer, closure):
    if isinstance(optimizer, DeltaSAM):
        return optimizer.step(closure)
    optimizer.zero_grad()
    loss = closure().mean()
    loss.backward()
    optimizer.step()
    return loss


def sam_step(rho):
    """Sharpness-aware minimization by Foret et al., in ten lines."""

    def step(base, closure):
        params = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
        state, before = torch.get_rng_state(), [p.detach().clone() for p in params]
        loss = closure()
        gradients = torch.autograd.grad(loss.mean(), params)
        norm = global_norm(gradients)  # torch's own rounds differently
        for p, g in zip(params, gradients):
            p.data.add_(g * (torch.full_like(norm, rho) / norm))
        torch.set_rng_state(state)
        base.zero_grad()
        closure().mean().backward()
        for p, value in zip(params, before):
            p.data.copy_(value)
        base.step()
        return loss.mean()

    return step


def optimizers(base, **options):
    """Two equal models, one with DeltaSAM and one with the base optimizer alone."""
    (kind, kind_options), model, other = base, Net(), Net()
    return (
        (model, DeltaSAM(model.parameters(), kind, **options, **kind_options)),
        (other, kind(other.parameters(), **kind_options)),
    )


def flat(value):
    """All tensors and numbers of a nested structure, in order."""
    if isinstance(value, dict):
        return [leaf for key in value if key != "delta_sam_step" for leaf in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value.tolist() if isinstance(value, torch.Tensor) else value]


def assert_same(one, other):
    """Equal models and optimizer states, bit for bit."""
    (model, optimizer), (other_model, other_optimizer) = one, other
    assert flat(model.state_dict()) == flat(other_model.state_dict())
    assert flat(optimizer.state_dict()) == flat(other_optimizer.state_dict())


# --- invariants 1 and 2: SAM, and the base optimizer


@bases
@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_uniform_weights_are_sam_bit_for_bit(base, rho):
    delta, plain = optimizers(base, rho=rho, weighting="uniform")
    torch.manual_seed(1)
    losses = train(*delta, range(STEPS))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert losses == train(*plain, range(STEPS), step=sam_step(rho))
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(delta, plain)


def penalized(model, number, size):
    """Losses with the squared norm of their gradient at the inputs."""
    x, y = batch_of(number, size)

    def closure():
        inputs = x.clone().requires_grad_()
        losses = F.cross_entropy(model(inputs), y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        return losses + gradient.square().sum(1)

    return closure


def adversarial(model, number, size):
    """Losses at inputs that were moved along the sign of their gradient."""
    x, y = batch_of(number, size)

    def closure():
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(inputs), y), inputs)
        return F.cross_entropy(model(x + 0.1 * gradient.sign()), y, reduction="none")

    return closure


@pytest.mark.parametrize("closure", [penalized, adversarial])
def test_a_closure_that_takes_gradients_itself_trains_by_sam(closure):
    (model, delta), (other, plain) = optimizers(SGD, rho=0.05, weighting="uniform")
    torch.manual_seed(1)
    losses = [take_step(delta, closure(model, number, 6)).item() for number in range(4)]
    torch.manual_seed(1)
    assert losses == [sam_step(0.05)(plain, closure(other, number, 6)).item() for number in range(4)]
    assert_same((model, delta), (other, plain))


@pytest.mark.parametrize("closure", [penalized, adversarial])
@pytest.mark.parametrize(
    ("options", "remedy"), [({}, "uniform"), ({"perturbation": "instance"}, 'perturbation="batch"')]
)
def test_a_closure_that_takes_gradients_itself_is_refused_elsewhere(closure, options, remedy):
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, **options)
    with pytest.raises(Refused, match=remedy):
        optimizer.step(closure(model, 0, 6))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@bases
def test_a_batch_of_one_is_sam_bit_for_bit_whatever_the_weighting(base, weighting):
    delta, plain = optimizers(base, rho=0.1, weighting=weighting, probes=2)
    torch.manual_seed(1)
    losses = train(*delta, range(STEPS), size=1)
    torch.manual_seed(1)
    assert losses == train(*plain, range(STEPS), size=1, step=sam_step(0.1))
    assert_same(delta, plain)


def test_every_weighting_is_another():
    runs = {}
    for weighting in WEIGHTINGS:
        model, optimizer = optimizers(SGD, rho=0.1, weighting=weighting)[0]
        train(model, optimizer, range(2))
        assert (optimizer.statistics.ess < 1) == (weighting != "uniform")
        runs[weighting] = tuple(map(str, flat(model.state_dict())))
    assert len(set(runs.values())) == len(WEIGHTINGS)


@bases
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_radius_of_zero_is_the_base_optimizer_bit_for_bit(base, weighting):
    delta, plain = optimizers(base, rho=0.0, weighting=weighting, probes=2)
    torch.manual_seed(1)
    losses = train(*delta, range(STEPS))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert losses == train(*plain, range(STEPS))
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(delta, plain)


@hypothesis_settings(max_examples=10)
@given(st.integers(1, 5), st.integers(0, 100), st.floats(0.01, 1))
def test_one_step_is_sam_whatever_batch_and_radius(size, number, rho):
    delta, plain = optimizers(SGD, rho=rho, weighting="uniform")
    torch.manual_seed(number)
    losses = train(*delta, [number], size=size)
    torch.manual_seed(number)
    assert losses == train(*plain, [number], size=size, step=sam_step(rho))
    assert_same(delta, plain)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the probes build no graph
def test_activation_checkpointing_changes_nothing(reentrant):
    plain, recomputed = Net(), Net(recompute=lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    runs = []
    for model in (plain, recomputed):
        optimizer = DeltaSAM(model.parameters(), torch.optim.Adam, rho=0.1)
        torch.manual_seed(1)
        train(model, optimizer, range(6))
        runs.append((model, optimizer))
    assert_same(*runs)


# --- the contract of a torch optimizer


def test_the_loss_returned_is_the_mean_at_the_weights_before_the_step():
    model = Net(dropout=0)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    expected = closure_of(model, 0)().mean()
    loss = optimizer.step(closure_of(model, 0))
    assert loss.item() == expected.item()
    assert not loss.requires_grad
    assert closure_of(model, 0)().mean() < loss
    assert optimizer.statistics.eps_norm.item() == pytest.approx(0.05, rel=1e-4)


def test_a_step_works_where_gradients_are_switched_off():
    delta, plain = optimizers(SGD, rho=0.0)
    torch.manual_seed(1)
    with torch.no_grad():
        train(*delta, range(2))
    torch.manual_seed(1)
    train(*plain, range(2))
    assert_same(delta, plain)


def test_a_learning_rate_scheduler_sees_the_base_optimizer():
    runs = optimizers(SGD, rho=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, optimizer in runs:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            torch.manual_seed(1)
            for number in range(6):
                train(model, optimizer, [number])
                scheduler.step()
            assert optimizer.param_groups[0]["lr"] == 0.1 / 8
    assert_same(*runs)


@bases
@pytest.mark.parametrize("first", ["base", "delta"])
def test_a_state_dict_continues_under_the_base_optimizer_and_the_other_way_round(base, first):
    delta, plain = optimizers(base, rho=0.0)
    one, other = (plain, delta) if first == "base" else (delta, plain)
    torch.manual_seed(1)
    train(*one, range(5))
    other[0].load_state_dict(one[0].state_dict())
    other[1].load_state_dict(one[1].state_dict())
    train(*other, range(5, 10))
    _, uninterrupted = optimizers(base)
    torch.manual_seed(1)
    train(*uninterrupted, range(10))
    assert_same(other, uninterrupted)


@bases
@pytest.mark.parametrize("dropout", [0.3, 0.0], ids=["dropout", "deterministic"])
@pytest.mark.parametrize("weighting", ["curvature", "kl", "gradient_norm"])
@pytest.mark.parametrize("half", [True, False], ids=["autocast", "single"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(base, dropout, weighting, half):
    def fresh():
        model = Net(dropout)
        if half:
            model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        return model, DeltaSAM(model.parameters(), base[0], rho=0.2, weighting=weighting, **base[1])

    run = fresh()
    torch.manual_seed(1)
    train(*run, range(5))
    saved = io.BytesIO()
    torch.save([run[0].state_dict(), run[1].state_dict(), torch.get_rng_state()], saved)
    train(*run, range(5, 10))

    resumed = fresh()
    saved.seek(0)
    model_state, optimizer_state, random_state = torch.load(saved)  # plain data, weights_only suffices
    resumed[0].load_state_dict(model_state)
    resumed[1].load_state_dict(optimizer_state)
    torch.set_rng_state(random_state)
    train(*resumed, range(5, 10))
    assert_same(run, resumed)
    assert run[1].statistics == resumed[1].statistics
    assert run[1].state_dict()["param_groups"] == resumed[1].state_dict()["param_groups"]


def test_parameter_groups_keep_their_options_and_share_one_perturbation():
    runs = []
    for kind in ("delta", "plain"):
        model = Net()
        groups = [{"params": [*model.enter.parameters()], "lr": 0.3}, {"params": [*model.body.parameters()]}]
        if kind == "delta":
            optimizer = DeltaSAM(groups, torch.optim.SGD, rho=0.2, weighting="uniform", lr=0.1)
        else:
            optimizer = torch.optim.SGD(groups, lr=0.1)
        optimizer.add_param_group({"params": [*model.leave.parameters()], "lr": 0.0})
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.0]
        torch.manual_seed(1)
        train(model, optimizer, range(5), step=None if kind == "delta" else sam_step(0.2))
        runs.append((model, optimizer))
    assert_same(*runs)
    assert flat(runs[0][0].leave.state_dict()) == flat(Net().leave.state_dict())
    assert flat(runs[0][0].body.state_dict()) != flat(Net().body.state_dict())


def test_frozen_parameters_never_move_not_even_in_a_probe_and_unused_ones_stay():
    model, places = Net(), []
    model.enter.requires_grad_(False)
    model.idle = nn.Parameter(torch.ones(3))
    model.leave.register_forward_pre_hook(lambda *_: places.append(flat([*model.enter.parameters()])))
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, weight_decay=0.1)
    start = flat([*model.enter.parameters()])
    train(model, optimizer, range(3))
    assert places == [start] * (3 * 4 + 2)  # batches 1 and 2 are checked
    assert flat([*model.enter.parameters()]) == start
    assert model.idle.tolist() == [1.0] * 3
    assert model.idle.grad is None


def test_a_trainable_parameter_of_another_optimizer_gets_nothing_of_the_ascent():
    found = []
    for delta in (True, False):
        model = Net()
        kind = DeltaSAM if delta else torch.optim.SGD
        options = {"base_optimizer": torch.optim.SGD, "rho": 0.0, "weighting": "uniform"} if delta else {}
        torch.manual_seed(1)
        train(model, kind(model.leave.parameters(), lr=0.1, **options), range(1))
        found.append([parameter.grad.tolist() for parameter in model.enter.parameters()])
    assert found[0] == found[1]


def test_every_step_probes_along_its_own_direction_although_nothing_draws_random_numbers():
    model = Net(dropout=0)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.0)
    shares = set()
    for _ in range(3):
        optimizer.step(closure_of(model, 0))  # the same batch at the same weights
        shares.add(optimizer.statistics.ess.item())
    assert len(shares) == 3


def test_gradients_of_before_the_step_are_cleared():
    delta, plain = optimizers(SGD, rho=0.0)
    for parameter in delta[0].parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    for run in (delta, plain):
        torch.manual_seed(1)
        train(*run, range(1))
    assert_same(delta, plain)


def test_hooks_can_be_registered():
    model, calls = Net(), []
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    names = [name for name in dir(torch.optim.Optimizer) if name.startswith("register_")]
    assert len(names) == 6
    for name in names:
        getattr(optimizer, name)(lambda *_, name=name: calls.append(name))
    train(model, optimizer, range(1))
    assert calls == ["register_step_pre_hook", "register_step_post_hook"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert sorted(calls) == sorted(names)
    assert not hasattr(optimizer, "loss")


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
    "torch.save": lambda run: torch.load(stored(run), weights_only=False),
}


def stored(run):
    file = io.BytesIO()
    torch.save(run, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("perturbation", ["batch", "instance"])
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_made_under_a_learning_rate_scheduler_trains_its_own_model(kind, perturbation):
    model = nn.Linear(4, 3)
    optimizer = DeltaSAM(model.parameters(), torch.optim.Adam, rho=0.2, perturbation=perturbation, lr=0.01)
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    train(model, optimizer, range(3))
    copied = COPIES[kind]((model, optimizer))
    before = flat(model.state_dict())
    assert flat(copied[0].state_dict()) == before
    train(*copied, range(3, 6))
    assert flat(model.state_dict()) == before
    assert flat(copied[0].state_dict()) != before
    train(model, optimizer, range(3, 6))
    assert_same((model, optimizer), copied)
    assert copied[1].statistics == optimizer.statistics


def test_the_representation_names_settings_and_base_optimizer():
    text = repr(DeltaSAM(Net().parameters(), torch.optim.SGD, rho=0.25, lr=0.1))
    assert text.startswith("DeltaSAM(Settings(rho=0.25, weighting='curvature'")
    assert "SGD (" in text


# --- misuse and faults


def test_an_invalid_setting_is_refused_at_once():
    with pytest.raises(ValueError, match=r"Invalid rho=-0.1 \(--sam-rho\)"):
        DeltaSAM(Net().parameters(), torch.optim.SGD, rho=-0.1, lr=0.1)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("adam", r"Invalid base_optimizer='adam'\. Must be a class"),
        (torch.optim.LBFGS, "Invalid base_optimizer LBFGS: it"),
    ],
)
def test_a_base_optimizer_that_cannot_be_one_is_refused(base, message):
    with pytest.raises(ValueError, match=message):
        DeltaSAM(Net().parameters(), base, lr=0.1)


def test_a_step_that_cannot_be_taken_is_refused():
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"DeltaSAM.step\(\) without a closure: .* Pass a function that returns"):
        optimizer.step()
    with pytest.raises(ValueError, match="Invalid per-sample losses: the closure returned None"):
        optimizer.step(lambda: None)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"DeltaSAM.step\(\) without a trainable parameter"):
        optimizer.step(closure_of(model, 0))


@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
@pytest.mark.parametrize("perturbation", ["batch", "instance"])
def test_logits_that_the_weighting_does_not_need_change_nothing(weighting, perturbation):
    runs = []
    for closure in (closure_of, with_logits):
        model = Net()
        optimizer = DeltaSAM(
            model.parameters(), torch.optim.SGD, weighting=weighting, lr=0.1, perturbation=perturbation
        )
        torch.manual_seed(1)
        optimizer.step(closure(model, 0))
        runs.append((model, optimizer))
    assert_same(*runs)


def test_predictions_that_do_not_count_change_no_weight():
    """A tagger, and padding of which the model says all kinds of things."""
    found = []
    for padding in (0.0, 1e4):
        model = Net(dropout=0)
        optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, weighting="kl", lr=0.1)
        x, y = batch_of(0, size=12)
        counted = torch.ones(4, 3, dtype=torch.bool)
        counted[1, 2] = counted[3, 1:] = False
        x[~counted.flatten()] = padding

        def closure(model=model, x=x, y=y, counted=counted):
            logits = model(x)
            losses = F.cross_entropy(logits, y, reduction="none").view(4, 3)
            return torch.where(counted, losses, 0).sum(1), logits.view(4, 3, 3), counted

        optimizer.step(closure)
        found.append(optimizer.statistics.ess.item())
    assert found[0] == pytest.approx(found[1], rel=1e-5) != 1


def test_kl_without_logits_is_refused():
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, weighting="kl", lr=0.1)
    with pytest.raises(ValueError, match="Invalid weighting='kl'") as error:
        optimizer.step(closure_of(model, 0))
    assert str(error.value).startswith(
        "Invalid weighting='kl' (--sam-weighting): it compares logits, and the forward pass gives only losses. Return "
        "(losses, logits) from the closure of DeltaSAM, or choose one of: curvature, gradient_norm, normalized, uniform"
    )


@pytest.mark.parametrize(
    ("logits", "counted", "message"),
    [
        ([1.0], None, r"Invalid logits: the closure returned a list beside 6 losses\. Must be a tensor \(B, …, V\)"),
        (torch.ones(6), None, r"Invalid logits: the closure returned \(6,\) of torch\.float32 beside 6 losses\."),
        (torch.ones(5, 3), None, r"Invalid logits: the closure returned \(5, 3\) of torch\.float32 beside 6 losses\."),
        (
            torch.ones(6, 2, 3),
            torch.ones(6, 3).bool(),
            r"Invalid counted: .* \(6, 3\) of torch\.bool .* \(6, 2\), e",
        ),
        (torch.ones(6, 3), torch.ones(6), r"Invalid counted: the closure returned \(6,\) of torch\.float32 beside"),
    ],
)
def test_logits_of_another_shape_are_refused(logits, counted, message):
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, weighting="kl", lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: (closure_of(model, 0)(), logits, counted))


@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
@pytest.mark.parametrize(
    ("reduce", "shape"), [(torch.mean, "()"), (lambda losses: losses[:0], "(0,)"), (torch.diag, "(6, 6)")]
)
def test_a_closure_that_does_not_return_one_loss_per_sample_is_refused(weighting, reduce, shape):
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, weighting=weighting, lr=0.1)
    before = flat(model.state_dict())
    with pytest.raises(ValueError, match="Invalid per-sample losses") as error:
        optimizer.step(lambda: reduce(closure_of(model, 0)()))
    assert str(error.value) == (
        f"Invalid per-sample losses of shape {shape}. Must be (B,) with B >= 1: one loss for each "
        "sample of the batch, e.g. from a loss function with reduction='none', summed over the sample's tokens."
    )
    assert flat(model.state_dict()) == before


@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
def test_a_loss_that_is_not_a_number_does_what_it_does_to_the_base_optimizer(weighting):
    runs = optimizers(SGD, rho=0.2, weighting=weighting)
    for model, optimizer in runs:
        closure = closure_of(model, 0)
        torch.manual_seed(1)
        loss = take_step(optimizer, lambda closure=closure: closure() * torch.tensor([1.0, torch.nan, 1, 1, 1, 1]))
        assert loss.isnan()
    ruined, others = ([p.isnan().all().item() for p in model.parameters()] for model, _ in runs)
    assert ruined == others
    assert any(ruined)
    statistics = runs[0][1].statistics
    assert (statistics.skipped, statistics.eps_norm, statistics.ess) == (1, 0, 1)


FAULTS = {
    "ascent forward": (1, False),
    "first probe": (2, False),
    "second probe": (3, False),
    "ascent backward": (1, True),
    "second forward": (4, False),
    "second backward": (4, True),
}


@bases
@pytest.mark.parametrize(("fatal", "backward"), FAULTS.values(), ids=FAULTS)
def test_the_step_after_an_exception_is_that_of_an_undisturbed_run(base, fatal, backward):
    disturbed, undisturbed = (optimizers(base, rho=0.2)[0] for _ in range(2))
    for run in (disturbed, undisturbed):
        torch.manual_seed(1)
        train(*run, range(2))
    passes = []

    def fail(*_):
        raise MemoryError

    def closure():
        passes.append(None)
        losses = closure_of(disturbed[0], 2)()
        if len(passes) == fatal:
            losses.register_hook(fail) if backward else fail()
        return losses

    with pytest.raises(MemoryError):
        disturbed[1].step(closure)
    assert len(passes) == (3 if backward and fatal == 1 else fatal)
    assert_same(disturbed, undisturbed)
    for run in (disturbed, undisturbed):
        torch.manual_seed(3)
        train(*run, range(2, 4))
    assert_same(disturbed, undisturbed)


@pytest.mark.parametrize("around", [True, False], ids=["around the step", "inside the closure"])
def test_losses_linear_in_the_weights_are_weighted_uniformly_under_autocast(around):
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data.copy_(torch.linspace(1, 3, 5)[None])
    optimizer = DeltaSAM(layer.parameters(), torch.optim.SGD, probes=2, lr=0.1)

    def autocast(here):
        return torch.autocast("cpu", dtype=torch.bfloat16) if here else contextlib.nullcontext()

    def closure():
        with autocast(not around):
            return layer(torch.eye(5))[:, 0].float()

    with autocast(around):
        optimizer.step(closure)
    assert optimizer.statistics.ess.item() == pytest.approx(1, abs=1e-6)


# --- without fairseq

TRAIN_WITHOUT_FAIRSEQ = """
import importlib.util, sys, torch
assert importlib.util.find_spec("fairseq") is None
from deltasam_plugin import DeltaSAM
model = torch.nn.Linear(3, 2)
optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.05, weighting="curvature", lr=0.1, momentum=0.9)
x, y = torch.randn(8, 3), torch.arange(8) % 2
losses = [optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none")) for _ in range(9)]
assert losses[-1] < losses[0]
assert not [name for name in sys.modules if name.startswith(("fairseq", "omegaconf", "hydra"))]
"""


def test_the_package_trains_where_fairseq_is_not_installed(tmp_path):
    # A copy, by links, of all that is installed except fairseq; -S keeps the real site-packages out.
    for folder in map(Path, site.getsitepackages()):
        for entry in folder.iterdir() if folder.exists() else ():
            if "fairseq" not in entry.name and not entry.name.startswith(("omegaconf", "hydra")):
                (tmp_path / entry.name).symlink_to(entry)
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    run = subprocess.run(
        [sys.executable, "-S", "-c", TRAIN_WITHOUT_FAIRSEQ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("weighting", ["uniform", "curvature"])
def test_norms_of_half_precision_losses_are_in_single_precision(weighting):
    """fp16 holds no number above 65504, and would be off by 0.1 %."""
    model = nn.Linear(64, 1, bias=False)
    model.weight.data.zero_()
    x = torch.full((2, 64), 3.0001e4)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.05, weighting=weighting, lr=0.0)
    optimizer.step(lambda: model(x).squeeze(1).half())
    assert optimizer.statistics.ascent_gnorm.item() == pytest.approx(8 * 3.0001e4, rel=1e-6)
    assert optimizer.statistics.eps_norm.item() == pytest.approx(0.05, rel=1e-6)


def test_modules_with_the_same_names_are_all_perturbed():
    """Parameters that are given by name, from two modules: each has a weight and a bias."""
    x, y = batch_of(0)
    moved = []
    for named in (True, False):
        torch.manual_seed(0)
        first, second = nn.Linear(4, 8), nn.Linear(8, 3)
        groups = [{"params": m.named_parameters() if named else m.parameters()} for m in (first, second)]
        optimizer = DeltaSAM(groups, torch.optim.SGD, rho=0.5, weighting="uniform", lr=0.1)
        optimizer.step(lambda: F.cross_entropy(second(first(x)), y, reduction="none"))  # noqa: B023
        moved.append([p.tolist() for p in (*first.parameters(), *second.parameters())])
    assert moved[0] == moved[1]


def test_a_closure_that_calls_backward_is_refused():
    model = Net()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)

    def closure():
        losses = closure_of(model, 0)()
        losses.mean().backward()
        return losses

    with pytest.raises(ValueError, match=r"closure called backward\(\).*autograd.grad"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ({"rho": 0.0}, {}, r"Invalid rho=0.0 of a parameter group.*parameters="),
        ({"maximize": True}, {}, r"Invalid maximize=True.*Negate the losses"),
        ({}, {"maximize": True}, r"Invalid maximize=True.*Negate the losses"),
    ],
)
def test_options_of_a_group_that_would_be_ignored_are_refused(group, options, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        DeltaSAM([{"params": model.parameters(), **group}], torch.optim.SGD, lr=0.1, **options)


def test_options_of_a_group_that_is_added_are_refused_too():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = DeltaSAM(first.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="Invalid rho=0"):
        optimizer.add_param_group({"params": second.parameters(), "rho": 0.0})


class ZeroingSGD(torch.optim.SGD):
    """Keeps the tensors of the gradients."""

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none=False)


def test_a_base_optimizer_that_keeps_its_gradients_and_sets_them_to_zero():
    (model, delta), (other, plain) = ((m, DeltaSAM(m.parameters(), kind, rho=0.05, lr=0.1))
                                      for kind in (ZeroingSGD, torch.optim.SGD) for m in [Net(0)])  # fmt: skip
    for number in range(3):
        delta.step(closure_of(model, number))
        plain.step(closure_of(other, number))
    assert flat(model.state_dict()) == flat(other.state_dict())


def test_a_base_optimizer_with_a_rho_of_its_own_keeps_it():
    optimizer = DeltaSAM(Net().parameters(), torch.optim.Adadelta, rho=0.05)
    assert (optimizer.settings.rho, optimizer.param_groups[0]["rho"]) == (0.05, 0.9)


@pytest.mark.parametrize("shard", ["FSDP", "fully_shard"])
def test_sharded_parameters_are_refused(tmp_path, shard):
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = Net()
        if shard == "FSDP":
            model = fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        else:
            fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.05, weighting="uniform", lr=0.1)
        with pytest.raises(Refused, match=r"sharded.*DistributedDataParallel"):
            optimizer.step(closure_of(model, 0))
    finally:
        torch.distributed.destroy_process_group()
