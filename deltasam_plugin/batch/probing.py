r"""Run forward passes at displaced weights, and measure what changes in every sample.

A direction u is shared by the batch: all samples are compared along the same direction. It is drawn lot by lot and
never kept: a copy of the parameters would cost memory. The other side of w is found by reflection, or by drawing once
more where parameters are rounded masters. The length of u is relative to that of the P parameters: with probe scale s,
:math:`\sigma = s\,\|w\| / \sqrt{P}` and :math:`\|\sigma u\| \approx s \|w\|` for a model of any size. A fixed σ would
not do: 0.01 moves a model of 35 million parameters by a third of their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import Drawn, displace, mirror
from deltasam_plugin.batch.measures import Measure, measured_floor
from deltasam_plugin.batch.norms import global_norm
from deltasam_plugin.batch.restoration import PerturbedParameter, restored
from deltasam_plugin.errors import Refused
from deltasam_plugin.loss import Objective
from deltasam_plugin.precision import Rounding, at_least_float32

SINGLE_PRECISION = Rounding()
Draw = Callable[[Tensor], Tensor]  # see displacement.Drawn
SIGN, ONE = -(2**31), 0x3F800000  # the sign bit of a float32, and the bits of 1.0


def random_signs(seed: int) -> Draw:
    """A direction u of random signs, +1 or -1, the same whenever it is drawn again, in any precision.

    Args:
        seed: determines the direction. The global generators are neither read nor advanced.
    """

    def draw(values: Tensor, generator: torch.Generator) -> Tensor:
        # Every bit of a random word becomes the sign of a one: on a CPU ten times faster than random numbers.
        words = torch.empty(-(-values.numel() // 64), dtype=torch.int64, device=values.device)
        halves = words.random_(-(2**63), None, generator=generator).view(torch.int32)
        signs = halves.unsqueeze(1) << torch.arange(32, dtype=torch.int32, device=values.device)
        ones = signs.bitwise_and_(SIGN).bitwise_or_(ONE).view(torch.float32)
        return ones.view(-1)[: values.numel()].to(values.dtype)

    return _drawing(seed, draw)


def standard_normal(seed: int) -> Draw:
    """A direction u of standard normal numbers, the same whenever it is drawn again, in any precision.

    Args:
        seed: as for :func:`random_signs`.
    """

    def draw(values: Tensor, generator: torch.Generator) -> Tensor:
        numbers = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        return numbers.normal_(generator=generator).to(values.dtype)

    return _drawing(seed, draw)


def dither(seed: int, eps: float) -> Draw:
    """Steps of up to half the spacing of the numbers to both sides: they change how every value is rounded.

    Args:
        seed: as for :func:`random_signs`. The two do not depend on each other.
        eps: spacing of the numbers near 1.
    """

    def draw(values: Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty_like(values).uniform_(-eps / 2, eps / 2, generator=generator).mul_(values.abs())

    return _drawing(~seed, draw)


def _drawing(seed: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Draw:
    generators: dict[torch.device, torch.Generator] = {}

    def drawn(values: Tensor) -> Tensor:
        if values.device not in generators:
            generators[values.device] = torch.Generator(values.device).manual_seed(seed)
        return draw(at_least_float32(values), generators[values.device])

    return drawn


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
        rewritten: see :func:`~deltasam_plugin.batch.restoration.restored`.
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
    may_mirror = not any(p.master is not None or p.rewritten for p in moved)

    measured, floors = [], []
    with torch.no_grad(), restored(parameters, rewritten) as originals:
        every = (old if p.master is None else p.value for p, old in zip(parameters, originals, strict=True))
        values = [value for value, is_reached in zip(every, reached, strict=True) if is_reached]
        centers = [old for old, is_reached in zip(originals, reached, strict=True) if is_reached]
        norm = global_norm(values)
        sigma = scale * norm / math.sqrt(max(count, 1))
        direction = random_signs if measure.signs else standard_normal
        for number in range(probes):
            displaced = []
            for side in measure.sides:
                if side == -1 and may_mirror:
                    mirror(moved, centers)
                else:
                    displace(parameters, originals, Drawn(reached, direction(seed + number)), side * sigma)
                displaced.append(_without_gradients(forward))
            found, floor = measure.compare(displaced, center, rounding.eps)
            measured.append(torch.where(center.losses.isfinite(), found, torch.nan))
            floors.append(floor)
        if noisy:
            displace(parameters, originals, Drawn(reached, dither(seed, rounding.eps)), torch.ones_like(sigma))
            floor = measured_floor(center.losses, _without_gradients(forward).losses, measure.noise or 0)
            floors = [floor.expand_as(row) for row in measured]
    return torch.stack(measured), torch.stack(floors)


def _without_gradients(forward: Callable[[], Objective]) -> Objective:
    """Run a pass of a probe.

    Raises:
        Refused: the pass takes gradients itself.
    """
    try:
        return forward()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise Refused(
            "The forward pass takes gradients itself (a gradient penalty, adversarial inputs). Probes run it without "
            "gradients. Choose --sam-weighting uniform, which has no probes."
        ) from error
