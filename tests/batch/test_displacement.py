"""The weights move by ρ or not at all, and come back bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from deltasam_plugin.batch import displacement, norms
from deltasam_plugin.batch.displacement import ascended, displace
from deltasam_plugin.batch.restoration import PerturbedParameter, originals_of_rewritten, restored
from tests.helpers.drawn_tensors import ELEMENTS, arrays, norm_of

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
WEIGHTS = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([-0.0, 2.0**-149, -(2.0**-130), 2.0**127]))
SHAPES = st.lists(hnp.array_shapes(max_dims=3, max_side=4), min_size=1, max_size=4)


def bits(tensors):
    """The tensors as integers: −0 differs from 0, and a NaN equals itself."""
    return [tensor.detach().clone().view(INTEGERS[tensor.dtype]).tolist() for tensor in tensors]


def parameter(values, dtype=torch.float32):
    return torch.nn.Parameter(torch.as_tensor(values).to(dtype))


@st.composite
def ascents(draw, elements=ELEMENTS):
    """Parameters, and a gradient for each or None."""
    shapes = draw(SHAPES)
    parameters = [parameter(draw(arrays(shape, WEIGHTS))) for shape in shapes]
    return parameters, [draw(st.one_of(st.none(), arrays(shape, elements))) for shape in shapes]


# --- invariant 4: ‖ε‖ = ρ, or 0


@given(ascents(), st.sampled_from([1e-6, 0.05, 1.0, 100.0]))
def test_the_perturbation_has_the_length_rho_and_the_direction_of_the_gradient(drawn, rho):
    parameters, gradients = drawn
    norm = norm_of(gradient for gradient in gradients if gradient is not None)
    for weight in parameters:
        weight.data.zero_()  # around zero the perturbation is not rounded to the spacing of the weights
    expected = [
        torch.zeros_like(p) if g is None else rho * g.double() / (norm or 1) for p, g in zip(parameters, gradients)
    ]
    with ascended([PerturbedParameter(weight) for weight in parameters], gradients, rho) as ascent:
        assert norm_of(p.detach() for p in parameters) == pytest.approx(rho if norm > 0 else 0, rel=1e-6)
        assert ascent.moved.item() == pytest.approx(rho if norm > 0 else 0, rel=1e-6)
        assert ascent.gradient_norm.item() == pytest.approx(norm, rel=1e-6)
        assert ascent.skipped.item() == (norm == 0)
        for weight, step in zip(parameters, expected):
            torch.testing.assert_close(weight.detach().double(), step.double(), rtol=1e-6, atol=1e-36)


@given(ascents(st.just(0.0)), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), st.data())
def test_a_zero_or_non_finite_gradient_moves_nothing_and_makes_no_nan(drawn, value, data):
    parameters, gradients = drawn
    gradients.append(data.draw(arrays(3, ELEMENTS) if value else arrays(3, st.just(0.0))))
    gradients[-1][data.draw(st.integers(0, 2))] = value
    parameters.append(parameter(data.draw(arrays(3, WEIGHTS))))
    before = bits(parameters)
    with ascended([PerturbedParameter(weight) for weight in parameters], gradients, 0.05) as ascent:
        assert bits(parameters) == before
        assert (ascent.gradient_norm.item(), ascent.moved.item(), ascent.skipped.item()) == (0, 0, 1)
        assert ascent.overflowed.item() == (value != 0)
    assert bits(parameters) == before


@given(st.lists(arrays(hnp.array_shapes(max_dims=2), WEIGHTS).map(parameter), max_size=3))
def test_gradients_that_are_all_none_move_nothing(parameters):
    before = bits(parameters)
    with ascended([PerturbedParameter(weight) for weight in parameters], [None] * len(parameters), 0.05) as ascent:
        assert bits(parameters) == before
        assert (ascent.gradient_norm.item(), ascent.moved.item(), ascent.skipped.item()) == (0, 0, 1)


@given(ascents())
def test_a_radius_of_zero_moves_nothing(drawn):
    parameters, gradients = drawn
    before = bits(parameters)
    with ascended([PerturbedParameter(weight) for weight in parameters], gradients, 0.0) as ascent:
        assert bits(parameters) == before
        assert ascent.moved.item() == 0


@given(hnp.arrays("int64", st.integers(1, 5), elements=st.integers(0, 3)).map(torch.from_numpy), st.data())
def test_a_sparse_gradient_moves_like_the_dense_one(rows, data):
    values = data.draw(arrays((len(rows), 2), st.floats(-10, 10, width=32)))
    sparse = torch.sparse_coo_tensor(rows[None], values, (4, 2))  # uncoalesced: rows repeat
    moved = []
    for gradient in (sparse, sparse.to_dense()):
        table = parameter(torch.zeros(4, 2))
        with ascended([PerturbedParameter(table)], [gradient], 0.05):
            moved.append(table.detach().clone())
    assert torch.equal(*moved)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_precision_moves_by_rho_and_returns(dtype):
    weight = parameter(torch.linspace(-1, 1, 1000), dtype)
    gradient = torch.linspace(3, -5, 1000).to(dtype)
    before = bits([weight])
    with ascended([PerturbedParameter(weight)], [gradient], 10.0) as ascent:
        assert weight.dtype == dtype
        really = norm_of([weight.detach().double() - torch.linspace(-1, 1, 1000).to(dtype).double()])
        assert ascent.moved.item() == pytest.approx(really, rel=1e-6)
        assert really == pytest.approx(10, rel=max(1e-6, torch.finfo(dtype).eps))
    assert bits([weight]) == before


def test_parameters_of_several_precisions_share_one_norm():
    parameters = [parameter(torch.zeros(4), dtype) for dtype in (torch.float64, torch.float32, torch.float16)]
    gradients = [torch.full((4,), 3.0, dtype=weight.dtype) for weight in parameters]
    with ascended([PerturbedParameter(weight) for weight in parameters], gradients, 12.0):
        for weight in parameters:
            torch.testing.assert_close(
                weight.double(), torch.full((4,), 12 / math.sqrt(12)).double(), rtol=1e-3, atol=0
            )


def test_the_radius_is_exact_in_double_precision():
    weight = parameter(torch.zeros(2), torch.float64)
    with ascended([PerturbedParameter(weight)], [torch.tensor([3.0, 4.0], dtype=torch.float64)], 0.05):
        assert weight.tolist() == pytest.approx([0.03, 0.04], rel=1e-14)


def test_moved_is_what_rounding_left_of_the_perturbation():
    weight = parameter([1.0, 0.0])
    with ascended([PerturbedParameter(weight)], [torch.tensor([1.0, 1.0])], math.sqrt(2) * 1e-9) as ascent:
        assert ascent.moved.item() == pytest.approx(1e-9, rel=1e-6)  # 1 + 1e-9 is 1 in single precision


# --- invariant 3: restored bit for bit


@given(st.lists(arrays(hnp.array_shapes(max_dims=2), WEIGHTS), min_size=1, max_size=3), st.booleans(), st.data())
def test_whatever_happens_inside_the_weights_come_back_bit_for_bit(values, fails, data):
    parameters = [parameter(value) for value in values]
    before = bits(parameters)
    try:
        with restored([PerturbedParameter(weight) for weight in parameters]) as originals:
            assert bits(originals) == before
            for weight in parameters:  # whether it has a gradient or not
                weight.data.copy_(data.draw(arrays(tuple(weight.shape), st.floats(width=32))))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert bits(parameters) == before


@given(ascents(), st.booleans())
def test_an_ascent_is_undone_bit_for_bit(drawn, fails):
    parameters, gradients = drawn
    before = bits(parameters)
    try:
        with ascended([PerturbedParameter(weight) for weight in parameters], gradients, 1e3):
            if fails:
                raise MemoryError
    except MemoryError:
        assert fails
    assert bits(parameters) == before


def test_an_ascent_that_fails_half_way_is_undone(monkeypatch):
    parameters = [parameter([1.0, 2.0]), parameter([3.0, 4.0], torch.float64)]
    before = bits(parameters)
    gradients = [torch.ones(2), torch.ones(2, dtype=torch.float64)]
    real = displacement.tensor_norm
    moved = []

    def failing(tensor):
        moved.append([bits([p]) != [was] for p, was in zip(parameters, before, strict=True)])
        if any(moved[-1]):  # how far the first one moved
            raise MemoryError
        return real(tensor)

    monkeypatch.setattr(displacement, "tensor_norm", failing)
    with (
        pytest.raises(MemoryError),
        ascended([PerturbedParameter(weight) for weight in parameters], gradients, 1.0),
    ):
        pytest.fail("it went on")
    assert moved[-1] == [True, False]
    assert bits(parameters) == before


def test_a_step_of_another_shape_is_refused():
    with (
        pytest.raises(RuntimeError, match=r"A step of shape \(3,\) for a parameter of shape \(2,\)"),
        ascended([PerturbedParameter(parameter([1.0, 2.0]))], [torch.ones(3)], 1.0),
    ):
        pytest.fail("it was accepted")


class Kernels(TorchDispatchMode):
    """Counts the operations that a device would launch a kernel for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name not in ("detach", "view", "split", "split_with_sizes", "empty_like", "_unsafe_view", "alias")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_number_of_kernels_does_not_depend_on_the_number_of_parameters(dtype):
    counts = []
    for number in (10, 100):
        parameters = [parameter(torch.linspace(-1, 1, 12).view(3, 4), dtype) for _ in range(number)]
        perturbed = [PerturbedParameter(p, p.detach().float() if dtype == torch.float16 else None) for p in parameters]
        gradients = [torch.ones(3, 4, dtype=dtype) for _ in parameters]
        before = bits(parameters)
        with Kernels() as kernels, ascended(perturbed, gradients, 0.5):
            pass
        assert bits(parameters) == before
        counts.append(kernels.count)
    assert counts[0] == counts[1] < 100


