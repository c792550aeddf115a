r"""Measure every sample's loss at both ends of random displacements.

:math:`u \sim N(0, I)` is drawn once per probe and shared by the batch: all samples are compared along the same
direction. Its length is relative to that of the P parameters: with probe scale s, :math:`\sigma = s\,\|w\| / \sqrt{P}`
and :math:`\|\sigma u\| \approx s \|w\|` for a model of any size. A fixed σ would not do: 0.01 moves a model of 35
million parameters by a third of their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import PerturbedParameter, displace, global_norm, restored


def draw_direction(parameters: Sequence[PerturbedParameter], seed: int) -> list[Tensor]:
    """One standard normal direction over all parameters, from generators of its own.

    Args:
        parameters: P numbers in all.
        seed: determines the direction; the global generators are neither read nor advanced.

    Returns:
        u, one tensor per parameter, of its shape and device, at least fp32.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, p in enumerate(parameters):
        dtype = torch.promote_types(p.value.dtype, torch.float32)
        groups.setdefault((p.value.device, dtype), []).append(index)
    generators = {device: torch.Generator(device).manual_seed(seed) for device, _ in groups}
    direction: dict[int, Tensor] = {}
    for (device, dtype), indices in groups.items():
        values = [parameters[i].value for i in indices]
        sizes = [value.numel() for value in values]
        drawn = torch.randn(sum(sizes), generator=generators[device], dtype=dtype, device=device).split(sizes)
        direction.update((i, part.view(value.shape)) for i, part, value in zip(indices, drawn, values, strict=True))
    return [direction[index] for index in range(len(parameters))]


def probe_losses(
    losses: Callable[[], Tensor],
    parameters: Sequence[PerturbedParameter],
    probes: int,
    scale: float,
    seed: int,
    reached: Sequence[bool] | None = None,
    rewritten: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor]:
    r"""Losses at :math:`w + \sigma u_k` and :math:`w - \sigma u_k`, without gradient: 2K forward passes.

    Args:
        losses: a forward pass that replays its random numbers; returns per-sample losses, shape (B,).
        parameters: of the model.
        probes: K.
        scale: expected length of the displacement as a fraction of the L2 norm of the parameters that are
            reached.
        seed: of the first direction; the further ones follow from it.
        reached: which parameters the losses depend on. A probe moves these, and is measured by them; by default all.
        rewritten: see :func:`~deltasam_plugin.batch.displacement.restored`.

    Returns:
        Two tensors of shape (K, B). The parameters are what they were, also after an exception.
    """
    reached = reached or [True] * len(parameters)
    moved = [p for p, is_reached in zip(parameters, reached, strict=True) if is_reached]
    count = sum(p.parameter.numel() for p in moved)
    plus, minus = [], []
    with torch.no_grad(), restored(parameters, rewritten) as originals:
        values = (old if p.master is None else p.value for p, old in zip(parameters, originals, strict=True))
        norm = global_norm(value for value, is_reached in zip(values, reached, strict=True) if is_reached)
        sigma = scale * norm / math.sqrt(max(count, 1))
        for probe in range(probes):
            drawn = iter(draw_direction(moved, seed + probe))
            direction = [next(drawn) if is_reached else None for is_reached in reached]
            displace(parameters, originals, direction, sigma)
            plus.append(losses().detach())
            displace(parameters, originals, direction, -sigma)
            minus.append(losses().detach())
    return torch.stack(plus), torch.stack(minus)
