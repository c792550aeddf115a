"""Norms of many tensors, and the lots in which tensors are processed together.

A GPU needs few kernels: small tensors are joined. A CPU needs what its cache holds: large tensors are cut into parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.precision import at_least_float32

ROW = 512  # squares that a norm adds up one after the other


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    r"""The L2 norm of all tensors together, a norm of norms.

    Args:
        tensors: any shapes, dtypes and devices.

    Returns:
        A scalar on the first tensor's device, at least fp32; zero for no tensors or only zeros, non-finite if any
        element is.
    """
    filled = [part for tensor in tensors if tensor.numel() > 0 for (part,) in parts_of(tensor)]
    return norm_of_norms([tensor_norm(joined(filled[i] for i in lot)) for lot in lots(filled)])


def norm_of_norms(norms: Sequence[Tensor]) -> Tensor:
    """The L2 norm of tensors of these norms together, on the first one's device."""
    return tensor_norm(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else torch.zeros(())


def tensor_norm(tensor: Tensor) -> Tensor:
    r"""The L2 norm of one tensor, :math:`m\,\sqrt{\sum_j (g_j/m)^2},\ m = \max_j |g_j|`.

    With the largest magnitude factored out nothing overflows or underflows on the way, and the squares are added
    pairwise: torch's own fp32 norm is off by 0.1 % at 20 million elements on a CPU. A CPU is asked first whether it
    must be factored out; a GPU is not, because asking is waiting.
    """
    value = dense(tensor)
    if not value.numel():
        return value.new_zeros(())
    if value.device.type == "cpu" and 1e-12 < float(norm := _unscaled_norm(value)) < 1e18:
        return norm
    peak = value.abs().amax()
    unit = torch.where(peak > 0, peak, 1)
    return unit * (value / unit).square_().sum().sqrt()


def _unscaled_norm(value: Tensor) -> Tensor:
    """The norm of the norms of rows, which reads the values once; where there are no rows, by squares."""
    if value.numel() % ROW:
        return value.square().sum().sqrt()
    return torch.linalg.vector_norm(torch.linalg.vector_norm(value.reshape(-1, ROW), dim=1))


def lot_size(device: torch.device) -> int:
    """How many elements are processed together: on a CPU what its cache holds, else enough to launch few kernels."""
    return 2**16 if device.type == "cpu" else 2**22


def lots(tensors: Sequence[Tensor], *more: Sequence[Any]) -> list[list[int]]:
    """Indices of tensors that are processed together, because each kernel must be launched.

    Args:
        tensors: those of one device and dtype go together, up to a bound on the memory.
        more: what else must be equal in a lot, one sequence for each property.
    """
    found: list[list[int]] = []
    latest: dict[tuple[Any, ...], list[int]] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    for index, (tensor, *properties) in enumerate(zip(tensors, *more, strict=True)):
        key = tensor.device, tensor.dtype, *properties
        if tensor.numel() >= lot_size(tensor.device):
            found.append([index])  # alone: joining copies
            continue
        if key not in sizes or sizes[key] >= lot_size(tensor.device):
            latest[key], sizes[key] = [], 0
            found.append(latest[key])
        latest[key].append(index)
        sizes[key] += tensor.numel()
    return found


def parts_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of tensors of one shape, detached: views of no more elements than a lot has.

    Tensors that do not lie in memory in the order of their elements stay whole.
    """
    size, detached = lot_size(tensors[0].device), [tensor.detach() for tensor in tensors]
    if tensors[0].numel() > size and all(t.layout is torch.strided and t.is_contiguous() for t in tensors):
        yield from zip(*(tensor.view(-1).split(size) for tensor in detached))
    else:
        yield tuple(detached)


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in one flat tensor, detached and dense, at least fp32. Read only: it may be the tensor itself."""
    return at_least_float32(flattened([(t.to_dense() if t.is_sparse else t).detach() for t in tensors]))


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one flat tensor. Read only: a single tensor is not copied."""
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])


def dense(tensor: Tensor) -> Tensor:
    """The tensor detached, dense and in at least fp32."""
    tensor = tensor.detach()
    return at_least_float32(tensor.to_dense() if tensor.is_sparse else tensor)
