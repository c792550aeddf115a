"""Layer normalization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.gradients import PerSampleGradients, PerSamplePerturbation
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layers.base import CallArguments, Layer, RecordedCall
from deltasam_plugin.precision import at_least_float32


class LayerNorm(Layer):
    """w ∘ x̂ + b."""

    name, role = "layer_norm", "vector"

    def read(
        self,
        input: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> CallArguments | None:
        shape = tuple(normalized_shape)
        lead = tuple(input.shape[: input.dim() - len(shape)]) or (1,)
        return CallArguments(input, weight, bias, lead, (shape, eps))

    def run(self, call: CallArguments, x: Tensor) -> Tensor:
        shape, eps = call.options
        return F.layer_norm(x, shape, call.weight, call.bias, eps)

    def _normalized(self, site: RecordedCall, x: Tensor) -> Tensor:
        shape, eps = site.options
        return F.layer_norm(at_least_float32(x), shape, None, None, eps).reshape(-1, *shape)

    def _products(self, site: RecordedCall, gradient: Tensor) -> dict[ParameterSlice, Tensor]:
        assert site.x is not None
        gradient = at_least_float32(gradient).reshape(-1, *site.options[0])
        found = {}
        if site.weight is not None:
            found[site.weight] = gradient * self._normalized(site, site.x)
        if site.bias is not None:
            found[site.bias] = gradient
        return found

    def dense(self, site: RecordedCall, gradient: Tensor) -> dict[ParameterSlice, Tensor]:
        return {target: products.sum(0) for target, products in self._products(site, gradient).items()}

    def contribute(self, site: RecordedCall, gradient: Tensor, ledger: PerSampleGradients) -> None:
        assert site.grouping is not None
        for target, products in self._products(site, gradient).items():
            ledger.add(target, site.grouping.group(products).sum(1))

    def correct(self, site: RecordedCall, x: Tensor, y: Tensor, correction: PerSamplePerturbation) -> Tensor:
        assert site.grouping is not None
        weight, bias = correction.step(site.weight), correction.step(site.bias)
        added: Tensor | None = None
        if bias is not None:
            added = bias.unsqueeze(1).expand(-1, site.grouping.width, *site.options[0])
        if weight is not None:
            normalized = site.grouping.group(self._normalized(site, x))
            weight = weight.unsqueeze(1)
            added = normalized * weight if added is None else torch.addcmul(added, normalized, weight)
        return y if added is None else y.add_(site.grouping.ungroup(added).reshape(y.shape).to(y.dtype))
