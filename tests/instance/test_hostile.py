"""Rows and branches that models choose by data: instance mode is exact on every batch, or refuses and says what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fairseq.modules import AdaptiveInput
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from deltasam_plugin import DeltaSAM
from deltasam_plugin.errors import Refused
from tests.helpers.tagger import SIZES, WIDTH, WORDS, Tagger, check, inside, run, summed

# A4: which rows belong to which sample depends on the data of each batch


@pytest.mark.parametrize("none", [False, True])
def test_labelled_tokens_only(none: bool) -> None:
    """In some batches no token at all is labelled."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        labelled = inside(tokens, lengths) & (tokens % 2 == 1) & ~torch.tensor(none and number % 2 == 1)
        lost = F.cross_entropy(
            model.out(model.layers(model.words(tokens)[labelled])), tokens[labelled], reduction="none"
        )
        everywhere = model.hidden(model.words(tokens)).square().sum((1, 2))
        return everywhere + summed(lost, labelled.nonzero()[:, 0], len(tokens))

    check(run(model, losses), "exact")


@pytest.mark.parametrize("where", ["model", "layer"])
def test_rows_sorted_by_length(where: str) -> None:
    """Inside the model and back, or for good: then the losses are in another order than the rows."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = model.layers(model.words(tokens[order]))
        if where == "layer":
            return model.classified(x[order.argsort()].sum(1), tokens)
        return model.classified(x.sum(1), tokens[order])[order.argsort()]

    check(run(model, losses), "exact")


@pytest.mark.parametrize("by_time", [False, True])
def test_packed_sequences(by_time: bool) -> None:
    """Positions without padding, sample after sample, or as torch packs them: time step after time step."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        samples = torch.arange(len(tokens)).unsqueeze(1).expand_as(tokens)
        if by_time:
            packed = [
                pack_padded_sequence(t, lengths, batch_first=True, enforce_sorted=False).data for t in (tokens, samples)
            ]
        else:
            packed = [t[inside(tokens, lengths)] for t in (tokens, samples)]
        lost = F.cross_entropy(model.out(model.layers(model.words(packed[0]))), packed[0], reduction="none")
        return summed(lost, packed[1], len(tokens))

    check(run(model, losses), "exact")


@pytest.mark.parametrize("sizes", [SIZES, [(3, 4)] * 8], ids=["changing shapes", "one shape"])
def test_a_contrastive_term_whose_factor_grows_from_zero(sizes: list[tuple[int, int]]) -> None:
    """From the third batch on (of one shape: from the sixth), samples mix, and that is refused."""
    model, from_ = Tagger(), 2 if sizes is SIZES else 5

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.words(tokens)).mean(1)
        others = F.cross_entropy(x @ x.t(), torch.arange(len(x)), reduction="none")
        return model.classified(x, tokens) + max(0, number - from_ + 1) * others

    verdicts = run(model, losses, sizes)
    assert [verdict.kind for verdict in verdicts] == ["exact"] * from_ + ["refused"], verdicts[-1]
    assert "samples" in verdicts[-1].detail
    check(verdicts, "exact", "refused")


@pytest.mark.parametrize("time_first", [False, True])
def test_a_layer_used_once_a_time_step(time_first: bool) -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.words(tokens.t()) if time_first else model.words(tokens).transpose(0, 1)
        h = torch.zeros_like(x[0])
        for step in x:
            h = torch.tanh(model.hidden(step) + model.again(h))
        return model.classified(h, tokens)

    check(run(model, losses), "exact")


def test_a_layer_used_once_a_sample() -> None:
    """On its own length: no call has rows of two samples."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        each = [model.layers(model.words(row[:length])).sum(0) for row, length in zip(tokens, lengths)]
        return model.classified(torch.stack(each), tokens)

    check(run(model, losses), "exact")


class Adaptive(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.adaptive = AdaptiveInput(WORDS, 0, WIDTH, 2, WIDTH, [3, 6])


def test_adaptive_inputs() -> None:
    """fairseq's own: every band of the vocabulary has its rows, chosen by a mask."""
    model = Adaptive()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.adaptive(tokens))
        return F.cross_entropy(model.out(x).transpose(1, 2), tokens, reduction="none").sum(1)

    check(run(model, losses), "exact")


