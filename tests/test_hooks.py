"""Modules are observed by one hook, in the thread that asks, and compiled models stay compiled."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as registry

from deltasam_plugin import DeltaSAM
from deltasam_plugin.hooks import before_forward


def test_callbacks_nest_and_are_gone_after_an_exception():
    layer, inputs, one, other = nn.Linear(2, 2), torch.ones(1, 2), [], []
    with before_forward(one.append):
        layer(inputs)
        with contextlib.suppress(MemoryError), before_forward(other.append):
            layer(inputs)
            raise MemoryError
        layer(inputs)
    layer(inputs)
    assert one == [layer] * 3
    assert other == [layer]


def test_other_threads_are_not_observed():
    layer, seen = nn.Linear(2, 2), []
    with before_forward(seen.append):
        thread = threading.Thread(target=layer, args=[torch.ones(1, 2)])
        thread.start()
        thread.join()
    assert seen == []


def test_the_hook_is_registered_once_and_again_where_somebody_removed_it():
    with before_forward(print):
        pass
    installed = dict(registry._global_forward_pre_hooks)
    with before_forward(print):
        assert registry._global_forward_pre_hooks == installed
    registry._global_forward_pre_hooks.clear()
    seen, layer = [], nn.Linear(2, 2)
    with before_forward(seen.append):
        layer(torch.ones(1, 2))
    assert seen == [layer]
    assert len(registry._global_forward_pre_hooks) == 1


@pytest.mark.parametrize("whole", [True, False], ids=["loss", "model"])
@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
def test_a_compiled_model_is_compiled_in_its_first_steps_and_never_again(weighting, whole):
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled, found = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for compile_it in (True, False):
        torch.manual_seed(0)
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3)
        model = nn.Sequential(*layers)
        x, y = torch.randn(6, 4), torch.arange(6) % 3

        def losses(model=model, x=x, y=y):
            return F.cross_entropy(model(x), y, reduction="none")

        closure = losses
        if compile_it and whole:
            closure = torch.compile(losses, backend=backend)
        elif compile_it:
            fast = torch.compile(model, backend=backend)
            closure = lambda fast=fast: losses(fast)  # noqa: E731
        optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, lr=0.1, weighting=weighting)
        counts = []
        for _ in range(9):
            optimizer.step(closure)
            counts.append(len(compiled))
        found.append([value.tolist() for value in model.state_dict().values()])
        if compile_it:
            assert 0 < counts[1] == counts[-1] <= 4
    assert found[0] == found[1]  # batch-norm statistics included
