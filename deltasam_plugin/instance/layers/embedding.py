"""Embedding tables."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.factored import Factor
from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.layers.base import CallArguments, Form, Layer, PlannedCall, added_to
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
from deltasam_plugin.precision import at_least_float32


class Embedding(Layer):
    """Rows of a table, W (n, m)."""

    name, weight_kind, may_be_shared = "embedding", "matrix", True

    def read(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> CallArguments | None:
        if scale_grad_by_freq or (max_norm is not None and math.isfinite(max_norm)):
            return None
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]
        return CallArguments(input, weight, None, tuple(input.shape) or (1,), (padding_idx, sparse))

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        padding_idx, sparse = arguments.options
        return F.embedding(x, arguments.weight, padding_idx, sparse=sparse)  # type: ignore[arg-type]

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        if call.weight is None:
            return
        index, gradient = x.flatten().long(), gradient.reshape(x.numel(), -1)
        padding_idx = call.options[0]
        if padding_idx is not None:
            gradient = gradient.masked_fill((index == padding_idx).unsqueeze(1), 0)
        index, gradient = call.grouping.group(index), call.grouping.group(gradient)
        if call.form is not Form.FACTORED:
            gradients.add_rows(call.weight, index, at_least_float32(gradient), call.weight_shape)
        else:
            gradients.add_factor(call.weight, Factor(index, gradient))

    def perturb_output(self, call: PlannedCall, x: Tensor, y: Tensor, perturbation: PerSamplePerturbation) -> Tensor:
        added = perturbation.lookup(call.weight, call.grouping.group(x.flatten().long()))
        return y if added is None else added_to(y, call, added)