@pytest.mark.parametrize("strided", [False, True])
def test_several_rows_a_sample_in_changing_number(strided: bool) -> None:
    """Choices of a multiple-choice question: one row each in the first batches, more later."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        each = [1, 1, 2, 3, 2, 3][number]
        shifts = (
            torch.arange(each).repeat_interleave(len(tokens)) if strided else torch.arange(each).repeat(len(tokens))
        )
        rows = tokens.repeat(each, 1) if strided else tokens.repeat_interleave(each, 0)
        x = model.layers(model.words((rows + shifts.unsqueeze(1)) % WORDS)).transpose(0, 1)
        lost = model.classified(model.hidden(x).mean(0), rows)
        return lost.view(each, -1).sum(0) if strided else lost.view(-1, each).sum(1)

    check(run(model, losses), "exact")


# A5: outputs that no gradient flows through are at w + εᵢ too


FAR = 1.5  # far enough for an argmax to change
DETACHED: dict[str, Callable[[Tagger, Tensor], Tensor]] = {  # hidden states to hidden states
    "detached input": lambda m, x: m.hidden(x.detach()) + x,
    "detached gate": lambda m, x: x * torch.sigmoid(m.hidden(x).detach()),
    "gate under no_grad": lambda m, x: x * torch.sigmoid(torch.no_grad()(m.hidden)(x)),
    "argmax": lambda m, x: x + m.words(m.out(x).argmax(2)),
    "argmax of the input": lambda m, x: x + m.words(m.out(x.detach()).argmax(2)),
    "straight-through": lambda m, x: x + (m.hidden(x).round() - m.hidden(x)).detach() + m.hidden(x),
    "detached weight": lambda m, x: x + F.linear(x, m.hidden.weight.detach(), m.hidden.bias),
    "weight data": lambda m, x: x + F.linear(x, m.hidden.weight.data),
    "detached statistics of the batch": lambda m, x: x - m.hidden(x).detach().mean((0, 1)),
    "threshold": lambda m, x: x * (m.hidden(x) > 0),
}


@pytest.mark.parametrize("kind", DETACHED)
def test_detached_branches(kind: str) -> None:
    """Of a layer that is perturbed, for it is also used with a gradient."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.words(tokens)
        x = model.norm(DETACHED[kind](model, x + torch.tanh(model.hidden(x))))
        return model.classified(torch.tanh(model.again(x)).sum(1), tokens)

    check(run(model, losses, rho=FAR), "exact", "refused")


TARGETS: dict[str, Callable[[Tagger, Tensor], Tensor]] = {  # hidden states (B, T, C) to losses (B,)
    "self-distillation": lambda m, x: F.kl_div(
        m.out(x).log_softmax(2), m.out(m.hidden(x)).softmax(2).detach(), reduction="none"
    ).sum((1, 2)),
    "teacher under no_grad": lambda m, x: F.kl_div(
        m.out(x).log_softmax(2), torch.no_grad()(m.out)(m.hidden(x)).softmax(2), reduction="none"
    ).sum((1, 2)),
    "one-sided target": lambda m, x: (m.hidden(x)[:, :-1] - m.again(x)[:, 1:].detach()).square().sum((1, 2)),
    "hard pseudo-labels": lambda m, x: F.cross_entropy(
        m.out(x).transpose(1, 2), m.out(m.hidden(x)).argmax(2), reduction="none"
    ).sum(1),
    "weighted by its own confidence": lambda m, x: (
        m.out(x).softmax(2).max(2)[0].detach() * m.again(x).square().sum(2)
    ).sum(1),
    "EMA of itself": lambda m, x: (m.hidden(x) - F.linear(x, 0.9 * m.hidden.weight.detach())).square().sum((1, 2)),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_one_sided_targets(kind: str) -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.words(tokens))
        return TARGETS[kind](model, x) + model.classified(x.sum(1), tokens)

    check(run(model, losses, rho=FAR), "exact", "refused")


REACHED: dict[str, Callable[[Tensor], Tensor]] = {  # hidden states (B, T, C) to (B, C)
    "largest in every channel": lambda x: x.max(1)[0],
    "most salient position": lambda x: x[torch.arange(len(x)), x[..., 0].argmax(1)],
    "dead until perturbed": lambda x: torch.relu(x - 1.2).sum(1),
    "clamped": lambda x: x.clamp(-0.7, 0.7).sum(1),
}


@pytest.mark.parametrize("rows", ["padded", "reversed", "packed", "stepwise"])
@pytest.mark.parametrize("kind", REACHED)
def test_rows_that_have_a_gradient_only_when_perturbed(kind: str, rows: str) -> None:
    """At w the loss does not depend on them; at w + εᵢ it does."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.words(tokens)
        if rows == "packed":
            chosen = inside(tokens, lengths)
            x = x.masked_scatter(chosen.unsqueeze(2), model.layers(x[chosen]))
        elif rows == "stepwise":
            x = torch.stack([model.layers(x[:, t]) for t in range(x.shape[1])], 1)
        elif rows == "reversed":
            x = model.layers(x.flip(0)).flip(0)
        else:
            x = model.layers(x)
        return model.classified(REACHED[kind](x), tokens)

    check(run(model, losses, rho=FAR), "exact", "refused")


@pytest.mark.parametrize("before", [0, 1])
def test_a_row_that_was_given_to_the_wrong_one_of_its_neighbours(before: int) -> None:
    """It has no gradient at w, and the sample before it gets it. It belongs to the one after it."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 1, bias=False), torch.randn(5, 4)
    still = layer(x).detach()[before + 1]

    def losses() -> Tensor:
        rows = layer(x)
        own = torch.cat([rows[: before + 1], rows[before + 2 :]]).squeeze(1).square()
        return own + F.one_hot(torch.tensor(before + 1), 4) * 100 * (rows[before + 1] - still).square()

    optimizer = DeltaSAM(layer.parameters(), torch.optim.SGD, rho=0.5, perturbation="instance", lr=0.1)
    with pytest.raises(Refused, match="changes with the perturbation of another, though no gradient shows it"):
        optimizer.step(losses)
