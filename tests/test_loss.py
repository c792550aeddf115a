"""The gradient of a sharpness-aware loss with one perturbation for the batch: against an oracle, and under everything
that can surround or interrupt it."""

import contextvars
import math
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltasam_plugin import Logits, Settings
from deltasam_plugin.batch.displacement import ascended
from deltasam_plugin.batch.measures import ROUNDING_FACTOR
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.weighting import WEIGHTINGS as REGISTRY
from deltasam_plugin.loss import Objective, sharpness_aware_loss
from deltasam_plugin.randomness import RandomState
from deltasam_plugin.replay import Conditions
from tests.helpers.directions import direction_of

UNIFORM = Settings(weighting="uniform")
WEIGHTINGS = {
    "curvature": Settings(rho=0.5),
    "uniform": Settings(rho=0.5, weighting="uniform"),
    "three-probes": Settings(rho=0.5, probes=3),
    "gradient-norm": Settings(rho=0.5, weighting="gradient_norm", probes=2),
    "kl": Settings(rho=0.5, weighting="kl", probes=2),
}
weightings = pytest.mark.parametrize("settings", WEIGHTINGS.values(), ids=WEIGHTINGS)
PASSES = {"curvature": 2, "uniform": 0, "gradient_norm": 1, "normalized": 1, "kl": 1}  # of each probe


class Net(nn.Module):
    """A classifier with dropout; counts its forward passes, and fails in the one it is told to."""

    def __init__(self, recompute=lambda layer, x: layer(x), normalize=False):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)
        self.body = nn.Sequential(nn.BatchNorm1d(8) if normalize else nn.Identity(), nn.Dropout(0.3), nn.Linear(8, 8))
        self.recompute = recompute
        self.passes, self.graphs = 0, 0
        self.fatal_pass = self.fatal_graph = None

    def forward(self, x):
        self.passes += 1
        hidden = self.recompute(self.body, torch.tanh(self.enter(x)))
        if self.passes == self.fatal_pass:
            raise MemoryError("in a forward pass")
        if torch.is_grad_enabled():
            self.graphs += 1
            if self.graphs == self.fatal_graph:
                hidden.register_hook(self.fail)
        return self.leave(torch.tanh(hidden))

    @staticmethod
    def fail(gradient):
        raise MemoryError("in a backward pass")


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 4, generator=generator), torch.arange(6) % 3) for _ in range(4)]


def sample_losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def objective(model, batch, factor=1.0):
    """Loss, per-sample losses, nothing shared, and the logits."""
    logits = model(batch[0])
    losses = factor * F.cross_entropy(logits, batch[1], reduction="none")
    return losses.sum(), losses, None, (), Logits.by_sample(logits)


def loss_of(first, parameters, leaves, settings, step=0):
    """The sharpness-aware loss of a forward pass that returns loss and per-sample losses, and its statistics."""
    perturbation = BatchPerturbation([*parameters], [*leaves], settings, step)
    return sharpness_aware_loss(lambda: Objective(*first()), lambda: first()[0], perturbation, {torch.device("cpu")})


def aware(model, batch, settings, step=0, factor=1.0, perturbed=None):
    """The sharpness-aware loss of a classifier, a sum over the batch, and its statistics."""

    def first():
        return objective(model, batch, factor)

    return loss_of(first, perturbed or map(PerturbedParameter, model.parameters()), model.parameters(), settings, step)


def copies(tensors):
    return [None if tensor is None else tensor.detach().clone() for tensor in tensors]


def values(model):
    return copies(model.parameters())


def gradients(model):
    return copies(parameter.grad for parameter in model.parameters())


def same(one, other):
    """Equal bit for bit, None included."""
    return len(one) == len(other) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one, other)
    )


