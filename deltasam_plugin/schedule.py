"""When parameters are perturbed, and how far: functions of the update, which a resumed run continues."""

from __future__ import annotations

from typing import Any

from deltasam_plugin.settings import Settings

GREATEST_LR = "delta_sam_greatest_lr"


def perturbs(settings: Settings, update: int) -> bool:
    """Whether this update is sharpness-aware.

    Args:
        settings: validated settings.
        update: number of updates before it.
    """
    return update % settings.interval == 0


def radius(settings: Settings, update: int, relative_lr: float) -> float:
    r"""The radius of an update, :math:`\rho\,\min(1, (t + 1)/N)` with N updates of warm-up.

    With the schedule ``lr`` it is :math:`\rho` times the relative learning rate after the warm-up.

    Args:
        settings: validated settings.
        update: t, number of updates before it.
        relative_lr: the learning rate as a fraction of its greatest. More counts as 1.

    Returns:
        The radius, L2 norm in parameter space.
    """
    if update < settings.warmup_updates:
        return settings.radius * (update + 1) / settings.warmup_updates
    return settings.radius * (min(1.0, relative_lr) if settings.rho_schedule == "lr" else 1.0)


def relative_lr(settings: Settings, group: dict[str, Any]) -> float:
    """A learning rate as a fraction of the greatest so far, or of a greater one that a scheduler of torch announces.

    Args:
        settings: validated settings.
        group: of parameters; keeps the greatest rate for the next update, and in checkpoints.
    """
    if settings.rho_schedule != "lr":
        return 1.0
    known = (group.get(name, 0.0) for name in (GREATEST_LR, "initial_lr", "max_lr", "lr"))
    group[GREATEST_LR] = greatest = max(map(float, known))
    return float(group["lr"]) / greatest if greatest else 1.0
