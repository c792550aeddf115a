"""A forward pass that cannot be replayed is refused on the first batch, and no other one is."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.loss import Objective, sharpness_aware_loss
from deltasam_plugin.modes import Perturbations

MODES = [{"weighting": "curvature"}, {"weighting": "uniform"}, {"perturbation": "instance"}]
modes = pytest.mark.parametrize("mode", MODES, ids=["curvature", "uniform", "instance"])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)

    def middle(self, hidden):
        return hidden

    def forward(self, x):
        return self.leave(self.middle(torch.tanh(self.enter(x))))


class Memory(Base):
    """Adds what the pass before it saw, as Transformer-XL and adaptive span do."""

    memory = None

    def middle(self, hidden):
        before, self.memory = self.memory, hidden.detach().mean(dim=0)
        return hidden if before is None else hidden + before


class OwnGenerator(Base):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def middle(self, hidden):
        return hidden * (torch.rand(hidden.shape, generator=self.generator) > 0.3)


class OldSpectralNorm(Base):
    def __init__(self):
        super().__init__()
        self.leave = nn.utils.spectral_norm(self.leave)


class SpectralNorm(Base):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.leave)


class Codebook(Base):
    """Moves a buffer towards what it sees, as vector quantization with exponential moving averages does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def middle(self, hidden):
        self.mean.mul_(0.5).add_(hidden.detach().mean(dim=0), alpha=0.5)
        return hidden - self.mean.clone()


class Dropout(Base):
    def middle(self, hidden):
        return F.dropout(hidden, 0.3)


class LayerDrop(Base):
    """Leaves a layer out, by each of the generators that people use."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def middle(self, hidden):
        draws = torch.rand(()).item(), random.random(), np.random.rand(), np.random.default_rng().random()
        for layer, drawn in zip(self.layers, draws):
            hidden = layer(hidden) if drawn > 0.5 else hidden
        return hidden


class Normalized(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def middle(self, hidden):
        return self.norm(hidden)


class DataDependentInit(Base):
    """The first forward pass sets a bias (activation normalization, k-means codebooks, learned step sizes)."""

    ready = False

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def middle(self, hidden):
        if not self.ready:
            self.shift.data -= hidden.detach().mean(dim=0)
            self.ready = True
        return torch.tanh(hidden + self.shift)


class InitAfterUse(Base):
    """The first forward pass sets a bias that it has used already."""

    ready = False

    def middle(self, hidden):
        if not self.ready:
            self.enter.bias.data -= hidden.detach().mean(dim=0)
            self.ready = True
        return hidden


REFUSED = [Memory, OwnGenerator, Codebook, InitAfterUse]
ACCEPTED = [Base, Dropout, LayerDrop, Normalized, DataDependentInit]


def closure_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
    return lambda: F.cross_entropy(model(x), y, reduction="none")


def seed_everything():
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)


@modes
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Instance mode leaves unperturbed")
def test_a_forward_pass_that_cannot_be_replayed_is_refused(kind, mode):
    model = kind()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, **mode)
    before = model.leave.weight.detach().clone()
    with pytest.raises(RuntimeError, match="The forward pass cannot be replayed") as error:
        optimizer.step(closure_of(model))
    for cause in ("memory between forward passes", "torch.Generator of its own", "first forward pass", "codebooks"):
        assert cause in str(error.value)
    assert torch.equal(model.leave.weight, before)


@modes
@pytest.mark.parametrize("kind", [OldSpectralNorm, SpectralNorm])
@pytest.mark.filterwarnings("ignore:Instance mode leaves unperturbed")
def test_spectral_norm_is_refused_although_its_vectors_may_have_converged(kind, mode):
    model = kind()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, **mode)
    with pytest.raises(RuntimeError, match="spectral norm updates its vectors in every one"):
        optimizer.step(closure_of(model))


@pytest.mark.parametrize("kind", [OldSpectralNorm, SpectralNorm])
def test_spectral_norm_that_is_not_updated_is_accepted(kind):
    model = kind().eval()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    assert optimizer.step(closure_of(model)).isfinite()


@modes
@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_radius_of_zero_is_the_base_run_bit_for_bit_where_the_forward_pass_can_be_replayed(kind, mode):
    states = []
    for delta in (True, False):
        model = kind()
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer = DeltaSAM(model.parameters(), torch.optim.Adam, rho=0.0, lr=0.01, **mode)
        seed_everything()
        for step in range(3):
            with pytest.MonkeyPatch.context() as patch:
                # instead of the system's entropy, which differs between the two runs
                seeded = lambda seed=None, make=np.random.default_rng, step=step: make(seed or step)  # noqa: E731
                patch.setattr(np.random, "default_rng", seeded)
                if delta:
                    optimizer.step(closure_of(model, step))
                else:
                    base.zero_grad()
                    closure_of(model, step)().mean().backward()
                    base.step()
        states.append((model.state_dict(), torch.get_rng_state(), random.getstate(), np.random.rand()))
    (one, *random_states), (other, *other_states) = states
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert torch.equal(random_states.pop(0), other_states.pop(0))
    assert random_states == other_states


@pytest.mark.parametrize("kind", [Base, Dropout, LayerDrop, Normalized, DataDependentInit])
@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
def test_training_goes_on_where_the_forward_pass_can_be_replayed(kind, weighting):
    model = kind()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, weighting=weighting)
    for step in range(9):
        assert optimizer.step(closure_of(model, step)).isfinite()
        assert optimizer.statistics.eps_norm.item() == pytest.approx(0.05, rel=1e-3)
    assert getattr(model, "ready", True)


def test_what_data_dependent_initialisation_did_is_kept():
    model = DataDependentInit()
    DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.0).step(closure_of(model))
    assert model.shift.all()


def test_an_output_layer_of_zeros_does_not_hide_it_for_long():
    """At first no loss depends on what cannot be replayed: batches 1, 2, 4, 8 and so on are checked."""
    model = OwnGenerator()
    nn.init.zeros_(model.leave.weight)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(closure_of(model))
    with pytest.raises(RuntimeError, match="The forward pass cannot be replayed"):
        optimizer.step(closure_of(model, 1))


def test_steady_steps_run_no_forward_pass_more():
    model, passes = Base(), []
    model.enter.register_forward_pre_hook(lambda *_: passes.append(None))
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, weighting="uniform")
    counts = []
    for step in range(8):
        optimizer.step(closure_of(model, step))
        counts.append(len(passes))
        passes.clear()
    assert counts == [3, 3, 2, 3, 2, 2, 2, 3]


def test_a_batch_whose_losses_are_not_numbers_proves_nothing_and_refuses_nothing():
    model = Base()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.0, weighting="uniform")
    closure = closure_of(model)
    optimizer.step(lambda: closure() * torch.tensor([1, torch.nan, torch.inf, -torch.inf, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_rounding_changes_is_no_difference(dtype):
    """A kernel that adds in another order differs in the last place."""
    model = Base().to(dtype)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.0, weighting="uniform")
    eps, passes = torch.finfo(dtype).eps, []

    def closure():
        passes.append(None)
        losses = F.cross_entropy(model(torch.ones(6, 4, dtype=dtype)), torch.arange(6) % 3, reduction="none")
        return losses * (1 + 2 * eps * (len(passes) % 2))

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="cannot be replayed"):
        optimizer.step(lambda: closure() * (1 + 0.1 * len(passes)))


@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
def test_a_parameter_that_the_forward_pass_rewrites_is_no_difference(weighting):
    """fairseq's quantization noise: every forward pass scales the weight that it finds."""
    weight = nn.Parameter(torch.linspace(1, 2, 6).reshape(3, 2))
    original, seen = weight.detach().clone(), []

    def first():
        weight.data.mul_(2 * (torch.rand(3, 2) > 0.2))
        seen.append(weight.detach().clone())
        losses = (weight @ torch.ones(2)).square()
        return Objective(losses.sum(), losses)

    perturbations = Perturbations({"weight": PerturbedParameter(weight, rewritten=True)}, Settings(0.5, weighting))
    loss, _ = sharpness_aware_loss(first, lambda: first().loss, perturbations.of_batch(), perturbations.devices)
    loss.backward()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(weight, seen[0])  # as the base run leaves it
    for moved in seen[2:]:  # one multiplication each, from near the original
        assert (moved[seen[0] != 0] / original[seen[0] != 0] - 2).abs().max() < 1


