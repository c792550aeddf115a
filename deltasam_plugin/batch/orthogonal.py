"""The part of a vector that is orthogonal to another, both in several tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltasam_plugin.batch.norms import dense, global_norm


def orthogonal_part(vectors: Sequence[Tensor | None], onto: Sequence[Tensor | None]) -> list[Tensor | None]:
    r"""The part of a vector that is orthogonal to another: :math:`a - \langle a, b\rangle\,b/\|b\|^2`.

    Args:
        vectors: a, in several tensors; None counts as zero.
        onto: b, in tensors of the same shapes. Where it is zero, or not finite, the whole of a is returned.

    Returns:
        Tensors of at least fp32; None where a and b are None.
    """
    norm = global_norm(tensor for tensor in onto if tensor is not None)
    usable = torch.isfinite(norm) & (norm > 0)

    def unit(b: Tensor) -> Tensor:
        return torch.where(usable.to(b.device), dense(b) / norm.to(b.device), 0)

    units = [None if b is None else unit(b) for b in onto]
    products = [(dense(a) * b).sum() for a, b in zip(vectors, units, strict=True) if a is not None and b is not None]
    along = torch.stack([product.to(norm.device) for product in products]).sum() if products else torch.zeros_like(norm)

    def less(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if b is None:
            return None if a is None else dense(a)
        return (torch.zeros_like(b) if a is None else dense(a)) - along.to(b.device) * b

    return [less(a, b) for a, b in zip(vectors, units, strict=True)]
