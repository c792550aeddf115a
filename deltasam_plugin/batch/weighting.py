r"""How much each sample of a batch counts in the ascent direction.

The perturbation of δ-SAM is :math:`\epsilon = \rho \sum_i v_i g_i / \|\sum_i v_i g_i\|`. This module turns what probes
measured (:mod:`~deltasam_plugin.batch.measures`) into the weights v: tensors in, tensors out, no gradient flows through
any of it.

One function is one weighting. It gets the magnitudes m of the samples, shape (B,), with mean 1, and the number of
probes K; it returns weights up to a common factor. :func:`sample_weights` does the rest, the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltasam_plugin.batch.measures import MEASURES, Measure

Weigh = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Weighting:
    """A weighting of the samples.

    Attributes:
        name: what ``--sam-weighting`` calls it.
        measure: what its probes measure; None if it needs no probes, and weights are uniform.
        weigh: from the magnitudes (B,) and the number of probes to relative weights (B,).
    """

    name: str
    measure: Measure | None
    weigh: Weigh

    @property
    def by_logits(self) -> bool:
        """Whether its probes compare logits."""
        return self.measure is not None and self.measure.logits


WEIGHTINGS: dict[str, Weighting] = {}


def weighting(name: str, measures: str) -> Callable[[Weigh], Weigh]:
    r"""Register a weighting under a name of ``--sam-weighting``.

    The function is called as ``function(magnitudes, probes)``. The magnitude :math:`m_i` of a sample is the root mean
    square of what K probes measured in it. It is bounded from below by the rounding floor, and the mean over the batch
    is 1. The function returns weights :math:`\ge 0` of shape (B,), up to a common factor. They should not depend on
    the order of the samples. If one is negative or not finite, the whole batch is weighted uniformly.

    Args:
        name: of the weighting.
        measures: what a probe measures in a sample:

            - ``second_difference``: :math:`\ell_i(w+\sigma u) + \ell_i(w-\sigma u) - 2\ell_i(w)`, two forward passes;
            - ``first_difference``: :math:`\ell_i(w+\sigma z) - \ell_i(w)`, one forward pass;
            - ``logit_change``: how far the predicted distributions move, one forward pass.

    Raises:
        ValueError: the name is taken, or nothing is measured under that name.

    Example:
        >>> @deltasam_plugin.weighting("square_root", measures="second_difference")
        ... def square_root(magnitudes, probes):
        ...     return magnitudes.sqrt()
    """
    if name in WEIGHTINGS:
        raise ValueError(
            f"There is a weighting {name!r} already, in {WEIGHTINGS[name].weigh.__module__}. Choose another name."
        )
    if measures not in MEASURES:
        raise ValueError(f"Unknown measures={measures!r} of weighting {name!r}. Choose one of: {', '.join(MEASURES)}.")

    def register(function: Weigh) -> Weigh:
        WEIGHTINGS[name] = Weighting(name, MEASURES[measures], function)
        return function

    return register


@weighting("curvature", measures="second_difference")
def curvature(magnitudes: Tensor, probes: int) -> Tensor:
    r""":math:`v_i \propto |u^\top H_i u|`: samples whose gradient changes faster count more.

    The published method estimates its weights by Gaussian weight perturbations. Its exact constants are not available
    to us, so this is a reconstruction from its description, not a reproduction.

    Reference: Zhou, Liu, Zhang, Chen. δ-SAM: Sharpness-Aware Minimization with Dynamic Reweighting. Findings of EMNLP
    2022.
    """
    return magnitudes


@weighting("kl", measures="logit_change")
def kl(magnitudes: Tensor, probes: int) -> Tensor:
    r""":math:`v_i \propto u^\top G_i u`, with the Gauss-Newton matrix Gᵢ: the curvature of the predicted distributions.

    To second order it is twice the Kullback-Leibler divergence between the predictions at w and at w + σu. It is
    never negative, and no cancellation loses digits. u is of random signs: the mean is the trace of Gᵢ, as with
    Gaussian numbers, and its variance is less.

    References: Martens. New Insights and Perspectives on the Natural Gradient Method. JMLR 2020 (the matrix).
    Hutchinson. A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines.
    Communications in Statistics 1989 (the signs).
    """
    return magnitudes.square()


@weighting("gradient_norm", measures="first_difference")
def gradient_norm(magnitudes: Tensor, probes: int) -> Tensor:
    r""":math:`v_i \propto \exp(\lambda \|g_i\|)`: samples with large gradients count more.

    The norms are estimated by :math:`\|g_i\| \approx |\ell_i(w+\sigma z) - \ell_i(w)|/\sigma` with z of random signs.
    We divide them by their mean over the batch and take λ = 1, so that a common scale of the losses changes nothing.
    This normalization is ours: the paper's constants are not available to us.

    Reference: Luo, Harandi, Phung, Le. Unveiling m-Sharpness Through the Structure of Stochastic Gradient Noise
    (RW-SAM). arXiv 2509.18001.
    """
    return (magnitudes - magnitudes.amax()).exp()


@weighting("normalized", measures="first_difference")
def normalized(magnitudes: Tensor, probes: int) -> Tensor:
    r""":math:`v_i \propto 1/\|g_i\|`: the ascent direction is the sum of the samples' own directions.

    A few probes can find next to nothing of a gradient that they happen to be orthogonal to. Its inverse would be
    huge. So the mean square over the batch counts as one more probe of every sample. With many probes it vanishes.

    .. math:: v_i \propto \left(\frac{K m_i^2 + \overline{m^2}}{K + 1}\right)^{-1/2}

    Reference: Zhou et al., as above; :math:`a_i` constant in the weights :math:`v_i \propto a_i/\|g_i\|` that bring one
    perturbation closest to those of the samples.
    """
    squares = magnitudes.square()
    return (probes * squares + squares.mean()).rsqrt()


def uniform(magnitudes: Tensor, probes: int) -> Tensor:
    """Equal weights: plain SAM.

    Reference: Foret et al. Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR 2021.
    """
    return torch.ones_like(magnitudes)


WEIGHTINGS["uniform"] = Weighting("uniform", None, uniform)


def uniform_weights(count: int, device: torch.device | None = None) -> Tensor:
    """Equal weights v = 1/B.

    Args:
        count: B.
        device: of the result.

    Returns:
        v, shape (B,), double precision.
    """
    return torch.full((count,), 1.0 / max(count, 1), dtype=torch.double, device=device)


def sample_weights(weighting: Weighting, measured: Tensor, floor: Tensor) -> Tensor:
    r"""The weights of the samples, from what probes measured in them.

    .. math:: a_i = \max\left(\sqrt{\tfrac1K \sum_k D_{ki}^2},\ \tau\right), \qquad
              m_i = a_i / \bar a, \qquad v_i \propto \mathrm{weigh}(m, K)_i

    A common floor :math:`\tau = \max_{ki} \tau_{ki}` bounds every magnitude from below, so that a sample of which the
    probes saw nothing but rounding counts as much as the least that could have been seen, and a batch in which nothing
    was seen gets uniform weights. A non-finite measurement says that the probe left the neighbourhood in which it means
    anything: the whole batch gets uniform weights then.

    Args:
        weighting: of ``WEIGHTINGS``.
        measured: D, shape (K, B).
        floor: :math:`\tau`, broadcastable to (K, B): the size below which a measurement is rounding noise.

    Returns:
        v, shape (B,), double precision: non-negative, sum 1.

    Raises:
        ValueError: the weighting does not return one weight for each sample.
    """
    measured = measured.detach().double()
    equal = uniform_weights(measured.size(-1), measured.device)
    if equal.numel() == 0:
        return equal
    bounded = torch.maximum(root_mean_square(measured), floor.detach().double().amax())
    relative = bounded / bounded.amax()
    weights = weighting.weigh(relative / relative.mean(), len(measured)).detach()
    if weights.shape != equal.shape:
        raise ValueError(
            f"Weighting {weighting.name!r} returned weights of shape {tuple(weights.shape)}. Must be "
            f"{tuple(equal.shape)}, one for each sample. Fix its function."
        )
    weights = weights / weights.amax()  # of equal weights each is exactly 1 then
    usable = torch.isfinite(bounded).all() & torch.isfinite(weights).all() & (weights >= 0).all()
    return torch.where(usable, weights / weights.sum(), equal)


def root_mean_square(measured: Tensor) -> Tensor:
    """Over the first dimension, (K, B) to (B,).

    The largest is factored out. The squares of huge or tiny numbers would leave the range of double precision.
    """
    peak = measured.abs().amax()
    scaled = measured / torch.where(peak > 0, peak, 1)
    return scaled.square().mean(dim=0).sqrt() * peak


def effective_sample_size(weights: Tensor) -> Tensor:
    r"""Share of the batch that the weights really use.

    .. math:: \mathrm{ess} = (\textstyle\sum_i v_i)^2 / (B \sum_i v_i^2)

    Args:
        weights: v, shape (B,), B >= 1.

    Returns:
        A scalar in [1/B, 1]; 1 when the weights are uniform.
    """
    return weights.sum().square() / (weights.numel() * weights.square().sum())
