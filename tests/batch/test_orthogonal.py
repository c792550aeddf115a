"""The part of a vector that is orthogonal to another."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltasam_plugin.batch.orthogonal import orthogonal_part

SIZES = (3, 1, 4)
numbers = st.floats(-1, 1, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
vectors = st.lists(numbers, min_size=8, max_size=8)
exponents = st.sampled_from([-25, -3, 0, 3, 25])


def parts(values: list[float], exponent: int = 0) -> list[Tensor]:
    """One vector in three tensors, of one, two and no dimensions."""
    first, second, third = (torch.tensor(values) * 10.0**exponent).split(SIZES)
    return [first, second.view(()), third.view(2, 2)]


def dot(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other) if a is not None and b is not None)


@given(vectors, vectors, exponents, exponents)
def test_it_is_orthogonal_and_the_rest_is_parallel(a: list[float], b: list[float], size: int, length: int) -> None:
    """At any scale: nothing overflows or is lost on the way."""
    vector, onto = parts(a, size), parts(b, length)
    found = orthogonal_part(vector, onto)
    norm, direction = math.sqrt(dot(vector, vector)), math.sqrt(dot(onto, onto))
    assert [part.shape for part in found] == [part.shape for part in vector]
    assert abs(dot(found, onto)) <= 1e-5 * norm * direction
    along = dot(vector, onto) / direction**2 if direction else 0.0
    for part, whole, b_part in zip(found, vector, onto):
        assert (part.double() - (whole.double() - along * b_part.double())).abs().max() <= 1e-5 * norm


@given(vectors)
def test_nothing_is_left_of_a_parallel_vector_and_all_beside_a_zero_one(a: list[float]) -> None:
    vector = parts(a)
    norm = math.sqrt(dot(vector, vector))
    assert all(part.abs().max() <= 1e-6 * norm for part in orthogonal_part(vector, [-3 * part for part in vector]))
    for none in ([torch.zeros_like(part) for part in vector], [None] * 3, [torch.inf * (part + 2) for part in vector]):
        assert all(map(torch.equal, orthogonal_part(vector, none), vector))


@given(vectors, vectors)
def test_what_is_missing_is_zero(a: list[float], b: list[float]) -> None:
    vector, onto = parts(a), parts(b)
    (_, *known), (first, _, last) = vector, onto
    found = orthogonal_part([None, *known], [first, None, last])
    filled = [torch.zeros_like(vector[0]), *known], [first, torch.zeros_like(onto[1]), last]
    for part, same in zip(found, orthogonal_part(*filled)):
        torch.testing.assert_close(part, same, rtol=0, atol=1e-6)
    assert orthogonal_part([None], [None]) == [None]


def test_half_precision_is_computed_in_single() -> None:
    """The squares of these would overflow."""
    (found,) = orthogonal_part([torch.tensor([300.0, 300.0]).half()], [torch.tensor([3e4, 0.0]).half()])
    assert found.dtype == torch.float32
    assert found.tolist() == [0.0, 300.0]
