"""What functions of torch do with the values of their arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# A parameter stays recognizable through these: packed query, key and value projections, and casts of fp16 parameters.
SPLITS = {torch.chunk, Tensor.chunk, torch.split, Tensor.split}
CASTS = {Tensor.float, Tensor.to, Tensor.type_as, Tensor.contiguous, Tensor.double, Tensor.half, Tensor.bfloat16}
# These take no values from their further arguments, only a type or a shape.
TYPE_OR_SHAPE_ONLY = CASTS | {Tensor.view_as, Tensor.reshape_as, Tensor.expand_as}
# Names of functions that take from their first argument no values, only a type, a device or a shape.
MAKES = re.compile("new_(?!tensor)|.*_like$")
# Names of functions whose results tell nothing of values. Others without a gradient do, such as indices and numbers.
LOOKS = re.compile(
    "_?is_(?!nonzero)|is(nan|inf|posinf|neginf|finite|real)$|(dense_|sparse_)?dim$|size$|ndimension$|dim_order$|numel$"
    "|nelement$|element_size$|stride$|type$|storage|untyped_storage$|(const_)?data_ptr$|get_device$|result_type$|can_cast$"
    "|retain_grad$|requires_grad_$|register_|__(get|len|hash|repr|str|format|dir|dlpack_device)__$"
)

TRANSPOSES = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
SUMS = {torch.add, Tensor.add, Tensor.add_}

DETACHES = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]

GRADIENT = Tensor.grad.__get__  # type: ignore[union-attr]


@cache
def writes_in_place(func: Callable[..., Any]) -> bool:
    """Whether it writes to its first argument."""
    name = name_of(func)
    return name in ("__setitem__", "__iadd__", "__isub__", "__imul__") or (name[-1:] == "_" and name[-2:] != "__")


@cache
def decides(func: Callable[..., Any]) -> bool:
    """Whether indices and masks that it returns tell of values."""
    return not (LOOKS.match(name_of(func)) or MAKES.match(name_of(func)))


def name_of(func: Callable[..., Any]) -> str:
    """Its name, for messages too."""
    return getattr(func, "__name__", str(func))
