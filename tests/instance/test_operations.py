"""What a graph tells of rows that are taken one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deltasam_plugin.instance.indices import indices
from deltasam_plugin.instance.operations import Graph
from deltasam_plugin.instance.orders import pieces

B = 3
Taken = Callable[[Tensor, int], Tensor]  # (B, 4, 2) and the number of a sample to its rows
TAKEN: dict[str, Taken] = {
    "index": lambda x, i: x[i],
    "slice": lambda x, i: x[i : i + 1],
    "narrow": lambda x, i: x.narrow(0, i, 1),
    "unbind": lambda x, i: x.unbind()[i],
    "split": lambda x, i: x.split(1)[i],
    "chunk": lambda x, i: x.chunk(B)[i],
    "tensor_split": lambda x, i: x.tensor_split(B)[i],
    "of a tensor made anew": lambda x, i: (2 * x)[i],
    "of a view": lambda x, i: x.transpose(0, 1)[:, i],
    "of a piece": lambda x, i: x.unbind(1)[0][i],
}


def graph(order: Sequence[int], taken: Taken) -> Graph:
    """That of losses (B,), each the sum of some rows."""
    x = torch.randn(B, 4, 2, requires_grad=True).tanh()
    return Graph.of(torch.stack([taken(x, i).sum() for i in order]))


def in_turn(order: Sequence[int], taken: Taken) -> tuple[bool, ...]:
    """Whether rows are taken from first to last, and whether from last to first."""
    kept = {each.kept[1:3] for each in pieces(graph(order, taken))} - {(True, True)}  # a single piece is both
    assert len(kept) == 1
    return kept.pop()


@pytest.mark.parametrize("how", TAKEN)
def test_samples_taken_in_turn_or_not(how: str) -> None:
    forward, backward, mixed = (in_turn(order, TAKEN[how]) for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]))
    assert sorted(forward) == sorted(backward) == [False, True]
    assert forward != backward
    assert mixed == (False, False)


@pytest.mark.parametrize("words", [[0, 1, 2], [1, 2, 0]])
def test_pieces_of_pieces_have_an_order_of_their_own(words: list[int]) -> None:
    """Words of sentences: all of the first sentence, then all of the second."""
    found = pieces(graph([0, 1, 2], lambda x, i: torch.stack([x[i][word] for word in words])))
    mixed = [order for order in found if order.kept[1:3] == (False, False)]
    assert len(found) == 2
    assert len(mixed) == (words != sorted(words))


def test_a_single_row_is_in_every_order() -> None:
    assert [order.kept for order in pieces(graph([1], TAKEN["index"]))] == [(True,) * 4]


class ViewOf(torch.autograd.Function):
    """Its node is named like that of a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize(
    "named_alike",
    [
        lambda x, i: x.select_scatter(x[i], 0, i),
        lambda x, i: x.slice_scatter(x[i : i + 1], 0, i, i + 1),
        lambda x, i: torch.view_as_real(torch.view_as_complex(x)),
        lambda x, i: ViewOf.apply(x),
    ],
)
def test_operations_named_like_those_that_take_pieces_or_views(named_alike: Taken) -> None:
    assert all(order.kept[1:3] != (False, False) for order in pieces(graph([0, 1, 2], named_alike)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x.softmax(0)[0], lambda x: x.softmax(1)[0]),
        (lambda x: x.permute(0, 1)[0], lambda x: x.permute(1, 0)[0]),
        (lambda x: x.transpose(0, 1)[0], lambda x: x.transpose(1, 1)[0]),
        (lambda x: x.flip(0)[0], lambda x: x.flip(1)[0]),
        (lambda x: x.roll(0, 0)[0], lambda x: x.roll(1, 0)[0]),
        (lambda x: x.repeat(2, 1)[0], lambda x: x.repeat(1, 2)[0, :3]),
        (lambda x: x.view(3, 3)[0], lambda x: x.view(9)[:3]),
    ],
)
def test_dimensions_belong_to_an_operation(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 3, requires_grad=True)
    found = [{operation[0] for _, operation in Graph.of(f(x)).nodes} for f in (one, one, other)]
    assert found[0] == found[1] != found[2]


