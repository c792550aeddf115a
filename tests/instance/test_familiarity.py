"""Between two checks too: a batch that is unlike those that were compared is compared before its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin.instance import InstanceEngine
from deltasam_plugin.instance.engine import ALWAYS_CHECKED
from deltasam_plugin.instance.familiarity import Familiarity
from tests.helpers.rehearsal import Rehearsal, moved
from tests.helpers.tagger import WIDTH, WORDS, Step, Tagger, inside, summed
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


ORDERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, order: x[order],
    "index_select": lambda x, order: x.index_select(0, order),
    "index_select, time first": lambda x, order: x.transpose(0, 1).index_select(1, order).transpose(0, 1),
    "index_select, last": lambda x, order: x.permute(1, 2, 0).index_select(-1, order).permute(2, 0, 1),
    "gather, last": lambda x, order: x.permute(1, 2, 0).gather(2, order.expand(4, WIDTH, 3)).permute(2, 0, 1),
    "third index": lambda x, order: x.transpose(0, 1)[None][:, :, order][0].transpose(0, 1),
    "take": lambda x, order: x.take(order.view(-1, 1) * x[0].numel() + torch.arange(x[0].numel())).view_as(x),
    "embedding": lambda x, order: F.embedding(order, x.flatten(1)).view_as(x),
    "gather": lambda x, order: x.gather(0, order.view(-1, 1, 1).expand_as(x)),
    "time first": lambda x, order: x.transpose(0, 1)[:, order].transpose(0, 1),
    "numbers": lambda x, order: torch.stack([x[i] for i in order.tolist()]),
    "numbers, of the second dimension": lambda x, order: torch.stack([x.transpose(0, 1)[:, i] for i in order.tolist()]),
    "slices": lambda x, order: torch.cat([x[i : i + 1] for i in order.tolist()]),
    "unbind": lambda x, order: torch.stack([x.unbind()[i] for i in order.tolist()]),
    "split": lambda x, order: torch.cat([x.split(1)[i] for i in order.tolist()]),
    "split once": lambda x, order: torch.cat(list(map(x.split(1).__getitem__, order.tolist()))),
    "split, work in between": lambda x, order: torch.stack([2 * x.split(1)[i].squeeze(0) for i in order.tolist()]),
}


@pytest.mark.parametrize("how", ORDERED)
def test_sentences_sorted_by_length_that_come_unsorted_late(how: str) -> None:
    """fairseq's loader sorts them already."""
    model, ordered = Tagger(), ORDERED[how]

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = model.norm(torch.tanh(model.hidden(ordered(model.words(tokens), order))))
        return model.classified(ordered(x, order.argsort()).sum(1), tokens)

    assert run(model, losses, [4, 3, 2], [2, 3, 4]).kind == "exact"


