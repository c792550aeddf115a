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
from torch import Tensor

from deltasam_plugin.batch.displacement import PerturbedParameter, dense, lots


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
        return int(self._from_each(seed)[0])

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Which of the flags, as many for each worker, are set for any worker."""
        if self.group is None:
            return flags
        return [any(column) for column in zip(*self._from_each(flags), strict=True)]

    def total(self, count: int, scale: Tensor) -> int:
        """The number of samples of all workers; those of a worker whose loss is multiplied by zero do not count."""
        if self.group is None:
            return count
        return sum(self._from_each(count if bool(scale != 0) else 0))

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
        mine = (differences.cpu(), floor.cpu()) if bool(scale != 0) else None
        theirs = self._from_each(mine)
        rank = dist.get_rank(self.group)
        start = sum(part[0].size(1) for part in theirs[:rank] if part is not None)
        present = [part for part in theirs if part is not None]
        if mine is None:  # its gradient is zero whatever the weights; they must only be as many as its samples
            present, start = [*present, (differences.cpu(), floor.cpu())], sum(part[0].size(1) for part in present)
        joined = [torch.cat(parts, dim=1).to(differences.device) for parts in zip(*present, strict=True)]
        return joined[0], joined[1], slice(start, start + differences.size(1))

    def _from_each(self, own: Any) -> list[Any]:
        """What each worker gives, by rank."""
        given: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(given, own, group=self.group)
        return given

    def all_reduce(
        self, gradients: list[Tensor | None], parameters: Sequence[PerturbedParameter]
    ) -> list[Tensor | None]:
        """The sum of all workers' ascent gradients, in at least fp32; those of a worker on its own as they are."""
        if self.group is None:
            return gradients
        total: list[Tensor | None] = [None] * len(gradients)
        reached = [i for i, is_reached in enumerate(self.any_of([g is not None for g in gradients])) if is_reached]
        own = []
        for i in reached:
            gradient = gradients[i]
            own.append(torch.zeros_like(dense(parameters[i].parameter)) if gradient is None else dense(gradient))
        for lot in lots(own):
            flat = torch.cat([own[i].flatten() for i in lot])
            dist.all_reduce(flat, group=self.group)
            for i, part in zip(lot, flat.split([own[i].numel() for i in lot]), strict=True):
                total[reached[i]] = part.view(own[i].shape)
        return total


NO_SYNC = Workers()
