"""Probes measure curvature along one shared direction and leave nothing behind."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deltasam_plugin.batch.measures import DEVIATIONS, MEASURES
from deltasam_plugin.batch.probing import dither, probe, random_signs, standard_normal
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.weighting import WEIGHTINGS, sample_weights
from deltasam_plugin.loss import Logits, Objective
from deltasam_plugin.precision import Rounding
from tests.helpers.directions import direction_of

SECOND, FIRST = MEASURES["second_difference"], MEASURES["first_difference"]
LOGIT = MEASURES["logit_change"]
DOUBLE, HALF = Rounding(torch.float64, 2.0**-52), Rounding(torch.float16, 2.0**-10)
SEEDS = st.integers(0, 2**62)
SCALES = st.sampled_from([1e-3, 0.1, 1.0, 50.0])


def arrays(shape, low=-8, high=8):
    """Integers in double precision."""
    return hnp.arrays("int64", shape, elements=st.integers(low, high)).map(lambda v: torch.from_numpy(v).double())


@st.composite
def quadratics(draw, factors=None):
    r""":math:`\ell_i(w) = \tfrac12 w^\top H_i w + b_i^\top w + c_i` in two parameters; Hᵢ = hᵢM with factors hᵢ."""
    factors = None if factors is None else torch.tensor(draw(factors), dtype=torch.double)
    batch = draw(st.integers(1, 4)) if factors is None else len(factors)
    split, rest = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = split + rest
    hessians = draw(arrays((batch if factors is None else 1, count, count)))
    hessians = hessians + hessians.transpose(1, 2)
    if factors is not None:
        hessians = factors[:, None, None] * hessians
    slopes, constants = draw(arrays((batch, count))), draw(arrays(batch))
    parameters = [torch.nn.Parameter(draw(arrays(size))) for size in (split, rest)]
    assume(any(parameter.any() for parameter in parameters))

    def losses():
        w = torch.cat(parameters)
        return torch.einsum("p,bpq,q->b", w, hessians, w) / 2 + slopes @ w + constants

    return [PerturbedParameter(parameter) for parameter in parameters], hessians, losses, factors


def probed(losses, parameters, probes, scale, seed, measure=SECOND, rounding=DOUBLE):
    """The measurements and their floor, (K, B) each."""
    center = Objective(torch.zeros(()), losses().detach())

    def forward():
        return Objective(torch.zeros(()), losses())

    return probe(forward, center, parameters, measure, probes, scale, seed, rounding=rounding)


def displacements(parameters, probes, scale, seed, measure=SECOND, rounding=DOUBLE):
    """Where a probe puts the parameters, relative to where they are: one flat tensor for each forward pass."""
    home = torch.cat([p.parameter.detach().flatten() for p in parameters])
    seen = []

    def losses():
        seen.append(torch.cat([p.parameter.detach().flatten() for p in parameters]) - home)
        return torch.zeros(1)

    probed(losses, parameters, probes, scale, seed, measure, rounding)
    return seen[1:]


# --- quadratics, where the answer is known


@given(quadratics(), st.integers(1, 3), SCALES, SEEDS)
def test_probes_are_exact_for_quadratics_at_any_scale(quadratic, probes, scale, seed):
    parameters, hessians, losses, _ = quadratic
    differences, rounding = probed(losses, parameters, probes, scale, seed)
    home = torch.cat([p.parameter.detach() for p in parameters])
    sigma = scale * home.norm() / math.sqrt(home.numel())
    for number in range(probes):
        u = torch.cat(direction_of(parameters, seed + number, SECOND))
        curvature = torch.einsum("p,bpq,q->b", u, hessians, u)
        slack = 1e4 * rounding[number] + 1e-12 * sigma**2 * hessians.abs().sum() * u.square().sum()
        assert ((differences[number] - sigma**2 * curvature).abs() <= slack).all()


@given(quadratics(factors=st.lists(st.integers(-8, 8).filter(bool), min_size=1, max_size=5)), SCALES, SEEDS)
def test_hessians_that_are_multiples_of_one_give_weights_proportional_to_the_multiples(quadratic, scale, seed):
    parameters, _, losses, factors = quadratic
    differences, rounding = probed(losses, parameters, 2, scale, seed)
    assume(1e4 * rounding.max() < 1e-8 * differences.abs().amax(dim=0).min())  # M = 0, or a probe that hardly moves
    expected = factors.abs() / factors.abs().sum()
    found = sample_weights(WEIGHTINGS["curvature"], differences, torch.zeros(()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@given(arrays((4, 3)), st.integers(1, 3), SCALES, SEEDS)
def test_affine_losses_have_no_curvature(slopes, probes, scale, seed):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.double))
    differences, rounding = probed(lambda: slopes @ parameter + 7, [PerturbedParameter(parameter)], probes, scale, seed)
    assert (differences.abs() <= 1e4 * rounding + 1e-12 * scale).all()


@given(arrays((4, 3)), st.integers(1, 3), SCALES, SEEDS)
def test_first_differences_of_affine_losses_are_products_of_slope_and_displacement(slopes, probes, scale, seed):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.double))
    parameters = [PerturbedParameter(parameter)]
    differences, rounding = probed(lambda: slopes @ parameter + 7, parameters, probes, scale, seed, FIRST)
    for number in range(probes):
        z = direction_of(parameters, seed + number, FIRST)[0]
        expected = scale * parameter.detach().norm() / math.sqrt(3) * (slopes @ z)
        slack = 1e4 * rounding[number] + 1e-12 * scale + 1e-13  # the terms of a loss of zero are rounded, too
        assert ((differences[number] - expected).abs() <= slack).all()


# --- logits


@given(arrays(4, 1, 8), arrays(4, 1, 8), SEEDS, SEEDS)
def test_one_probe_finds_the_trace_of_a_diagonal_gauss_newton_matrix(weights, factors, seed, other):
    """Each of four predictions has one parameter of its own: Gᵢ has one element, fᵢ² p(1 − p)."""
    parameter = torch.nn.Parameter(weights / 8)

    def forward():
        logits = torch.stack([factors * parameter, torch.zeros(4)], dim=1)
        return Objective(torch.zeros(()), torch.zeros(4), logits=Logits.by_sample(logits.detach()))

    expected = factors.square() * torch.sigmoid(factors * parameter.detach()).mul(torch.sigmoid(-factors * parameter))
    for start in (seed, other):
        found = probe(forward, forward(), [PerturbedParameter(parameter)], LOGIT, 1, 0.1, start, rounding=DOUBLE)[0]
        sigma = 0.1 * parameter.detach().norm() / 2
        torch.testing.assert_close(found[0].square() / sigma**2, expected.detach(), rtol=1e-6, atol=0)


# --- the direction


@pytest.mark.parametrize("measure", [SECOND, FIRST], ids=["second", "first"])
@given(SEEDS)
def test_the_seed_determines_the_direction(measure, seed):
    parameters = [PerturbedParameter(torch.zeros(30, 20)), PerturbedParameter(torch.zeros(40))]
    first, again, other = (
        torch.cat([u.flatten() for u in direction_of(parameters, s, measure)]) for s in (seed, seed, seed + 1)
    )
    assert torch.equal(first, again)
    assert abs((first * other).mean()) < 0.25


@given(SEEDS, st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_the_direction_is_of_signs_that_have_nothing_in_common(seed, dtype):
    signs = random_signs(seed)(torch.zeros(2**15 - 5, dtype=dtype))
    assert signs.dtype == torch.promote_types(dtype, torch.float32)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.03
    for lag in (1, 31, 32, 64, 1024):
        assert abs((signs[lag:] * signs[:-lag]).mean()) < 0.03


@given(SEEDS)
def test_the_direction_is_standard_normal(seed):
    numbers = standard_normal(seed)(torch.zeros(2**15))
    assert abs(numbers.mean()) < 0.03
    assert numbers.square().mean().item() == pytest.approx(1, rel=0.05)
    assert numbers.pow(4).mean().item() == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("draw", [random_signs, standard_normal])
def test_every_lot_has_a_direction_of_its_own_and_the_same_in_any_precision(draw):
    single, double = draw(3), draw(3)
    first, second = (single(torch.zeros(1000)) for _ in range(2))
    assert not torch.equal(first, second)
    for lot in (first, second):
        assert torch.equal(double(torch.zeros(1000, dtype=torch.double)), lot.double())


@given(st.integers(1, 3), SEEDS)
def test_both_sides_of_a_probe_lie_on_one_line_and_every_probe_has_its_own(probes, seed):
    parameters = [PerturbedParameter(torch.nn.Parameter(torch.ones(5, 8, dtype=torch.double)))]
    parameters.append(PerturbedParameter(torch.nn.Parameter(torch.full((20,), -3.0, dtype=torch.double))))
    seen = displacements(parameters, probes, 0.1, seed)
    assert len(seen) == 2 * probes  # one forward pass each: the whole batch shares the direction
    for plus, minus in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(plus, -minus, rtol=0, atol=1e-14)
    assert len({tuple(plus.sign().tolist()) for plus in seen[::2]}) == probes


def test_both_sides_are_equally_far_in_spite_of_rounding():
    """The spacing of numbers below 1 is half of that above."""
    plus, minus = displacements([PerturbedParameter(torch.nn.Parameter(torch.ones(1000)))], 1, 1e-3, 3)
    above = plus > 0  # what is below need not have a counterpart
    assert torch.equal(plus[above], -minus[above])


def test_the_other_side_of_a_parameter_that_the_forward_pass_rewrites_is_that_of_its_original():
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.double))
    seen = []

    def forward():
        seen.append(weight.detach().clone())
        weight.data = weight.data.round()
        return Objective(torch.zeros(()), torch.zeros(1))

    center = Objective(torch.zeros(()), torch.zeros(1))
    original = weight.detach().clone()
    probe(forward, center, [PerturbedParameter(weight, rewritten=True)], SECOND, 1, 1e-3, 3, rewritten=[original])
    torch.testing.assert_close(seen[0] - original, original - seen[1], rtol=0, atol=1e-14)
    assert (seen[0] != original).all()


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scale", [0.001, 0.3])
def test_a_probe_moves_the_weights_by_its_scale_times_their_length_whatever_the_model(unit, scale):
    generator = torch.Generator().manual_seed(0)
    for count in (1000, 100_000):
        weight = torch.nn.Parameter(unit * torch.randn(count, generator=generator, dtype=torch.double))
        for move in displacements([PerturbedParameter(weight)], 1, scale, 5):
            assert (move.norm() / weight.norm()).item() == pytest.approx(scale, rel=0.1)


def test_half_precision_weights_are_probed_through_their_masters():
    master = torch.linspace(0.0251, 0.0299, 10001)  # a step of 6e-6 each, fp16 spacing 1.5e-5
    weight = torch.nn.Parameter(master.half())
    before = weight.detach().clone()
    direction = direction_of([PerturbedParameter(weight, master)], 3, SECOND)[0]
    sigma = 2e-4 * master.norm().item() / math.sqrt(10001)
    plus, minus = displacements([PerturbedParameter(weight, master)], 1, 2e-4, 3)
    for move, sign in ((plus, 1), (minus, -1)):
        moved = (move.double() + before.double()) - master.half().double()
        assert (moved @ direction.double() / direction.square().sum()).item() == pytest.approx(sign * sigma, rel=0.1)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_in_half_precision_a_probe_is_at_least_as_long_as_the_measure_needs(measure):
    home = torch.linspace(-1, 1, 10_001, dtype=torch.double)
    blind = replace(measure, compare=lambda *_: (torch.zeros(1), torch.zeros(1)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for scale in (0.002, 0.2):
            move = displacements(
                [PerturbedParameter(torch.nn.Parameter(home.clone()))], 1, scale, 3, blind, Rounding(dtype)
            )[0]
            expected = max(scale, measure.least_scale.get(dtype, 0))
            assert (move.norm() / home.norm()).item() == pytest.approx(expected, rel=0.03)


# --- rounding that is measured


@pytest.mark.parametrize("measure", [SECOND, FIRST], ids=["second", "first"])
def test_where_numbers_are_coarse_one_more_pass_measures_what_rounding_does(measure):
    """A loss with an error that is as good as random at every place, and no slope or curvature."""
    weight = torch.nn.Parameter(torch.linspace(1, 2, 1001, dtype=torch.double))
    places, phases = [], torch.linspace(1, 2, 3000, dtype=torch.double)

    def losses():
        places.append(weight.detach().clone())
        return 3 + 0.01 * torch.sin(1e9 * phases * (weight * torch.arange(1001)).sum()).detach()

    measured, floor = probed(losses, [PerturbedParameter(weight)], 2, 0.01, 5, measure, HALF)
    assert len(places) == 1 + 2 * len(measure.sides) + 1
    steps = places[-1] - places[0]
    assert (steps.abs() <= 2.0**-11 * places[0]).all()
    assert (steps.abs() > 2.0**-13 * places[0]).double().mean() > 0.5
    assert floor.shape == measured.shape
    assert (floor == floor[0, 0]).all()
    assert floor[0, 0].item() == pytest.approx(DEVIATIONS * measured.std().item(), rel=0.1)
    assert (measured.abs() < floor).double().mean() > 0.9


@pytest.mark.parametrize("draw", [random_signs, standard_normal])
def test_the_dither_does_not_depend_on_the_direction(draw):
    parameter = torch.ones(10_000, dtype=torch.double)
    direction, steps = draw(7)(parameter), dither(7, 0.5)(parameter)
    assert (steps.abs() <= 0.25).all()
    assert abs(torch.corrcoef(torch.stack([direction, steps]))[0, 1]) < 0.03


# --- nothing is left behind


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]


def test_the_global_generators_are_not_touched():
    parameters = [PerturbedParameter(torch.nn.Parameter(torch.ones(5)))]
    before = generators()
    probed(lambda: torch.zeros(2), parameters, 3, 0.1, 0, rounding=HALF)
    assert generators() == before


@given(st.integers(1, 3), st.data())
def test_an_exception_in_any_probe_leaves_the_weights_as_they_were(probes, data):
    values = data.draw(hnp.arrays("float32", 4, elements=st.sampled_from([-0.0, 0.0, 2.0**-149, 1.1875, -(2.0**99)])))
    weight = torch.nn.Parameter(torch.from_numpy(values))
    before = weight.detach().clone().view(torch.int32)
    fatal = data.draw(st.integers(2, 2 * probes + 2))
    passes = []

    def losses():
        passes.append(None)
        if len(passes) == fatal:
            raise MemoryError
        return torch.zeros(2)

    with pytest.raises(MemoryError):
        probed(losses, [PerturbedParameter(weight)], probes, 0.1, 0, rounding=HALF)
    assert torch.equal(weight.detach().view(torch.int32), before)


def test_probes_build_no_graph_and_return_one_row_for_each_probe():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    modes = []

    def losses():
        modes.append(torch.is_grad_enabled())
        return weight * 3

    measured, floor = probed(losses, [PerturbedParameter(weight)], 3, 0.1, 0)
    assert measured.shape == floor.shape == (3, 2)
    assert modes == [True] + [False] * 6
    assert not measured.requires_grad


def test_weights_that_are_all_zero_have_no_length_to_move_by():
    weight = torch.nn.Parameter(torch.zeros(3))
    measured, floor = probed(lambda: weight.sum()[None], [PerturbedParameter(weight)], 1, 0.1, 0)
    assert measured.item() == floor.item() == 0
