"""The precision of a pass is observed, not guessed."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltasam_plugin.precision import at_least_float32, coarsest, observed_dtypes, spacing


def hooks() -> int:
    return len(nn.modules.module._global_forward_pre_hooks)


def test_autocast_is_observed_wherever_it_was_entered() -> None:
    layer, inputs, installed = nn.Linear(3, 3), torch.ones(2, 3), hooks()
    with observed_dtypes(layer.parameters()) as seen:
        layer(inputs)
    assert seen == {torch.float32}
    with observed_dtypes(layer.parameters()) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(inputs)
    assert seen == {torch.float32, torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.float16), observed_dtypes(layer.parameters()) as seen:
        pass
    assert seen == {torch.float32, torch.float16}
    with contextlib.suppress(MemoryError), observed_dtypes(layer.parameters()) as seen:
        raise MemoryError
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(inputs)
    assert seen == {torch.float32}  # nothing is observed afterwards
    assert hooks() == installed


def test_the_coarsest_type_decides_what_is_rounding() -> None:
    assert coarsest({torch.float32, torch.float64}) == torch.float32
    assert coarsest({torch.float32, torch.float16}) == torch.float16
    assert coarsest({torch.float16, torch.bfloat16}) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_single_precision_is_the_least(dtype: torch.dtype) -> None:
    value = torch.ones(2, dtype=dtype)
    if dtype.itemsize >= 4:
        assert at_least_float32(value) is value
    else:
        assert at_least_float32(value).dtype == torch.float32


@given(st.integers(1, 50), st.floats(0.001, 1), st.floats(0.01, 100))
def test_spacing_of_constant_weights(count: int, rho: float, value: float) -> None:
    parameters = [
        torch.full((count,), value, dtype=torch.bfloat16),
        torch.full((2, count), value, dtype=torch.bfloat16),
    ]
    step, size, distance = spacing(parameters, rho)
    assert step == pytest.approx(rho / math.sqrt(3 * count))
    assert size == pytest.approx(float(parameters[0][0]), rel=1e-5)
    assert distance == pytest.approx(size * 2**-7)
