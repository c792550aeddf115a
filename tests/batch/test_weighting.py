"""What the weights of the ascent direction must satisfy, whatever was measured; and what they do not satisfy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from deltasam_plugin import weighting
from deltasam_plugin.batch.measures import MEASURES, first_difference, rounding_floor, second_difference
from deltasam_plugin.batch.weighting import WEIGHTINGS, effective_sample_size, sample_weights, uniform_weights
from tests.helpers.registries import BUILT_IN_WEIGHTINGS

FLOAT32 = torch.finfo(torch.float32).eps
CURVATURE = WEIGHTINGS["curvature"]

sizes = st.tuples(st.integers(1, 4), st.integers(1, 9))  # (K, B)
magnitudes = st.one_of(st.just(0.0), st.floats(1e-30, 1e30))
finite = st.one_of(magnitudes, magnitudes.map(lambda value: -value), st.sampled_from([1.0, -1.0, 1e30, 1e-30, 5e-324]))
anything = st.one_of(finite, st.floats(allow_nan=True, allow_infinity=True))
every = pytest.mark.parametrize("name", BUILT_IN_WEIGHTINGS)


def arrays(shape, elements):
    """Tensors in double precision with drawn values; ties are likely."""
    return hnp.arrays("float64", shape, elements=elements).map(torch.from_numpy)


def integers(shape, low, high):
    """Integers in double precision, so that sums and differences of them are exact."""
    return hnp.arrays("int64", shape, elements=st.integers(low, high)).map(
        lambda values: torch.from_numpy(values).double()
    )


def weigh(name: str, measured: Tensor, floor: Tensor | None = None) -> Tensor:
    return sample_weights(WEIGHTINGS[name], measured, torch.zeros(()) if floor is None else floor)


def weights_of(name: str, plus: Tensor, minus: Tensor, center: Tensor, eps: float = 0.0) -> Tensor:
    """Weights from losses. What takes logits gets the first difference, a change of any other kind."""
    if WEIGHTINGS[name].measure is MEASURES["second_difference"]:
        return weigh(name, second_difference(plus, minus, center), rounding_floor([plus, minus], center, eps))
    return weigh(name, first_difference(plus, center), rounding_floor([plus], center, eps))


@st.composite
def measured(draw, nonzero=False):
    """Losses (plus, minus, center) of K probes and B samples, integers: their differences are exact."""
    shape = draw(sizes)
    center = draw(integers(shape[1:], -(2**16), 2**16))
    first = draw(integers(shape, 2**9, 2**10) if nonzero else integers(shape, -(2**10), 2**10))
    second = draw(integers(shape, 2**11, 2**12) if nonzero else integers(shape, -(2**12), 2**12))
    return center + first, center + second, center


# --- invariant 5: every weighting, any measurement


@every
@given(measurement=sizes.flatmap(lambda shape: st.tuples(arrays(shape, anything), arrays(shape, magnitudes))))
def test_weights_are_non_negative_and_sum_to_one_whatever_was_measured(name, measurement):
    weights = weigh(name, *measurement)
    assert weights.shape == measurement[0].shape[1:]
    assert weights.dtype == torch.double
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, rel=1e-12)


@every
@given(losses=measured(), random=st.randoms(use_true_random=False))
def test_weights_follow_a_permutation_of_the_samples(name, losses, random):
    order = list(range(losses[2].numel()))
    random.shuffle(order)
    permuted = weights_of(name, *(values[..., order] for values in losses), eps=FLOAT32)
    torch.testing.assert_close(permuted, weights_of(name, *losses, eps=FLOAT32)[order], rtol=1e-9, atol=1e-300)


@every
@given(losses=measured(), data=st.data())
def test_a_constant_added_to_a_sample_s_loss_changes_nothing(name, losses, data):
    constants = data.draw(integers(losses[2].shape, -(2**20), 2**20))
    assert torch.equal(weights_of(name, *(values + constants for values in losses)), weights_of(name, *losses))


@every
@given(losses=measured(nonzero=True), data=st.data())
def test_constants_change_nothing_either_while_the_floor_stays_below_what_was_measured(name, losses, data):
    constants = data.draw(integers(losses[2].shape, -(2**16), 2**16))
    shifted = weights_of(name, *(values + constants for values in losses), eps=FLOAT32)
    assert torch.equal(shifted, weights_of(name, *losses, eps=FLOAT32))


@every
@given(losses=measured(), exponent=st.integers(-400, 400))
def test_a_common_scale_of_all_losses_changes_nothing(name, losses, exponent):
    scaled = weights_of(name, *(values * 2.0**exponent for values in losses), eps=FLOAT32)  # a power of two is exact
    assert torch.equal(scaled, weights_of(name, *losses, eps=FLOAT32))


@every
@given(batch=st.integers(1, 9), data=st.data())
def test_equal_magnitudes_give_uniform_weights_exactly(name, batch, data):
    magnitude = data.draw(arrays((data.draw(st.integers(1, 4)), 1), finite))
    signs = data.draw(hnp.arrays("int64", (len(magnitude), batch), elements=st.sampled_from([-1, 1])))
    assert weigh(name, magnitude * torch.from_numpy(signs)).tolist() == [1 / batch] * batch


@every
@given(shape=sizes, data=st.data())
def test_measurements_under_the_floor_give_uniform_weights_exactly(name, shape, data):
    floor = data.draw(arrays(shape, st.floats(1e-30, 1e30)))
    below = data.draw(arrays(shape, st.floats(-1, 1))) * floor
    assert weigh(name, below, floor).tolist() == [1 / shape[1]] * shape[1]


@every
@given(shape=sizes, value=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_one_non_finite_loss_gives_uniform_weights_exactly(name, shape, value, data):
    losses = [data.draw(arrays(size, finite)) for size in (shape, shape, shape[1:])]
    second = WEIGHTINGS[name].measure is MEASURES["second_difference"]
    victim = data.draw(st.sampled_from(losses if second else losses[::2])).view(-1)
    victim[data.draw(st.integers(0, victim.numel() - 1))] = value
    assert weights_of(name, *losses, eps=FLOAT32).tolist() == [1 / shape[1]] * shape[1]


@every
@given(shape=sizes, value=st.sampled_from([math.nan, math.inf]), data=st.data())
def test_a_floor_that_is_not_finite_gives_uniform_weights_exactly(name, shape, value, data):
    assert weigh(name, data.draw(arrays(shape, finite)), torch.tensor(value)).tolist() == [1 / shape[1]] * shape[1]


@every
@given(difference=anything, floor=anything)
def test_a_single_sample_has_the_weight_one(name, difference, floor):
    assert weigh(name, torch.tensor([[difference]]), torch.tensor([[abs(floor)]])).tolist() == [1.0]


@every
def test_an_empty_batch_has_empty_weights(name):
    assert weigh(name, torch.zeros(2, 0), torch.zeros(2, 0)).shape == (0,)
    assert uniform_weights(0).shape == (0,)


@every
def test_no_gradient_flows_through_the_weights(name):
    assert not weigh(name, torch.rand(1, 3).requires_grad_(), torch.ones(1, 3).requires_grad_()).requires_grad


@given(st.integers(1, 9), st.data())
def test_affine_losses_in_single_precision_give_uniform_weights_exactly(batch, data):
    single = st.floats(-(2.0**100), 2.0**100, width=32)
    center, slope = (data.draw(hnp.arrays("float32", batch, elements=single).map(torch.from_numpy)) for _ in range(2))
    plus, minus = (center + slope)[None], (center - slope)[None]  # each rounded: their difference is not quite zero
    assert weights_of("curvature", plus, minus, center, FLOAT32).tolist() == [1 / batch] * batch


@given(arrays(st.integers(2, 9), finite), st.floats(1e-30, 1e30))
def test_a_sample_under_the_floor_counts_as_much_as_the_least_that_can_be_seen(differences, floor):
    weights = weigh("curvature", differences[None], torch.full_like(differences, floor)[None])
    bounded = torch.tensor([max(abs(value), floor) for value in differences.tolist()], dtype=torch.double)
    torch.testing.assert_close(weights, bounded / bounded.max() / (bounded / bounded.max()).sum(), rtol=1e-12, atol=0)


def test_the_floor_is_the_batch_s_largest():
    weights = weigh("curvature", torch.tensor([[0.5, 4.0]]), torch.tensor([[2.0, 0.0]]))
    assert weights.tolist() == pytest.approx([1 / 3, 2 / 3])


# --- each by its own formula


def rms_of(differences):
    return [math.sqrt(math.fsum(d * d for d in column) / len(column)) for column in differences.T.tolist()]


def normalized(values):
    return torch.tensor([value / math.fsum(values) for value in values], dtype=torch.double)


several = sizes.flatmap(lambda shape: arrays(shape, st.floats(1e-3, 1e3)))
units = st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300])
FORMULAS = {
    "curvature": lambda rms, probes: rms,
    "kl": lambda rms, probes: [a * a for a in rms],
    "gradient_norm": lambda rms, probes: [math.exp((a - max(rms)) * len(rms) / math.fsum(rms)) for a in rms],
    "normalized": lambda rms, probes: [
        (probes * a * a + math.fsum(b * b for b in rms) / len(rms)) ** -0.5 for a in rms
    ],
    "uniform": lambda rms, probes: [1.0 for _ in rms],
}


def test_every_weighting_has_its_formula_here():
    assert FORMULAS.keys() == BUILT_IN_WEIGHTINGS.keys()


@every
@given(differences=several, unit=units)
def test_weights_follow_their_formula_in_the_root_mean_square_over_the_probes(name, differences, unit):
    expected = normalized(FORMULAS[name](rms_of(differences), len(differences)))
    torch.testing.assert_close(weigh(name, differences * unit), expected, rtol=1e-9, atol=1e-300)


@given(st.integers(1, 9))
def test_uniform_weights_are_one_over_the_batch(batch):
    assert uniform_weights(batch).tolist() == [1 / batch] * batch


def test_a_gradient_that_the_probe_did_not_see_gets_no_huge_weight():
    weights = weigh("normalized", torch.tensor([[1e-9, 1.0, 1.0, 1.0]]))
    assert 1 < weights[0] / weights[1] < 2


def test_with_many_probes_the_inverse_norms_are_exact():
    weights = weigh("normalized", torch.tensor([[1.0, 2.0, 4.0]]).expand(100_000, 3))
    assert weights.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], rel=1e-3)


# --- weightings of users


@pytest.fixture
def registry(monkeypatch):
    """The weightings, to which a test may add."""
    monkeypatch.setattr("deltasam_plugin.batch.weighting.WEIGHTINGS", before := dict(WEIGHTINGS))
    return before


def test_a_weighting_of_one_s_own_gets_magnitudes_of_mean_one_and_the_number_of_probes(registry):
    seen = []

    @weighting("mine", measures="first_difference")
    def mine(magnitudes, probes):
        seen.append((magnitudes.tolist(), probes))
        return magnitudes.sqrt()

    weights = sample_weights(registry["mine"], torch.tensor([[3.0, -1.0], [-3.0, 1.0]]), torch.zeros(()))
    assert registry["mine"].measure is MEASURES["first_difference"]
    assert seen == [([1.5, 0.5], 2)]
    assert weights.tolist() == pytest.approx([3**0.5 / (3**0.5 + 1), 1 / (3**0.5 + 1)])


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_weights_that_cannot_be_ones_make_the_batch_uniform(registry, value):
    weighting("mine", measures="first_difference")(lambda magnitudes, probes: torch.tensor([value, 2.0]).double())
    assert sample_weights(registry["mine"], torch.ones(1, 2), torch.zeros(())).tolist() == [0.5, 0.5]


def test_misuse_of_the_registry_is_refused(registry):
    with pytest.raises(
        ValueError, match=r"There is a weighting 'kl' already, in deltasam_plugin\.batch\.weighting\. Cho"
    ):
        weighting("kl", measures="first_difference")
    with pytest.raises(ValueError, match=r"Unknown measures='hessian' of weighting 'mine'\. Choose one of: second_d"):
        weighting("mine", measures="hessian")
    weighting("mine", measures="first_difference")(lambda magnitudes, probes: magnitudes.sum())
    with pytest.raises(ValueError, match=r"Weighting 'mine' returned weights of shape \(\)\. Must be \(2,\), one for"):
        sample_weights(registry["mine"], torch.ones(1, 2), torch.zeros(()))


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
    assert weigh("curvature", torch.tensor([[2.0, 1.0]])).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_constants_that_lift_the_floor_above_the_measurement_flatten_the_weights():
    plus, minus, center = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), torch.zeros(2)
    assert weights_of("curvature", plus, minus, center, FLOAT32).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert weights_of("curvature", plus + 1e9, minus + 1e9, center + 1e9, FLOAT32).tolist() == [1 / 2, 1 / 2]


def test_the_weights_of_two_probes_are_not_the_mean_of_each_probe_s_weights():
    one, other = torch.tensor([[1.0, 7.0]]), torch.tensor([[1.0, 1.0]])
    together = weigh("curvature", torch.cat([one, other]))
    assert together.tolist() == pytest.approx([1 / 6, 5 / 6])
    apart = (weigh("curvature", one) + weigh("curvature", other)) / 2
    assert apart.tolist() == pytest.approx([5 / 16, 11 / 16])


def test_the_sign_of_a_measurement_does_not_matter():
    assert weigh("curvature", torch.tensor([[-3.0, 1.0]])).tolist() == pytest.approx([3 / 4, 1 / 4])
