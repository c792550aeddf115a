"""Linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.factored import Factor, contract, expand_into, form
from deltasam_plugin.instance.gradients import PerSampleGradients, PerSamplePerturbation
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layers.base import CallArguments, Layer, RecordedCall
from deltasam_plugin.instance.layout import Grouping
from deltasam_plugin.precision import at_least_float32


class _AddExpanded(torch.autograd.Function):
    """y += Σₜ cₜ lₜ + v in place, differentiable in y and c."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, coefficients: Tensor, left: Tensor, vector: Tensor | None, grouping: Grouping
    ) -> Tensor:
        ctx.save_for_backward(left)
        ctx.grouping, ctx.dtype = grouping, coefficients.dtype
        ctx.mark_dirty(y)
        grouped = grouping.group(y)
        if grouped.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() or y.dtype != coefficients.dtype:
            added = expand_into(coefficients.new_zeros(grouped.shape), coefficients, left)
            added = added if vector is None else added.add_(vector.unsqueeze(1))
            return y.add_(grouping.ungroup(added).reshape(y.shape))
        expand_into(grouped, coefficients, left)
        if vector is not None:
            grouped.add_(vector.unsqueeze(1))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # type: ignore[override]
        towards = None
        if ctx.needs_input_grad[1]:
            (left,) = ctx.saved_tensors
            towards = contract(ctx.grouping.group(gradient), left).to(ctx.dtype)
        return gradient, towards, None, None, None


class Linear(Layer):
    """y = Wx + b, W (n, m)."""

    name, role = "linear", "matrix"

    def read(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> CallArguments | None:
        if weight.dim() != 2:
            return None
        return CallArguments(input, weight, bias, tuple(input.shape[:-1]) or (1,))

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def run(self, call: CallArguments, x: Tensor) -> Tensor:
        return F.linear(x, call.weight, call.bias)  # type: ignore[arg-type]

    def finish(self, call: CallArguments, y: Tensor) -> Tensor:
        return y.view(*call.x.shape[:-1], y.shape[-1])

    def dense(self, site: RecordedCall, gradient: Tensor) -> dict[ParameterSlice, Tensor]:
        assert site.x is not None
        found = {}
        if site.weight is not None:
            found[site.weight] = at_least_float32(gradient).T @ at_least_float32(site.x)
        if site.bias is not None:
            found[site.bias] = at_least_float32(gradient).sum(0)
        return found

    def contribute(self, site: RecordedCall, gradient: Tensor, ledger: PerSampleGradients) -> None:
        assert site.grouping is not None
        assert site.x is not None
        left = site.grouping.group(gradient)
        if site.weight is not None:
            right = ledger.grouped(site.x, site.grouping)
            if site.formed:
                ledger.add(site.weight, form(left, right))
            else:
                ledger.factors[site.weight].append(Factor(left, right, site.affine))
        if site.bias is not None and not site.affine:
            ledger.add(site.bias, at_least_float32(left).sum(1))

    def correct(self, site: RecordedCall, x: Tensor, y: Tensor, correction: PerSamplePerturbation) -> Tensor:
        assert site.grouping is not None
        vector = None if site.affine else correction.step(site.bias)
        if vector is not None and site.weight is None:
            ones = vector.new_ones(site.grouping.batch, site.grouping.width, 1)
            return _AddExpanded.apply(y, ones, vector.unsqueeze(1), None, site.grouping)
        formed = correction.step(site.weight) if site.formed else None
        if formed is not None:
            inputs = at_least_float32(site.grouping.group(x))
            return _AddExpanded.apply(y, inputs, formed.transpose(1, 2), vector, site.grouping)
        for factor in correction.factors(site.weight):
            y = _AddExpanded.apply(
                y, correction.coefficients(factor, x, site.grouping), factor.left, vector, site.grouping
            )
            vector = None
        return y
