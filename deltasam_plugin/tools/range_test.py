r"""A range test for ρ: what perturbations of growing radius do to the loss and to its gradient, at the same parameters.

A few updates of the base optimizer lead away from the initial parameters, and then every ρ of both modes is measured on
the same batches without a step. The relative sharpness :math:`(L(w+\epsilon) - L(w)) / L(w)`, to first order
:math:`\rho\,\|g\|/L`, is a property of w, so that a few batches show it for all ρ alike. Whether the loss falls would
show only after hundreds of updates for each ρ, which is what the test is there to save.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from fairseq import utils
from fairseq.trainer import Trainer
from torch import Tensor
from tqdm import tqdm

from deltasam_plugin.batch.norms import global_norm
from deltasam_plugin.fairseq.errors import one_message
from deltasam_plugin.fairseq.optimizer import SharpnessAwareOptimizer
from deltasam_plugin.fairseq.refusals import refuse_unsupported
from deltasam_plugin.fairseq.scalars import SHARPNESS

# examples/sentiment learns with SAM at 0.05 and instance mode at 0.01. The range test shows 20 % and 26 % for them.
# In earlier runs with label noise SAM at 0.1 (40 %) and instance mode at 0.02 (54 %) learned too, and instance mode at
# 0.05 (147 %) stayed at chance.
RELATIVE_SHARPNESS = (0.2, 0.5)

# Settings: every update is sharpness-aware, at a radius that nothing changes; or none is after the first.
ALWAYS: dict[str, Any] = {"interval": 1, "warmup_updates": 0, "rho_schedule": "constant", "loss_budget": None}
ALWAYS |= {"descent": "perturbed", "descent_weight": None}
NEVER: dict[str, Any] = {**ALWAYS, "interval": 2**31, "rho": 0.0}


class Point(NamedTuple):
    """What a perturbation of one radius does.

    Attributes:
        rho: the radius.
        relative: (L(w + ε) − L(w)) / L(w).
        loss: L(w + ε) by sample size, base 2.
        change: ‖g' − g‖ / ‖g‖ with the sharpness-aware gradient g' and the plain one g: the mean over batches.
    """

    rho: float
    relative: float
    loss: float
    change: float


def measure(
    trainer: Trainer, optimizer: SharpnessAwareOptimizer, mode: str, grid: Sequence[float], batches: Sequence[Any]
) -> list[Point]:
    """Measure one mode at the trainer's parameters, and leave these as they are.

    Args:
        trainer: fairseq's, with δ-SAM.
        optimizer: its optimizer, δ-SAM's.
        mode: ``batch`` or ``instance``.
        grid: radii, in growing order.
        batches: of the training data.

    Returns:
        The loss at w, at radius 0, and a point for each radius.

    Raises:
        Unsupported, InvalidValue: this mode does not do for the command.
    """
    trainer.cfg.optimizer.sam_perturbation = mode
    with one_message():
        refuse_unsupported(trainer.cfg)
        group = optimizer.settings.group if mode == "instance" else 1
        optimizer.change(perturbation=mode, group=group, **ALWAYS)
    settings = optimizer.settings
    rises, changes = dict.fromkeys(grid, 0.0), dict.fromkeys(grid, 0.0)
    loss = size = 0.0
    for batch in tqdm(batches, mode, unit="batch", leave=False, file=sys.stderr):
        sample, _ = trainer._prepare_sample(batch)
        optimizer.settings = replace(settings, **NEVER)
        plain = _run(trainer, sample)
        loss, size = loss + plain.loss, size + plain.size
        for rho in grid:
            optimizer.settings = replace(settings, rho=rho)
            found = _run(trainer, sample)
            rises[rho] += found.rise
            changes[rho] += _relative_change(plain.gradient, found.gradient) / len(batches)
    unit = size * math.log(2)
    points = [Point(rho, rises[rho] / loss, (loss + rises[rho]) / unit, changes[rho]) for rho in grid]
    return [Point(0, 0, loss / unit, 0), *points]


class _Pass(NamedTuple):
    loss: float  # at w
    rise: float  # L(w + ε) − L(w)
    size: float
    gradient: list[Tensor | None]


def _run(trainer: Trainer, sample: Any) -> _Pass:
    """One sharpness-aware forward and backward pass, with the same dropout for every radius."""
    utils.set_torch_seed(trainer.cfg.common.seed + trainer.get_num_updates())
    trainer.zero_grad()
    loss, size, logged = trainer.task.train_step(
        sample, trainer.model, trainer.criterion, trainer.optimizer, trainer.get_num_updates()
    )
    gradient = [p.grad for module in (trainer.model, trainer.criterion) for p in module.parameters()]
    trainer.zero_grad()
    return _Pass(float(loss), float(logged.get(SHARPNESS, 0)), float(size), gradient)


def _relative_change(plain: list[Tensor | None], other: list[Tensor | None]) -> float:
    """‖g' − g‖ / ‖g‖, 0 if g is zero."""
    pairs = [(old, new) for old, new in zip(plain, other) if old is not None and new is not None]
    norm = float(global_norm(old for old, _ in pairs))
    return float(global_norm(new - old for old, new in pairs)) / norm if norm > 0 else 0.0


def suggestion(points: Sequence[Point], mode: str) -> str:
    """The radii whose relative sharpness is in the range, as one sentence.

    Args:
        points: from :func:`measure`.
        mode: ``batch`` or ``instance``.
    """
    first = points[1]
    if not math.isfinite(points[0].loss):
        return f"{mode}: the loss is not finite at ρ = 0 already. Measure after fewer updates (--updates)."
    finite = list(takewhile(lambda point: math.isfinite(point.relative), points))
    last = finite[-1]
    low, high = (radius_at(finite, target) for target in RELATIVE_SHARPNESS)
    if first.relative > RELATIVE_SHARPNESS[1] or last.rho == 0:
        return f"{mode}: every ρ of the grid is too large. Try smaller ones than {first.rho:g} (--grid)."
    if low is None and len(finite) < len(points):
        return (
            f"{mode}: {last.rho:g} is too small, and at {points[len(finite)].rho:g} the loss is not finite. Try values "
            "between (--grid)."
        )
    if low is None:
        return f"{mode}: every ρ of the grid is too small. Try larger ones than {last.rho:g} (--grid)."
    return f"{mode}: --sam-perturbation {mode} --sam-rho {low:.2g} to {last.rho if high is None else high:.2g}"


def radius_at(points: Sequence[Point], target: float) -> float | None:
    """The least radius at which the relative sharpness reaches `target`, interpolated; None if it does at none."""
    for before, after in pairwise(points):
        if before.relative < target <= after.relative:
            share = (target - before.relative) / (after.relative - before.relative)
            return before.rho + share * (after.rho - before.rho)
    return None
