"""The precision that a pass computes in, and what half precision does to a small perturbation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltasam_plugin.hooks import before_forward


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in fp32 if its own precision is less, else the tensor itself."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type with the widest spacing of numbers."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


SINGLE = torch.finfo(torch.float32).eps
TF32 = 2.0**-10  # spacing of the numbers that enter a product; they have the range of fp32


class Rounding(NamedTuple):
    """How coarse the numbers of a pass are.

    Attributes:
        dtype: the coarsest type that it computes in.
        eps: spacing of the numbers near 1 in its products.
    """

    dtype: torch.dtype = torch.float32
    eps: float = SINGLE

    @property
    def coarse(self) -> bool:
        """Whether products have fewer digits than in single precision."""
        return self.eps > SINGLE

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], parameters: Iterable[Tensor]) -> Rounding:
        """The rounding of a pass that computes in these types, with the present settings for TF32.

        TF32 is for fp32 on CUDA. Convolutions, with weights of three dimensions and more, have a setting of their own.
        """
        dtype = coarsest(dtypes)
        eps = torch.finfo(dtype).eps
        on_cuda = [p for p in parameters if p.device.type == "cuda"] if dtype == torch.float32 else []
        products = torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
        convolutions = torch.backends.cudnn.allow_tf32 and any(p.dim() > 2 for p in on_cuda)
        return cls(dtype, max(eps, TF32) if on_cuda and (products or convolutions) else eps)


@contextmanager
def observed_dtypes(parameters: Iterable[Tensor]) -> Iterator[set[torch.dtype]]:
    """The types that modules within this context compute in.

    Args:
        parameters: of the model.

    Yields:
        The types of the parameters. Types of autocast are added as modules run, wherever autocast was entered.
    """
    parameters = list(parameters)
    device_types = {parameter.device.type for parameter in parameters}
    seen = {parameter.dtype for parameter in parameters}

    def look(module: nn.Module | None = None) -> None:
        seen.update(torch.get_autocast_dtype(kind) for kind in device_types if torch.is_autocast_enabled(kind))

    look()
    with before_forward(look):
        yield seen


def spacing(parameters: Sequence[Tensor], rho: float) -> tuple[float, float, float]:
    r"""The size of a perturbation of length :math:`\rho` in a single element, and the spacing of the numbers there.

    Args:
        parameters: P elements in all, of one dtype.
        rho: L2 norm of the perturbation.

    Returns:
        The root mean square of the perturbation, :math:`\rho/\sqrt P`; that of the parameters; and the spacing of
        numbers of that size.
    """
    count = sum(parameter.numel() for parameter in parameters)
    squares = torch.stack([at_least_float32(parameter.detach()).square().sum() for parameter in parameters])
    size = math.sqrt(float(squares.sum()) / count)
    return rho / math.sqrt(count), size, size * torch.finfo(parameters[0].dtype).eps
