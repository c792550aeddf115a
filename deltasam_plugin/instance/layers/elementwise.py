"""Parameters that are added to all rows, or multiplied with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.layers.base import CallArguments, Layer, PlannedCall, added_to
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
from deltasam_plugin.precision import at_least_float32


def _row_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a row that the parameter is combined with: its own, without leading ones."""
    shape = tuple(parameter.shape)
    while shape[:1] == (1,):
        shape = shape[1:]
    return shape


def _read(one: Any, other: Any) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """Input, parameter and leading shape, if exactly one of the two is a parameter of the input's trailing shape."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return None
    x, parameter = (other, one) if isinstance(one, nn.Parameter) else (one, other)
    if isinstance(x, nn.Parameter) or not isinstance(parameter, nn.Parameter):
        return None
    shape = _row_shape(parameter)
    rank = x.dim() - len(shape)
    if not shape or rank < 1 or x.dim() < parameter.dim() or tuple(x.shape[rank:]) != shape:
        return None
    return x, parameter, tuple(x.shape[:rank])


class Addition(Layer):
    """x + b, as in the head of a masked language model."""

    name, weight_kind = "add", "vector"

    def read(self, input: Any, other: Any, *, alpha: float = 1) -> CallArguments | None:
        if alpha != 1 or (found := _read(input, other)) is None:
            return None
        x, bias, leading_shape = found
        return CallArguments(x, None, bias, leading_shape, (_row_shape(bias), bias.shape))

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        return x + arguments.bias  # type: ignore[operator]

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        if call.bias is not None:
            row_shape, shape = call.options
            rows = call.grouping.group(at_least_float32(gradient).reshape(-1, *row_shape))
            gradients.add(call.bias, rows.sum(1).reshape(-1, *shape))

    def perturb_output(self, call: PlannedCall, x: Tensor, y: Tensor, perturbation: PerSamplePerturbation) -> Tensor:
        bias = perturbation.step(call.bias)
        if bias is None:
            return y
        row_shape = call.options[0]
        rows = bias.reshape(-1, 1, *row_shape).expand(-1, call.grouping.rows_per_sample, *row_shape)
        return added_to(y, call, rows)


class Expansion(Addition):
    """b for every row, as the class token of a vision model."""

    name = "expand"

    def read(self, input: Tensor, *sizes: Any) -> CallArguments | None:  # type: ignore[override]
        if not isinstance(input, nn.Parameter):
            return None
        sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        own = (1,) * (len(sizes) - input.dim()) + tuple(input.shape)
        shape = tuple(kept if size == -1 else size for size, kept in zip(sizes, own))
        row_shape = _row_shape(input)
        rank = len(shape) - len(row_shape)
        if not row_shape or rank < 1:
            return None
        return CallArguments(input, None, input, tuple(shape[:rank]), (row_shape, input.shape, shape))

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        return x.expand(arguments.options[2]).clone()

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        super().accumulate(replace(call, options=call.options[:2]), x, gradient, gradients)


class Scaling(Layer):
    """x ∘ w."""

    name, weight_kind = "mul", "vector"

    def read(self, input: Any, other: Any) -> CallArguments | None:
        if (found := _read(input, other)) is None:
            return None
        x, weight, leading_shape = found
        return CallArguments(x, weight, None, leading_shape, (_row_shape(weight),))

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        return x * arguments.weight  # type: ignore[operator]

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        if call.weight is not None:
            products = (at_least_float32(gradient) * at_least_float32(x)).reshape(-1, *call.options[0])
            gradients.add(call.weight, call.grouping.group(products).sum(1).reshape(-1, *call.weight_shape))

    def perturb_output(self, call: PlannedCall, x: Tensor, y: Tensor, perturbation: PerSamplePerturbation) -> Tensor:
        weight = perturbation.step(call.weight)
        if weight is None:
            return y
        row_shape = call.options[0]
        rows = call.grouping.group(at_least_float32(x).reshape(-1, *row_shape))
        return added_to(y, call, rows * weight.reshape(-1, 1, *row_shape))
