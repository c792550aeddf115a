"""A memo computes once for the same arguments, and again for others."""

from __future__ import annotations

import torch
from torch import Tensor

from deltasam_plugin.instance.memo import Memo


def doubled(x: Tensor, by: int = 2) -> Tensor:
    return x * by


def test_the_same_arguments_give_the_same_tensor() -> None:
    once, x = Memo(), torch.arange(3.0)
    assert once(doubled, x) is once(doubled, x)
    assert torch.equal(once(doubled, x), 2 * x)
    assert once(doubled, x, 3) is not once(doubled, x)
    assert once(doubled, x.clone()) is not once(doubled, x)


def test_a_tensor_that_was_written_to_is_another() -> None:
    once, x = Memo(), torch.arange(3.0)
    before = once(doubled, x)
    x.add_(1)
    assert torch.equal(once(doubled, x), 2 * x)
    assert torch.equal(before, 2 * torch.arange(3.0))


def test_only_the_latest_results_are_kept() -> None:
    once, one, other = Memo(size=1), torch.ones(2), torch.ones(2)
    first = once(doubled, one)
    once(doubled, other)
    assert once(doubled, one) is not first


def test_nothing_is_confused_with_what_is_gone() -> None:
    """A new tensor may have the id of one that was freed."""
    once = Memo()
    for value in range(100):
        assert torch.equal(once(doubled, torch.full((2,), float(value))), torch.full((2,), 2.0 * value))


def test_nothing_is_kept_after_clearing() -> None:
    once, x = Memo(), torch.ones(2)
    first = once(doubled, x)
    once.clear()
    assert once(doubled, x) is not first
