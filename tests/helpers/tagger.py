"""A small tagger, and what hostile tests do with it: train it on batches of changing shape, and judge every step."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.verdict import Comparison, Verdict

WORDS, WIDTH, CLASSES = 11, 6, 3
SIZES = [(3, 4), (2, 5), (4, 4), (1, 3), (3, 2), (5, 1)]  # B, T of the batches; one is square
NAMES = re.compile(
    r"parameter \d|(linear|embedding|layer_norm|conv\dd|add)\(|activation checkpointing|loss of a sample"
)
Step = Callable[[int, Tensor, Tensor], Tensor]  # number of the batch, tokens (B, T), lengths (B,) to losses (B,)


def run(model: nn.Module, losses: Step, sizes: Sequence[tuple[int, int]] = SIZES, rho: float = 0.3) -> list[Verdict]:
    """Verdicts of one step a batch, up to the first that is not exact."""
    comparison, verdicts = Comparison(model.double().parameters(), rho), []
    for number, (batch, length) in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(1, WORDS, (batch, length), generator=generator)
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        verdicts.append(comparison.step(lambda: losses(number, tokens, lengths), seed=number))  # noqa: B023
        if verdicts[-1].kind not in ("exact", "warned"):
            break
    return verdicts


def check(verdicts: list[Verdict], *kinds: str) -> None:
    """Every step is of one of these kinds; a refusal says what it is about."""
    assert {verdict.kind for verdict in verdicts} <= set(kinds), verdicts[-1]
    assert verdicts[-1].kind != "refused" or NAMES.search(verdicts[-1].detail), verdicts[-1]


class Tagger(nn.Module):
    """Embeddings, a hidden layer, logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WORDS)

    def layers(self, x: Tensor) -> Tensor:
        return self.norm(x + self.again(torch.tanh(self.hidden(x))))

    def classified(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Losses (B,) of hidden states (B, C): the class is the first token."""
        return F.cross_entropy(self.out(x), tokens[:, 0], reduction="none")


def inside(tokens: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)


def summed(lost: Tensor, samples: Tensor, batch: int) -> Tensor:
    return lost.new_zeros(batch).index_add(0, samples, lost)
