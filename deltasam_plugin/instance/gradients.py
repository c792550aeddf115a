r"""Per-sample gradients of the first pass, which the per-sample perturbation is made of.

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
    inner,
    right_products,
    step_sizes,
    sum_over_samples,
)
from deltasam_plugin.instance.memo import Memo
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
from deltasam_plugin.instance.slices import ParameterSlice
from deltasam_plugin.precision import at_least_float32

SMALL = 2**14  # numbers in a sample's gradient that is joined with others
ScaleOf = Callable[[ParameterSlice], Tensor]


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