def gradient_of(model, batch, settings, seed=5, scale=1.0, step=0):
    """The gradient of the sharpness-aware loss, in a fresh .grad."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss, statistics = aware(model, batch, settings, step)
    (scale * loss).backward()
    return gradients(model), statistics


def plain_gradient_of(model, batch, seed=5):
    model.zero_grad()
    torch.manual_seed(seed)
    sample_losses(model, batch).sum().backward()
    return gradients(model)


# --- the oracle: one sample at a time, in double precision


def logits_of(parameters, x):
    enter, shift, leave, bias = parameters
    return torch.tanh(x @ enter + shift) @ leave + bias


def classifier(parameters, x, y):
    """Per-sample losses."""
    return F.cross_entropy(logits_of(parameters, x), y, reduction="none")


@st.composite
def problems(draw):
    """Parameters, inputs, labels, strength of a loss that belongs to no sample, settings, seed."""

    def array(*shape):
        return torch.from_numpy(draw(hnp.arrays("float64", shape, elements=st.floats(-1, 1))))

    batch, inputs, hidden, classes = (draw(st.integers(low, 4)) for low in (1, 1, 1, 2))
    parameters = [array(inputs, hidden), array(hidden), array(hidden, classes), array(classes)]
    labels = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch)))
    weighting, probes = draw(st.sampled_from(sorted(PASSES))), draw(st.sampled_from([1, 3]))
    settings = Settings(draw(st.sampled_from([0.0625, 0.5])), weighting, probes, probe_scale=0.25)
    return (
        parameters,
        array(batch, inputs),
        labels,
        draw(st.sampled_from([0, 3])),
        settings,
        draw(st.integers(0, 2**32)),
    )


def penalty(parameters, strength):
    return strength * sum(value.square().sum() for value in parameters)


def reference(parameters, x, y, strength, settings, seed):
    """The gradient and the statistics, from every sample's own losses and gradients."""
    samples = range(len(y))

    def value_of(i, at):
        return classifier(at, x[i : i + 1], y[i : i + 1]).sum()

    def gradients_at(at):
        """Those of every sample, and that of the shared part."""
        at = [value.clone().requires_grad_() for value in at]
        shared = [2 * strength * value.detach() for value in at]
        return [torch.autograd.grad(value_of(i, at), at) for i in samples], shared

    def objective(at):
        return sum(value_of(i, at).item() for i in samples) + float(penalty(at, strength))

    relative = [1.0 for _ in samples]
    if settings.weighting != "uniform":
        count = sum(value.numel() for value in parameters)
        sigma = settings.probe_scale * math.sqrt(sum(value.square().sum().item() for value in parameters) / count)
        squares, floor = [0.0 for _ in samples], 0.0
        for probe in range(settings.probes):
            measure = REGISTRY[settings.weighting].measure
            u = direction_of([PerturbedParameter(value) for value in parameters], seed + probe, measure)
            there, back = ([w + side * sigma * d for w, d in zip(parameters, u)] for side in (1, -1))
            for i in samples:
                plus, minus, center = (value_of(i, at).item() for at in (there, back, parameters))
                if settings.weighting == "curvature":
                    squares[i] += (plus + minus - 2 * center) ** 2 / settings.probes
                    floor = max(floor, ROUNDING_FACTOR * 2**-52 * (plus + minus + 2 * center) / 4)
                elif settings.weighting == "kl":
                    z, moved = (logits_of(at, x[i]) for at in (parameters, there))
                    p = z.softmax(-1)
                    squares[i] += float((p * (moved - z - (p * (moved - z)).sum()) ** 2).sum()) / settings.probes
                else:
                    squares[i] += (plus - center) ** 2 / settings.probes
                    floor = max(floor, ROUNDING_FACTOR * 2**-52 * (plus + center) / 2)
        assume(max(floor, 1e-15) < 1e-11 * math.sqrt(max(squares)))  # else the weights are made of rounding errors
        assume(settings.weighting != "kl" or min(squares) > 1e-8)
        relative = FORMULAS[settings.weighting]([max(math.sqrt(square), floor) for square in squares], settings.probes)
    v = [value / sum(relative) for value in relative]
    per_sample, shared = gradients_at(parameters)
    ascent = [sum(v[i] * per_sample[i][j] for i in samples) + shared[j] / len(v) for j in range(len(parameters))]
    norm = math.sqrt(sum(g.square().sum().item() for g in ascent))
    assume(norm > 1e-6)  # else its direction is made of rounding errors
    moved = [w + settings.rho * g / norm for w, g in zip(parameters, ascent)]
    statistics = {
        "sharpness": objective(moved) - objective(parameters),
        "ess": 1 / (len(v) * sum(value**2 for value in v)),
        "weight_max": len(v) * max(v),
        "ascent_gnorm": norm,
        "eps_norm": settings.rho,
        "skipped": 0.0,
    }
    per_sample, shared = gradients_at(moved)
    return [sum(per_sample[i][j] for i in samples) + shared[j] for j in range(len(parameters))], statistics


