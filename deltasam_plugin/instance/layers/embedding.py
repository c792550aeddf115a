"""Embedding tables."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.factored import Factor
from deltasam_plugin.instance.gradients import PerSampleGradients, PerSamplePerturbation
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layers.base import CallArguments, Layer, RecordedCall
from deltasam_plugin.precision import at_least_float32


class Embedding(Layer):
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
    ) -> CallArguments | None:
        if max_norm is not None or scale_grad_by_freq:
            return None
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]
        return CallArguments(input, weight, None, tuple(input.shape) or (1,), (padding_idx, sparse))

    def run(self, call: CallArguments, x: Tensor) -> Tensor:
        padding_idx, sparse = call.options
        return F.embedding(x, call.weight, padding_idx, sparse=sparse)  # type: ignore[arg-type]

    def _right(self, site: RecordedCall, gradient: Tensor) -> tuple[Tensor, Tensor]:
        assert site.x is not None
        index, gradient = site.x.reshape(-1).long(), gradient.reshape(site.x.numel(), -1)
        padding_idx = site.options[0]
        if padding_idx is not None:
            gradient = gradient.masked_fill((index == padding_idx).unsqueeze(1), 0)
        return index, gradient

    def dense(self, site: RecordedCall, gradient: Tensor) -> dict[ParameterSlice, Tensor]:
        assert site.weight is not None
        index, right = self._right(site, gradient)
        return {
            site.weight: at_least_float32(right).new_zeros(site.shape).index_add_(0, index, at_least_float32(right))
        }

    def contribute(self, site: RecordedCall, gradient: Tensor, ledger: PerSampleGradients) -> None:
        assert site.weight is not None
        assert site.grouping is not None
        index, right = self._right(site, gradient)
        ledger.factors[site.weight].append(Factor(site.grouping.group(index), site.grouping.group(right)))

    def correct(self, site: RecordedCall, x: Tensor, y: Tensor, correction: PerSamplePerturbation) -> Tensor:
        assert site.grouping is not None
        index = site.grouping.group(x.reshape(-1).long())
        added = correction.lookup(site.weight, index)
        return y if added is None else y.add_(site.grouping.ungroup(added).reshape(y.shape).to(y.dtype))
