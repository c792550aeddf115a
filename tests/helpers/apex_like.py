"""A stand-in for apex.normalization.fused_layer_norm: its names and signatures; nothing can see into its kernel."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _gradients(ctx: Any, gradient: Tensor, function: Any) -> tuple[Tensor, ...]:
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        leaves = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
        return torch.autograd.grad(function(*leaves), leaves, gradient)


def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps) * weight


class FusedLayerNormAffineFunction(torch.autograd.Function):
    """LayerNorm(x) ∘ weight + bias."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: tuple[int, ...], eps: float
    ) -> Tensor:
        ctx.normalized_shape, ctx.eps = normalized_shape, eps
        ctx.save_for_backward(input, weight, bias)
        with torch._C.DisableTorchFunction():
            return F.layer_norm(input, normalized_shape, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        shape, eps = ctx.normalized_shape, ctx.eps
        return *_gradients(ctx, gradient, lambda x, w, b: F.layer_norm(x, shape, w, b, eps)), None, None


class FusedRMSNormAffineFunction(torch.autograd.Function):
    """x / rms(x) ∘ weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, normalized_shape: tuple[int, ...], eps: float) -> Tensor:
        ctx.normalized_shape, ctx.eps = normalized_shape, eps
        ctx.save_for_backward(input, weight)
        with torch._C.DisableTorchFunction():
            return _rms_norm(input, normalized_shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        shape, eps = ctx.normalized_shape, ctx.eps
        return *_gradients(ctx, gradient, lambda x, w: _rms_norm(x, shape, w, eps)), None, None


def fused_layer_norm_affine(input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float) -> Tensor:
    return FusedLayerNormAffineFunction.apply(input, weight, bias, normalized_shape, eps)


def fused_rms_norm_affine(input: Tensor, weight: Tensor, normalized_shape: Any, eps: float) -> Tensor:
    return FusedRMSNormAffineFunction.apply(input, weight, normalized_shape, eps)


class FusedLayerNorm(nn.Module):
    """As apex's module does on a GPU."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.normalized_shape, self.eps = torch.Size([normalized_shape]), eps
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, input: Tensor) -> Tensor:
        return fused_layer_norm_affine(input, self.weight, self.bias, self.normalized_shape, self.eps)


class FusedRMSNorm(nn.Module):
    """As apex's module does on a GPU."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.normalized_shape, self.eps = torch.Size([normalized_shape]), eps
        self.weight = nn.Parameter(torch.ones(normalized_shape))

    def forward(self, input: Tensor) -> Tensor:
        return fused_rms_norm_affine(input, self.weight, self.normalized_shape, self.eps)


def install(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Make `import apex.normalization.fused_layer_norm` find these classes."""
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    here = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", here)
    for name in ("FusedLayerNorm", "FusedRMSNorm"):
        monkeypatch.setattr(sys.modules["apex.normalization"], name, getattr(here, name), raising=False)
    monkeypatch.setattr(sys.modules["apex"], "normalization", sys.modules["apex.normalization"], raising=False)
    monkeypatch.setattr(sys.modules["apex.normalization"], "fused_layer_norm", here, raising=False)
    return here