FORMULAS = {
    "curvature": lambda rms, probes: rms,
    "kl": lambda rms, probes: [a**2 for a in rms],
    "gradient_norm": lambda rms, probes: [math.exp(a * len(rms) / sum(rms)) for a in rms],
    "normalized": lambda rms, probes: [(probes * a**2 + sum(b**2 for b in rms) / len(rms)) ** -0.5 for a in rms],
}


@hypothesis_settings(max_examples=60)
@given(problems())
def test_the_gradient_and_the_statistics_equal_a_reference_that_takes_one_sample_at_a_time(problem):
    parameters, x, y, strength, settings, seed = problem
    torch.manual_seed(seed)
    expected, statistics = reference(parameters, x, y, strength, settings, RandomState.capture(set()).seed())
    leaves = [nn.Parameter(value.clone()) for value in parameters]

    def first():
        losses, shared, logits = classifier(leaves, x, y), penalty(leaves, strength), logits_of(leaves, x)
        return losses.sum() + shared, losses, shared if strength else None, (), Logits.by_sample(logits)

    loss, found = loss_of(first, map(PerturbedParameter, leaves), leaves, settings)
    assert loss.item() == first()[0].item()
    loss.backward()
    error = math.sqrt(sum((p.grad - g).square().sum().item() for p, g in zip(leaves, expected)))
    assert error <= 1e-9 * math.sqrt(sum(g.square().sum().item() for g in expected))
    for name, value in statistics.items():  # kept in single precision
        assert getattr(found, name).item() == pytest.approx(value, rel=2e-6, abs=1e-12), name


# --- the passes


@weightings
def test_the_passes_are_one_ascent_then_those_of_each_probe_and_one_second(settings, batches):
    model, modes = Net(), []
    model.enter.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    loss, _ = aware(model, batches[0], settings)
    probes = PASSES[settings.weighting] * settings.probes
    assert modes == [True] + [False] * probes
    loss.backward()
    assert modes == [True] + [False] * probes + [True]


@weightings
def test_the_value_is_the_plain_loss_and_the_generators_end_where_a_plain_pass_ends(settings, batches):
    model = Net()
    torch.manual_seed(5)
    plain = sample_losses(model, batches[0]).sum().item()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    loss, _ = aware(model, batches[0], settings)
    assert loss.item() == plain
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after)


def test_generators_without_a_seed_draw_the_same_in_every_pass(batches):
    model, drawn = Net(), []
    model.enter.register_forward_pre_hook(lambda *_: drawn.append(np.random.default_rng().random()))
    aware(model, batches[0], Settings())[0].backward()
    assert drawn == [drawn[0]] * 4


def test_statistics_are_zero_until_the_backward_pass_fills_them(batches):
    loss, statistics = aware(Net(), batches[0], UNIFORM)
    assert (statistics.sharpness, statistics.ascent_gnorm, statistics.eps_norm) == (0, 0, 0)
    sharpness = statistics.sharpness  # whoever holds the tensor sees it filled
    loss.backward()
    assert sharpness > 0
    assert statistics.eps_norm.item() == pytest.approx(0.05, rel=1e-4)


# --- what surrounds the loss


@weightings
def test_micro_batches_accumulate_and_nothing_of_the_ascent_does(settings, batches):
    model = Net()
    one, other = (gradient_of(model, batch, settings, seed)[0] for batch, seed in zip(batches, (5, 6)))
    model.zero_grad()
    for batch, seed in zip(batches, (5, 6)):
        torch.manual_seed(seed)
        aware(model, batch, settings)[0].backward()
    assert same(gradients(model), [a + b for a, b in zip(one, other)])


