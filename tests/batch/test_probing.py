"""Probes measure curvature along one shared direction and leave nothing behind."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deltasam_plugin.batch.displacement import PerturbedParameter
from deltasam_plugin.batch.probing import draw_direction, probe_losses
from deltasam_plugin.batch.weighting import curvature_weights, second_difference

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


def probed(losses, parameters, probes, scale, seed):
    """The second differences (K, B), and a bound on the rounding in them."""
    plus, minus = probe_losses(losses, parameters, probes, scale, seed)
    center = losses().detach()
    return second_difference(plus, minus, center), 1e-12 * (plus.abs() + minus.abs() + 2 * center.abs())


def displacements(parameters, probes, scale, seed):
    """Where a probe puts the parameters, relative to where they are: one flat tensor for each forward pass."""
    home = torch.cat([p.parameter.detach().flatten() for p in parameters])
    seen = []

    def losses():
        seen.append(torch.cat([p.parameter.detach().flatten() for p in parameters]) - home)
        return torch.zeros(1)

    probe_losses(losses, parameters, probes, scale, seed)
    return seen


# --- quadratics, where the answer is known


@given(quadratics(), st.integers(1, 3), SCALES, SEEDS)
def test_probes_are_exact_for_quadratics_at_any_scale(quadratic, probes, scale, seed):
    parameters, hessians, losses, _ = quadratic
    differences, rounding = probed(losses, parameters, probes, scale, seed)
    home = torch.cat([p.parameter.detach() for p in parameters])
    sigma = scale * home.norm() / math.sqrt(home.numel())
    for probe in range(probes):
        u = torch.cat(draw_direction(parameters, seed + probe))
        curvature = torch.einsum("p,bpq,q->b", u, hessians, u)
        slack = rounding[probe] + 1e-12 * sigma**2 * hessians.abs().sum() * u.square().sum()
        assert ((differences[probe] - sigma**2 * curvature).abs() <= slack).all()


@given(quadratics(factors=st.lists(st.integers(-8, 8).filter(bool), min_size=1, max_size=5)), SCALES, SEEDS)
def test_hessians_that_are_multiples_of_one_give_weights_proportional_to_the_multiples(quadratic, scale, seed):
    parameters, _, losses, factors = quadratic
    differences, rounding = probed(losses, parameters, 2, scale, seed)
    assume(rounding.max() < 1e-8 * differences.abs().amax(dim=0).min())  # M = 0, or a probe that hardly moves
    expected = factors.abs() / factors.abs().sum()
    torch.testing.assert_close(
        curvature_weights(differences, torch.zeros_like(differences)), expected, rtol=1e-6, atol=0
    )


@given(arrays((4, 3)), st.integers(1, 3), SCALES, SEEDS)
def test_affine_losses_have_no_curvature(slopes, probes, scale, seed):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.double))
    differences, rounding = probed(lambda: slopes @ parameter + 7, [PerturbedParameter(parameter)], probes, scale, seed)
    assert (differences.abs() <= rounding + 1e-12 * scale).all()


# --- the direction


@given(SEEDS)
def test_the_seed_determines_the_direction(seed):
    parameters = [PerturbedParameter(torch.zeros(3, 2)), PerturbedParameter(torch.zeros(4))]
    first, again, other = (
        torch.cat([u.flatten() for u in draw_direction(parameters, s)]) for s in (seed, seed, seed + 1)
    )
    assert torch.equal(first, again)
    assert not (first == other).any()
    assert len(set(first.tolist())) == 10  # no two elements share their number


def test_the_direction_is_standard_normal_in_full_precision():
    parameters = [
        PerturbedParameter(torch.zeros(100, 100).half()),
        PerturbedParameter(torch.zeros(5, dtype=torch.double)),
    ]
    parameters.append(PerturbedParameter(torch.zeros(3).half(), torch.zeros(3)))
    direction = draw_direction(parameters, 1)
    assert [u.dtype for u in direction] == [torch.float32, torch.float64, torch.float32]
    assert [u.shape for u in direction] == [p.parameter.shape for p in parameters]
    assert direction[0].mean().item() == pytest.approx(0, abs=0.03)
    assert direction[0].std().item() == pytest.approx(1, rel=0.03)


@given(st.integers(1, 3), SEEDS)
def test_both_sides_of_a_probe_lie_on_one_line_and_every_probe_has_its_own(probes, seed):
    parameters = [PerturbedParameter(torch.nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.double)))]
    parameters.append(PerturbedParameter(torch.nn.Parameter(torch.tensor([-3.0], dtype=torch.double))))
    seen = displacements(parameters, probes, 0.1, seed)
    assert len(seen) == 2 * probes  # one forward pass each: the whole batch shares the direction
    for plus, minus in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(plus, -minus, rtol=0, atol=1e-14)
    assert len({round(plus[0].item(), 12) for plus in seen[::2]}) == probes


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
    direction = draw_direction([PerturbedParameter(weight, master)], 3)[0]
    sigma = 2e-4 * master.norm().item() / math.sqrt(10001)
    plus, minus = displacements([PerturbedParameter(weight, master)], 1, 2e-4, 3)
    for move, sign in ((plus, 1), (minus, -1)):
        moved = (move.double() + before.double()) - master.half().double()
        assert (moved @ direction.double() / direction.square().sum()).item() == pytest.approx(sign * sigma, rel=0.1)
    assert torch.equal(weight, before)


# --- nothing is left behind


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]


def test_the_global_generators_are_not_touched():
    parameters = [PerturbedParameter(torch.nn.Parameter(torch.ones(5)))]
    before = generators()
    probe_losses(lambda: torch.zeros(2), parameters, 3, 0.1, 0)
    assert generators() == before


@given(st.integers(1, 3), st.data())
def test_an_exception_in_any_probe_leaves_the_weights_as_they_were(probes, data):
    values = data.draw(hnp.arrays("float32", 4, elements=st.sampled_from([-0.0, 0.0, 2.0**-149, 1.1875, -(2.0**99)])))
    weight = torch.nn.Parameter(torch.from_numpy(values))
    before = weight.detach().clone().view(torch.int32)
    fatal = data.draw(st.integers(1, 2 * probes))
    passes = []

    def losses():
        passes.append(None)
        if len(passes) == fatal:
            raise MemoryError
        return torch.zeros(2)

    with pytest.raises(MemoryError):
        probe_losses(losses, [PerturbedParameter(weight)], probes, 0.1, 0)
    assert torch.equal(weight.detach().view(torch.int32), before)


def test_probes_build_no_graph_and_return_one_row_for_each_probe():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    modes = []

    def losses():
        modes.append(torch.is_grad_enabled())
        return weight * 3

    plus, minus = probe_losses(losses, [PerturbedParameter(weight)], 3, 0.1, 0)
    assert plus.shape == minus.shape == (3, 2)
    assert modes == [False] * 6
    assert not plus.requires_grad


def test_weights_that_are_all_zero_have_no_length_to_move_by():
    weight = torch.nn.Parameter(torch.zeros(3))
    plus, minus = probe_losses(lambda: weight.sum()[None], [PerturbedParameter(weight)], 1, 0.1, 0)
    assert plus.item() == minus.item() == 0
