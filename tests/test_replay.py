"""A replayed forward pass repeats the first and leaves no trace."""

import contextlib
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltasam_plugin.randomness import RandomState
from deltasam_plugin.replay import Conditions, frozen_statistics

CPU = {torch.device("cpu")}

# --- random numbers


def draw():
    """Something from every generator that a model may use."""
    mask = F.dropout(torch.ones(50), 0.5)
    return (
        mask.tolist(),
        torch.randn(3).tolist(),
        np.random.rand(3).tolist(),
        random.random(),
        torch.randperm(9).tolist(),
    )


@pytest.fixture(autouse=True)
def seed_everything():
    def seed():
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)

    seed()
    return seed


def test_every_replay_draws_what_the_first_run_drew():
    draw()
    conditions = Conditions.capture(CPU)
    first = draw()
    for _ in range(2):
        with conditions.replayed():
            assert draw() == first
        draw()


def test_generators_end_where_they_would_have_been_without_replays(seed_everything):
    conditions = Conditions.capture(CPU)
    draw()
    undisturbed = draw()
    seed_everything()
    draw()
    with conditions.replayed():
        draw()
        draw()
    with contextlib.suppress(MemoryError), conditions.replayed():
        draw()
        draw()
        raise MemoryError
    assert draw() == undisturbed


def test_replays_nest():
    outer, first = Conditions.capture(CPU), draw()
    inner, second = Conditions.capture(CPU), draw()
    with outer.replayed():
        with inner.replayed():
            assert draw() == second
        assert draw() == first


def test_the_seed_is_a_function_of_the_state_and_advances_nothing():
    state = RandomState.capture(CPU)
    seed = state.seed()
    assert RandomState.capture(CPU).seed() == state.seed() == seed
    assert 0 <= seed < 2**62
    first = draw()
    assert RandomState.capture(CPU).seed() != seed
    state.restore()
    assert draw() == first


def test_generators_made_without_a_seed_are_remade_in_every_replay():
    installed, conditions = np.random.default_rng, Conditions.capture(CPU)

    def make():
        return [np.random.default_rng().random(), np.random.default_rng().random(), np.random.default_rng(5).random()]

    with conditions.generators.replayed():
        first = make()
    assert first[0] != first[1]
    assert first[2] == installed(5).random()
    for _ in range(2):
        with conditions.replayed():
            assert make() == first
    with Conditions.capture(CPU).replayed():
        assert make()[:2] != first[:2]
    with contextlib.suppress(MemoryError), conditions.replayed():
        raise MemoryError
    assert np.random.default_rng is installed


def test_generators_made_by_other_threads_are_their_own():
    conditions, drawn = Conditions.capture(CPU), []

    def make():
        drawn.append(np.random.default_rng().random())

    with conditions.generators.replayed():
        make()
    with conditions.replayed():
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        make()
    first, elsewhere, again = drawn
    assert first == again != elsewhere


# --- autocast


@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (True, torch.float16), (False, torch.float32)])
def test_a_replay_computes_in_the_precision_of_the_first_run(enabled, dtype):
    inputs, weight = torch.randn(4, 3), nn.Parameter(torch.randn(5, 3))
    with torch.autocast("cpu", dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16, enabled=enabled):
        conditions = Conditions.capture(CPU)
        first = F.linear(inputs, weight)
    assert first.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        with conditions.replayed():
            inside = F.linear(inputs, weight)
        after = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        assert before == after
    with conditions.replayed():
        outside = F.linear(inputs, weight)
    for second in (inside, outside):
        assert second.dtype == dtype
        assert torch.equal(first, second)


def test_a_replay_inside_the_same_autocast_context_sees_changed_weights():
    inputs, weight = torch.eye(2), nn.Parameter(torch.zeros(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conditions = Conditions.capture(CPU)
        F.linear(inputs, weight)  # the cast of the weight is cached from here on
        weight.data.fill_(1)
        assert F.linear(inputs, weight).sum() == 0  # as this shows
        with conditions.replayed():
            assert F.linear(inputs, weight).sum() == 4


# --- batch-norm statistics


class Normalized(nn.Module):
    """Every kind of batch-norm layer, the first of which runs twice."""

    def __init__(self):
        super().__init__()
        self.flat, self.image = nn.BatchNorm1d(3), nn.BatchNorm2d(3)
        self.cumulative = nn.BatchNorm1d(3, momentum=None)
        self.volume = nn.Sequential(nn.BatchNorm3d(3, affine=False))
        self.stateless, self.frozen = nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval()

    def forward(self, x):
        x = self.frozen(self.stateless(self.cumulative(self.flat(2 * self.flat(x) + 1))))
        return self.volume(self.image(x[:, :, None, None] - 3)[..., None]).flatten(1)


def statistics(model):
    return {name: value.tolist() for name, value in model.named_buffers()}


def hooks():
    module = torch.nn.modules.module
    return len(module._global_forward_pre_hooks), len(module._global_forward_hooks)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_replay_leaves_running_statistics_alone_and_computes_the_same(grad, fails):
    model, inputs, installed = Normalized(), torch.randn(8, 3), hooks()
    conditions = Conditions.capture(CPU)
    first = model(inputs)
    before = statistics(model)
    assert before["flat.num_batches_tracked"] == 2
    assert before["volume.0.num_batches_tracked"] == 1
    for _ in range(2):
        try:
            with torch.set_grad_enabled(grad), conditions.replayed():
                assert torch.equal(model(inputs), first)
                assert statistics(model) != before
                if fails:
                    raise MemoryError
        except MemoryError:
            assert fails
        assert statistics(model) == before
        assert hooks() == installed


def test_a_layer_that_fails_in_a_replay_leaves_no_trace_either():
    model, conditions, installed = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 4)), Conditions.capture(CPU), hooks()
    before = statistics(model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), conditions.replayed():
        model(torch.randn(8, 3))
    assert statistics(model) == before
    assert hooks() == installed


def test_a_replay_leaves_the_statistics_of_instance_norm_alone_too():
    model, conditions = nn.InstanceNorm1d(3, track_running_stats=True), Conditions.capture(CPU)
    before = statistics(model)
    with conditions.replayed():
        model(torch.randn(2, 3, 5))
    assert statistics(model) == before


def test_statistics_that_another_thread_collects_are_its_own():
    model, conditions = nn.BatchNorm1d(3), Conditions.capture(CPU)
    with conditions.replayed():
        thread = threading.Thread(target=model, args=[torch.randn(8, 3)])
        thread.start()
        thread.join()
    assert model.num_batches_tracked == 1


def test_a_replay_leaves_the_statistics_of_data_parallel_layers_alone():
    """Their copies run in other threads, and share the buffers of the layers on the first device."""

    class InThreads(nn.DataParallel):
        def forward(self, x):
            thread = threading.Thread(target=self.module, args=[x])
            thread.start()
            thread.join()

    model, conditions = nn.Sequential(nn.BatchNorm1d(3)), Conditions.capture(CPU)
    with conditions.replayed():
        InThreads(model)(torch.randn(8, 3))
    assert model[0].num_batches_tracked == 0
    assert model[0].running_mean.tolist() == [0, 0, 0]


def test_outside_a_replay_statistics_are_collected_again():
    model = nn.BatchNorm1d(3)
    with frozen_statistics():
        model(torch.randn(8, 3))
    assert model.num_batches_tracked == 0
    model(torch.randn(8, 3))
    assert model.num_batches_tracked == 1
