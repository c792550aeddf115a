"""A vector added to every row."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltasam_plugin.instance.gradients import PerSampleGradients, PerSamplePerturbation
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layers.base import CallArguments, Layer, RecordedCall
from deltasam_plugin.precision import at_least_float32


class Addition(Layer):
    """x + b with a vector b, as in the head of a masked language model."""

    name, role = "add", "vector"

    def read(self, input: Any, other: Any, *, alpha: float = 1) -> CallArguments | None:
        if alpha != 1 or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        x, bias = (other, input) if isinstance(input, nn.Parameter) else (input, other)
        if not isinstance(bias, nn.Parameter) or bias.dim() != 1 or x.dim() < 2 or x.shape[-1] != bias.shape[0]:
            return None
        return CallArguments(x, None, bias, tuple(x.shape[:-1]))

    def run(self, call: CallArguments, x: Tensor) -> Tensor:
        assert call.bias is not None
        return x + call.bias

    def dense(self, site: RecordedCall, gradient: Tensor) -> dict[ParameterSlice, Tensor]:
        return {} if site.bias is None else {site.bias: at_least_float32(gradient).flatten(0, -2).sum(0)}

    def contribute(self, site: RecordedCall, gradient: Tensor, ledger: PerSampleGradients) -> None:
        assert site.grouping is not None
        if site.bias is not None:
            ledger.add(site.bias, at_least_float32(site.grouping.group(gradient.flatten(0, -2))).sum(1))

    def correct(self, site: RecordedCall, x: Tensor, y: Tensor, correction: PerSamplePerturbation) -> Tensor:
        assert site.grouping is not None
        bias = correction.step(site.bias)
        if bias is None:
            return y
        added = bias.unsqueeze(1).expand(-1, site.grouping.width, -1)
        return y.add_(site.grouping.ungroup(added).reshape(y.shape).to(y.dtype))
