"""Probes move, and are measured by, what the loss of the batch reaches and nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltasam_plugin import DeltaSAM


class Net(nn.Module):
    """A classifier; `extra` is trainable, and each test says how it is used."""

    def __init__(self, use=lambda extra, hidden: hidden):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.extra = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 8)
        self.use = use

    def forward(self, x):
        return self.leave(self.use(self.extra, torch.tanh(self.enter(x))))


def without_gradient(extra, hidden):
    with torch.no_grad():
        return hidden + extra(hidden)


def train(model, optimizer, steps):
    """Statistics of every step."""
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
        found.append(optimizer.statistics)
    return found


def run(model, frozen=False, steps=range(4)):
    model.extra.requires_grad_(not frozen)
    return train(model, DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1), steps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, 1e10])
def test_a_parameter_that_is_not_used_may_hold_anything(value):
    model, expected = Net(), run(Net(), frozen=True)
    nn.init.constant_(model.extra.bias, value)
    assert run(model) == expected
    assert all(statistics.ess < 1 for statistics in expected)


def test_a_parameter_under_no_grad_is_not_probed():
    places = []
    model = Net(without_gradient)
    model.extra.register_forward_pre_hook(lambda layer, _: places.append(layer.weight.tolist()))
    assert run(model) == run(Net(without_gradient), frozen=True)
    assert places == [places[0]] * len(places)


def test_a_layer_that_this_batch_leaves_out_is_not_probed():
    alternating = Net(lambda extra, hidden: torch.tanh(extra(hidden)) if torch.rand(()) < 0.5 else hidden)
    optimizer = DeltaSAM(alternating.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    kinds = set()
    for step in range(8):
        twin = copy.deepcopy(alternating)
        torch.manual_seed(step)
        used = bool(torch.rand(()) < 0.5)
        kinds.add(used)
        twin.extra.requires_grad_(used)
        torch.manual_seed(step)
        expected = DeltaSAM(twin.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        expected.param_groups[0]["delta_sam_step"] = step
        torch.manual_seed(step)
        found = train(alternating, optimizer, [step])
        torch.manual_seed(step)
        assert found == train(twin, expected, [step])
    assert kinds == {True, False}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the probes build no graph
def test_what_is_hidden_by_activation_checkpointing_is_probed():
    places = []
    model = Net(lambda extra, hidden: checkpoint(extra, hidden, use_reentrant=True))
    model.extra.register_forward_pre_hook(lambda layer, _: places.append(layer.weight.sum().item()))
    assert run(model) == run(Net(lambda extra, hidden: extra(hidden)))
    assert len(set(places)) > 4


def test_a_resumed_run_reaches_what_the_uninterrupted_one_does():
    def fresh():
        model = Net(lambda extra, hidden: torch.tanh(extra(hidden)) if torch.rand(()) < 0.5 else hidden)
        return model, DeltaSAM(model.parameters(), torch.optim.Adam, rho=0.1, lr=0.01)

    torch.manual_seed(1)
    run, resumed = fresh(), fresh()
    train(*run, range(5))
    for one, other in zip(resumed, run):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    state = torch.get_rng_state()
    expected = train(*run, range(5, 12))
    torch.set_rng_state(state)
    assert train(*resumed, range(5, 12)) == expected
