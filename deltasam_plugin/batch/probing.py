r"""Measure every sample's loss on both sides of the weights along random directions.

:math:`u \sim N(0, I)` is drawn once per probe and shared by the batch, so that the samples are compared along the same
direction. The length is relative: :math:`\sigma = s\,\|w\| / \sqrt{P}` for P weights and probe scale s, so that
:math:`\|\sigma u\| \approx s \|w\|` whatever the size of the model. (A fixed σ per weight is no unit: 0.01 moves a
model of 35 million weights by a third of their own length.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import PerturbedParameter, displace, global_norm, restored


def draw_direction(weights: Sequence[PerturbedParameter], seed: int) -> list[Tensor]:
    """One standard normal direction over all weights, from generators of its own.

    Args:
        weights: P numbers in all.
        seed: determines the direction; the global generators are neither read nor advanced.

    Returns:
        u, one tensor per weight, of its shape and device, at least fp32.
    """
    generators: dict[torch.device, torch.Generator] = {}
    direction = []
    for weight in weights:
        exact = weight.exact
        if exact.device not in generators:
            generators[exact.device] = torch.Generator(device=exact.device).manual_seed(seed)
        dtype = torch.promote_types(exact.dtype, torch.float32)
        direction.append(torch.randn(exact.shape, generator=generators[exact.device], dtype=dtype, device=exact.device))
    return direction


def probe_losses(
    losses: Callable[[], Tensor], weights: Sequence[PerturbedParameter], probes: int, scale: float, seed: int
) -> tuple[Tensor, Tensor]:
    r"""Losses at :math:`w + \sigma u_k` and :math:`w - \sigma u_k`, without gradient: 2K forward passes.

    Args:
        losses: a forward pass that replays its random numbers; returns per-sample losses, shape (B,).
        weights: all that a probe moves.
        probes: K.
        scale: expected length of the displacement as a fraction of the weights' L2 norm.
        seed: of the first direction; the further ones follow from it.

    Returns:
        Two tensors of shape (K, B). The weights are what they were, also after an exception.
    """
    count = sum(weight.parameter.numel() for weight in weights)
    plus, minus = [], []
    with torch.no_grad(), restored(weights) as saved:
        sigma = scale * global_norm(weight.exact for weight in weights) / math.sqrt(max(count, 1))
        for probe in range(probes):
            direction = draw_direction(weights, seed + probe)
            displace(weights, saved, direction, sigma)
            plus.append(losses().detach())
            displace(weights, saved, direction, -sigma)
            minus.append(losses().detach())
    return torch.stack(plus), torch.stack(minus)
