"""The scale of adaptive SAM, for values of all sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltasam_plugin.adaptive import LEAST, filter_scale

values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=12, max_size=12)
shapes = st.sampled_from([(12,), (3, 4), (4, 3), (2, 3, 2), (12, 1), (1, 12)])


@given(values, shapes)
def test_it_is_the_norm_of_each_filter_and_a_little(numbers: list[float], shape: tuple[int, ...]) -> None:
    value = torch.tensor(numbers).view(shape)
    scale = filter_scale(value)
    assert scale.shape == ((12,) if len(shape) == 1 else (shape[0], *[1] * (len(shape) - 1)))
    rows = [[x] for x in numbers] if len(shape) == 1 else value.flatten(1).tolist()
    expected = [math.sqrt(sum(x * x for x in row)) + LEAST for row in rows]
    assert scale.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@given(values, shapes, st.floats(0.01, 100))
def test_it_grows_with_the_parameter_and_does_not_see_signs(
    numbers: list[float], shape: tuple[int, ...], factor: float
) -> None:
    value = torch.tensor(numbers).view(shape)
    torch.testing.assert_close(
        filter_scale(factor * value) - LEAST, factor * (filter_scale(value) - LEAST), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(filter_scale(-value), filter_scale(value))


def test_zero_can_move_and_half_precision_is_measured_in_single() -> None:
    assert filter_scale(torch.zeros(2, 2)).flatten().tolist() == pytest.approx([LEAST] * 2)
    scale = filter_scale(torch.full((1, 4), 3e4).half())  # its square would overflow
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(6e4, rel=1e-3)
    assert filter_scale(torch.tensor(-2.0)).item() == pytest.approx(2 + LEAST)
