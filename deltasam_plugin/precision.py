"""The precision that a pass computes in, and what half precision does to a small perturbation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deltasam_plugin.hooks import before_forward


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in fp32 if its own precision is less, else the tensor itself."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type with the widest spacing of numbers."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


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