def test_more_elements_than_are_joined_move_as_few_do(monkeypatch):
    moved = []
    for size in (100, 5):
        monkeypatch.setattr(norms, "lot_size", lambda device, size=size: size)
        parameters = [parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(4)]
        gradients = [torch.linspace(k, 5, 12).view(3, 4) for k in range(4)]
        with ascended([*map(PerturbedParameter, parameters)], gradients, 0.5) as ascent:
            moved.append(torch.stack([p.detach().clone() for p in parameters]))
            assert ascent.moved.item() == pytest.approx(0.5, rel=1e-6)
    torch.testing.assert_close(*moved, rtol=1e-6, atol=0)


def test_a_graph_that_is_alive_does_not_notice():
    weight = parameter([1.0, 2.0])
    loss = weight.square().sum()
    with ascended([PerturbedParameter(weight)], [torch.ones(2)], 1.0):
        pass
    loss.backward()
    assert weight.grad.tolist() == [2.0, 4.0]


def test_the_gradients_are_released():
    weight, gradients = parameter([1.0, 2.0]), [torch.ones(2)]
    with ascended([PerturbedParameter(weight)], gradients, 1.0):
        assert gradients == []


def test_displacing_again_starts_from_the_weights_and_not_from_where_they_are():
    parameters = [PerturbedParameter(parameter([1.0, 2.0])), PerturbedParameter(parameter([3.0]))]
    with restored(parameters) as originals:
        displace(parameters, originals, [torch.ones(2), torch.ones(1)], torch.tensor(0.5))
        displace(parameters, originals, [torch.ones(2), None], torch.tensor(-0.25))
        assert [perturbed.parameter.tolist() for perturbed in parameters] == [[0.75, 1.75], [3.0]]