WRITTEN: dict[str, Callable[[Tensor, int, Tensor], object]] = {
    "by numbers": lambda out, i, row: out.__setitem__(i, row),
    "by slices": lambda out, i, row: out.__setitem__(slice(i, i + 1), row[None]),
    "by slices of time first": lambda out, i, row: out.transpose(0, 1).__setitem__((slice(None), i), row),
    "by tensors": lambda out, i, row: out.__setitem__(torch.tensor(i), row),
    "by numbers of numpy": lambda out, i, row: out.__setitem__(np.int64(i), row),
    "copied": lambda out, i, row: out.select(0, i).copy_(row, True),
    "added": lambda out, i, row: out[i].add_(other=row, alpha=1),
    "subtracted": lambda out, i, row: out[i].sub_(row),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_sentences_written_to_their_places_one_by_one_that_come_unsorted_late(how: str) -> None:
    model, write = Tagger(), WRITTEN[how]

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = model.norm(torch.tanh(model.hidden(model.words(tokens[order]))))
        out = torch.zeros_like(x)
        for row, place in zip(x, order.tolist()):
            write(out, place, row)
        return model.classified(out.sum(1), tokens)

    assert run(model, losses, [4, 3, 2], [2, 3, 4]).kind == "exact"


def test_sentences_written_to_their_places_at_once_that_come_unsorted_late() -> None:
    """To a tensor that has no gradient before."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = model.norm(torch.tanh(model.hidden(model.words(tokens[order].t()))))
        out = torch.zeros_like(x)
        out[:, order] = x
        return model.classified(out.sum(0), tokens)

    assert run(model, losses, [4, 3, 2], [2, 3, 4]).kind == "exact"


def test_two_tensors_one_after_the_other_that_rows_are_written_to() -> None:
    """The second may lie where the first one was."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = model.norm(torch.tanh(model.hidden(model.words(tokens[order]))))
        for _ in range(2):
            out = torch.zeros_like(x)
            for row, place in zip(x, order.tolist()):
                out[place] = row
            x = out[order] + 0
        return model.classified(out.sum(1), tokens)

    assert run(model, losses, [4, 3, 2], [2, 3, 4]).kind == "exact"


@pytest.mark.parametrize("late", [[2, 3, 4], [3, 4, 2]])
def test_sentences_encoded_one_by_one_from_the_longest_on(late: list[int]) -> None:
    """Each in calls of its own."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True).tolist()
        encoded = {i: model.layers(model.words(tokens[i])).sum(0) for i in order}
        return model.classified(torch.stack([encoded[i] for i in range(len(order))]), tokens)

    assert run(model, losses, [4, 3, 2], late).kind == "exact"


def kept(x: Tensor) -> Tensor:
    """With memory of its own, so that no further operation tells where the rows came from."""
    return x.clone(memory_format=torch.contiguous_format)


def permuted(x: Tensor, late: bool) -> Tensor:
    return kept(x.permute((0, 1, 2) if late else (1, 0, 2)))


def viewed(x: Tensor, late: bool) -> Tensor:
    """From (B·T, C) to the same in another order."""
    return kept(x.view(4 if late else 3, -1, x.shape[-1]).transpose(0, 1)).view(-1, x.shape[-1])


MOVED: dict[str, tuple[Callable[[Tensor, bool], Tensor], Callable[[Tensor, bool], Tensor]]] = {
    "permute": (permuted, lambda x, late: permuted(x.view((3, 4, WIDTH) if late else (4, 3, WIDTH)), late)),
    "view": (
        lambda x, late: viewed(x.view(-1, WIDTH), late),
        lambda x, late: x[viewed(torch.arange(12).unsqueeze(1), late).flatten().argsort()],
    ),
    "flip": (lambda x, late: x.flip(0 if late else 1), lambda x, late: x.view(3, 4, WIDTH).flip(0 if late else 1)),
    "roll": (lambda x, late: x.roll(int(late), 0), lambda x, late: x.view(3, 4, WIDTH).roll(-int(late), 0)),
    "repeat": (
        lambda x, late: x.repeat((1, 2, 1) if late else (2, 1, 1)),
        lambda x, late: x.view((3, 2, 4, WIDTH) if late else (2, 3, 4, WIDTH)).sum(1 if late else 0),
    ),
}


@pytest.mark.parametrize("how", MOVED)
def test_rows_that_the_same_operations_move_another_way_late(how: str) -> None:
    """Their arguments alone tell it."""
    model, (there, back) = Tagger(), MOVED[how]

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = there(model.words(tokens), number == LAST)
        x = model.norm(torch.tanh(model.hidden(x.reshape(-1, WIDTH))))
        return model.classified(back(x, number == LAST).reshape(3, 4, WIDTH).sum(1), tokens)

    assert run(model, losses, [4, 4, 4], [4, 4, 4]).kind == "exact"


@pytest.mark.parametrize("late", [0, 1])
def test_a_softmax_over_the_samples_that_comes_late(late: int) -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.words(tokens)).softmax(late if number == LAST else 1)
        return model.classified(x.sum(1), tokens)

    assert run(model, losses, [4, 4, 4], [4, 4, 4]).kind == ("exact" if late else "refused")


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


@pytest.mark.parametrize("by", ["embedding_bag", "segment_reduce"])
def test_words_added_up_by_sentence_that_come_unevenly_late(by: str) -> None:
    """As many words as before."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = tokens[inside(tokens, lengths)]
        x = model.layers(model.words(packed))
        if by == "embedding_bag":
            starts = lengths.cumsum(0) - lengths
            return model.classified(F.embedding_bag(torch.arange(len(x)), x, starts, mode="sum"), tokens)
        lost = F.cross_entropy(model.out(x), packed, reduction="none")
        return torch.segment_reduce(lost, "sum", lengths=lengths)

    assert run(model, losses, [2, 2, 2], [4, 1, 1]).kind == "exact"


TIME_FIRST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mask": lambda x, chosen: x[chosen],
    "numbers": lambda x, chosen: x.flatten(0, 1).index_select(0, chosen.flatten().nonzero().squeeze(1)),
}


