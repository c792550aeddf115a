"""What probes measure, against exact arithmetic and the definitions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deltasam_plugin import Logits
from deltasam_plugin.batch.measures import (
    DEVIATIONS,
    MEASURES,
    ROUNDING_FACTOR,
    first_difference,
    logit_change,
    measured_floor,
    rounding_floor,
    second_difference,
)
from deltasam_plugin.loss import Objective

FLOAT32 = torch.finfo(torch.float32).eps
singles = hnp.arrays("float32", 3, elements=st.floats(-(2.0**100), 2.0**100, width=32)).map(torch.from_numpy)


def doubles(shape, low=-5.0, high=5.0):
    return hnp.arrays("float64", shape, elements=st.floats(low, high)).map(torch.from_numpy)


# --- losses


@given(singles, singles, singles)
def test_differences_of_single_precision_losses_lose_only_double_precision(plus, minus, center):
    second = second_difference(plus[None], minus[None], center)[0].tolist()
    first = first_difference(plus[None], center)[0].tolist()
    for d2, d1, p, m, c in zip(second, first, plus.tolist(), minus.tolist(), center.tolist(), strict=True):
        up, down = Fraction(p) - Fraction(c), Fraction(m) - Fraction(c)
        assert abs(Fraction(d2) - (up + down)) <= Fraction(2) ** -52 * (abs(up) + abs(down))
        assert abs(Fraction(d1) - up) <= Fraction(2) ** -53 * abs(up)


@given(singles, singles, singles, st.sampled_from([2.0**-52, 2.0**-23]))
def test_the_floor_is_a_multiple_of_the_losses_own_rounding(plus, minus, center, eps):
    plus, minus, center = plus[None].double(), minus[None].double(), center.double()
    two, one = rounding_floor([plus, minus], center, eps), rounding_floor([plus], center, eps)
    assert two.shape == one.shape == plus.shape
    torch.testing.assert_close(two, ROUNDING_FACTOR / 4 * eps * (plus.abs() + minus.abs() + 2 * center.abs()))
    torch.testing.assert_close(one, ROUNDING_FACTOR / 2 * eps * (plus.abs() + center.abs()))


@pytest.mark.parametrize("name", ["second_difference", "first_difference"])
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_the_measured_floor_covers_nineteen_twentieths_of_pure_noise(name, outlier):
    """Every loss is off by a random error, that of one sample by a larger one. The dithered pass predicts how much."""
    measure, generator = MEASURES[name], torch.Generator().manual_seed(0)
    size = torch.tensor([*[0.3] * 31, 0.3 * outlier], dtype=torch.double)

    def noisy():
        return Objective(torch.zeros(()), 7 + size * torch.randn(32, generator=generator, dtype=torch.double))

    below, ratios = [], []
    for _ in range(500):
        center = noisy()
        measured, _ = measure.compare([noisy() for _ in measure.sides], center, FLOAT32)
        floor = measured_floor(center.losses, noisy().losses, measure.noise)
        below.append((measured.abs() < floor).double().mean())
        ratios.append(floor / (0.3 * 2**0.5 * measure.noise))
    assert torch.stack(below).mean() > 0.95
    if outlier == 1:
        assert DEVIATIONS < torch.stack(ratios).median() < 1.3 * DEVIATIONS


def test_the_measured_floor_of_a_single_sample_is_not_below_its_error():
    assert measured_floor(torch.tensor([1.0]), torch.tensor([1.5]), 2.0) == DEVIATIONS * 2.0 * 0.5


# --- logits


@given(doubles((4, 3)), doubles((4, 3)))
def test_the_logit_change_is_the_variance_of_the_differences_under_the_prediction(before, after):
    samples = [0, 1, 0, 2]
    expected = [0.0, 0.0, 0.0]
    for sample, one, other in zip(samples, before, after):
        p = one.softmax(-1)
        differences = other - one
        expected[sample] += float((p * differences**2).sum() - (p * differences).sum() ** 2)
    found, _ = logit_change(after, Logits(before, torch.tensor(samples)), 3)
    torch.testing.assert_close(found.square(), torch.tensor(expected, dtype=torch.double), rtol=1e-9, atol=1e-12)


@given(doubles((4, 3)), doubles((4, 3)))
def test_the_spread_of_logits_is_their_variance_under_the_prediction(before, after):
    center = Logits(before, torch.tensor([0, 1, 0, 2]))
    torch.testing.assert_close(logit_change(after, center, 3)[1], logit_change(0 * after, center, 3)[0])


@given(doubles((2, 3, 4)), doubles((2, 3, 4)), doubles((2, 3, 1), -100, 100))
def test_what_is_added_to_all_logits_of_a_prediction_does_not_count(before, after, shift):
    one, _ = logit_change(after.flatten(0, 1), Logits.by_sample(before), 2)
    other, _ = logit_change((after + shift).flatten(0, 1), Logits.by_sample(before), 2)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_to_second_order_it_is_twice_the_divergence():
    torch.manual_seed(0)
    z, u = torch.randn(5, 7, dtype=torch.double), 1e-4 * torch.randn(5, 7, dtype=torch.double)
    p, q = z.log_softmax(-1), (z + u).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum()
    found, _ = logit_change(z + u, Logits(z, torch.zeros(5, dtype=torch.long)), 1)
    assert found.square().item() == pytest.approx(2 * divergence.item(), rel=1e-3)


@given(doubles((2, 3, 4)), doubles((2, 3, 4)), hnp.arrays("bool", (2, 3)).map(torch.from_numpy))
def test_padding_does_not_count(before, after, counted):
    whole, _ = logit_change(after.flatten(0, 1), Logits.by_sample(before, counted), 2)
    alone = [
        logit_change(after[i][counted[i]], Logits(before[i][counted[i]], counted[i].nonzero()[:, 0] * 0), 1)[0]
        for i in range(2)
    ]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-12, atol=0)


def test_padding_may_hold_anything():
    values = torch.tensor([[[0.0, 1.0], [torch.nan, torch.inf]]])
    counted = torch.tensor([[True, False]])
    found, _ = logit_change(torch.tensor([[1.0, 1.0], [torch.nan, 0.0]]), Logits.by_sample(values, counted), 1)
    assert found.isfinite().all()


def test_a_class_that_is_excluded_does_not_count():
    before, after = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.5, 1.0, -torch.inf]])
    found = logit_change(after, Logits.by_sample(before), 1)
    torch.testing.assert_close(found, logit_change(after[:, :2], Logits.by_sample(before[:, :2]), 1))
    assert torch.stack(found).isfinite().all()


def test_logits_of_sentences_without_tokens_are_rows():
    logits = Logits.by_sample(torch.zeros(3, 5))
    assert logits.samples.tolist() == [0, 1, 2]
    assert logits.counted is None
    assert Logits.by_sample(torch.zeros(2, 2, 3, 5)).samples.tolist() == [0] * 6 + [1] * 6


def test_rounding_of_the_logits_alone_is_under_their_floor():
    torch.manual_seed(0)
    z = 4 * torch.randn(400, 30, dtype=torch.double)
    center, moved = (
        Objective(torch.zeros(()), torch.zeros(20), logits=Logits.by_sample(part.view(20, 20, 30)))
        for part in (z, z.half().double())
    )
    measure = MEASURES["logit_change"]
    measured, floor = measure.compare([moved], center, torch.finfo(torch.float16).eps)
    assert (measured < floor).all()
    assert (measured > floor / 20).all()


def test_no_gradient_flows_through_a_measurement():
    losses = [torch.ones(3).requires_grad_() for _ in range(3)]
    logits = [Logits.by_sample(torch.rand(3, 2).requires_grad_()) for _ in range(3)]
    center, *moved = (Objective(torch.zeros(()), one, logits=other) for one, other in zip(losses, logits))
    for measure in MEASURES.values():
        measured, floor = measure.compare(moved[: len(measure.sides)], center, FLOAT32)
        assert not measured.requires_grad
        assert not floor.requires_grad