@pytest.mark.parametrize("rho", [5.0, 0.0])
def test_a_parameter_that_the_forward_pass_rewrites_is_perturbed_from_what_it_was_before(rho):
    parameters = [PerturbedParameter(parameter([1.0, 2.0]), rewritten=True), PerturbedParameter(parameter([5.0]))]
    parameters.append(PerturbedParameter(parameter([7.0]), rewritten=True))
    originals = originals_of_rewritten(parameters)
    assert [original if original is None else original.tolist() for original in originals] == [[1.0, 2.0], None, [7.0]]
    for perturbed in parameters:
        perturbed.parameter.data.fill_(9)  # what the first pass made of them
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([4.0]), None]
    with ascended(parameters, gradients, rho, originals) as ascent:
        moved = [[1.0 + 0.6 * rho, 2.0], [9.0 + 0.8 * rho], [7.0]]
        assert [perturbed.parameter.tolist() for perturbed in parameters] == moved
        assert ascent.moved.item() == rho
    assert [perturbed.parameter.tolist() for perturbed in parameters] == [[9.0, 9.0], [9.0], [9.0]]


@given(arrays(3, WEIGHTS).map(parameter), arrays(3, st.floats(width=32)))
def test_a_scale_of_zero_moves_nothing_whatever_the_step_holds(weight, step):
    before = bits([weight])
    with restored([PerturbedParameter(weight)]) as originals:
        displace([PerturbedParameter(weight)], originals, [step], torch.tensor(0.0))
        assert bits([weight]) == before


