"""Linear layers, y = Wx + b."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.factored import Factor, contract, expand_into, form
from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.layers.base import CallArguments, Form, Layer, PlannedCall
from deltasam_plugin.instance.layout import Grouping, grouped
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
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
        if not _is_view(grouped, y) or y.dtype != coefficients.dtype:
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


class _OwnWeights(torch.autograd.Function):
    """y = Wᵢx + bᵢ for the rows of sample i. The gradients of W and b are those of Wᵢ and bᵢ, added up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own_weights: Tensor,
        vector: Tensor | None,
        grouping: Grouping,
    ) -> Tensor:
        ctx.save_for_backward(x, own_weights)
        ctx.grouping = grouping
        return _products(x, own_weights.transpose(1, 2), bias, vector, grouping)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, own_weights = ctx.saved_tensors
        return (
            _products(gradient, own_weights, None, None, ctx.grouping) if ctx.needs_input_grad[0] else None,
            gradient.t() @ x if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
            *(None, None, None),
        )


def _products(rows: Tensor, matrices: Tensor, bias: Tensor | None, vector: Tensor | None, grouping: Grouping) -> Tensor:
    """Rows (N, m) times the matrix of their sample (B, m, n), plus a bias (n) for all and (B, n) for each: (N, n)."""
    y = rows.new_empty(len(rows), matrices.shape[2])
    target = grouping.group(y)
    if bias is not None:
        target.copy_(bias if vector is None else (bias + vector).unsqueeze(1))
    elif vector is not None:
        target.copy_(vector.unsqueeze(1).expand_as(target))
    target.baddbmm_(grouping.group(rows), matrices, beta=0 if bias is None and vector is None else 1)
    if not _is_view(target, y):
        y.copy_(grouping.ungroup(target).reshape(y.shape))
    return y  # and not a view of the target: a Function must not return one


def _is_view(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Linear(Layer):
    """y = Wx + b, W (n, m)."""

    name, weight_kind = "linear", "matrix"

    def read(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> CallArguments | None:
        if weight.dim() != 2:
            return None
        return CallArguments(input, weight, bias, tuple(input.shape[:-1]) or (1,))

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        return F.linear(x, arguments.weight, arguments.bias)  # type: ignore[arg-type]

    def finish(self, arguments: CallArguments, y: Tensor) -> Tensor:
        return y.view(*arguments.x.shape[:-1], y.shape[-1])

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        left = call.grouping.group(gradient)
        if call.weight is not None:
            right = gradients.once(grouped, call.grouping, x)
            if call.form is not Form.FACTORED:
                gradients.add(call.weight, form(left, right))
            else:
                gradients.add_factor(call.weight, Factor(left, right, call.bias if call.affine else None))
        if call.bias is not None and not call.affine:
            gradients.add(call.bias, at_least_float32(left).sum(1))

    def run_perturbed(
        self, call: PlannedCall, arguments: CallArguments, x: Tensor, perturbation: PerSamplePerturbation
    ) -> Tensor:
        weight, bias = arguments.weight, arguments.bias
        if call.form is not Form.OWN or call.weight is None or weight is None:
            return super().run_perturbed(call, arguments, x, perturbation)
        own_weights, vector = perturbation.own_weights(call.weight, weight), perturbation.step(call.bias)
        with torch.autocast(x.device.type, enabled=False):
            return _OwnWeights.apply(x, weight, bias, own_weights, vector, call.grouping)

    def perturb_output(self, call: PlannedCall, x: Tensor, y: Tensor, perturbation: PerSamplePerturbation) -> Tensor:
        vector = None if call.affine else perturbation.step(call.bias)
        if vector is not None and call.weight is None:
            ones = vector.new_ones(call.grouping.batch, call.grouping.rows_per_sample, 1)
            return _AddExpanded.apply(y, ones, vector.unsqueeze(1), None, call.grouping)
        formed = perturbation.step(call.weight) if call.form is Form.BESIDE else None
        if formed is not None:
            inputs = at_least_float32(call.grouping.group(x))
            return _AddExpanded.apply(y, inputs, formed.transpose(1, 2), vector, call.grouping)
        for factor in perturbation.factors(call.weight):
            coefficients = perturbation.coefficients(factor, x, call.grouping)
            y = _AddExpanded.apply(y, coefficients, factor.left, vector, call.grouping)
            vector = None
        return y