# --- probes


def test_probes_that_give_no_number_are_counted_and_warned_of_once():
    model = Base()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.0, probes=3)
    closure, passes = closure_of(model), []

    def failing():
        losses = closure()
        passes.append(None)
        return losses if torch.is_grad_enabled() or len(passes) % 3 else losses * torch.nan

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.step(failing)
            assert optimizer.statistics.ess == 1
            assert 1 <= optimizer.statistics.probes_failed <= 3
        optimizer.step(closure)
    assert [str(warning.message)[:47] for warning in caught] == ["A probe gave losses that are not finite. Its ba"]
    assert optimizer.statistics.probes_failed == 0


@pytest.mark.parametrize(("flat", "warned"), [(True, True), (False, False)], ids=["nothing to see", "curvature"])
def test_probes_that_see_nothing_but_rounding_are_counted_and_warned_of_once(flat, warned):
    weight = nn.Parameter(torch.linspace(1, 2, 5))
    optimizer = DeltaSAM([weight], torch.optim.SGD, lr=0.0)
    inputs = torch.eye(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(34):
            assert len(caught) == (warned and step >= 16)
            optimizer.step(lambda: (inputs @ weight) if flat else (inputs @ weight).square())
            assert (optimizer.statistics.probes_lost == 1) == flat
    assert [str(warning.message)[:47] for warning in caught] == [
        "In 16 of 16 batches the probes saw nothing but "
    ] * warned


def test_a_batch_of_one_sample_has_nothing_to_see():
    weight = nn.Parameter(torch.linspace(1, 2, 5))
    optimizer = DeltaSAM([weight], torch.optim.SGD, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(17):
            optimizer.step(lambda: weight.sum()[None])
