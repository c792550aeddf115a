r"""Per-sample gradients of the first pass, and the per-sample perturbation made of them.

A parameter that is used several times (tied embeddings, shared layers) has the SUM over its uses as gradient. Entries
are therefore kept by parameter, norms include the products between uses, and the perturbation of each use is made of
the entries of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

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
from deltasam_plugin.instance.layout import Grouping
from deltasam_plugin.instance.memo import Memo
from deltasam_plugin.instance.slices import ParameterSlice
from deltasam_plugin.precision import at_least_float32

SMALL = 2**14  # numbers in a sample's gradient that is joined with others
ScaleOf = Callable[[ParameterSlice], Tensor]


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

    def add_rows(self, part: ParameterSlice, index: Tensor, rows: Tensor, shape: torch.Size) -> None:
        """Add to rows of per-sample gradients that are formed.

        Args:
            part: a table (n, m).
            index: v (B, T) integer.
            rows: what is added to the rows v, (B, T, m).
            shape: (n, m).
        """
        batch = len(index)
        if part not in self.formed:
            self.formed[part] = rows.new_zeros(batch, *shape)
        offsets = torch.arange(batch, device=index.device).unsqueeze(1) * shape[0]
        self.formed[part].flatten(0, 1).index_add_(0, (index + offsets).flatten(), rows.flatten(0, 1))

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

    def _squared_norms(self, losses: Tensor, joined: Tensor | None) -> Tensor:
        r""":math:`\|g_i\|^2` over all parameters, (B,), double precision, on the losses' device.

        Sums are taken in the order of the layers, so that every process rounds them alike.
        """
        parts, small = [] if joined is None else [joined.square().sum(1)], self._small()
        for gradients in (gradients for part, gradients in self.formed.items() if part not in small):
            # By rows, to read the gradients once: fp32 loses nothing over so few elements.
            rows = gradients.flatten(2) if gradients.dim() > 2 else gradients.unsqueeze(1)
            parts.append(torch.linalg.vector_norm(rows, dim=2).square().sum(1))
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

    def _small(self) -> list[ParameterSlice]:
        """What is formed and has few elements. It is joined, because each kernel must be launched."""
        return [part for part, gradients in self.formed.items() if gradients[0].numel() <= SMALL]

    def _joined(self) -> Tensor | None:
        small = [self.formed[part].flatten(1) for part in self._small()]
        return torch.cat(small, dim=1) if small else None

    def _stretch(self, scale_of: ScaleOf) -> None:
        """Multiply every gradient with the scale of its parameter."""
        for part, gradients in self.formed.items():
            gradients.mul_(scale_of(part))
        for part, factors in self.factors.items():
            scale = scale_of(part).flatten()
            factors[:] = [
                Factor(f.left, f.right * scale[f.left].unsqueeze(2)) if f.indexed else Factor(f.left * scale, f.right)
                for f in factors
            ]

    def perturbation(
        self, losses: Tensor, rho: float, rise: Tensor | None = None, scale_of: ScaleOf | None = None
    ) -> PerSamplePerturbation:
        """The perturbation along each sample's gradient, where that has a direction. Spends `self`.

        Args:
            losses: (B,).
            rho, rise: as for :func:`~deltasam_plugin.instance.factored.step_sizes`.
            scale_of: from a part of a parameter to the scale of its filters, see
                :func:`~deltasam_plugin.adaptive.filter_scale`. Norms are those of the scaled gradients then. No factor
                may carry a bias.
        """
        if scale_of is not None:
            self._stretch(scale_of)
        joined = self._joined()
        norms, steps = step_sizes(self._squared_norms(losses, joined), rho, rise)
        lengths = steps * norms
        if scale_of is not None:
            self._stretch(scale_of)
            joined = self._joined()
            lengths = steps * self._squared_norms(losses, joined).sqrt()
        finite = torch.isfinite(norms)
        # A GPU is not waited for. There such a sample makes the whole gradient non-finite, as it does at w itself.
        if not norms.is_cuda and not bool(finite.all()):
            # 0 · inf is not 0: the factors of such a sample must not reach the others' matrix products.
            joined = None if joined is None else _where(finite, joined)
            self.formed = {part: _where(finite, gradients) for part, gradients in self.formed.items()}
            for factors in self.factors.values():
                factors[:] = [Factor(_where(finite, f.left), _where(finite, f.right), f.bias) for f in factors]
        scaled: dict[ParameterSlice, Tensor] = {}
        if joined is not None:
            shapes = {part: self.formed.pop(part).shape[1:] for part in self._small()}
            pieces = joined.mul_(steps.to(joined.dtype).unsqueeze(1)).split([s.numel() for s in shapes.values()], dim=1)
            scaled = {part: piece.unflatten(1, shape) for (part, shape), piece in zip(shapes.items(), pieces)}
        dtype = torch.promote_types(losses.dtype, torch.float32)
        lengths = torch.where(steps > 0, lengths, 0).to(dtype)
        return PerSamplePerturbation(norms.to(dtype), steps.to(dtype), lengths, dict(self.factors), self.formed, scaled)


def _where(finite: Tensor, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    return torch.where(finite.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


class PerSamplePerturbation:
    r"""The perturbations :math:`\epsilon_i = s_i g_i` of one batch.

    Attributes:
        norms: :math:`\|g_i\|` of the scaled losses, (B,), at least fp32.
        steps: :math:`s_i`, (B,), of the same type; 0 where the norm is zero or not finite.
        lengths: :math:`\|\epsilon_i\|`, (B,).
    """

    def __init__(
        self,
        norms: Tensor,
        steps: Tensor,
        lengths: Tensor,
        factors: dict[ParameterSlice, list[Factor]],
        formed: dict[ParameterSlice, Tensor],
        scaled: dict[ParameterSlice, Tensor],
    ) -> None:
        self.norms, self.steps, self.lengths = norms, steps, lengths
        self._factors, self._formed, self._scaled = factors, formed, scaled
        self._own: dict[ParameterSlice, tuple[Tensor, Tensor]] = {}  # W + sG, and W
        self._once = Memo(size=1)

    def _steps_of(self, gradients: Tensor) -> Tensor:
        return self.steps.to(gradients.dtype).view(-1, *[1] * (gradients.dim() - 1))

    def step(self, part: ParameterSlice | None) -> Tensor | None:
        r""":math:`s_i g_i`, (B, \*shape), where it is kept in this form."""
        if part is None:
            return None
        if part.upright in self._formed:
            gradients = self._formed.pop(part.upright)
            self._scaled[part.upright] = gradients.mul_(self._steps_of(gradients))
        step = self._scaled.get(part.upright)
        return step.transpose(1, 2) if step is not None and part.transposed else step

    def own_weights(self, part: ParameterSlice, weight: Tensor) -> Tensor:
        r""":math:`W + s_i G_i` of a matrix whose per-sample gradients are formed, (B, n, m). Takes their memory.

        Args:
            part: the matrix.
            weight: its values (n, m), in the same precision.
        """
        if part.upright not in self._own:
            upright = weight.detach().t() if part.transposed else weight.detach()
            if part.upright in self._scaled:
                own = upright + self._scaled.pop(part.upright)
            else:
                gradients = self._formed.pop(part.upright)
                own = torch.addcmul(upright, gradients, self._steps_of(gradients), out=gradients)
            self._own[part.upright] = own, upright
        own, _ = self._own[part.upright]
        return own.transpose(1, 2) if part.transposed else own

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
        if factors := self.factors(part):
            return torch.stack([lookup(factor, index) for factor in factors]).sum(0) * self.steps.view(-1, 1, 1)
        samples = torch.arange(len(index), device=index.device).unsqueeze(1)
        if part in self._own:
            own, weight = self._own[part]
            return own[samples, index] - weight[index]
        if part in self._formed:
            return self._formed[part][samples, index] * self.steps.view(-1, 1, 1)
        return self._scaled[part][samples, index] if part in self._scaled else None

    def of_samples(self, chosen: Tensor) -> PerSamplePerturbation:
        """The same for the chosen samples, (B,) bool; none for the others. A copy."""
        formed = {part: gradients.clone() for part, gradients in self._formed.items()}
        scaled = {part: step * chosen.view(-1, *[1] * (step.dim() - 1)) for part, step in self._scaled.items()}
        return PerSamplePerturbation(
            self.norms, self.steps * chosen, self.lengths * chosen, self._factors, formed, scaled
        )

    def release(self) -> None:
        """Leave what backward still needs to the graph, which frees it layer by layer."""
        self._factors, self._formed, self._scaled, self._own = {}, {}, {}, {}
        self._once.clear()
