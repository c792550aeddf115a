"""Layers that act on rows: linear, embedding, layer norm, added bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin.instance.algebra import Factor, contract, expand_into, form, wide
from deltasam_plugin.instance.interception import Target
from deltasam_plugin.instance.layout import Grouping
from deltasam_plugin.instance.ledger import Correction, Ledger
from deltasam_plugin.instance.operation import Arguments, Operation, Site


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


class Linear(Operation):
    """y = Wx + b, W (n, m)."""

    name, role = "linear", "matrix"

    def read(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments | None:
        if weight.dim() != 2:
            return None
        return Arguments(input, weight, bias, tuple(input.shape[:-1]) or (1,))

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def run(self, call: Arguments, x: Tensor) -> Tensor:
        return F.linear(x, call.weight, call.bias)  # type: ignore[arg-type]

    def finish(self, call: Arguments, y: Tensor) -> Tensor:
        return y.view(*call.x.shape[:-1], y.shape[-1])

    def dense(self, site: Site, gradient: Tensor) -> dict[Target, Tensor]:
        assert site.x is not None
        found = {}
        if site.weight is not None:
            found[site.weight] = wide(gradient).T @ wide(site.x)
        if site.bias is not None:
            found[site.bias] = wide(gradient).sum(0)
        return found

    def contribute(self, site: Site, gradient: Tensor, ledger: Ledger) -> None:
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
            ledger.add(site.bias, wide(left).sum(1))

    def correct(self, site: Site, x: Tensor, y: Tensor, correction: Correction) -> Tensor:
        assert site.grouping is not None
        vector = None if site.affine else correction.step(site.bias)
        if vector is not None and site.weight is None:
            ones = vector.new_ones(site.grouping.batch, site.grouping.width, 1)
            return _AddExpanded.apply(y, ones, vector.unsqueeze(1), None, site.grouping)
        formed = correction.step(site.weight) if site.formed else None
        if formed is not None:
            inputs = wide(site.grouping.group(x))
            return _AddExpanded.apply(y, inputs, formed.transpose(1, 2), vector, site.grouping)
        for factor in correction.factors(site.weight):
            y = _AddExpanded.apply(
                y, correction.coefficients(factor, x, site.grouping), factor.left, vector, site.grouping
            )
            vector = None
        return y


class Embedding(Operation):
    """Rows of a table, W (n, m)."""

    name, role = "embedding", "matrix"

    def read(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Arguments | None:
        if max_norm is not None or scale_grad_by_freq:
            return None
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]
        return Arguments(input, weight, None, tuple(input.shape) or (1,), (padding_idx, sparse))

    def run(self, call: Arguments, x: Tensor) -> Tensor:
        padding_idx, sparse = call.options
        return F.embedding(x, call.weight, padding_idx, sparse=sparse)  # type: ignore[arg-type]

    def _right(self, site: Site, gradient: Tensor) -> tuple[Tensor, Tensor]:
        assert site.x is not None
        index, gradient = site.x.reshape(-1).long(), gradient.reshape(site.x.numel(), -1)
        padding_idx = site.options[0]
        if padding_idx is not None:
            gradient = gradient.masked_fill((index == padding_idx).unsqueeze(1), 0)
        return index, gradient

    def dense(self, site: Site, gradient: Tensor) -> dict[Target, Tensor]:
        assert site.weight is not None
        index, right = self._right(site, gradient)
        return {site.weight: wide(right).new_zeros(site.shape).index_add_(0, index, wide(right))}

    def contribute(self, site: Site, gradient: Tensor, ledger: Ledger) -> None:
        assert site.weight is not None
        assert site.grouping is not None
        index, right = self._right(site, gradient)
        ledger.factors[site.weight].append(Factor(site.grouping.group(index), site.grouping.group(right)))

    def correct(self, site: Site, x: Tensor, y: Tensor, correction: Correction) -> Tensor:
        assert site.grouping is not None
        index = site.grouping.group(x.reshape(-1).long())
        added = correction.lookup(site.weight, index)
        return y if added is None else y.add_(site.grouping.ungroup(added).reshape(y.shape).to(y.dtype))


class LayerNorm(Operation):
    """w ∘ x̂ + b."""

    name, role = "layer_norm", "vector"

    def read(
        self,
        input: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Arguments | None:
        shape = tuple(normalized_shape)
        lead = tuple(input.shape[: input.dim() - len(shape)]) or (1,)
        return Arguments(input, weight, bias, lead, (shape, eps))

    def run(self, call: Arguments, x: Tensor) -> Tensor:
        shape, eps = call.options
        return F.layer_norm(x, shape, call.weight, call.bias, eps)

    def _normalized(self, site: Site, x: Tensor) -> Tensor:
        shape, eps = site.options
        return F.layer_norm(wide(x), shape, None, None, eps).reshape(-1, *shape)

    def _products(self, site: Site, gradient: Tensor) -> dict[Target, Tensor]:
        assert site.x is not None
        gradient = wide(gradient).reshape(-1, *site.options[0])
        found = {}
        if site.weight is not None:
            found[site.weight] = gradient * self._normalized(site, site.x)
        if site.bias is not None:
            found[site.bias] = gradient
        return found

    def dense(self, site: Site, gradient: Tensor) -> dict[Target, Tensor]:
        return {target: products.sum(0) for target, products in self._products(site, gradient).items()}

    def contribute(self, site: Site, gradient: Tensor, ledger: Ledger) -> None:
        assert site.grouping is not None
        for target, products in self._products(site, gradient).items():
            ledger.add(target, site.grouping.group(products).sum(1))

    def correct(self, site: Site, x: Tensor, y: Tensor, correction: Correction) -> Tensor:
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


class Addition(Operation):
    """x + b with a vector b, as in the head of a masked language model."""

    name, role = "add", "vector"

    def read(self, input: Any, other: Any, *, alpha: float = 1) -> Arguments | None:
        if alpha != 1 or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        x, bias = (other, input) if isinstance(input, nn.Parameter) else (input, other)
        if not isinstance(bias, nn.Parameter) or bias.dim() != 1 or x.dim() < 2 or x.shape[-1] != bias.shape[0]:
            return None
        return Arguments(x, None, bias, tuple(x.shape[:-1]))

    def run(self, call: Arguments, x: Tensor) -> Tensor:
        assert call.bias is not None
        return x + call.bias

    def dense(self, site: Site, gradient: Tensor) -> dict[Target, Tensor]:
        return {} if site.bias is None else {site.bias: wide(gradient).flatten(0, -2).sum(0)}

    def contribute(self, site: Site, gradient: Tensor, ledger: Ledger) -> None:
        assert site.grouping is not None
        if site.bias is not None:
            ledger.add(site.bias, wide(site.grouping.group(gradient.flatten(0, -2))).sum(1))

    def correct(self, site: Site, x: Tensor, y: Tensor, correction: Correction) -> Tensor:
        assert site.grouping is not None
        bias = correction.step(site.bias)
        if bias is None:
            return y
        added = bias.unsqueeze(1).expand(-1, site.grouping.width, -1)
        return y.add_(site.grouping.ungroup(added).reshape(y.shape).to(y.dtype))
