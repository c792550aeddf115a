"""The direction of a probe, which the package itself never holds as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltasam_plugin.batch.displacement import Drawn, displace
from deltasam_plugin.batch.measures import Measure
from deltasam_plugin.batch.probing import random_signs, standard_normal
from deltasam_plugin.batch.restoration import PerturbedParameter


def direction_of(parameters: Sequence[PerturbedParameter], seed: int, measure: Measure) -> list[Tensor]:
    """Where a probe of this seed moves the parameters: one tensor for each."""
    found = [torch.zeros_like(p.value) for p in parameters]
    origin = [torch.zeros_like(p.value) for p in parameters]
    draw = random_signs(seed) if measure.signs else standard_normal(seed)
    moves = Drawn([True] * len(parameters), draw)
    displace([*map(PerturbedParameter, found)], origin, moves, torch.ones(()))
    return found
