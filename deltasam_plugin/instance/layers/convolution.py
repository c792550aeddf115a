"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deltasam_plugin.instance.gradients import PerSampleGradients, PerSamplePerturbation
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layers.base import CallArguments, Layer, RecordedCall
from deltasam_plugin.precision import at_least_float32


class Convolution(Layer):
    """W * x + b with a filter W (n, m, ...).

    Sequences are long and filters small: the per-instance gradient is formed, and a grouped convolution applies it.

    Args:
        name: of the function.
        function: the convolution.
        weight_gradient: of its filter, from torch.nn.grad.
    """

    role = "filter"

    def __init__(self, name: str, function: Callable[..., Tensor], weight_gradient: Callable[..., Tensor]) -> None:
        self.name, self.function, self.weight_gradient = name, function, weight_gradient

    def read(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> CallArguments | None:
        if isinstance(padding, str) or input.dim() != weight.dim():
            return None
        return CallArguments(input, weight, bias, (input.shape[0],), (stride, padding, dilation, groups))

    def run(self, call: CallArguments, x: Tensor) -> Tensor:
        return self.function(x, call.weight, call.bias, *call.options)

    @staticmethod
    def _side_by_side(x: Tensor) -> Tensor:
        """(B, C, ...) as one sample of B·C channels: a grouped convolution has a filter for each sample."""
        return x.flatten(0, 1).unsqueeze(0)

    def dense(self, site: RecordedCall, gradient: Tensor) -> dict[ParameterSlice, Tensor]:
        assert site.x is not None
        found = {}
        if site.weight is not None:
            found[site.weight] = self.weight_gradient(site.x, site.shape, gradient, *site.options)
        if site.bias is not None:
            found[site.bias] = at_least_float32(gradient).transpose(0, 1).flatten(1).sum(1)
        return found

    def contribute(self, site: RecordedCall, gradient: Tensor, ledger: PerSampleGradients) -> None:
        assert site.grouping is not None
        assert site.x is not None
        batch, (stride, padding, dilation, groups) = site.grouping.batch, site.options
        if site.grouping.width != 1:
            raise RuntimeError(
                f"Per-instance perturbation: {self.name}() runs on {site.lead[0]} inputs for {batch} samples. Must be "
                'one each. Otherwise choose --sam-perturbation batch (perturbation="batch" in Python).'
            )
        if site.weight is not None:
            x, towards = (self._side_by_side(at_least_float32(t)) for t in (site.x, gradient))
            shape = (batch * site.shape[0], *site.shape[1:])
            formed = self.weight_gradient(x, shape, towards, stride, padding, dilation, batch * groups)
            ledger.add(site.weight, formed.view(batch, *site.shape))
        if site.bias is not None:
            ledger.add(site.bias, at_least_float32(gradient).flatten(2).sum(2))

    def correct(self, site: RecordedCall, x: Tensor, y: Tensor, correction: PerSamplePerturbation) -> Tensor:
        weight, bias = correction.step(site.weight), correction.step(site.bias)
        stride, padding, dilation, groups = site.options
        if weight is not None:
            filters = weight.flatten(0, 1)
            assert site.grouping is not None
            joint = self._side_by_side(at_least_float32(x))
            added = self.function(joint, filters, None, stride, padding, dilation, site.grouping.batch * groups)
            y = y.add_(added.reshape(y.shape).to(y.dtype))
        if bias is not None:
            y = y.add_(bias.view(*bias.shape, *[1] * (y.dim() - 2)).to(y.dtype))
        return y
