"""The perturbation of every sample, and what perturbed layers need of it."""

from __future__ import annotations

import torch
from torch import Tensor

from deltasam_plugin.instance.factored import Factor, coefficients, lookup
from deltasam_plugin.instance.layout import Grouping
from deltasam_plugin.instance.memo import Memo
from deltasam_plugin.instance.slices import ParameterSlice


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
