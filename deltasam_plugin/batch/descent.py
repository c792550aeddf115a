r"""What the base optimizer descends along: a function of the gradients at w and at w + ε.

One function is one descent (``--sam-descent``). It gets the gradient :math:`\tilde g` at w + ε and its change
:math:`d = \tilde g - g` since w, and a weight. Where nothing changes it returns :math:`\tilde g`: at a radius of zero
each is the base optimizer's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltasam_plugin.batch.norms import dense
from deltasam_plugin.batch.orthogonal import orthogonal_part

Descend = Callable[[Sequence[Tensor], Sequence[Tensor], float], list[Tensor]]


@dataclass(frozen=True)
class Descent:
    """A descent.

    Attributes:
        weight: what ``--sam-descent-weight`` is by default; None if the descent has no weight.
        function: from the gradient at w + ε, its change and the weight to the gradient that is handed over.
    """

    weight: float | None
    function: Descend


DESCENTS: dict[str, Descent] = {}


def _register(name: str, weight: float | None) -> Callable[[Descend], Descend]:
    def register(function: Descend) -> Descend:
        DESCENTS[name] = Descent(weight, function)
        return function

    return register


@_register("perturbed", weight=None)
def perturbed(gradient: Sequence[Tensor], change: Sequence[Tensor], weight: float) -> list[Tensor]:
    r""":math:`\tilde g`, as all of SAM's relatives but the two below."""
    return list(gradient)


@_register("weighted", weight=9.0)
def weighted(gradient: Sequence[Tensor], change: Sequence[Tensor], weight: float) -> list[Tensor]:
    r""":math:`(1 - a)\,g + a\,\tilde g = \tilde g + (a - 1)\,d`, the gradient of the loss plus a times the sharpness.

    With a = 1 it is SAM, with a = 0 the base optimizer. The paper calls :math:`a = \gamma/(1 - \gamma)`; the default is
    its γ = 0.9. The paper also has the base optimizer take its step along g alone and adds the sharpness to it. Here
    the base optimizer sees the sum.

    Reference: Yue, Jiang, Ye, Gao, Liu, Zhang. Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term (WSAM). KDD 2023.
    """
    return [g + (weight - 1) * d for g, d in zip(gradient, change, strict=True)]


@_register("surrogate_gap", weight=0.4)
def surrogate_gap(gradient: Sequence[Tensor], change: Sequence[Tensor], weight: float) -> list[Tensor]:
    r""":math:`\tilde g - \alpha\,g_\perp`, less the part of g that is orthogonal to :math:`\tilde g`.

    That part lowers L(w) alone; without it the gap between both losses shrinks. :math:`g = \tilde g - d`, so
    :math:`g_\perp = -d_\perp`, which does not cancel. α is the weight, by default 0.4. The paper tunes it.

    Reference: Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training (GSAM). ICLR 2022.
    """
    parts = orthogonal_part(change, gradient)
    return [g + weight * part for g, part in zip(gradient, parts, strict=True) if part is not None]


def backward_along(
    descend: Descend,
    weight: float,
    at_w: Mapping[Tensor, Tensor | None],
    scale: Tensor,
    loss: Tensor,
) -> None:
    """Run the second backward pass, and accumulate in ``.grad`` what the base optimizer is to get.

    The accumulation is a backward pass of its own, from the leaves. It fires the hooks on which distributed training
    relies, once.

    Args:
        descend: a function of ``DESCENTS``.
        weight: for it.
        at_w: all leaves that the loss may depend on, with its gradients at w; None counts as no change.
        scale: factor on the loss, the same as at w.
        loss: of the second forward pass, scalar.
    """
    leaves = [leaf for leaf in at_w if leaf.requires_grad]
    found = torch.autograd.grad(loss, leaves, scale.to(loss.dtype), allow_unused=True)
    reached = {leaf: gradient for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None}
    gradients, change = [dense(gradient) for gradient in reached.values()], []
    for leaf, gradient in zip(reached, gradients, strict=True):
        before = at_w[leaf]
        change.append(torch.zeros_like(gradient) if before is None else gradient - dense(before))
    handed = [g.to(leaf.dtype) for leaf, g in zip(reached, descend(gradients, change, weight), strict=True)]
    handed = [g.sparse_mask(f.coalesce()) if f.is_sparse else g for f, g in zip(reached.values(), handed, strict=True)]
    torch.autograd.backward([*reached], handed)
