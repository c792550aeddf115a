"""Which weights the engine perturbs: reported and checked against autograd, never assumed; and what it refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layers.base import RecordedCall
from deltasam_plugin.precision import at_least_float32

TOLERATED = 0.01  # share of the weights that may stay unperturbed
ATTEMPTS = 3  # batches after which a gradient that is always zero counts as verified
REMEDY = 'choose --sam-perturbation batch (perturbation="batch" in Python)'


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
        self._attempts: dict[str, int] = {}
        self._warned = 0

    @property
    def uncovered(self) -> list[Tensor]:
        """The parameters that stay unperturbed."""
        return [self._parameters[name] for name in self._uncovered]

    def covers(self, target: ParameterSlice) -> bool:
        """Whether the parameter is perturbed."""
        return target.name not in self._uncovered

    def exclude(self, reasons: Mapping[str, str]) -> None:
        """Take parameters out of coverage.

        Raises:
            RuntimeError: these and the earlier ones hold more than the tolerated share of the weights.
        """
        self._uncovered = {**reasons, **self._uncovered}
        if self._share() > TOLERATED:
            raise RuntimeError(
                f"Per-instance perturbation does not cover {self._listing()}. Must be at most {TOLERATED:.0%}: linear, "
                "embedding, layer norm and convolution layers are covered, recurrent layers and parameters used in "
                f"plain arithmetic are not. Remedy: {REMEDY}."
            )

    def warn(self) -> None:
        """Name what stays unperturbed, once."""
        if len(self._uncovered) > self._warned:
            warnings.warn(f"Per-instance perturbation leaves unperturbed {self._listing()}.", stacklevel=4)
        self._warned = len(self._uncovered)

    def _share(self) -> float:
        return sum(self._parameters[name].numel() for name in self._uncovered) / max(self._total, 1)

    def _listing(self) -> str:
        names = ", ".join(f"{name} ({reason})" for name, reason in sorted(self._uncovered.items()))
        return f"{self._share():.2%} of the weights: {names}"

    def unverified(self) -> list[str]:
        """Parameters whose coverage is yet to be checked."""
        return sorted(self._parameters.keys() - self._verified - self._uncovered.keys())

    def verify(self, true: Mapping[str, Tensor | None], arrived: Sequence[tuple[RecordedCall, Tensor]]) -> None:
        """Compare weight gradients made from recorded rows with autograd's own.

        Args:
            true: autograd's gradients, None for unused parameters.
            arrived: recorded calls with their output gradients.

        Raises:
            RuntimeError: as :meth:`exclude`.
        """
        found = {name: torch.zeros_like(at_least_float32(g)) for name, g in true.items() if g is not None}
        for site, gradient in arrived:
            for target, dense in site.operation.dense(site, gradient).items():
                if target.name in found:
                    found[target.name][target.start : target.stop] += dense
        squares = [at_least_float32(g).square().sum() for g in true.values() if g is not None]
        whole = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        coarsest = max((torch.finfo(gradient.dtype).eps for _, gradient in arrived), default=0.0)
        missed = {}
        for name, own in true.items():
            self._attempts[name] = self._attempts.get(name, 0) + 1
            if own is None:
                continue
            norm = float(at_least_float32(own).norm())
            # Some gradients are zero in exact arithmetic (a key's bias): hold rounding against the whole gradient.
            allowed = coarsest**0.5 * max(norm, 0.1 * whole)
            if not float((found[name] - at_least_float32(own)).norm()) <= allowed:
                missed[name] = "used outside the covered layers"
            elif norm > 0 or self._attempts[name] >= ATTEMPTS:
                self._verified.add(name)
        if math.isfinite(whole):  # an overflow says nothing about coverage
            self.exclude(missed)


def mixed_samples(site: RecordedCall) -> str:
    """The message for rows that several samples' losses depend on."""
    return (
        f"Per-instance perturbation: several samples' losses depend on the same rows of {_place(site)}. Each row must "
        "belong to one sample: batch normalization in training, in-batch negatives and inputs shared by all samples do "
        f"not qualify. Otherwise {REMEDY}."
    )


def no_layout(site: RecordedCall, batch: int) -> str:
    """The message for rows whose order is none of the known ones."""
    return (
        f"Per-instance perturbation: {_place(site)} has rows of leading sizes {site.lead} for {batch} samples in no "
        "recognisable order. Rows must be in batch or time order, or listed: for a layer that sees selected positions, "
        f"say which sample each is from (rows=...). Otherwise {REMEDY}."
    )


def not_a_replay(site: RecordedCall | None, key: tuple[Any, ...] | None = None, lead: tuple[int, ...] = ()) -> str:
    """The message for a second pass that is not the first one's repetition."""
    expected = "no further call" if site is None else f"{_place(site)} with leading sizes {site.lead}"
    found = "ends" if key is None else f"calls {_name(key)} with leading sizes {lead}"
    return (
        f"Per-instance perturbation: the second pass {found} where the first had "
        f"{expected}. Both passes must run the same layers: replay the random numbers, on the same batch. "
        f"With activation checkpointing, {REMEDY}."
    )


def _place(site: RecordedCall) -> str:
    return _name(site.key)


def _name(key: tuple[Any, ...]) -> str:
    operation, weight, bias = key[:3]
    return f"{operation}({', '.join(target.name for target in (weight, bias) if target is not None)})"
