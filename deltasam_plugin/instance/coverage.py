"""Which parameters the engine perturbs: reported and checked against autograd, never assumed; and what it refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deltasam_plugin.errors import Refused, listing
from deltasam_plugin.instance.slices import ParameterSlice
from deltasam_plugin.precision import at_least_float32

TOLERATED = 0.01  # share of the weights that may stay unperturbed
REMEDY = 'choose --sam-perturbation batch (perturbation="batch" in Python)'

MIXED = "several samples' losses depend on the same rows"
DETACHED = "also used behind detach(), argmax() or in a branch that the losses do not depend on"
UNKNOWN = "which of its rows belong to which sample cannot be told"
UNSEEN = "used outside the covered layers"


class Coverage:
    """Bookkeeping over the trainable parameters.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._total = sum(parameter.numel() for parameter in parameters.values())
        self._uncovered: dict[str, str] = {}
        self._verified: set[str] = set()
        self._warned = 0

    @property
    def uncovered(self) -> list[Tensor]:
        """The parameters that stay unperturbed."""
        return [self._parameters[name] for name in self._uncovered]

    def covers(self, part: ParameterSlice | None) -> bool:
        """Whether this is a parameter that is perturbed."""
        return part is not None and part.name not in self._uncovered

    def exclude(self, reasons: Mapping[str, str]) -> bool:
        """Take parameters out of coverage.

        Returns:
            Whether any of them was covered.

        Raises:
            Refused: these and the earlier ones hold more than the tolerated share of the weights.
        """
        before = len(self._uncovered)
        self._uncovered = {**reasons, **self._uncovered}
        if self._share() > TOLERATED:
            raise Refused(
                f"Instance mode does not cover {self._listing()}. Must be at most {TOLERATED:.0%}: linear, "
                "embedding, normalization and convolution layers are covered, recurrent layers and parameters used in "
                f"other arithmetic are not. Each row of a layer must belong to one sample: batch normalization in "
                "training and in-batch negatives do not qualify. Where rows are in no order, say which sample each is "
                f"from (rows=... in Python, a per-sample loss function's third result). Remedy: {REMEDY}."
            )
        return len(self._uncovered) > before

    def warn(self) -> None:
        """Name what stays unperturbed, once."""
        if len(self._uncovered) > self._warned:
            warnings.warn(f"Instance mode leaves unperturbed {self._listing()}.", stacklevel=4)
        self._warned = len(self._uncovered)

    def _share(self) -> float:
        return sum(self._parameters[name].numel() for name in self._uncovered) / max(self._total, 1)

    def _listing(self) -> str:
        largest = sorted(self._uncovered, key=lambda name: (-self._parameters[name].numel(), name))
        reasons = [f"{name} ({self._uncovered[name]})" for name in largest]
        return f"{self._share():.2%} of the weights: {listing(reasons)}"

    def names(self) -> list[str]:
        """Parameters that are perturbed, as far as is known."""
        return sorted(self._parameters.keys() - self._uncovered.keys())

    def unverified(self) -> list[str]:
        """Those whose coverage was never checked."""
        return [name for name in self.names() if name not in self._verified]

    def verify(
        self, true: Mapping[str, Tensor], totals: Iterable[tuple[ParameterSlice, Tensor]], eps: float
    ) -> dict[str, str]:
        """Compare the sum of the per-sample gradients with autograd's own gradients.

        A parameter counts as verified once its gradient was not zero and both were equal.

        Args:
            true: autograd's gradients, of parameters that the losses depend on.
            totals: sums over the samples, by slice; several for one slice are added.
            eps: of the coarsest precision among the output gradients.

        Returns:
            Parameters for which they differ, with the reason.
        """
        dense = {n: at_least_float32(g.to_dense() if g.is_sparse else g) for n, g in true.items()}
        found = {name: torch.zeros_like(gradient) for name, gradient in dense.items()}
        for part, gradient in totals:
            if part.name in found:
                part.of(found[part.name]).add_(gradient)
        whole = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in dense.values()))
        if not math.isfinite(whole):
            return {}  # an overflow says nothing about coverage
        missed = {}
        for name, gradient in dense.items():
            norm = float(gradient.norm())
            # Some gradients are zero in exact arithmetic (a key's bias): hold rounding against the whole gradient.
            if not float((found[name] - gradient).norm()) <= eps**0.5 * max(norm, 0.1 * whole):
                missed[name] = UNSEEN
            elif norm > 0:
                self._verified.add(name)
        return missed
