"""Tensors that Hypothesis draws, and their norm by the textbook."""

import math

import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# Normal numbers only: a norm in the subnormal range has lost digits already.
MAGNITUDES = st.floats(2.0**-100, 2.0**100, width=32)
ELEMENTS = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda value: -value))


def arrays(shape, elements):
    """Tensors in single precision."""
    return hnp.arrays("float32", shape, elements=elements).map(torch.from_numpy)


def norm_of(tensors):
    """The L2 norm in double precision, by the textbook."""
    return math.sqrt(math.fsum(value * value for tensor in tensors for value in tensor.double().flatten().tolist()))
