"""The direction of a probe, which the package itself never holds as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import Drawn, PerturbedParameter, displace
from deltasam_plugin.batch.probing import random_signs


def direction_of(parameters: Sequence[PerturbedParameter], seed: int) -> list[Tensor]:
    """Where a probe of this seed moves the parameters: one tensor of signs for each."""
    found = [torch.zeros_like(p.value) for p in parameters]
    origin = [torch.zeros_like(p.value) for p in parameters]
    moves = Drawn([True] * len(parameters), random_signs(seed))
    displace([*map(PerturbedParameter, found)], origin, moves, torch.ones(()))
    return found
