"""What the weights of the ascent direction must satisfy, whatever was measured; and what they do not satisfy."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from deltasam_plugin.batch.weighting import (
    ROUNDING_FACTOR,
    curvature_weights,
    effective_sample_size,
    rounding_floor,
    second_difference,
    uniform_weights,
)

FLOAT32 = torch.finfo(torch.float32).eps

sizes = st.tuples(st.integers(1, 4), st.integers(1, 9))  # (K, B)
magnitudes = st.one_of(st.just(0.0), st.floats(1e-30, 1e30))
finite = st.one_of(magnitudes, magnitudes.map(lambda value: -value), st.sampled_from([1.0, -1.0, 1e30, 1e-30, 5e-324]))
anything = st.one_of(finite, st.floats(allow_nan=True, allow_infinity=True))


def arrays(shape, elements):
    """Tensors in double precision with drawn values; ties are likely."""
    return hnp.arrays("float64", shape, elements=elements).map(torch.from_numpy)


def integers(shape, low, high):
    """Integers in double precision, so that sums and differences of them are exact."""
    return hnp.arrays("int64", shape, elements=st.integers(low, high)).map(
        lambda values: torch.from_numpy(values).double()
    )


def no_floor(differences: Tensor) -> Tensor:
    return torch.zeros_like(differences)


def weights_of(plus: Tensor, minus: Tensor, center: Tensor, eps: float = 0.0) -> Tensor:
    return curvature_weights(second_difference(plus, minus, center), rounding_floor(plus, minus, center, eps))


@st.composite
def measured(draw, nonzero=False):
    """Losses (plus, minus, center) of K probes and B samples, integers: their second differences are exact."""
    shape = draw(sizes)
    center = draw(integers(shape[1:], -(2**16), 2**16))
    first = draw(integers(shape, -(2**10), 2**10))
    second = draw(integers(shape, 2**11, 2**12) if nonzero else integers(shape, -(2**12), 2**12))
    return center + first, center + second, center


# --- invariant 5: weights of any measurement


@given(sizes.flatmap(lambda shape: st.tuples(arrays(shape, anything), arrays(shape, magnitudes))))
def test_weights_are_non_negative_and_sum_to_one_whatever_was_measured(measurement):
    differences, floor = measurement
    weights = curvature_weights(differences, floor)
    assert weights.shape == differences.shape[1:]
    assert weights.dtype == torch.double
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, rel=1e-12)


@given(measured(), st.randoms(use_true_random=False))
def test_weights_follow_a_permutation_of_the_samples(losses, random):
    order = list(range(losses[2].numel()))
    random.shuffle(order)
    permuted = weights_of(*(values[..., order] for values in losses), eps=FLOAT32)
    torch.testing.assert_close(permuted, weights_of(*losses, eps=FLOAT32)[order], rtol=1e-12, atol=0)


@given(measured(), st.data())
def test_a_constant_added_to_a_sample_s_loss_changes_nothing(losses, data):
    constants = data.draw(integers(losses[2].shape, -(2**20), 2**20))
    assert torch.equal(weights_of(*(values + constants for values in losses)), weights_of(*losses))


@given(measured(nonzero=True), st.data())
def test_constants_change_nothing_either_while_the_floor_stays_below_what_was_measured(losses, data):
    constants = data.draw(integers(losses[2].shape, -(2**16), 2**16))
    shifted = weights_of(*(values + constants for values in losses), eps=FLOAT32)
    assert torch.equal(shifted, weights_of(*losses, eps=FLOAT32))


@given(measured(), st.integers(-400, 400))
def test_a_common_scale_of_all_losses_changes_nothing(losses, exponent):
    scaled = weights_of(*(values * 2.0**exponent for values in losses), eps=FLOAT32)  # a power of two is exact
    assert torch.equal(scaled, weights_of(*losses, eps=FLOAT32))


@given(st.integers(1, 9), st.data())
def test_equal_curvatures_give_uniform_weights_exactly(batch, data):
    magnitude = data.draw(arrays((data.draw(st.integers(1, 4)), 1), finite))
    signs = data.draw(hnp.arrays("int64", (len(magnitude), batch), elements=st.sampled_from([-1, 1])))
    differences = magnitude * torch.from_numpy(signs)
    assert curvature_weights(differences, no_floor(differences)).tolist() == [1 / batch] * batch


@given(sizes, st.data())
def test_curvatures_under_the_floor_give_uniform_weights_exactly(shape, data):
    floor = data.draw(arrays(shape, st.floats(1e-30, 1e30)))
    differences = data.draw(arrays(shape, st.floats(-1, 1))) * floor
    assert curvature_weights(differences, floor).tolist() == [1 / shape[1]] * shape[1]


@given(st.integers(1, 9), st.data())
def test_affine_losses_in_single_precision_give_uniform_weights_exactly(batch, data):
    single = st.floats(-(2.0**100), 2.0**100, width=32)
    center, slope = (data.draw(hnp.arrays("float32", batch, elements=single).map(torch.from_numpy)) for _ in range(2))
    plus, minus = (center + slope)[None], (center - slope)[None]  # each rounded: their difference is not quite zero
    assert weights_of(plus, minus, center, FLOAT32).tolist() == [1 / batch] * batch


@given(sizes, st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_one_non_finite_measurement_gives_uniform_weights_exactly(shape, value, data):
    losses = [data.draw(arrays(size, finite)) for size in (shape, shape, shape[1:])]
    victim = data.draw(st.sampled_from(losses)).view(-1)
    victim[data.draw(st.integers(0, victim.numel() - 1))] = value
    assert weights_of(*losses, eps=FLOAT32).tolist() == [1 / shape[1]] * shape[1]


@given(
    sizes.flatmap(lambda shape: arrays(shape, st.floats(1e-3, 1e3))), st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300])
)
def test_weights_are_proportional_to_the_root_mean_square_over_the_probes(differences, unit):
    rms = [math.sqrt(math.fsum(d * d for d in column) / len(column)) for column in differences.T.tolist()]
    expected = torch.tensor([value / math.fsum(rms) for value in rms], dtype=torch.double)
    differences = differences * unit
    torch.testing.assert_close(curvature_weights(differences, no_floor(differences)), expected, rtol=1e-12, atol=0)


@given(arrays(st.integers(2, 9), finite), st.floats(1e-30, 1e30))
def test_a_sample_under_the_floor_counts_as_much_as_the_least_that_can_be_seen(differences, floor):
    weights = curvature_weights(differences[None], torch.full_like(differences, floor)[None])
    bounded = torch.tensor([max(abs(value), floor) for value in differences.tolist()], dtype=torch.double)
    torch.testing.assert_close(weights, bounded / bounded.max() / (bounded / bounded.max()).sum(), rtol=1e-12, atol=0)


def test_the_floor_is_the_batch_s_largest():
    differences = torch.tensor([[0.5, 4.0]])
    assert curvature_weights(differences, torch.tensor([[2.0, 0.0]])).tolist() == pytest.approx([1 / 3, 2 / 3])


@given(anything, anything)
def test_a_single_sample_has_the_weight_one(difference, floor):
    assert curvature_weights(torch.tensor([[difference]]), torch.tensor([[abs(floor)]])).tolist() == [1.0]


def test_an_empty_batch_has_empty_weights():
    empty = torch.zeros(2, 0)
    assert weights_of(empty, empty, empty[0]).shape == (0,)
    assert uniform_weights(0).shape == (0,)


def test_no_gradient_flows_through_the_weights():
    losses = [torch.ones(1, 3).requires_grad_(), torch.zeros(1, 3).requires_grad_(), torch.zeros(3).requires_grad_()]
    assert not second_difference(*losses).requires_grad
    assert not rounding_floor(*losses, FLOAT32).requires_grad
    differences, floor = torch.ones(1, 3).requires_grad_(), torch.ones(1, 3).requires_grad_()
    assert not curvature_weights(differences, floor).requires_grad


@given(st.integers(1, 9))
def test_uniform_weights_are_one_over_the_batch(batch):
    assert uniform_weights(batch).tolist() == [1 / batch] * batch


# --- the measurements themselves


@given(
    *[
        hnp.arrays("float32", 3, elements=st.floats(-(2.0**100), 2.0**100, width=32)).map(torch.from_numpy)
        for _ in range(3)
    ]
)
def test_the_second_difference_of_single_precision_losses_loses_only_double_precision(plus, minus, center):
    computed = second_difference(plus[None], minus[None], center)[0].tolist()
    for result, p, m, c in zip(computed, plus.tolist(), minus.tolist(), center.tolist(), strict=True):
        exact = Fraction(p) + Fraction(m) - 2 * Fraction(c)
        rounding = Fraction(2) ** -52 * (abs(Fraction(p) - Fraction(c)) + abs(Fraction(m) - Fraction(c)))
        assert abs(Fraction(result) - exact) <= rounding


@given(measured(), st.sampled_from([2.0**-52, 2.0**-23, 2.0**-10, 2.0**-7]))
def test_the_floor_is_a_multiple_of_the_losses_own_rounding(losses, eps):
    plus, minus, center = losses
    floor = rounding_floor(*losses, eps)
    assert floor.shape == plus.shape
    assert torch.equal(floor, ROUNDING_FACTOR / 4 * eps * (plus.abs() + minus.abs() + 2 * center.abs()))


# --- the effective sample size


@given(integers(st.integers(1, 9), 1, 100))
def test_the_effective_sample_size_lies_between_one_sample_and_the_batch_and_is_one_only_when_uniform(magnitudes):
    ess = effective_sample_size(magnitudes / magnitudes.sum()).item()
    assert 1 / magnitudes.numel() < ess + 1e-12 < 1 + 2e-12
    assert (ess > 1 - 1e-9) == (len(set(magnitudes.tolist())) == 1)


@given(st.integers(1, 9), st.data())
def test_the_effective_sample_size_is_one_when_uniform_and_one_over_the_batch_when_one_sample_has_it_all(batch, data):
    assert effective_sample_size(uniform_weights(batch)).item() == pytest.approx(1, rel=1e-15 * batch)
    alone = torch.zeros(batch, dtype=torch.double)
    alone[data.draw(st.integers(0, batch - 1))] = 1
    assert effective_sample_size(alone).item() == 1 / batch


# --- what does NOT hold


def test_a_loss_scale_of_one_sample_alone_changes_the_weights():
    differences = torch.tensor([[1.0, 1.0]])
    assert curvature_weights(differences * torch.tensor([2.0, 1.0]), no_floor(differences)).tolist() == [2 / 3, 1 / 3]


def test_constants_that_lift_the_floor_above_the_measurement_flatten_the_weights():
    plus, minus, center = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), torch.zeros(2)
    assert weights_of(plus, minus, center, FLOAT32).tolist() == [1 / 3, 2 / 3]
    assert weights_of(plus + 1e9, minus + 1e9, center + 1e9, FLOAT32).tolist() == [1 / 2, 1 / 2]


def test_the_weights_of_two_probes_are_not_the_mean_of_each_probe_s_weights():
    one, other = torch.tensor([[1.0, 7.0]]), torch.tensor([[1.0, 1.0]])
    together = curvature_weights(torch.cat([one, other]), torch.zeros(2, 2))
    assert together.tolist() == pytest.approx([1 / 6, 5 / 6])
    apart = (curvature_weights(one, no_floor(one)) + curvature_weights(other, no_floor(other))) / 2
    assert apart.tolist() == pytest.approx([5 / 16, 11 / 16])


def test_the_sign_of_a_curvature_does_not_matter():
    differences = torch.tensor([[-3.0, 1.0]])
    assert curvature_weights(differences, no_floor(differences)).tolist() == [3 / 4, 1 / 4]
