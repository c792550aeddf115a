"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.layers.base import CallArguments, Layer, PlannedCall, added_to
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
from deltasam_plugin.precision import at_least_float32


class Convolution(Layer):
    """W * x + b with a filter W (n, m, ...).

    Sequences are long and filters small. The per-sample gradient is formed, and a grouped convolution applies it.

    Args:
        name: of the function.
        function: the convolution.
    """

    weight_kind = "filter"

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self.name, self.function = name, function

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

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        return self.function(x, arguments.weight, arguments.bias, *arguments.options)

    @staticmethod
    def _side_by_side(call: PlannedCall, inputs: Tensor) -> Tensor:
        """Inputs (N, C, ...) as one of B·T·C channels: a grouped convolution has a filter for each."""
        return call.grouping.group(at_least_float32(inputs)).flatten(0, 2).unsqueeze(0)

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        batch, inputs = call.grouping.batch, call.grouping.rows_per_sample
        stride, padding, dilation, groups = call.options
        if call.weight is not None:
            rank = x.dim() - 2
            sizes = [list(s) if isinstance(s, tuple | list) else [s] * rank for s in (stride, padding, dilation)]
            joint, towards = (self._side_by_side(call, t) for t in (x, gradient))
            if joint.shape[-1] == 1:  # torch takes it for a tensor with channels last, and then refuses it
                joint, towards = F.pad(joint, (0, sizes[0][-1])), F.pad(towards, (0, 1))
            filters = joint.new_empty(batch * inputs * call.weight_shape[0], *call.weight_shape[1:])
            _, formed, _ = torch.ops.aten.convolution_backward(
                *(towards, joint, filters, None, *sizes, False, [0] * rank, batch * inputs * groups),
                (False, True, False),
            )
            gradients.add(call.weight, formed.view(batch, inputs, *call.weight_shape).sum(1))
        if call.bias is not None:
            gradients.add(call.bias, call.grouping.group(at_least_float32(gradient).flatten(2).sum(2)).sum(1))

    def perturb_output(self, call: PlannedCall, x: Tensor, y: Tensor, perturbation: PerSamplePerturbation) -> Tensor:
        weight, bias = perturbation.step(call.weight), perturbation.step(call.bias)
        batch, inputs = call.grouping.batch, call.grouping.rows_per_sample
        stride, padding, dilation, groups = call.options
        if weight is not None:
            filters = weight.unsqueeze(1).expand(-1, inputs, *call.weight_shape).flatten(0, 2)
            joint = self._side_by_side(call, x)
            added = self.function(joint, filters, None, stride, padding, dilation, batch * inputs * groups)
            y = added_to(y, call, added.view(batch, inputs, *y.shape[1:]))
        if bias is not None:
            rows = bias.view(batch, 1, -1, *[1] * (y.dim() - 2)).expand(-1, inputs, *y.shape[1:])
            y = added_to(y, call, rows)
        return y
