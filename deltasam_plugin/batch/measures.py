r"""What a probe measures in every sample, and below which size it is rounding noise.

A probe displaces the weights along a direction u that all samples share. A measure compares what the forward passes
gave there with what the ascent's forward pass gave at w. Every loss here is the sum over one sample's tokens, exactly
as it enters the objective. Tensors in, tensors out, all in double precision: no comparison adds rounding of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltasam_plugin.batch.norms import lot_size
from deltasam_plugin.loss import Logits, Objective
from deltasam_plugin.precision import at_least_float32

# Measured by benchmarks/probe_study.py: the rounding error of a loss in units of eps * |loss|, in single precision.
ROUNDING_FACTOR = 4.0
# Likewise: the error of a sample's logits in units of eps times their own spread.
LOGIT_ROUNDING_FACTOR = 2.0
# The least floor in standard deviations of the noise, where the noise is measured: 95 % of it is below.
DEVIATIONS = 2.0


@dataclass(frozen=True)
class Measure:
    """What one probe measures in every sample.

    Attributes:
        sides: where its forward passes run, in units of the displacement: at 1, or at 1 and then at -1.
        compare: from the results at these places and at w, and eps, the spacing of the numbers, to the measurements and
            the sizes below which they are rounding, shape (B,) each.
        noise: standard deviation of its rounding error in units of that of the difference between two losses; None if
            these sizes hold in half precision too.
        signs: whether directions are random signs, which a CPU draws ten times faster. Otherwise they are standard
            normal.
        logits: whether it compares logits.
        least_scale: by dtype, the shortest displacement along which it rises above rounding, as a fraction of the L2
            norm of the parameters. Measured by benchmarks/probe_study.py.
    """

    sides: tuple[int, ...]
    compare: Callable[[Sequence[Objective], Objective, float], tuple[Tensor, Tensor]]
    noise: float | None = None
    signs: bool = False
    logits: bool = False
    least_scale: Mapping[torch.dtype, float] = field(default_factory=dict)


def second_difference(plus: Tensor, minus: Tensor, center: Tensor) -> Tensor:
    r"""The second difference of every sample's loss along one direction.

    .. math:: D_i = \ell_i(w + \sigma u) + \ell_i(w - \sigma u) - 2\,\ell_i(w) = \sigma^2 u^\top H_i u + O(\sigma^4)

    It is exact for quadratic losses at any :math:`\sigma` and zero for affine ones.

    Args:
        plus: :math:`\ell_i(w + \sigma u)`, shape (..., B).
        minus: :math:`\ell_i(w - \sigma u)`, shape (..., B).
        center: :math:`\ell_i(w)`, shape (B,).

    Returns:
        D, shape (..., B), in double precision.
    """
    plus, minus, center = (losses.detach().double() for losses in (plus, minus, center))
    return (plus - center) + (minus - center)


def first_difference(plus: Tensor, center: Tensor) -> Tensor:
    r"""The difference :math:`\ell_i(w + \sigma z) - \ell_i(w) = \sigma z^\top g_i + O(\sigma^2)`.

    With independent directions z of mean 0 and variance 1, :math:`E (z^\top g_i)^2 = \|g_i\|^2`.

    Args:
        plus: :math:`\ell_i(w + \sigma z)`, shape (..., B).
        center: :math:`\ell_i(w)`, shape (B,).

    Returns:
        Shape (..., B), in double precision.
    """
    return plus.detach().double() - center.detach().double()


def logit_change(moved: Tensor, center: Logits, batch: int) -> tuple[Tensor, Tensor]:
    r"""How far every sample's predicted distributions move, as a length, and how wide its logits are spread.

    .. math:: D_i = \Bigl(\sum_t \mathrm{Var}_{p_t}\bigl(z_t(w+\sigma u) - z_t(w)\bigr)\Bigr)^{1/2}
              = \sigma\,(u^\top G_i u)^{1/2} + O(\sigma^2), \qquad
              S_i = \Bigl(\sum_t \mathrm{Var}_{p_t}\bigl(z_t(w)\bigr)\Bigr)^{1/2}, \qquad p_t = \mathrm{softmax}(z_t(w))

    The sums run over the predictions t of sample i; Gᵢ is the Gauss-Newton matrix of its cross-entropy. To second
    order :math:`D_i^2` is twice the Kullback-Leibler divergence. What is added to all logits of a prediction cancels.

    Args:
        moved: the logits z at the displaced weights, shape (N, V).
        center: those at w, with the sample of each row.
        batch: B.

    Returns:
        D and S, shape (B,) each, double precision.
    """
    # In parts: on a CPU as the cache holds them, and elsewhere to take little memory.
    rows = max(1, 4 * lot_size(moved.device) // max(1, moved.size(1)))
    parts = zip(moved.detach().split(rows), center.values.detach().split(rows), strict=True)
    found = [_variances(at_least_float32(z), at_least_float32(at_w)) for z, at_w in parts]
    variances = torch.cat(found, dim=1)
    if center.counted is not None:
        variances = torch.where(center.counted, variances, 0)
    totals = torch.zeros(2, batch, dtype=torch.double, device=moved.device)
    change, spread = totals.index_add(1, center.samples, variances).sqrt()
    return change, spread


def _variances(moved: Tensor, center: Tensor) -> Tensor:
    """Of the change of the logits and of the logits themselves, under the predictions; (2, N)."""
    probabilities, change = center.softmax(dim=-1), moved - center
    if center.device.type != "cpu" or center.numel() == 0 or not bool(probabilities.amin() > 0):  # a GPU is not asked
        possible = probabilities > 0  # elsewhere minus infinity less minus infinity must not count
        change, center = (torch.where(possible, x, 0) for x in (change, center))
    return torch.stack([_variance(probabilities, x) for x in (change, center)])


def _variance(probabilities: Tensor, values: Tensor) -> Tensor:
    centred = values - (probabilities * values).sum(dim=-1, keepdim=True)
    return (probabilities * centred.square_()).sum(dim=-1).double()


def rounding_floor(displaced: Sequence[Tensor], center: Tensor, eps: float) -> Tensor:
    r"""The size below which a difference of losses is rounding noise, in single and double precision.

    .. math:: \tau_i = c\,\mathrm{eps}\,\tfrac12 \bigl(\overline{|\ell_i(w \pm \sigma u)|} + |\ell_i(w)|\bigr)

    Args:
        displaced: the losses at each displaced place, shape (..., B) each.
        center: those at w, shape (B,).
        eps: spacing of the numbers that the forward pass computes with, ``torch.finfo(dtype).eps``.

    Returns:
        :math:`\tau`, shape (..., B), in the unit of the losses.
    """
    sizes = [losses.detach().double().abs() for losses in displaced]
    return ROUNDING_FACTOR * eps * (sum(sizes) / len(sizes) + center.detach().double().abs()) / 2


def measured_floor(center: Tensor, dithered: Tensor, noise: float) -> Tensor:
    r"""The size below which a difference of losses is rounding noise, from what rounding really did.

    .. math:: \tau = \mathrm{noise}\,\max\Bigl(2\,\bigl(\tfrac1B \sum_i e_i^2\bigr)^{1/2},\ \max_i |e_i|\Bigr),
              \qquad e_i = \ell_i(\tilde w) - \ell_i(w)

    In half precision the error of a loss is no fixed multiple of its size: logits are rounded, and errors of tokens
    cancel out. So it is measured: :math:`\tilde w` differs from w by less than the spacing of the numbers, and the
    losses there by nothing but rounding.

    Args:
        center: :math:`\ell_i(w)`, shape (B,).
        dithered: :math:`\ell_i(\tilde w)`, shape (B,).
        noise: see :class:`Measure`.

    Returns:
        :math:`\tau`, a scalar in the unit of the losses.
    """
    errors = first_difference(dithered, center)
    return noise * torch.maximum(DEVIATIONS * errors.square().mean().sqrt(), errors.abs().amax())


def _losses(
    difference: Callable[..., Tensor],
) -> Callable[[Sequence[Objective], Objective, float], tuple[Tensor, Tensor]]:
    def compare(displaced: Sequence[Objective], center: Objective, eps: float) -> tuple[Tensor, Tensor]:
        moved = [result.losses for result in displaced]
        return difference(*moved, center.losses), rounding_floor(moved, center.losses, eps)

    return compare


def _compared_logits(displaced: Sequence[Objective], center: Objective, eps: float) -> tuple[Tensor, Tensor]:
    """Rounding is as large as if every logit moved by a multiple of eps times its distance from the mean."""
    (moved,) = displaced
    assert moved.logits is not None  # refused before
    assert center.logits is not None
    change, spread = logit_change(moved.logits.values, center.logits, center.losses.numel())
    return change, LOGIT_ROUNDING_FACTOR * eps * spread


MEASURES: dict[str, Measure] = {
    "second_difference": Measure(
        sides=(1, -1),
        compare=_losses(second_difference),
        noise=3**0.5,  # variances 1 + 1 + 4 against 1 + 1
        least_scale={torch.float16: 0.03, torch.bfloat16: 0.1},
    ),
    "first_difference": Measure(
        sides=(1,),
        compare=_losses(first_difference),
        noise=1.0,
        signs=True,
        least_scale={torch.bfloat16: 0.03},
    ),
    "logit_change": Measure(
        sides=(1,),
        compare=_compared_logits,
        signs=True,
        logits=True,
        least_scale={torch.bfloat16: 0.03},
    ),
}
