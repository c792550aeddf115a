"""Between two checks too: a batch that is unlike those that were compared is compared before its update."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin.instance import InstanceEngine
from deltasam_plugin.instance.engine import ALWAYS_CHECKED
from deltasam_plugin.instance.familiarity import Familiarity
from tests.helpers.rehearsal import Rehearsal, moved
from tests.helpers.tagger import WORDS, Step, Tagger, inside, summed
from tests.helpers.verdict import Comparison, Verdict

LAST = ALWAYS_CHECKED + 3  # no check is due in this batch
SHAPE = (3, 4)


def run(model: Tagger, losses: Step, usual: Sequence[int], last: Sequence[int]) -> Verdict:
    """The verdict of batch `LAST`.

    Args:
        model: is trained.
        losses: number of the batch, tokens, lengths to per-sample losses.
        usual: lengths of the sentences in all batches but the last.
        last: their lengths in the last one.
    """
    comparison, generator = Comparison(model.double().parameters(), 0.3), torch.Generator().manual_seed(0)
    for number in range(1, LAST):
        tokens = torch.randint(1, WORDS, SHAPE, generator=generator)
        comparison.optimizer.step(lambda: losses(number, tokens, torch.tensor(usual)))  # noqa: B023
    return comparison.step(lambda: losses(LAST, tokens, torch.tensor(last)))


@pytest.mark.parametrize("zero", ["a factor", "absent"])
def test_a_contrastive_term_that_starts_late(zero: str) -> None:
    """Its factor is zero before, or it is not computed at all."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.words(tokens)).mean(1)
        lost, factor = model.classified(x, tokens), max(0, number - LAST + 1)
        if zero == "absent" and not factor:
            return lost
        return lost + factor * F.cross_entropy(x @ x.t(), torch.arange(len(x)), reduction="none")

    verdict = run(model, losses, [4, 4, 4], [4, 4, 4])
    assert verdict.kind == "refused"
    assert "samples" in verdict.detail


@pytest.mark.parametrize("how", ["index", "index_select", "gather", "time first"])
def test_sentences_sorted_by_length_that_come_unsorted_late(how: str) -> None:
    """fairseq's loader sorts them already."""
    model = Tagger()

    def ordered(x: Tensor, order: Tensor) -> Tensor:
        if how == "time first":
            return x.transpose(0, 1)[:, order].transpose(0, 1)
        if how == "gather":
            return x.gather(0, order.view(-1, 1, 1).expand_as(x))
        return x[order] if how == "index" else x.index_select(0, order)

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = model.norm(torch.tanh(model.hidden(ordered(model.words(tokens), order))))
        return model.classified(ordered(x, order.argsort()).sum(1), tokens)

    assert run(model, losses, [4, 3, 2], [2, 3, 4]).kind == "exact"


@pytest.mark.parametrize("by", ["index", "split", "slices"])
def test_sentences_without_padding_that_come_in_unequal_lengths_late(by: str) -> None:
    """As many words as with equal lengths, or as many as a multiple of the sentences."""
    model = Tagger()

    def by_sentence(lost: Tensor, samples: Tensor, lengths: Tensor) -> Tensor:
        if by == "index":
            return summed(lost, samples, len(lengths))
        if by == "split":
            return torch.stack([part.sum() for part in lost.split(lengths.tolist())])
        ends = lengths.cumsum(0).tolist()
        return torch.stack([lost[end - length : end].sum() for end, length in zip(ends, lengths.tolist())])

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        chosen = inside(tokens, lengths)
        lost = F.cross_entropy(model.out(model.layers(model.words(tokens[chosen]))), tokens[chosen], reduction="none")
        return by_sentence(lost, chosen.nonzero()[:, 0], lengths)

    assert run(model, losses, [4, 4, 4], [4, 1, 1]).kind == "exact"
    assert run(model, losses, [4, 4, 4], [1, 1, 1]).kind == "exact"
    assert run(model, losses, [2, 2, 2], [4, 1, 1]).kind == "exact"


def test_rows_taken_one_by_one_that_are_fewer_late() -> None:
    """Nothing but the number of rows of a sample tells it."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed, ends = tokens[inside(tokens, lengths)], lengths.cumsum(0).tolist()
        lost = F.cross_entropy(model.out(model.layers(model.words(packed))), packed, reduction="none")
        counts = zip(ends, lengths.tolist())
        return torch.stack([sum(lost[i] for i in range(end - count, end)) for end, count in counts])  # type: ignore[misc]

    assert run(model, losses, [4, 4, 4], [4, 1, 1]).kind == "exact"


@pytest.mark.parametrize("by", ["mask", "numbers"])
def test_as_many_labelled_words_that_come_unevenly_late(by: str) -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        chosen: Tensor | tuple[Tensor, ...] = inside(tokens, lengths)
        samples = chosen.nonzero()[:, 0]  # type: ignore[union-attr]
        chosen = chosen if by == "mask" else chosen.nonzero(as_tuple=True)  # type: ignore[union-attr]
        x = model.norm(torch.tanh(model.hidden(model.words(tokens))))
        lost = F.cross_entropy(model.out(x[chosen]), tokens[chosen], reduction="none")
        return x.square().sum((1, 2)) + summed(lost, samples, len(tokens))

    assert run(model, losses, [2, 2, 2], [4, 1, 1]).kind == "exact"


def test_on_a_gpu_an_unusual_order_is_told_of_one_batch_later() -> None:
    """To look at once would be a wait for the device in every batch."""
    rehearsal, familiarity = Rehearsal(), Familiarity()
    with rehearsal.active():
        x, usual, other = (moved(t) for t in (torch.randn(3, 4), torch.arange(3), torch.tensor([2, 0, 1])))

        def strange(order: Tensor) -> bool:
            return familiarity.strange([], x.requires_grad_()[order].sum(1))

        assert strange(usual)
        familiarity.learn()
        assert not strange(usual)
        assert not strange(other)
        assert not familiarity.lost
        with pytest.warns(UserWarning, match="the latest batch moved its rows about in another order"):
            strange(usual)
        assert familiarity.lost
        assert rehearsal.waits == []


def test_the_warning_names_the_line_that_asked_for_a_perturbation() -> None:
    rehearsal = Rehearsal()
    with rehearsal.active():
        layer = moved(nn.Linear(4, 3))
        engine, usual, other = InstanceEngine(layer, 0.1), moved(torch.arange(3)), moved(torch.tensor([2, 0, 1]))

        def solve(order: Tensor) -> None:
            x = moved(torch.randn(3, 4))
            with engine.recording() as tape:
                losses = layer(x)[order].square().sum(1)
            engine.solve(tape, losses)

        for _ in range(LAST - 1):
            solve(usual)
        solve(other)
        with pytest.warns(UserWarning, match="moved its rows about in another order") as warned:
            solve(usual)
    assert [warning.filename for warning in warned] == [__file__]