@weightings
@pytest.mark.parametrize("scale", [2.0**-20, 4.0, 2.0**16])
def test_a_positive_factor_on_the_loss_scales_the_gradient_and_no_statistic(settings, scale, batches):
    model = Net()
    plain, statistics = gradient_of(model, batches[0], settings)
    scaled, scaled_statistics = gradient_of(model, batches[0], settings, scale=scale)
    assert same(scaled, [scale * gradient for gradient in plain])
    assert scaled_statistics == statistics


@weightings
def test_a_factor_of_zero_adds_zeros_and_makes_no_nan(settings, batches):
    model = Net()
    found, statistics = gradient_of(model, batches[0], settings, scale=0.0)
    assert all((gradient == 0).all() for gradient in found)
    assert (statistics.sharpness, statistics.ascent_gnorm, statistics.eps_norm, statistics.skipped) == (0, 0, 0, 1)


def test_a_negative_factor_does_not_just_negate_the_gradient(batches):
    # It is another objective, −L, and its adversary raises −L.
    model = Net()
    found, statistics = gradient_of(model, batches[0], Settings(0.5, "uniform"), scale=-1.0)
    assert statistics.sharpness < 0 < statistics.ascent_gnorm
    assert not same(found, [-gradient for gradient in gradient_of(model, batches[0], Settings(0.5, "uniform"))[0]])


