"""Layer and root-mean-square normalization, y = w ∘ x̂ + b."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.layers.base import CallArguments, Layer, PlannedCall, added_to
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
from deltasam_plugin.precision import at_least_float32


class LayerNorm(Layer):
    """w ∘ x̂ + b with x̂ of mean 0 and variance 1."""

    name, weight_kind = "layer_norm", "vector"

    def read(
        self,
        input: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> CallArguments | None:
        shape = tuple(normalized_shape)
        leading_shape = tuple(input.shape[: input.dim() - len(shape)]) or (1,)
        return CallArguments(input, weight, bias, leading_shape, (shape, eps))

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        shape, eps = arguments.options
        return F.layer_norm(x, shape, arguments.weight, arguments.bias, eps)

    def normalized(self, x: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        """x̂."""
        return F.layer_norm(x, shape, None, None, eps)

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        shape, eps = call.options
        gradient = at_least_float32(gradient).reshape(-1, *shape)
        if call.weight is not None:
            products = gradient * self.normalized(at_least_float32(x), shape, eps).reshape(-1, *shape)
            gradients.add(call.weight, call.grouping.group(products).sum(1))
        if call.bias is not None:
            gradients.add(call.bias, call.grouping.group(gradient).sum(1))

    def perturb_output(self, call: PlannedCall, x: Tensor, y: Tensor, perturbation: PerSamplePerturbation) -> Tensor:
        weight, bias = perturbation.step(call.weight), perturbation.step(call.bias)
        shape, eps = call.options
        added: Tensor | None = None
        if bias is not None:
            added = bias.unsqueeze(1).expand(-1, call.grouping.rows_per_sample, *shape)
        if weight is not None:
            normalized = self.normalized(at_least_float32(x), shape, eps).reshape(-1, *shape)
            normalized, weight = call.grouping.group(normalized), weight.unsqueeze(1)
            added = normalized * weight if added is None else torch.addcmul(added, normalized, weight)
        return y if added is None else added_to(y, call, added)


class RMSNorm(LayerNorm):
    """w ∘ x̂ with x̂ of mean square 1."""

    name = "rms_norm"

    def read(  # type: ignore[override]
        self, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> CallArguments | None:
        return super().read(input, normalized_shape, weight, None, torch.finfo(input.dtype).eps if eps is None else eps)

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        shape, eps = arguments.options
        return F.rms_norm(x, shape, arguments.weight, eps)

    def normalized(self, x: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        return F.rms_norm(x, shape, None, eps)
