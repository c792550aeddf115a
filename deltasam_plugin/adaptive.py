r"""The scale of adaptive SAM: each filter of a parameter is perturbed in proportion to its own size."""

from __future__ import annotations

from torch import Tensor

from deltasam_plugin.precision import at_least_float32

LEAST = 0.01  # added to every scale, as in the paper: what is zero can move


def filter_scale(value: Tensor) -> Tensor:
    r""":math:`T_w`, with which :math:`\epsilon = \rho\, T_w^2 g / \|T_w g\|`.

    A filter is a row of a matrix, or whatever has one index of the first dimension; in a vector each element.

    Args:
        value: of a parameter, of any shape.

    Returns:
        The L2 norm of each filter plus 0.01, to be multiplied with the parameter's gradient. Its shape is (n,) or
        (n, 1, …), its type at least fp32.

    Reference: Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
    Neural Networks. ICML 2021.
    """
    value = at_least_float32(value.detach())
    if value.dim() < 2:
        return value.abs() + LEAST
    return value.flatten(1).norm(dim=1).view(-1, *[1] * (value.dim() - 1)) + LEAST
