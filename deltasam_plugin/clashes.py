"""Settings that do not go together, each pair with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deltasam_plugin.settings import Settings


class Clash(NamedTuple):
    """Two settings that mean nothing together, or would cost a pass of their own.

    Attributes:
        name: of the setting that is refused.
        other: the one that it does not go with.
        found: whether they meet.
        reason, remedy: for the message.
    """

    name: str
    other: str
    found: Callable[[Settings], bool]
    reason: str
    remedy: str


CLASHES = (
    Clash(
        "group",
        "perturbation",
        lambda given: given.group > 1 and given.perturbation == "batch",
        "there all samples share one.",
        "Use --sam-perturbation instance",
    ),
    Clash(
        "ascent",
        "perturbation",
        lambda given: given.ascent != "gradient" and given.perturbation == "instance",
        "a momentum belongs to no sample.",
        "Use --sam-perturbation batch",
    ),
    Clash(
        "descent",
        "perturbation",
        lambda given: given.descent != "perturbed" and given.perturbation == "instance",
        "its first pass gives no gradient of the parameters.",
        "Use --sam-perturbation batch",
    ),
    Clash(
        "loss_budget",
        "ascent",
        lambda given: given.loss_budget is not None and given.ascent == "momentum",
        "without a gradient at w nothing tells how far the loss rises.",
        "Use --sam-ascent gradient",
    ),
    Clash(
        "descent",
        "ascent",
        lambda given: given.descent != "perturbed" and given.ascent == "momentum",
        "no pass gives the gradient at w.",
        "Use --sam-ascent gradient",
    ),
    Clash(
        "descent",
        "weighting",
        lambda given: given.descent != "perturbed" and given.weighting != "uniform",
        "the gradient at w is then a reweighted one.",
        "Use --sam-weighting uniform",
    ),
    Clash(
        "descent_weight",
        "descent",
        lambda given: given.descent_weight is not None and given.descent == "perturbed",
        "it has no weight.",
        "Use --sam-descent weighted or surrogate_gap",
    ),
)
