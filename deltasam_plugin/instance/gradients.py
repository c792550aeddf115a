r"""Per-sample gradients of the first pass, and the per-sample perturbation made of them.

A parameter that is used several times (tied embeddings, shared layers) has the SUM over its uses as gradient. Entries
are therefore kept by parameter, norms include the products between uses, and the perturbation of each use is made of
the entries of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltasam_plugin.instance.factored import (
    Factor,
    coefficients,
    inner,
    lookup,
    right_products,
    step_sizes,
    sum_over_samples,
)
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layout import Grouping
from deltasam_plugin.instance.memo import Memo
from deltasam_plugin.precision import at_least_float32

SMALL = 2**14  # numbers in a sample's gradient that is joined with others


def grouped(grouping: Grouping, rows: Tensor) -> Tensor:
    """``grouping.group(rows)``, as a function for :class:`Memo`."""
    return grouping.group(rows)


class PerSampleGradients:
    """Per-sample gradients of every parameter, factored or formed.

    Attributes:
        factors: of matrices, one for each use.
        formed: the per-sample gradients themselves, (B, \\*shape), where these are small or cheaper.
        once: for rows that several layers read.
    """

    def __init__(self) -> None:
        self.factors: defaultdict[ParameterSlice, list[Factor]] = defaultdict(list)
        self.formed: dict[ParameterSlice, Tensor] = {}
        self.once = Memo()

    def add(self, part: ParameterSlice, gradients: Tensor) -> None:
        """Add per-sample gradients (B, \\*shape). The tensor is kept and written to."""
        if part.transposed:
            gradients = gradients.transpose(1, 2)
        if part.upright in self.formed:
            self.formed[part.upright].add_(gradients)
        else:
            self.formed[part.upright] = gradients

    def add_factor(self, part: ParameterSlice, factor: Factor) -> None:
        """Add the per-sample gradients of one use of a matrix."""
        self.factors[part.upright].append(factor.transposed if part.transposed else factor)

    def totals(self, shapes: dict[ParameterSlice, torch.Size]) -> Iterator[tuple[ParameterSlice, Tensor]]:
        """The sum over the samples of what was added: parameter slices, some repeatedly, and their gradients.

        Args:
            shapes: of the matrices that have factors.
        """
        for part, gradients in self.formed.items():
            yield part, gradients.sum(0)
        for part, factors in self.factors.items():
            for factor in factors:
                yield part, sum_over_samples(factor, shapes[part])
                if factor.bias is not None:
                    yield factor.bias, at_least_float32(factor.left).sum((0, 1))

    def squared_norms(self, losses: Tensor) -> Tensor:
        r""":math:`\|g_i\|^2` over all parameters, (B,), double precision, on the losses' device."""
        return self._squared_norms(losses, list(self._blocks().values()))

    def _squared_norms(self, losses: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        parts = [gradients.square().sum(1) for gradients in blocks]
        once = Memo(size=1)  # query, key and value projections have the same right vectors
        for factors in self.factors.values():
            for i, one in enumerate(factors):
                parts.append(inner(one, one, once(right_products, one.right, one.right, one.bias is not None)))
                for other in factors[i + 1 :]:
                    affine = one.bias is not None and other.bias is not None
                    parts.append(2 * inner(one, other, right_products(one.right, other.right, affine)))
        if not parts:
            return torch.zeros(losses.shape, dtype=torch.float64, device=losses.device)
        return torch.stack(parts).sum(0, dtype=torch.float64)

    def _blocks(self) -> dict[tuple[ParameterSlice, ...], Tensor]:
        """What is formed, flattened to (B, P); small gradients side by side, because each kernel must be launched."""
        small = tuple(part for part, gradients in self.formed.items() if gradients.flatten(1).shape[1] <= SMALL)
        blocks: dict[tuple[ParameterSlice, ...], Tensor] = {}
        blocks |= {(part,): self.formed[part].flatten(1) for part in self.formed if part not in small}
        if small:
            blocks[small] = torch.cat([self.formed[part].flatten(1) for part in small], dim=1)
        return blocks

    def perturbation(self, losses: Tensor, rho: float) -> PerSamplePerturbation:
        """The perturbation of length rho along each sample's gradient, where that has a direction. Spends `self`."""
        blocks = self._blocks()
        norms, steps = step_sizes(self._squared_norms(losses, list(blocks.values())), rho)
        finite = torch.isfinite(norms)
        # A GPU is not waited for. There such a sample makes the whole gradient non-finite, as it does at w itself.
        if not norms.is_cuda and not bool(finite.all()):
            # 0 · inf is not 0: the factors of such a sample must not reach the others' matrix products.
            blocks = {parts: _where(finite, gradients) for parts, gradients in blocks.items()}
            for factors in self.factors.values():
                factors[:] = [Factor(_where(finite, f.left), _where(finite, f.right), f.bias) for f in factors]
        formed: dict[ParameterSlice, Tensor] = {}
        for parts, gradients in blocks.items():
            shapes = [self.formed[part].shape[1:] for part in parts]
            pieces = gradients.mul_(steps.to(gradients.dtype).unsqueeze(1)).split([s.numel() for s in shapes], dim=1)
            formed |= {part: piece.unflatten(1, shape) for part, piece, shape in zip(parts, pieces, shapes)}
        dtype = torch.promote_types(losses.dtype, torch.float32)
        return PerSamplePerturbation(norms.to(dtype), steps.to(dtype), dict(self.factors), formed)


def _where(finite: Tensor, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    return torch.where(finite.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


class PerSamplePerturbation:
    r"""The perturbations :math:`\epsilon_i = s_i g_i` of one batch.

    Attributes:
        norms: :math:`\|g_i\|` of the scaled losses, (B,), at least fp32.
        steps: :math:`s_i`, (B,), of the same type; 0 where the norm is zero or not finite.
    """

    def __init__(
        self,
        norms: Tensor,
        steps: Tensor,
        factors: dict[ParameterSlice, list[Factor]],
        formed: dict[ParameterSlice, Tensor],
    ) -> None:
        self.norms, self.steps = norms, steps
        self._factors, self._formed = factors, formed
        self._once = Memo(size=1)

    def step(self, part: ParameterSlice | None) -> Tensor | None:
        r""":math:`s_i g_i`, (B, \*shape), where it is kept in this form."""
        step = None if part is None else self._formed.get(part.upright)
        return step.transpose(1, 2) if step is not None and part is not None and part.transposed else step

    def factors(self, part: ParameterSlice | None) -> list[Factor]:
        """What the gradient of a matrix consists of."""
        factors = [] if part is None else self._factors.get(part.upright, [])
        return [factor.transposed for factor in factors] if part is not None and part.transposed else factors

    def coefficients(self, factor: Factor, x: Tensor, grouping: Grouping) -> Tensor:
        """:func:`~deltasam_plugin.instance.factored.coefficients` for input rows x (N, m)."""
        return self._once(self._coefficients, factor.right, factor.bias is not None, x, grouping)

    def _coefficients(self, right: Tensor, affine: bool, x: Tensor, grouping: Grouping) -> Tensor:
        return coefficients(right, affine, grouping.group(x), self.steps)

    def lookup(self, part: ParameterSlice | None, index: Tensor) -> Tensor | None:
        r"""Rows of :math:`s_i G_i` for indices (B, Q): (B, Q, m), or None where nothing is added."""
        found = [lookup(factor, index) for factor in self.factors(part)]
        return torch.stack(found).sum(0) * self.steps.view(-1, 1, 1) if found else None

    def of_samples(self, chosen: Tensor) -> PerSamplePerturbation:
        """The same for the chosen samples, (B,) bool; none for the others. A copy."""
        formed = {part: step * chosen.view(-1, *[1] * (step.dim() - 1)) for part, step in self._formed.items()}
        return PerSamplePerturbation(self.norms, self.steps * chosen, self._factors, formed)

    def release(self) -> None:
        """Leave what backward still needs to the graph, which frees it layer by layer."""
        self._factors, self._formed = {}, {}
        self._once.clear()