def test_a_leaf_that_is_not_perturbed_gets_the_gradient_at_the_perturbed_weights_alone(batches):
    model = Net().eval()
    chosen = [PerturbedParameter(parameter) for parameter in model.leave.parameters()]
    aware(model, batches[0], Settings(0.5, "uniform"), perturbed=chosen)[0].backward()
    found = gradients(model)
    ascent = plain_gradient_of(model, batches[0])[2:4]  # enter, leave, body
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in ascent))
    for parameter, gradient in zip(model.leave.parameters(), ascent):
        parameter.data += 0.5 * gradient / norm
    for one, other in zip(found, plain_gradient_of(model, batches[0])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_parameter_outside_the_graph_neither_moves_nor_gets_a_gradient(batches):
    model, places = Net(), []
    model.idle = idle = nn.Parameter(torch.tensor([-0.0, 2.0**-149]))
    model.enter.register_forward_pre_hook(lambda *_: places.append(idle.view(torch.int32).tolist()))
    aware(model, batches[0], UNIFORM)[0].backward()
    assert places == [[-(2**31), 1]] * 2
    assert idle.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
@weightings
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the probes build no graph
def test_activation_checkpointing_changes_nothing(settings, reentrant, batches):
    recomputed = Net(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    found, statistics = gradient_of(recomputed, batches[0], settings)
    expected, expected_statistics = gradient_of(Net(), batches[0], settings)
    assert same(found, expected)
    assert statistics == expected_statistics


@weightings
def test_batch_norm_statistics_are_those_of_a_plain_pass(settings, batches):
    model, plain = Net(normalize=True), Net(normalize=True)
    gradient_of(model, batches[0], settings)
    plain_gradient_of(plain, batches[0])
    assert same(list(model.buffers()), list(plain.buffers()))
    assert model.body[0].num_batches_tracked == 1


def test_the_ascent_counts_samples_by_shares_of_which_the_mean_is_one(batches):
    """So data-parallel workers that add up their ascent gradients use one unit, and not each its own largest weight."""
    model, shares = Net(), []

    def first():
        losses = sample_losses(model, batches[0])
        if losses.requires_grad:
            losses.register_hook(shares.append)
        return losses.sum(), losses

    loss, statistics = loss_of(first, map(PerturbedParameter, model.parameters()), [*model.parameters()], Settings())
    loss.backward()
    assert shares[0].mean().item() == pytest.approx(1, rel=1e-6)
    assert 1.01 < shares[0].max().item() == pytest.approx(statistics.weight_max.item(), rel=1e-6)


# --- precision


def test_the_second_pass_computes_in_the_autocast_precision_of_the_first_and_sees_moved_weights():
    weight, seen = nn.Parameter(torch.ones(3, 3)), []

    def first():
        outputs = F.linear(torch.eye(3), weight)
        seen.append((outputs.dtype, outputs.sum().item()))
        losses = outputs.float().square().sum(dim=1)
        return losses.sum(), losses

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, statistics = loss_of(first, [PerturbedParameter(weight)], [weight], Settings(1.5, "uniform"))
        inside, _ = loss_of(first, [PerturbedParameter(weight)], [weight], Settings(1.5, "uniform"))
        inside.backward()
    loss.backward()  # outside, as the documentation of autocast has it
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    # nine weights move by 0.5 each: from 1 to 1.5, in the second pass of either loss
    assert [total for _, total in seen[-2:]] == [13.5, 13.5]
    assert statistics.sharpness.item() == pytest.approx(9 * (1.5**2 - 1), rel=1e-2)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_the_second_backward_pass_runs_under_the_autocast_state_that_backward_is_called_in(inside, batches):
    """As SAM written by hand, bit for bit. Autocast changes the backward pass of what runs in fp32."""
    x, y = batches[0]

    def autocast(enabled=True):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)

    def losses(model):
        hidden = model.enter(x)
        with autocast(False):
            hidden = torch.tanh(hidden.float()) @ model.body[2].weight
        return F.cross_entropy(model.leave(hidden), y, reduction="none")

    model, by_hand = Net(), Net()
    perturbed = [PerturbedParameter(parameter) for parameter in model.parameters()]
    with autocast():
        loss, _ = loss_of(lambda: (losses(model).sum(), losses(model)), perturbed, model.parameters(), UNIFORM)
        value = losses(by_hand).sum()
        with autocast(inside):
            ascent = torch.autograd.grad(value, [*by_hand.parameters()], allow_unused=True)
    with autocast(inside):
        loss.backward()
    gradients_by_name = dict(zip([*by_hand.parameters()], ascent))
    with ascended([*map(PerturbedParameter, by_hand.parameters())], [*gradients_by_name.values()], UNIFORM.rho):
        with autocast():
            value = losses(by_hand).sum()
        with autocast(inside):
            value.backward()
    assert same(gradients(model), gradients(by_hand))
    assert gradients(model)[0] is not None


def test_the_second_pass_sees_default_device_and_context_variables_although_another_thread_runs_it():
    """On a GPU, autograd runs backward passes in a thread of its own."""
    weight, seen, variable = nn.Parameter(torch.ones(3)), [], contextvars.ContextVar("variable", default="unset")

    def first():
        seen.append((torch.empty(1).device.type, variable.get()))
        return weight.sum(), weight * 1

    variable.set("set")
    with torch.device("meta"):
        perturbation = BatchPerturbation([PerturbedParameter(weight)], [weight], Settings())
        loss, _ = sharpness_aware_loss(lambda: Objective(*first()), lambda: first()[0], perturbation, {weight.device})
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert seen == [("meta", "set")] * 4
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_model_is_perturbed_through_its_masters(dtype, batches):
    model = Net().to(dtype)
    masters = [p.detach().float() for p in model.parameters()]
    batch = (batches[0][0].to(dtype), batches[0][1])
    through = [PerturbedParameter(p, master) for p, master in zip(model.parameters(), masters)]
    before = values(model)
    loss, statistics = aware(model, batch, Settings(0.01), perturbed=through)
    (128 * loss).backward()
    if dtype == torch.float16:
        assert statistics.eps_norm.item() == pytest.approx(0.01, rel=0.2)
    else:  # a step is a fraction of the weights' spacing: the few that move, move too far
        assert 0.01 < statistics.eps_norm.item() < 0.1
    assert all(p.grad.dtype == dtype for p in model.parameters())
    assert same(values(model), before)


@pytest.mark.parametrize(
    ("dtype", "scaler", "shown"),
    [(torch.float16, True, True), (torch.float16, False, False), (torch.float32, True, False)],
    ids=str,
)
def test_an_ascent_that_overflows_in_half_precision_is_shown_to_dynamic_loss_scaling(dtype, scaler, shown):
    weight = nn.Parameter(torch.ones(2, dtype=dtype))

    def first():
        losses = weight * torch.finfo(dtype).max  # a loss scale of 2 is too much for its gradient
        return Objective(losses.mean(), losses)

    perturbation = BatchPerturbation([PerturbedParameter(weight)], [weight], UNIFORM, loss_scaler=scaler)
    loss, statistics = sharpness_aware_loss(first, weight.sum, perturbation, {torch.device("cpu")})
    (2 * loss).backward()
    assert statistics.skipped == 1
    assert weight.grad.tolist() == [math.inf if shown else 2.0] * 2
    assert weight.tolist() == [1.0, 1.0]


# --- misuse


def test_a_second_backward_is_refused(batches):
    model = Net()
    loss, _ = aware(model, batches[0], UNIFORM)
    loss.backward(retain_graph=True)
    before = gradients(model)
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    assert str(error.value) == (
        "backward() through a sharpness-aware loss a second time. It runs two passes and frees their graphs; "
        "compute the loss again instead of passing retain_graph=True."
    )
    assert same(gradients(model), before)


# --- faults


@weightings
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_non_finite_loss_skips_the_ascent_and_weighs_uniformly(settings, value, batches):
    model = Net()
    before = values(model)
    factor = torch.ones(6)
    factor[2] = value
    loss, statistics = aware(model, batches[0], settings, factor=factor)
    loss.backward()
    assert same(values(model), before)
    assert (statistics.skipped, statistics.eps_norm, statistics.ascent_gnorm, statistics.ess) == (1, 0, 0, 1)
    assert any(
        gradient.isnan().any() for gradient in gradients(model)
    )  # as without the plugin: the trainer must see it


def surroundings():
    """Everything global that a pass sets for its duration."""
    module = torch.nn.modules.module
    hooks = len(module._global_forward_pre_hooks), len(module._global_forward_hooks)
    return hooks, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]


