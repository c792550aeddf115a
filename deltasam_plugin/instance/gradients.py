r"""What the first pass learns about the per-instance gradients, and what the second pass takes from it.

A parameter used several times (tied embeddings, shared layers) has the SUM over its uses as gradient: entries are kept
by parameter, the norm includes the products between uses, and each use's perturbation is made from the entries of all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltasam_plugin.instance.factored import Factor, coefficients, inner, lookup, right_products, step_sizes
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layout import Grouping

if TYPE_CHECKING:
    from deltasam_plugin.instance.layers.base import RecordedCall


class PerSampleGradients:
    """Per-instance gradients of every parameter, factored or summed.

    Attributes:
        factors: of matrices, one for each use.
        sums: the per-instance gradients themselves, (B, \\*shape), where these are small or cheaper.
    """

    def __init__(self) -> None:
        self.factors: defaultdict[ParameterSlice, list[Factor]] = defaultdict(list)
        self.sums: dict[ParameterSlice, Tensor] = {}
        self._grouped: dict[int, tuple[Tensor, Grouping, Tensor]] = {}

    def add(self, target: ParameterSlice, gradients: Tensor) -> None:
        """Enter per-instance gradients (B, \\*shape), which become the ledger's own."""
        if target in self.sums:
            self.sums[target].add_(gradients)
        else:
            self.sums[target] = gradients

    def grouped(self, x: Tensor, grouping: Grouping) -> Tensor:
        """``grouping.group(x)``, one and the same tensor for layers that share their input."""
        known = self._grouped.get(id(x))
        if known is None or not known[1].same(grouping):
            known = self._grouped[id(x)] = (x, grouping, grouping.group(x))
        return known[2]

    def squared_norms(self, losses: Tensor) -> Tensor:
        r""":math:`\|g_i\|^2` over all parameters, (B,), on the losses' device."""
        total = torch.zeros(losses.shape, dtype=torch.float64, device=losses.device)
        for gradients in self.sums.values():
            total += gradients.flatten(1).square().sum(1)
        products: dict[tuple[int, bool], Tensor] = {}  # of inputs, which the query, key and value projections share
        for factors in self.factors.values():
            for i, one in enumerate(factors):
                key = id(one.right), one.affine
                if key not in products:
                    products.clear()
                    products[key] = right_products(one, one)
                total += inner(one, one, products[key])
                for other in factors[i + 1 :]:
                    total += 2 * inner(one, other)
        return total

    def settle(self, losses: Tensor, rho: float) -> PerSamplePerturbation:
        """The perturbation: of length rho along each instance's gradient, where that has a direction."""
        norms, steps = step_sizes(self.squared_norms(losses), rho)
        if not bool(torch.isfinite(norms).all()):
            # 0 · inf is not 0: such an instance has no perturbation, and must not reach the others' matrix products.
            good = torch.isfinite(norms)
            self.sums = {target: _only(good, gradients) for target, gradients in self.sums.items()}
            for factors in self.factors.values():
                factors[:] = [_only_factor(good, factor) for factor in factors]
        for gradients in self.sums.values():
            gradients.mul_(steps.to(gradients.dtype).view(-1, *[1] * (gradients.dim() - 1)))
        self._grouped.clear()
        return PerSamplePerturbation(norms.to(losses.dtype), steps.to(losses.dtype), dict(self.factors), self.sums)


def _only(good: Tensor, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    return torch.where(good.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


def _only_factor(good: Tensor, factor: Factor) -> Factor:
    return Factor(_only(good, factor.left), _only(good, factor.right), factor.affine)


class PerSamplePerturbation:
    r"""The perturbations :math:`\epsilon_i = s_i g_i` of one batch.

    Attributes:
        norms: :math:`\|g_i\|` of the scaled losses, (B,).
        steps: :math:`s_i`, (B,); 0 where the norm is zero or not finite.
    """

    def __init__(
        self,
        norms: Tensor,
        steps: Tensor,
        factors: dict[ParameterSlice, list[Factor]],
        sums: dict[ParameterSlice, Tensor],
    ) -> None:
        self.norms, self.steps = norms, steps
        self._factors, self._sums = factors, sums
        self._uses = Counter((id(f.right), f.affine) for listed in factors.values() for f in listed)
        self.sites: list[RecordedCall] = []  # of the first pass; what the second pass must repeat
        self._shared: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}

    def step(self, target: ParameterSlice | None) -> Tensor | None:
        r""":math:`s_i g_i`, (B, \*shape), where it is kept in this form."""
        return None if target is None else self._sums.get(target)

    def factors(self, target: ParameterSlice | None) -> list[Factor]:
        """What the gradient of a matrix consists of."""
        return [] if target is None else self._factors.get(target, [])

    def coefficients(self, factor: Factor, x: Tensor, grouping: Grouping) -> Tensor:
        """:func:`~deltasam_plugin.instance.factored.coefficients` for input rows x (N, m), once for layers that share
        both the input and what it is multiplied with."""
        key = id(x), id(factor.right), factor.affine
        if key in self._shared:
            return self._shared[key][1]
        found = coefficients(factor, grouping.group(x), self.steps)
        if self._uses[key[1:]] > 1:
            self._shared[key] = (x, found)
        return found

    def lookup(self, target: ParameterSlice | None, index: Tensor) -> Tensor | None:
        r"""Rows of :math:`s_i G_i` for indices (B, Q): (B, Q, m), or None where nothing is added."""
        found = [lookup(factor, index) for factor in self.factors(target)]
        return torch.stack(found).sum(0) * self.steps.view(-1, 1, 1) if found else None

    def release(self) -> None:
        """Leave what backward still needs to the graph, which frees it layer by layer."""
        self._factors, self._sums = {}, {}
        self._shared.clear()
