"""Factored per-instance gradients against the matrices they stand for, in integers, where products are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from deltasam_plugin.instance.factored import (
    Factor,
    coefficients,
    contract,
    expand_into,
    form,
    inner,
    lookup,
    right_products,
    step_sizes,
    sum_over_samples,
)
from deltasam_plugin.instance.slices import ParameterSlice

B, N, M = 2, 5, 3  # samples, outputs, inputs


def integers(*shape: int) -> st.SearchStrategy[Tensor]:
    """Small integers in double precision."""
    values = hnp.arrays("int64", shape, elements=st.integers(-9, 9))
    return values.map(lambda array: torch.from_numpy(array).double())


def indices(*shape: int) -> st.SearchStrategy[Tensor]:
    """Rows of an (N, M) table; repetitions are likely."""
    return hnp.arrays("int64", shape, elements=st.integers(0, N - 1)).map(torch.from_numpy)


@st.composite
def factors(draw: st.DrawFn, affine: bool = False) -> Factor:
    """A use by a linear layer, or by an embedding."""
    rows = draw(st.integers(1, 4))
    left = draw(integers(B, rows, N) if affine or draw(st.booleans()) else indices(B, rows))
    return Factor(left, draw(integers(B, rows, M)), ParameterSlice("bias", 0, N) if affine else None)


def dense(factor: Factor) -> Tensor:
    """G (B, n, m), with a last column for the bias where there is one."""
    left = torch.nn.functional.one_hot(factor.left, N).double() if factor.indexed else factor.left
    right = torch.cat([factor.right, torch.ones(*factor.right.shape[:2], 1)], 2) if factor.bias else factor.right
    return torch.einsum("btn,btm->bnm", left, right)


def products(one: Factor, other: Factor) -> Tensor:
    affine = one.bias is not None and other.bias is not None
    return inner(one, other, right_products(one.right, other.right, affine))


@given(factors(), factors())
def test_inner_products_are_those_of_the_matrices(one: Factor, other: Factor) -> None:
    assert torch.equal(products(one, other), (dense(one) * dense(other)).sum((1, 2)))


@given(factors(affine=True), factors(affine=True))
def test_inner_products_include_the_bias(one: Factor, other: Factor) -> None:
    assert torch.equal(products(one, other), (dense(one) * dense(other)).sum((1, 2)))


@given(factors())
def test_the_sum_over_the_samples(factor: Factor) -> None:
    assert torch.equal(sum_over_samples(factor, torch.Size((N, M))), dense(factor).sum(0))


@given(factors())
def test_forming(factor: Factor) -> None:
    if not factor.indexed:
        assert torch.equal(form(factor.left, factor.right), dense(factor))


@given(st.booleans().flatmap(lambda affine: factors(affine)), integers(B, 4, M), integers(B, 4, N), integers(B))
def test_perturbed_output_and_its_derivative(factor: Factor, x: Tensor, towards: Tensor, steps: Tensor) -> None:
    x = x.requires_grad_()
    weights = coefficients(factor.right, factor.bias is not None, x, steps)
    y = expand_into(torch.ones(B, 4, N).double(), weights.detach(), factor.left)
    extended = torch.cat([x, torch.ones(B, 4, 1)], 2) if factor.bias else x
    perturbation = steps.view(-1, 1, 1) * dense(factor)
    assert torch.equal(y, 1 + torch.einsum("bnm,bqm->bqn", perturbation, extended))
    (found,) = torch.autograd.grad(weights, x, contract(towards, factor.left))
    assert torch.equal(found, torch.einsum("bnm,bqn->bqm", perturbation, towards)[..., :M])


@given(factors(), indices(B, 6))
def test_rows_of_the_matrix(factor: Factor, index: Tensor) -> None:
    expected = dense(factor).gather(1, index.unsqueeze(2).expand(-1, -1, M))
    assert torch.equal(lookup(factor, index), expected)


@given(
    hnp.arrays("float64", 4, elements=st.floats(0, 1e300)).map(torch.from_numpy),
    st.floats(0, 1e3),
)
def test_steps_have_length_rho_or_none(squared: Tensor, rho: float) -> None:
    norms, steps = step_sizes(squared, rho)
    assert torch.isfinite(steps).all()
    moved = steps * norms
    assert ((moved - rho).abs() <= 1e-9 * rho)[(steps > 0) & (steps > 1e-300)].all()
    assert not steps[norms == 0].any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("nan")])
def test_no_step_along_what_is_not_finite(bad: float) -> None:
    _, steps = step_sizes(torch.tensor([bad, 4.0]), 1.0)
    assert steps.tolist() == [0.0, 0.5]
