"""Samples that depend on each other by a factor of zero are found, and then looked up in every batch."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin.instance import InstanceEngine
from deltasam_plugin.instance.engine import ALWAYS_CHECKED
from deltasam_plugin.instance.entanglement import half_in_turn
from tests.instance.test_engine import RHO, passes_of


class Pairs(nn.Module):
    """A sample's loss takes from that `shift` places later, with a factor of zero."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 3), shift

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        others = torch.cat([y[self.shift :], torch.zeros(self.shift, 3)])
        return y.square().sum(1) + 0 * others.sum(1) if self.shift else y.square().sum(1)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_a_factor_of_zero_between_two_samples(shift: int) -> None:
    """In one direction only. Without it, a batch like those before takes one backward pass."""
    torch.manual_seed(0)
    model = Pairs(shift)
    engine = InstanceEngine(model, RHO)
    passes = [
        passes_of(engine, lambda: model(torch.randn(5, 4)), list(model.parameters())) for _ in range(ALWAYS_CHECKED + 3)
    ]
    assert passes[-1] == (2 if shift else 1)


def test_what_does_not_reach_other_samples_is_no_factor() -> None:
    """Padding, dropout and attention's masks are zeros within a sample."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.5, batch_first=True)
    padding = torch.arange(4).expand(5, 4) > torch.tensor([[3], [2], [1], [0], [3]])
    engine = InstanceEngine(layer, RHO)

    def losses() -> Tensor:
        hidden = F.dropout(layer(torch.randn(5, 4, 8), src_key_padding_mask=padding), 0.5)
        return (hidden.square().sum(2) * ~padding).sum(1)

    passes = [passes_of(engine, losses, list(layer.parameters())) for _ in range(ALWAYS_CHECKED + 3)]
    assert passes[-1] == 1


@pytest.mark.parametrize("batches", [[2], [3], [5], [8], [4, 17], [8, 9], [30, 7, 12]])
def test_a_few_batches_tell_every_sample_from_every_other(batches: list[int]) -> None:
    sizes = [batches[number % len(batches)] for number in range(1, ALWAYS_CHECKED + 1)]
    drawn = [half_in_turn(size, number, torch.device("cpu")) for number, size in enumerate(sizes, 1)]
    for one, other in combinations(range(min(batches)), 2):
        for has, lacks in ((one, other), (other, one)):
            assert any(marks[has] and not marks[lacks] for marks in drawn)