# --- half precision


@pytest.fixture
def master():
    return torch.linspace(0.0251, 0.0299, 10001)  # fp16 spacing 1.5e-5


@pytest.fixture
def uphill():
    return torch.ones(10001)


RHO = 6e-6 * math.sqrt(10001)  # 6e-6 for each weight


def test_a_perturbation_below_the_spacing_of_half_precision_is_lost_without_a_master(master, uphill):
    weight = parameter(master, torch.float16)
    with ascended([PerturbedParameter(weight)], [uphill], RHO) as ascent:
        assert ascent.moved.item() == 0


def test_a_perturbation_below_the_spacing_of_half_precision_survives_through_the_master(master, uphill):
    weight, kept = parameter(master, torch.float16), master.clone()
    before = bits([weight])
    with ascended([PerturbedParameter(weight, master)], [uphill.half()], RHO) as ascent:
        move = weight.detach().double() - master.half().double()
        assert (move @ uphill.double()).item() / math.sqrt(10001) == pytest.approx(RHO, rel=0.05)
        assert 0.9 * RHO < ascent.moved.item() < 2 * RHO  # the rounding adds a little
    assert bits([weight]) == before
    assert torch.equal(master, kept)


@pytest.mark.parametrize(("rho", "gradient"), [(0.0, 1.0), (0.05, 0.0), (0.05, math.nan)])
def test_no_ascent_does_not_even_round_a_master(rho, gradient):
    weight, master = parameter([1.0, 2.0], torch.float16), torch.tensor([1.25, 2.0])  # they need not agree
    before = bits([weight])
    with ascended([PerturbedParameter(weight, master)], [torch.full((2,), gradient, dtype=torch.float16)], rho):
        assert bits([weight]) == before
    assert bits([weight]) == before


def test_a_parameter_without_a_gradient_is_not_rounded_from_its_master():
    weights = [
        PerturbedParameter(parameter([1.0], torch.float16), torch.tensor([1.25])),
        PerturbedParameter(parameter([1.0])),
    ]
    with ascended(weights, [None, torch.ones(1)], 0.05):
        assert weights[0].parameter.item() == 1.0


def test_a_subnormal_gradient_moves_by_rho_or_not_at_all():
    weight = parameter([0.0, 0.0])
    with ascended([PerturbedParameter(weight)], [torch.full((2,), 2.0**-149)], 0.05) as ascent:
        assert ascent.skipped or norm_of([weight.detach()]) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("neighbours", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_whatever_is_beside_it(dtype, neighbours):
    generator = torch.Generator().manual_seed(0)
    value, gradient = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
    exact = (value.double() + gradient.double() / gradient.double().norm()).to(dtype)
    parameters = [parameter(value, dtype), *(parameter(torch.zeros(1), dtype) for _ in range(neighbours))]
    gradients = [gradient, *(torch.zeros(1, dtype=dtype) for _ in range(neighbours))]
    with ascended([PerturbedParameter(p) for p in parameters], gradients, 1.0):
        assert torch.equal(parameters[0], exact)
