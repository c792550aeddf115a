"""apex's fused normalization, which fairseq chooses on GPUs, in terms of functions that interception sees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor

MODULE = "apex.normalization.fused_layer_norm"


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float, *_: Any) -> Tensor:
    return F.layer_norm(x, tuple(shape), weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, shape: Any, eps: float, *_: Any) -> Tensor:
    return F.rms_norm(x, tuple(shape), weight, eps)


UNFUSED: dict[str, Callable[..., Tensor]] = {
    "FusedLayerNormAffineFunction": _layer_norm,
    "FusedLayerNormAffineMixedDtypesFunction": _layer_norm,
    "FusedRMSNormAffineFunction": _rms_norm,
    "FusedRMSNormAffineMixedDtypesFunction": _rms_norm,
}


@contextmanager
def unfused_norms() -> Iterator[None]:
    """Within this context apex's autograd functions run torch's own normalization, if apex is imported at all."""
    module = sys.modules.get(MODULE)
    functions = [(getattr(module, name), unfused) for name, unfused in UNFUSED.items() if hasattr(module, name)]
    try:
        for function, unfused in functions:
            function.apply = staticmethod(unfused)
        yield
    finally:
        for function, _ in functions:
            if "apply" in vars(function):
                del function.apply  # the inherited one is seen again
