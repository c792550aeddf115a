"""Functions of torch that call linear layers within, and are handed to a mode as a whole."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without its first check, which would hand the call to the mode as a whole.

    torch offers composite functions to the mode as one call. This shows the calls inside.
    """
    namespace = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


COMPOSITE = {F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward)}


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The same as a linear layer, where it is one."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)
    return F.linear(mat1, mat2.t(), input)
