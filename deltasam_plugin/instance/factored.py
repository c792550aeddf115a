r"""Per-sample gradients in factored form: norms, inner products and perturbed layers without per-sample weights.

The gradient of one sample with respect to a matrix W (n, m) that was applied to T rows is a sum of T outer products,

.. math:: G_i = \sum_{t=1}^{T} l_{it}\, r_{it}^\top \in \mathbb{R}^{n \times m},

for a linear layer with l the output gradients and r the inputs; for an embedding table with l the unit vector of the
token and r the output gradient. It is never formed: every quantity here costs :math:`O(T^2 (m + n))` per instance, or
:math:`O(T m n)` where that is cheaper.

Shapes: B samples, T rows each (padded with zero rows), n outputs, m inputs. Products accumulate in fp32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.instance.slices import ParameterSlice
from deltasam_plugin.precision import at_least_float32


@dataclass(frozen=True)
class Factor:
    r"""One use's share of the per-sample gradient of a matrix, :math:`G_i = \sum_t l_{it} r_{it}^\top`.

    Attributes:
        left: (B, T, n) floating; or (B, T) integer, where row t stands for the unit vector of that index.
        right: (B, T, m).
        bias: added by the same use. G_i is then the gradient of (W | bias), and r carries a one that is not stored.
    """

    left: Tensor
    right: Tensor
    bias: ParameterSlice | None = None

    @property
    def transposed(self) -> Factor:
        """Of the transposed matrix, without a bias."""
        return Factor(self.right, self.left)

    @property
    def indexed(self) -> bool:
        """Whether `left` holds indices."""
        return not self.left.is_floating_point()


def form(left: Tensor, right: Tensor) -> Tensor:
    r"""The per-sample gradients themselves, :math:`G_i = \sum_t l_{it} r_{it}^\top`.

    Args:
        left: (B, T, n) floating.
        right: (B, T, m).

    Returns:
        (B, n, m).
    """
    return torch.bmm(at_least_float32(left).transpose(1, 2), at_least_float32(right))


def _inner_products(one: Tensor, other: Tensor) -> Tensor:
    """Of all vectors of (B, T, m) and (B, S, m): (B, T, S)."""
    first = at_least_float32(one)
    second = first if other is one else at_least_float32(other)
    return torch.bmm(first, second.transpose(1, 2))


def _left_products(one: Factor, other: Factor) -> Tensor:
    """All inner products of the left vectors, (B, T, S)."""
    if one.indexed and other.indexed:
        return (one.left.unsqueeze(2) == other.left.unsqueeze(1)).to(at_least_float32(one.right).dtype)
    if other.indexed:
        index = other.left.unsqueeze(1).expand(-1, one.left.shape[1], -1)
        return at_least_float32(one.left.gather(2, index))
    if one.indexed:
        return _left_products(other, one).transpose(1, 2)
    return _inner_products(one.left, other.left)


def right_products(one: Tensor, other: Tensor, affine: bool) -> Tensor:
    """All inner products of right vectors, (B, T, S).

    Args:
        one: (B, T, m).
        other: (B, S, m).
        affine: whether both carry a one that is not stored.
    """
    products = _inner_products(one, other)
    return products.add_(1) if affine else products


def inner(one: Factor, other: Factor, rights: Tensor) -> Tensor:
    r"""Frobenius inner products :math:`\langle G_i, G'_i \rangle = \sum_{ts} (l_t \cdot l'_s)(r_t \cdot r'_s)`.

    Args:
        one: G.
        other: G'. G itself gives the squared norms.
        rights: their :func:`right_products`.

    Returns:
        (B,).
    """
    return (_left_products(one, other) * rights).sum((1, 2))


def sum_over_samples(factor: Factor, shape: torch.Size) -> Tensor:
    r""":math:`\sum_i G_i`, without the bias.

    Args:
        factor: G.
        shape: (n, m).
    """
    right = at_least_float32(factor.right).flatten(0, 1)
    if factor.indexed:
        return right.new_zeros(shape).index_add_(0, factor.left.flatten(), right)
    return at_least_float32(factor.left).flatten(0, 1).T @ right


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, right: Tensor, steps: Tensor, affine: bool) -> Tensor:
        ctx.save_for_backward(right, steps)
        ctx.dtype = x.dtype
        products = _inner_products(x, right)
        steps = steps.view(-1, 1, 1)
        return torch.addcmul(steps, products, steps, out=products) if affine else products.mul_(steps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        right, steps = ctx.saved_tensors
        return torch.bmm(gradient * steps.view(-1, 1, 1), at_least_float32(right)).to(ctx.dtype), None, None, None


def coefficients(right: Tensor, affine: bool, x: Tensor, steps: Tensor) -> Tensor:
    r"""What the perturbed layer adds, in terms of the left vectors: :math:`s_i (x_{iq} \cdot r_{it})`, plus
    :math:`s_i` where a bias is part of it.

    Args:
        right: of the factor of the layer's matrix.
        affine: whether the factor carries a bias.
        x: inputs of the perturbed layer (B, Q, m). The result is differentiable in x.
        steps: s (B,), of the result's type.

    Returns:
        (B, Q, T).
    """
    return _Coefficients.apply(x, right, steps.to(at_least_float32(x).dtype), affine)


def lookup(factor: Factor, index: Tensor) -> Tensor:
    r"""Rows of the per-sample gradient, :math:`G_i[v_q]`.

    Args:
        factor: G.
        index: v (B, Q) integer.

    Returns:
        (B, Q, m).
    """
    wanted = Factor(index, factor.right)
    return torch.bmm(_left_products(wanted, factor), at_least_float32(factor.right))


def expand_into(y: Tensor, coefficients: Tensor, left: Tensor) -> Tensor:
    r""":math:`y_q \mathrel{+}= \sum_t c_{qt} l_t` in place.

    Args:
        y: (B, Q, n).
        coefficients: c (B, Q, T), of y's type.
        left: l, (B, T, n) or indices (B, T).

    Returns:
        y.
    """
    if left.is_floating_point():
        return y.baddbmm_(coefficients, left.to(y.dtype))
    return y.scatter_add_(2, left.unsqueeze(1).expand_as(coefficients), coefficients)


def contract(gradient: Tensor, left: Tensor) -> Tensor:
    r""":math:`g_q \cdot l_t`, the adjoint of :func:`expand_into` in the coefficients: (B, Q, n) to (B, Q, T)."""
    if left.is_floating_point():
        return _inner_products(gradient, left)
    return at_least_float32(gradient.gather(2, left.unsqueeze(1).expand(-1, gradient.shape[1], -1)))


def step_sizes(squared_norms: Tensor, rho: float, rise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Norms and :math:`s_i = \min(\rho, R/\|g_i\|) / \|g_i\|`, which is 0 where the norm is zero or not finite.

    Args:
        squared_norms: (B,).
        rho: radius, L2 norm in parameter space.
        rise: R, one element, by which to first order each loss rises at most; None for no such limit.

    Returns:
        Norms (B,) and steps (B,).
    """
    norms = squared_norms.clamp(min=0).sqrt()
    radii = torch.full_like(norms, rho) if rise is None else (rise / norms).clamp(max=rho)
    steps = radii / norms
    return norms, torch.where(torch.isfinite(steps), steps, torch.zeros_like(steps))
