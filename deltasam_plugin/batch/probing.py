r"""Run forward passes at displaced weights, and measure what changes in every sample.

A direction u is drawn once per probe and shared by the batch: all samples are compared along the same direction. Its
length is relative to that of the P parameters: with probe scale s, :math:`\sigma = s\,\|w\| / \sqrt{P}` and
:math:`\|\sigma u\| \approx s \|w\|` for a model of any size. A fixed σ would not do: 0.01 moves a model of 35
million parameters by a third of their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import PerturbedParameter, displace, global_norm, restored
from deltasam_plugin.batch.measures import Measure, measured_floor
from deltasam_plugin.loss import Objective
from deltasam_plugin.precision import Rounding

SINGLE_PRECISION = Rounding()


def draw_direction(parameters: Sequence[PerturbedParameter], seed: int, signs: bool = False) -> list[Tensor]:
    """One direction over all parameters, standard normal, from generators of its own.

    Args:
        parameters: P numbers in all.
        seed: determines the direction; the global generators are neither read nor advanced.
        signs: random signs instead, +1 or -1.

    Returns:
        u, one tensor per parameter, of its shape and device, at least fp32.
    """

    def draw(values: Tensor, generator: torch.Generator) -> Tensor:
        if signs:
            return values.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        return values.normal_(generator=generator)

    return _drawn([p.value for p in parameters], seed, draw)


def draw_dither(values: Sequence[Tensor], seed: int, eps: float) -> list[Tensor]:
    """Steps of up to half the spacing of the numbers to both sides: they change how every value is rounded.

    Args:
        values: of the parameters, in the best precision that is kept of them.
        seed: as for :func:`draw_direction`. The two do not depend on each other.
        eps: spacing of the numbers near 1.

    Returns:
        One tensor per value, of its shape and device, at least fp32.
    """

    def draw(steps: Tensor, generator: torch.Generator) -> Tensor:
        return steps.uniform_(-eps / 2, eps / 2, generator=generator)

    steps = _drawn(values, ~seed, draw)
    torch._foreach_mul_(steps, torch._foreach_abs([*values]))
    return steps


def _drawn(values: Sequence[Tensor], seed: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> list[Tensor]:
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        dtype = torch.promote_types(value.dtype, torch.float32)
        groups.setdefault((value.device, dtype), []).append(index)
    generators = {device: torch.Generator(device).manual_seed(seed) for device, _ in groups}
    direction: dict[int, Tensor] = {}
    for (device, dtype), indices in groups.items():
        sizes = [values[i].numel() for i in indices]
        drawn = draw(torch.empty(sum(sizes), dtype=dtype, device=device), generators[device]).split(sizes)
        direction.update((i, part.view(values[i].shape)) for i, part in zip(indices, drawn, strict=True))
    return [direction[index] for index in range(len(values))]


def probe(
    forward: Callable[[], Objective],
    center: Objective,
    parameters: Sequence[PerturbedParameter],
    measure: Measure,
    probes: int,
    scale: float,
    seed: int,
    reached: Sequence[bool] | None = None,
    rewritten: Sequence[Tensor | None] = (),
    rounding: Rounding = SINGLE_PRECISION,
) -> tuple[Tensor, Tensor]:
    r"""Measure every sample along K directions, without gradient.

    In half precision the displacement is at least as long as the measure needs there. For a measure that subtracts
    losses, one more forward pass finds out how large rounding errors are.

    Args:
        forward: a forward pass that replays its random numbers.
        center: its result at w.
        parameters: of the model.
        measure: what is measured.
        probes: K. There are as many forward passes for each as the measure has sides.
        scale: expected length of the displacement as a fraction of the L2 norm of the parameters that are
            reached.
        seed: of the first direction; the further ones follow from it.
        reached: which parameters the losses depend on. A probe moves these, and is measured by them; by default all.
        rewritten: see :func:`~deltasam_plugin.batch.displacement.restored`.
        rounding: of the forward pass.

    Returns:
        The measurements, and the sizes below which they are rounding noise; (K, B) each. A sample whose loss at w is
        not finite has none. The parameters are what they were, also after an exception.
    """
    reached = reached or [True] * len(parameters)
    moved = [p for p, is_reached in zip(parameters, reached, strict=True) if is_reached]
    count = sum(p.parameter.numel() for p in moved)
    scale = max(scale, measure.least_scale.get(rounding.dtype, 0))
    noisy = measure.noise is not None and rounding.coarse

    def spread(steps: Sequence[Tensor]) -> list[Tensor | None]:
        drawn: Iterator[Tensor] = iter(steps)
        return [next(drawn) if is_reached else None for is_reached in reached]

    measured, floors = [], []
    with torch.no_grad(), restored(parameters, rewritten) as originals:
        every = (old if p.master is None else p.value for p, old in zip(parameters, originals, strict=True))
        values = [value for value, is_reached in zip(every, reached, strict=True) if is_reached]
        norm = global_norm(values)
        sigma = scale * norm / math.sqrt(max(count, 1))
        for number in range(probes):
            direction = spread(draw_direction(moved, seed + number, measure.signs))
            displaced = []
            for side in measure.sides:
                displace(parameters, originals, direction, side * sigma)
                displaced.append(forward())
            found, floor = measure.compare(displaced, center, rounding.eps)
            measured.append(torch.where(center.losses.isfinite(), found, torch.nan))
            floors.append(floor)
        if noisy:
            dither = spread(draw_dither(values, seed, rounding.eps))
            displace(parameters, originals, dither, torch.ones_like(sigma))
            floor = measured_floor(center.losses, forward().losses, measure.noise or 0)
            floors = [floor.expand_as(row) for row in measured]
    return torch.stack(measured), torch.stack(floors)