@pytest.mark.parametrize("how", TIME_FIRST)
def test_as_many_words_picked_from_time_first_that_come_unevenly_late(how: str) -> None:
    model, picked = Tagger(), TIME_FIRST[how]

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        chosen = inside(tokens, lengths).t()
        x = model.norm(torch.tanh(model.hidden(model.words(tokens.t()))))
        lost = F.cross_entropy(model.out(picked(x, chosen)), tokens.t()[chosen], reduction="none")
        return lost.new_zeros(chosen.shape).masked_scatter(chosen, lost).sum(0)

    assert run(model, losses, [2, 2, 2], [3, 2, 1]).kind == "exact"


def test_last_words_picked_from_time_first_in_another_order_late() -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = model.norm(torch.tanh(model.hidden(model.words(tokens.t()))))
        return model.classified(x.flatten(0, 1)[(lengths[order] - 1) * len(order) + order], tokens[order])

    assert run(model, losses, [4, 3, 2], [2, 3, 4]).kind != "silent"


def test_spans_of_a_stream_that_begin_elsewhere_late() -> None:
    """All are equally long."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, starts: Tensor) -> Tensor:
        x = model.layers(model.words(tokens.flatten()))
        return model.classified(torch.stack([x[start : start + 3].sum(0) for start in starts.tolist()]), tokens)

    assert run(model, losses, [0, 4, 8], [0, 3, 8]).kind != "silent"


@pytest.mark.parametrize("how", ["where", "masked_fill"])
def test_samples_mixed_behind_a_mask_that_was_empty(how: str) -> None:
    """Nothing crosses an empty mask, not even NaN."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x, mixed = model.norm(torch.tanh(model.hidden(model.words(tokens)))), torch.full((3, 1, 1), number == LAST)
        if how == "where":
            x = torch.where(mixed, x.roll(1, 0), x)
        else:
            x = x.masked_fill(mixed, 0) + x.roll(1, 0).masked_fill(~mixed, 0)
        return model.classified(x.sum(1), tokens)

    assert run(model, losses, [4, 4, 4], [4, 4, 4]).kind == "exact"


def test_two_views_of_a_batch_that_one_layer_sees_in_another_order_late() -> None:
    """As often as before, and in calls of the same size."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        def seen(view: Tensor) -> Tensor:
            return torch.tanh(model.hidden(model.words(view.flatten()))).view(*view.shape, WIDTH)

        if number == LAST:
            by_sentence, by_time = seen(tokens), seen(tokens.t())
        else:
            by_time, by_sentence = seen(tokens.t()), seen(tokens)
        return model.classified((by_sentence * by_time.transpose(0, 1)).sum(1), tokens)

    assert run(model, losses, [4, 4, 4], [4, 4, 4]).kind == "exact"


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
