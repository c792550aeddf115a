"""Batches of random models, and the orders in which models hand rows to a layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

VOCABULARY, CLASSES, FEATURES = 9, 3, 3


@dataclass(frozen=True)
class Batch:
    """One batch, R rows of at most T positions, B samples.

    Attributes:
        step: how many batches came before.
        count: B.
        samples: the sample of each row, (R,).
        tokens: (R, T).
        lengths: (R,), >= 1.
        selected: the positions that are labelled, (R, T).
        classes: one label a row, (R,).
        features: (R, T, FEATURES).
        factors: of the rows' losses, (R,).
    """

    step: int
    count: int
    samples: Tensor
    tokens: Tensor
    lengths: Tensor
    selected: Tensor
    classes: Tensor
    features: Tensor
    factors: Tensor

    @property
    def mask(self) -> Tensor:
        """Positions that are no padding, (R, T)."""
        return torch.arange(self.tokens.shape[1]) < self.lengths.unsqueeze(1)


class Draw(random.Random):
    """Random choices that are written down."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.taken: dict[str, Any] = {}

    def option(self, name: str, values: Sequence[Any]) -> Any:
        """One of the values, noted under this name."""
        self.taken[name] = self.choice(values)
        return self.taken[name]


Rows = Callable[[Tensor], Tensor]  # (..., C) to (..., C), row by row


def _selection(f: Rows, x: Tensor, chosen: Tensor) -> Tensor:
    return x.masked_scatter(chosen.unsqueeze(2), f(x[chosen]))


def _packed(f: Rows, x: Tensor, batch: Batch) -> Tensor:
    packed = pack_padded_sequence(x, batch.lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(packed._replace(data=f(packed.data)), batch_first=True, total_length=x.shape[1])[0]


def _permuted(f: Rows, x: Tensor, order: Tensor) -> Tensor:
    return f(x[order])[order.argsort()]


def _copies(x: Tensor) -> Tensor:
    return torch.tensor([0.0, 0.5], dtype=x.dtype)


LAYOUTS: dict[str, Callable[[Rows, Tensor, Batch], Tensor]] = {
    "batch first": lambda f, x, b: f(x),
    "time first": lambda f, x, b: f(x.transpose(0, 1)).transpose(0, 1),
    "(B·T)": lambda f, x, b: f(x.flatten(0, 1)).view_as(x),
    "(T·B)": lambda f, x, b: f(x.transpose(0, 1).flatten(0, 1)).view(*x.transpose(0, 1).shape).transpose(0, 1),
    "(B·k)": lambda f, x, b: (
        f((x.unsqueeze(1) + _copies(x).view(1, 2, 1, 1)).flatten(0, 1)).view(-1, 2, *x.shape[1:]).mean(1)
    ),
    "(k·B)": lambda f, x, b: f((x.unsqueeze(0) + _copies(x).view(2, 1, 1, 1)).flatten(0, 1)).view(2, *x.shape).mean(0),
    "stepwise": lambda f, x, b: torch.stack([f(x[:, t]) for t in range(x.shape[1])], 1),
    "sample by sample": lambda f, x, b: torch.cat([f(x[i : i + 1]) for i in range(len(x))]),
    "packed": lambda f, x, b: _selection(f, x, b.mask),
    "packed by time": _packed,
    "selected": lambda f, x, b: _selection(f, x, b.selected),
    "sorted by length": lambda f, x, b: _permuted(f, x, b.lengths.argsort(descending=True, stable=True)),
    "reversed": lambda f, x, b: f(x.flip(0)).flip(0),
    "shuffled": lambda f, x, b: _permuted(f, x, torch.randperm(len(x))),
    "first position": lambda f, x, b: torch.cat([f(x[:, 0]).unsqueeze(1), x[:, 1:]], 1),
    "checkpointed": lambda f, x, b: checkpoint(f, x, use_reentrant=False),
}