FAULTS = {
    "ascent forward": {"fatal_pass": 1},
    "first probe": {"fatal_pass": 2},
    "second probe": {"fatal_pass": 3},
    "ascent backward": {"fatal_graph": 1},
    "second forward": {"fatal_pass": 4},
    "second backward": {"fatal_graph": 2},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_in_any_pass_leaves_everything_as_it_was(fault, batches):
    model = Net(normalize=True)
    aware(model, batches[0], UNIFORM)[0].backward()  # something has been accumulated
    before, accumulated, around = values(model), gradients(model), surroundings()

    model.passes = model.graphs = 0
    for name, number in FAULTS[fault].items():
        setattr(model, name, number)
    loss, places = None, []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        plain_gradient_of(Net(normalize=True), batches[1], seed=7)
        after_plain = generators()
    torch.manual_seed(7)
    model.leave.register_forward_pre_hook(lambda *_: places.append(values(model)))
    with pytest.raises(MemoryError):  # noqa: PT012 - which of the two statements raises is the point of the test
        loss, _ = aware(model, batches[1], Settings(0.5))
        after_forward, buffers = generators(), copies(model.buffers())
        loss.backward()

    assert same(values(model), before)
    assert surroundings() == around
    if fault != "ascent forward":
        assert generators() == after_plain
    if loss is not None:
        assert generators() == after_forward
        assert same(copies(model.buffers()), buffers)
    assert model.body[0].num_batches_tracked == 2  # as after two plain passes
    if fault != "second backward":  # it has accumulated a part by then, as a plain backward pass has
        assert same(gradients(model), accumulated)
    else:
        assert not same(places[-1], before)  # it did fail at moved weights

    model.fatal_pass = model.fatal_graph = None
    undisturbed = Net(normalize=True)
    for buffer, value in zip(undisturbed.buffers(), model.buffers()):
        buffer.copy_(value)
    found, statistics = gradient_of(model, batches[2], Settings(0.5))
    expected, expected_statistics = gradient_of(undisturbed, batches[2], Settings(0.5))
    assert same(found, expected)
    assert statistics == expected_statistics


def test_conditions_are_captured_before_the_first_pass_and_not_from_the_last_replay(batches):
    model = Net()
    torch.manual_seed(5)
    conditions = Conditions.capture(set())
    loss, _ = aware(model, batches[0], Settings(0.0))
    torch.manual_seed(99)  # whatever happens between forward and backward
    torch.rand(3)
    between = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), between)
    found = gradients(model)
    model.zero_grad()
    with conditions.replayed():
        sample_losses(model, batches[0]).sum().backward()
    assert same(found, gradients(model))
