r"""How much each sample of a batch counts in the ascent direction.

The perturbation of δ-SAM is :math:`\epsilon = \rho \sum_i v_i g_i / \|\sum_i v_i g_i\|`. This module turns measured
losses into the weights v: tensors in, tensors out, no gradient flows through any of it. Every loss here is the sum
over one sample's tokens, exactly as it enters the objective.

The published method estimates its weights by Gaussian weight perturbations; its exact constants are not available to
us, so what follows is a reconstruction from its description, not a reproduction.

Reference: Zhou, Liu, Zhang, Chen. δ-SAM: Sharpness-Aware Minimization with Dynamic Reweighting. Findings of EMNLP 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTINGS = ("curvature", "uniform")

# Measured by benchmarks/probe_study.py: the rounding error of a loss in units of eps * |loss|.
ROUNDING_FACTOR = 4.0


def second_difference(plus: Tensor, minus: Tensor, center: Tensor) -> Tensor:
    r"""The second difference of every sample's loss along one direction.

    .. math:: D_i = \ell_i(w + \sigma u) + \ell_i(w - \sigma u) - 2\,\ell_i(w) = \sigma^2 u^\top H_i u + O(\sigma^4)

    It is exact for quadratic losses at any :math:`\sigma` and zero for affine ones.

    Args:
        plus: :math:`\ell_i(w + \sigma u)`, shape (..., B).
        minus: :math:`\ell_i(w - \sigma u)`, shape (..., B).
        center: :math:`\ell_i(w)`, shape (B,).

    Returns:
        D, shape (..., B), in double precision so that the subtraction adds no rounding of its own.
    """
    plus, minus, center = (losses.detach().double() for losses in (plus, minus, center))
    return (plus - center) + (minus - center)


def rounding_floor(plus: Tensor, minus: Tensor, center: Tensor, eps: float) -> Tensor:
    r"""The size below which a second difference is rounding noise.

    .. math:: \tau_i = c\,\mathrm{eps}\,(|\ell_i(w+\sigma u)| + |\ell_i(w-\sigma u)| + 2|\ell_i(w)|) / 4

    Args:
        plus, minus, center: as for :func:`second_difference`.
        eps: spacing of the numbers that the forward pass computes with, ``torch.finfo(dtype).eps``.

    Returns:
        :math:`\tau`, shape (..., B), in the unit of the losses.
    """
    plus, minus, center = (losses.detach().double().abs() for losses in (plus, minus, center))
    return ROUNDING_FACTOR * eps * (plus + minus + 2 * center) / 4


def uniform_weights(count: int, device: torch.device | None = None) -> Tensor:
    """Equal weights v = 1/B: plain SAM.

    Args:
        count: B.
        device: of the result.

    Returns:
        v, shape (B,), double precision.
    """
    return torch.full((count,), 1.0 / max(count, 1), dtype=torch.double, device=device)


def curvature_weights(differences: Tensor, floor: Tensor) -> Tensor:
    r"""Weights proportional to the measured curvature of every sample's loss.

    .. math:: a_i = \max\left(\sqrt{\tfrac1K \sum_k D_{ki}^2},\ \tau\right), \qquad v_i = a_i / \sum_j a_j

    A common floor :math:`\tau = \max_{ki} \tau_{ki}` bounds every magnitude from below, so that a sample of which the
    probes saw nothing but rounding counts as much as the least that could have been seen, and a batch in which nothing
    was seen gets uniform weights. A non-finite difference says that the probe left the neighbourhood in which it means
    anything: the whole batch gets uniform weights then.

    Args:
        differences: D, shape (K, B), from :func:`second_difference`.
        floor: :math:`\tau`, shape (K, B), from :func:`rounding_floor`.

    Returns:
        v, shape (B,), double precision: non-negative, sum 1.
    """
    differences = differences.detach().double()
    uniform = uniform_weights(differences.size(-1), differences.device)
    if uniform.numel() == 0:
        return uniform
    peak = differences.abs().amax()  # factored out: squares of huge or tiny losses stay in range
    scaled = differences / torch.where(peak > 0, peak, 1)
    magnitude = scaled.square().mean(dim=0).sqrt() * peak
    bounded = torch.maximum(magnitude, floor.detach().double().amax())
    relative = bounded / bounded.amax()
    return torch.where(torch.isfinite(relative).all(), relative / relative.sum(), uniform)


def effective_sample_size(weights: Tensor) -> Tensor:
    r"""Share of the batch that the weights really use.

    .. math:: \mathrm{ess} = (\textstyle\sum_i v_i)^2 / (B \sum_i v_i^2)

    Args:
        weights: v, shape (B,), B >= 1.

    Returns:
        A scalar in [1/B, 1]; 1 when the weights are uniform.
    """
    return weights.sum().square() / (weights.numel() * weights.square().sum())
