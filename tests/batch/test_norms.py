"""Norms are accurate at any magnitude, and for any number of elements."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deltasam_plugin.batch.norms import global_norm
from tests.helpers.drawn_tensors import ELEMENTS, arrays, norm_of


@given(st.lists(arrays(hnp.array_shapes(max_dims=2, min_side=0), ELEMENTS), max_size=4))
def test_the_norm_is_accurate_at_any_magnitude(tensors):
    assert global_norm(tensors).item() == pytest.approx(norm_of(tensors), rel=1e-6)


@given(arrays(st.integers(1, 3), st.floats(2.0**100, 2.0**126, width=32)), st.sampled_from([1.0, 2.0**-110]))
def test_squares_neither_overflow_nor_underflow(values, unit):
    values = values * unit * unit
    assert 0 < norm_of([values]) < torch.finfo(torch.float32).max
    assert global_norm([values]).item() == pytest.approx(norm_of([values]), rel=1e-6)


@given(arrays(4, ELEMENTS), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 3))
def test_the_norm_is_non_finite_where_any_element_is(values, value, position):
    values[position] = value
    assert not torch.isfinite(global_norm([torch.ones(2), values]))


def test_the_norm_of_half_precision_tensors_is_taken_in_single_precision():
    assert global_norm([torch.full((10000,), 1000.0).half()]).item() == pytest.approx(1e5)  # beyond fp16's 65504
    assert global_norm([torch.ones(3).half(), torch.full((1,), 1e-3).bfloat16()]).dtype == torch.float32


def test_the_norm_is_accurate_at_twenty_million_elements_where_torch_s_own_is_not():
    values = torch.full((20_000_000,), 0.1)
    truth = values.double().norm().item()
    assert global_norm([values]).item() == pytest.approx(truth, rel=1e-6)
    assert abs(values.norm().item() / truth - 1) > 1e-4
