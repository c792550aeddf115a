r"""Move parameters: along given steps, along steps that are drawn, or up a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from deltasam_plugin.adaptive import filter_scale
from deltasam_plugin.batch.norms import (
    dense,
    flattened,
    global_norm,
    joined,
    lots,
    norm_of_norms,
    parts_of,
    tensor_norm,
)
from deltasam_plugin.batch.restoration import PerturbedParameter, copy_all, restored
from deltasam_plugin.precision import at_least_float32


class Drawn(NamedTuple):
    """Steps that are drawn lot by lot and kept nowhere.

    Attributes:
        moves: one per parameter, whether it moves.
        draw: called with the flat values of each lot in turn, in the best precision that is kept of them. Returns their
            steps, flat, at least fp32.
    """

    moves: Sequence[bool]
    draw: Callable[[Tensor], Tensor]


def displace(
    parameters: Sequence[PerturbedParameter],
    originals: Sequence[Tensor],
    steps: Sequence[Tensor | None] | Drawn,
    scale: Tensor,
) -> None:
    """Set every parameter to its original plus ``scale * step``; to be called inside :func:`restored`.

    Args:
        parameters: what to move.
        originals: from :func:`restored`, one per parameter.
        steps: one per parameter, of its shape; None moves nothing. Or drawn.
        scale: scalar. Where it is zero nothing moves, not even by rounding a master, whatever the steps hold.
    """
    for _ in displaced_lots(parameters, originals, steps, scale):
        pass


def displaced_lots(
    parameters: Sequence[PerturbedParameter],
    originals: Sequence[Tensor],
    steps: Sequence[Tensor | None] | Drawn,
    scale: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Like :func:`displace`, lot by lot.

    Yields:
        The new values of a lot and the original ones, flat, while a CPU's cache holds them.
    """
    moving: list[tuple[Tensor, ...]] = []
    resting = []
    draw, chosen = (steps.draw, steps.moves) if isinstance(steps, Drawn) else (None, steps)
    on_cpu = scale.device.type == "cpu"
    rests = on_cpu and not bool(scale)  # a GPU is not asked
    for p, original, step in zip(parameters, originals, chosen, strict=True):
        if step is None or step is False or rests:
            resting.append((p.parameter, original))
            continue
        kept = [p.parameter, original] if p.master is None else [p.parameter, original, p.master]
        if isinstance(step, Tensor):
            if step.shape != original.shape:
                shapes = tuple(step.shape), tuple(original.shape)
                raise RuntimeError("A step of shape {} for a parameter of shape {}.".format(*shapes))
            kept.append(step)
        moving += parts_of(*kept)
    if resting:
        copy_all(*zip(*resting, strict=True))
    kinds = [tuple(tensor.dtype for tensor in tensors[2:]) for tensors in moving]
    factors = {device: scale.to(device) for device in {tensors[0].device for tensors in moving}}
    for lot in lots([original for _, original, *_ in moving], kinds):
        targets, before, *more = zip(*(moving[i] for i in lot))
        given = [] if draw else more.pop()
        original, factor = flattened(before), factors[before[0].device]
        value = flattened(more.pop()) if more else original  # the master
        taken = draw(value) if draw else joined(given)
        # Not addcmul: it rounds an element by where it is in its tensor.
        in_place = on_cpu and len(lot) == 1 and targets[0].is_contiguous()
        if in_place and value.dtype == taken.dtype == original.dtype:  # in half precision it would round twice
            moved = torch.mul(taken, factor, out=targets[0].data.view(-1)).add_(value)
        else:
            moved = (taken * factor).add_(value).to(original.dtype)
            moved = moved if on_cpu else torch.where(factor != 0, moved, original)
            pieces = moved.split([tensor.numel() for tensor in before])
            copy_all(targets, [piece.view(old.shape) for piece, old in zip(pieces, before, strict=True)])
        yield moved, original


def mirror(parameters: Sequence[PerturbedParameter], originals: Sequence[Tensor]) -> None:
    """Move parameters to the other side of their originals: where :func:`displace` put w + d, there is w − d.

    Args:
        parameters: without masters, and not rewritten: what they hold is not w + d.
        originals: from :func:`restored`, one per parameter.
    """
    if parameters:
        torch._foreach_lerp_([p.parameter.data for p in parameters], list(originals), 2.0)


def _stretch(gradients: list[Tensor | None], scales: Sequence[Tensor]) -> None:
    """Multiply gradients with the scales of their parameters, if there are any."""
    for i, scale in enumerate(scales):
        gradient = gradients[i]
        gradients[i] = None if gradient is None else dense(gradient) * scale


@dataclass(frozen=True)
class Ascent:
    """Result of an ascent step: scalars on the parameters' device.

    Attributes:
        gradient_norm: L2 norm of the ascent gradient, 0 where it was not finite.
        moved: L2 norm by which the parameters really moved, after rounding to their precision.
        skipped: 1 where the gradient was zero or non-finite and nothing moved, else 0.
        overflowed: whether the gradient was non-finite.
    """

    gradient_norm: Tensor
    moved: Tensor
    skipped: Tensor
    overflowed: Tensor

    def to(self, device: torch.device) -> Ascent:
        """The same on the device of the loss: layers may be on several."""
        return Ascent(*(getattr(self, item.name).to(device) for item in fields(self)))


@contextmanager
def ascended(
    parameters: Sequence[PerturbedParameter],
    gradients: list[Tensor | None],
    rho: float,
    rewritten: Sequence[Tensor | None] = (),
    rise: Tensor | None = None,
    adaptive: bool = False,
) -> Iterator[Ascent]:
    r"""Within this context the parameters are :math:`w + \epsilon,\ \epsilon = \rho\,g/\|g\|`; afterwards they are w.

    Zero and non-finite gradients are told apart on the device, which nothing waits for. They give :math:`\epsilon = 0`.

    Args:
        parameters: all that may move.
        gradients: g, one per parameter, of its shape; None counts as zero. The list is emptied, to free the memory.
        rho: radius, L2 norm in parameter space.
        rewritten: as for :func:`restored`.
        rise: R, scalar. Shortens the radius to :math:`\min(\rho, R/\|g\|)`: to first order, what has the gradient g
            rises by no more than R.
        adaptive: whether :math:`\epsilon = \rho\,T_w^2 g/\|T_w g\|` instead, with the scale of
            :func:`~deltasam_plugin.adaptive.filter_scale`. Then g means :math:`T_w g` above and in the result.

    Reference: Foret et al. Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR 2021.
    """
    with restored(parameters, rewritten) as originals:
        every = zip(parameters, originals, strict=True)
        scales = [filter_scale(old if p.master is None else p.value) for p, old in every] if adaptive else []
        _stretch(gradients, scales)
        norm = global_norm(gradient for gradient in gradients if gradient is not None)
        radius = torch.full_like(norm, rho) if rise is None else (rise.to(norm) / norm).clamp(max=rho)
        step = radius / norm
        # A subnormal norm has no precision left, and a radius that is too large for it has no step.
        usable = torch.isfinite(norm) & (norm >= torch.finfo(norm.dtype).tiny) & torch.isfinite(step)
        _stretch(gradients, scales)
        moves = displaced_lots(parameters, originals, gradients, torch.where(usable, step, 0))
        moved = norm_of_norms([tensor_norm(at_least_float32(now) - at_least_float32(old)) for now, old in moves])
        gradients.clear()
        yield Ascent(torch.where(usable, norm, 0), moved, (~usable).to(norm.dtype), ~torch.isfinite(norm))
