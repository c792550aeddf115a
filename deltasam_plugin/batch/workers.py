"""Data-parallel workers that share one perturbation.

By default every worker perturbs by its own batch (m-sharpness, as SAM's reference implementation does), and nothing
here communicates. Workers that share act on the union of their batches: one direction to probe along, weights over all
samples, one ascent gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.batch.norms import dense
from deltasam_plugin.batch.restoration import PerturbedParameter


@dataclass(frozen=True)
class Workers:
    """The process group that shares a perturbation; None for a worker on its own.

    All of them must run the same number of (micro-)batches in the same order. One that has nothing to contribute takes
    part with a loss multiplied by zero, as fairseq's dummy batches are.
    """

    group: Any = None

    def broadcast_seed(self, seed: int) -> int:
        """The first worker's seed, for all."""
        if self.group is None:
            return seed
        return int(self._from_each(torch.full((1,), seed, device=self._device))[0])

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Which of the flags, as many for each worker, are set for any worker."""
        if self.group is None:
            return flags
        total = torch.tensor(flags, dtype=torch.int32).to(self._device, non_blocking=True)
        dist.all_reduce(total, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in total.tolist()]

    def total(self, count: int, scale: Tensor) -> int:
        """The number of samples of all workers; those of a worker whose loss is multiplied by zero do not count."""
        if self.group is None:
            return count
        total = _counted(count, scale).to(self._device)
        dist.all_reduce(total, group=self.group)
        return int(total)

    def all_gather(self, differences: Tensor, floor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, slice]:
        """The measurements of all workers' probes, side by side.

        Args:
            differences: of this worker's samples, shape (K, B).
            floor: shape (K, B).
            scale: of this worker's loss; the samples of a worker whose loss is multiplied by zero do not count.

        Returns:
            Differences and floor of all samples, shape (K, B₁ + B₂ + …), and the slice of this worker's own.
        """
        if self.group is None:
            return differences, floor, slice(None)
        batch, rank = differences.size(1), dist.get_rank(self.group)
        sizes = torch.stack([_counted(batch, scale), torch.full_like(scale, batch, dtype=torch.long)])
        counted, given = torch.stack(self._from_each(sizes)).t().tolist()  # the one wait for the device
        own = F.pad(torch.stack([differences, floor.to(differences)]), (0, max(given) - batch))
        theirs = [part.to(differences.device) for part in self._from_each(own)]
        present = [part[..., :size] for part, size in zip(theirs, counted, strict=True)]
        start = sum(counted[:rank])
        if counted[rank] == 0:  # its gradient is zero whatever the weights; they must only be as many as its samples
            present, start = [*present, theirs[rank][..., :batch]], sum(counted)
        joined = torch.cat(present, dim=2)
        return joined[0], joined[1], slice(start, start + batch)

    @property
    def _device(self) -> torch.device:
        """Where tensors must be for an exchange."""
        on_gpus = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")

    def _from_each(self, own: Tensor) -> list[Tensor]:
        """What each worker gives, by rank: tensors of one shape."""
        own = own.to(self._device)
        given = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(given, own.contiguous(), group=self.group)
        return given

    def all_reduce(
        self, gradients: list[Tensor | None], parameters: Sequence[PerturbedParameter]
    ) -> list[Tensor | None]:
        """The sum of all workers' ascent gradients, in at least fp32; those of a worker on its own as they are.

        One flat buffer for each device and type, in one exchange.
        """
        if self.group is None:
            return gradients
        total: list[Tensor | None] = [None] * len(gradients)
        reached = [i for i, is_reached in enumerate(self.any_of([g is not None for g in gradients])) if is_reached]
        buffers: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
        for i in reached:
            gradient, parameter = gradients[i], parameters[i].parameter
            own = torch.zeros_like(dense(parameter)) if gradient is None else dense(gradient)
            buffers.setdefault((own.device, own.dtype), []).append((i, own))
        for items in buffers.values():
            flat = torch.cat([own.flatten() for _, own in items])
            dist.all_reduce(flat, group=self.group)
            for (i, own), part in zip(items, flat.split([own.numel() for _, own in items]), strict=True):
                total[i] = part.view(own.shape)
        return total


def _counted(count: int, scale: Tensor) -> Tensor:
    """The number, or zero where the loss is multiplied by zero: integer scalar."""
    return torch.where(scale != 0, count, 0)


NO_SYNC = Workers()
