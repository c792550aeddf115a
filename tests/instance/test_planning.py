"""In which form per-sample gradients are kept: the cheapest one, and every one of them is exact."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deltasam_plugin.instance import InstanceEngine, planning
from deltasam_plugin.instance.layers.base import Form
from deltasam_plugin.instance.planning import TRAFFIC, cheapest_form
from tests.helpers.instance_oracle import correction_error, trainable
from tests.instance.test_engine import sequence_losses, sequences

sizes = st.integers(1, 2000)


@given(sizes, sizes, sizes)
def test_the_cheapest_form(rows: int, outputs: int, inputs: int) -> None:
    """Products counted one by one: norm, perturbed layer, its derivative; forming, and the traffic in its memory."""
    if inputs * outputs > 1.5 * rows * (inputs + outputs):  # more memory than factors take
        assert cheapest_form(rows, outputs, inputs) == Form.FACTORED
        return
    factored = 3 * (rows * rows * inputs + rows * rows * outputs)
    own = rows * inputs * outputs + TRAFFIC * inputs * outputs
    assert cheapest_form(rows, outputs, inputs) == (Form.OWN if own < factored else Form.FACTORED)
    beside = own + 2 * rows * inputs * outputs
    assert cheapest_form(rows, outputs, inputs, summed=False) == (Form.BESIDE if beside < factored else Form.FACTORED)


@pytest.mark.parametrize("form", Form, ids=lambda form: form.name)
@pytest.mark.parametrize("size", [(4, 4), (1, 5), (5, 1), (3, 7)])
def test_every_form_is_exact_on_tied_packed_and_shared_layers(
    size: tuple[int, int], form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "cheapest_form", lambda *arguments: form)
    model = sequences()
    batch = torch.randint(1, 7, size, generator=torch.Generator().manual_seed(1))
    assert correction_error(InstanceEngine(model, 0.4), lambda: sequence_losses(model, batch), trainable(model)) <= 1e-9


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [2, 40])
def test_half_precision_never_adds_a_perturbation_to_the_weights(tokens: int, autocast: bool) -> None:
    """Below their spacing it would be lost. So the result is the same in whichever form."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(3, tokens, 16).to(model.weight.dtype)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x).float().square().sum((1, 2))

    with InstanceEngine(model, 1e-4).recording() as tape:
        first = losses()
    solution = InstanceEngine(model, 1e-4).solve(tape, first)
    assert {call.form for call in solution.calls} == {Form.BESIDE if tokens == 40 else Form.FACTORED}


NORMS = """
import torch
from torch import nn
from deltasam_plugin.instance import InstanceEngine

torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(130, 130) for _ in range(8))).double()
engine = InstanceEngine(model, 0.1)
with engine.recording() as tape:
    losses = model(torch.randn(3, 300, 130, dtype=torch.double)).square().sum((1, 2))
solution = engine.solve(tape, losses)
assert all(call.form.name == "OWN" for call in solution.calls)
print([norm.hex() for norm in solution.perturbation.norms.tolist()])
"""


def test_every_process_rounds_alike() -> None:
    """Python's hashes of names differ from process to process. A resumed run must be the uninterrupted one."""
    printed = set()
    for seed in range(3):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", NORMS]
        printed.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(printed) == 1, printed