def test_sizes_do_not_belong_to_an_operation() -> None:
    """Every batch has others."""

    def operations(batch: int, length: int) -> set[tuple[str, ...]]:
        x = torch.randn(batch, length, 2, requires_grad=True)
        x = x.repeat(batch, 1, 1).roll(length, 0).view(-1, 2).view(batch, -1, 2)
        return {operation for _, operation in Graph.of(x[:, : length - 1].sum((1, 2))).nodes}

    assert operations(3, 4) == operations(5, 7)


def test_indices_say_whether_samples_stay_in_order() -> None:
    x = torch.randn(B, 4, requires_grad=True)
    for order, kept in (([0, 1, 2], True), ([2, 0, 1], False)):
        assert [each.kept for each in indices(Graph.of(x[torch.tensor(order)].sum(1)))()] == [(kept,) * 4]


PICKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (B, T, C), with B = 3 and T = 6, in another order
    "index": lambda x, order: x[order],
    "second index": lambda x, order: x.transpose(0, 1)[:, order],
    "index_select": lambda x, order: x.transpose(0, 1).index_select(1, order),
    "index_select, from the end": lambda x, order: x.transpose(0, 1).index_select(-2, order),
    "gather": lambda x, order: x.gather(0, order.view(-1, 1, 1).expand_as(x)),
    "gather, every column": lambda x, order: x.gather(0, order.view(-1, 1, 1).repeat(1, 6, 2)),
    "flat, by sample": lambda x, order: x.flatten(0, 1)[6 * order + 5],
    "flat, by position": lambda x, order: x.transpose(0, 1).flatten(0, 1)[3 * torch.tensor([5, 2, 4]) + order],
    "embedding": lambda x, order: torch.nn.functional.embedding(order, x.flatten(1)),
}


@pytest.mark.parametrize("how", PICKED)
def test_an_order_is_seen_whatever_the_length_is(how: str) -> None:
    x = torch.randn(B, 6, 2, requires_grad=True) * 1
    kept = {}
    for order in ([0, 1, 2], [2, 0, 1]):
        picked = PICKED[how](x, torch.tensor(order))
        (found,) = indices(Graph.of(picked.sum() * torch.ones(B)))()
        kept[tuple(order)] = found.kept
    assert any(before and not after for before, after in zip(*kept.values()))


def test_one_column_in_another_order_is_seen() -> None:
    x, index = torch.randn(B, 4, 2, requires_grad=True) * 1, torch.arange(B).view(B, 1, 1).repeat(1, 4, 2)
    mixed = index.clone()
    mixed[:, 3] = mixed[:, 3].roll(1, 0)
    kept = [indices(Graph.of(x.gather(0, each).sum((1, 2))))()[0].kept for each in (index, mixed)]
    assert kept == [(True,) * 4, (False,) * 4]


def test_indices_that_a_gpu_would_see_on_the_cpu_and_masks_that_are_sparse() -> None:
    """The meta device stands for it: nothing can be stacked with what is elsewhere."""
    x = torch.randn(B, 4, requires_grad=True) * 1
    sparse = torch.eye(B, 4).to_sparse()
    assert indices(Graph.of(x.sparse_mask(sparse).to_dense().sum(1)))() == []
    with torch.device("meta"):
        y = torch.empty(B, 4, requires_grad=True) * 1
        mask = torch.empty(B, 4, dtype=torch.bool)
    indices(Graph.of(y.masked_fill(mask, 0)[torch.arange(B)].sum(1)))


def test_words_of_a_dictionary_have_no_order() -> None:
    embedding = torch.nn.Embedding(5, 2)
    assert indices(Graph.of(embedding(torch.tensor([2, 0, 1])).sum(1)))() == []
