"""The sharpness of one checkpoint over a grid of radii, and how many samples carry it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from deltasam_plugin.errors import Refused
from deltasam_plugin.instance import InstanceEngine
from deltasam_plugin.loss import Objective
from deltasam_plugin.replay import Conditions
from deltasam_plugin.tools.checkpoints import Checkpoint
from deltasam_plugin.tools.console import first_sentence
from deltasam_plugin.tools.rises import Forward, along_gradient, along_own_gradients, along_random, shared_out

SEED = 1  # of random directions, and of models that draw random numbers without dropout: the same for all checkpoints


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Attributes:
        label: what the checkpoint is called.
        size: Σ sample sizes of the N samples.
        losses: at w, (N,): natural logarithm, summed over a sample's tokens.
        rises: their rises by direction, at R radii, (R, N).
    """

    label: str
    size: int
    losses: Tensor
    rises: dict[str, Tensor]

    @property
    def loss(self) -> float:
        """L(w) by sample size, base 2."""
        return float(self.losses.double().sum()) / self.size / math.log(2)

    def sharpness(self, direction: str) -> list[float]:
        """(L(w + ε) − L(w)) by sample size, base 2, at each radius."""
        return (self.rises[direction].double().sum(1) / self.size / math.log(2)).tolist()

    def half_shares(self, direction: str) -> list[float]:
        """See :func:`half_share`, at each radius."""
        return [half_share(rises) for rises in self.rises[direction]]


def half_share(rises: Tensor) -> float:
    """The smallest share of the samples whose rises make up half of the sum: near 0 if a few carry it all.

    Args:
        rises: (N,).

    Returns:
        A share of N; not a number if the sum is not positive.
    """
    sums = rises.double().sort(descending=True).values.cumsum(0)
    if not float(sums[-1]) > 0:
        return math.nan
    return (int((sums >= sums[-1] / 2).long().argmax()) + 1) / len(rises)


def measure(
    checkpoint: Checkpoint,
    label: str,
    dataset: Any,
    batches: Sequence[Sequence[int]],
    radii: Sequence[float],
    count: int,
) -> Profile:
    """Measure a checkpoint, and leave its parameters as they were.

    Args:
        checkpoint: what to measure.
        label: what to call it.
        dataset: a part of its data.
        batches: indices of samples.
        radii: L2 norms in parameter space.
        count: number of random directions.
    """
    named = checkpoint.parameters
    parameters = list(named.values())
    torch.manual_seed(SEED)
    checkpoint.check(checkpoint.sample(dataset, batches[0]))

    def passes(kind: str, batches: Sequence[Sequence[int]]) -> Iterator[Forward]:
        """One forward pass for each batch, which can be repeated."""
        for indices in tqdm(batches, f"{label}, {kind}", unit="batch", leave=False, file=sys.stderr):
            yield _repeatable(checkpoint, checkpoint.sample(dataset, indices))

    losses, sizes = [], 0
    for indices in batches:
        with torch.no_grad():
            objective, size = checkpoint.forward(checkpoint.sample(dataset, indices))
        losses.append(shared_out(objective))
        sizes += size

    def gather(kind: str, batches: Sequence[Sequence[int]], rises: Callable[[Forward], Tensor]) -> Tensor:
        return torch.cat([rises(forward).cpu() for forward in passes(kind, batches)], dim=1)

    engine, refusal = InstanceEngine(named.items(), max(radii)), None
    found = {
        "random": gather("random", batches, lambda forward: along_random(parameters, radii, forward, count, SEED)),
        "batch": gather("batch", batches, lambda forward: along_gradient(parameters, radii, forward)),
    }
    try:
        found["per sample"] = gather("per sample", batches, lambda forward: along_own_gradients(engine, radii, forward))
    except Refused as error:
        refusal = first_sentence(error)
    if refusal is not None:
        tqdm.write(f"{label}: samples are measured one by one. {refusal}.", file=sys.stderr)
        alone = [[index] for indices in batches for index in indices]
        found["per sample"] = gather("one by one", alone, lambda forward: along_gradient(parameters, radii, forward))
    return Profile(label, sizes, torch.cat(losses).cpu(), found)


def _repeatable(checkpoint: Checkpoint, sample: Any) -> Forward:
    """The forward pass of a batch. It draws the same random numbers in every run (in-batch negatives, masks)."""
    conditions = Conditions.capture({checkpoint.device})

    def forward() -> Objective:
        with conditions.replayed():
            return checkpoint.forward(sample)[0]

    return forward
