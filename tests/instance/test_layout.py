"""Layouts: grouping by sample is what a loop over rows does, and gradients tell the right one from the others."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltasam_plugin.instance.layout import NOBODY, Layout, Listed, agreed, conceivable, consistent

WIDTH = 2


@st.composite
def calls(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], int]:
    """A layout, the leading sizes of a call in that layout, and B."""
    batch, repeats, time = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rank = draw(st.integers(1, 3))
    dim = draw(st.integers(0, rank - 1))
    lead = [time] * rank
    lead[dim] = batch * repeats
    return Layout(dim, draw(st.booleans())), tuple(lead), batch


def owner(layout: Layout, position: list[int], lead: tuple[int, ...], batch: int) -> int:
    """The definition, one row at a time."""
    repeats = lead[layout.dim] // batch
    return position[layout.dim] // repeats if layout.outer else position[layout.dim] % batch


def owners(layout: Layout, lead: tuple[int, ...], batch: int) -> Tensor:
    rows = torch.ones(lead).nonzero().tolist()
    return torch.tensor([owner(layout, row, lead, batch) for row in rows])


@given(calls())
def test_rows_are_grouped_by_their_sample(call: tuple[Layout, tuple[int, ...], int]) -> None:
    layout, lead, batch = call
    grouping = layout.bind(lead, batch, [])
    assert grouping is not None
    expected = owners(layout, lead, batch)
    rows = torch.arange(len(expected) * WIDTH).view(-1, WIDTH)
    assert torch.equal(grouping.owners().flatten(), expected)
    grouped = grouping.group(rows)
    for sample in range(batch):
        assert {tuple(r) for r in grouped[sample].tolist()} == {tuple(r) for r in rows[expected == sample].tolist()}
    assert torch.equal(grouping.ungroup(grouped), rows.view(*lead, WIDTH))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(4, 5))
def test_listed_rows_are_padded_with_zeros(listed: list[int], batch: int) -> None:
    index = torch.tensor(listed)
    rows = torch.arange(1.0, len(listed) * WIDTH + 1).view(-1, WIDTH)
    grouping = Layout(listed=0).bind(tuple(index.shape), batch, [Listed(index, batch)])
    assert grouping is not None
    grouped = grouping.group(rows)
    for sample in range(batch):
        own = rows[index == sample]
        assert torch.equal(grouped[sample, : len(own)], own)
        assert not grouped[sample, len(own) :].any()
    assert torch.equal(grouping.ungroup(grouped), rows)


@given(calls(), st.data())
def test_what_gradients_leave_open_does_not_matter(
    call: tuple[Layout, tuple[int, ...], int], data: st.DataObject
) -> None:
    """Whatever rows have gradients: the true layout survives, and survivors agree with it on those rows."""
    layout, lead, batch = call
    true = owners(layout, lead, batch)
    known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(true), max_size=len(true))))
    seen = torch.where(known, true, NOBODY)
    survivors = []
    for candidate in conceivable(len(lead), 0):
        grouping = candidate.bind(lead, batch, [])
        if grouping is not None and consistent(grouping, seen):
            survivors.append(candidate)
            assert torch.equal(grouping.owners().flatten()[known], true[known])
    assert layout in survivors


@given(calls())
def test_square_batches_are_ambiguous_until_gradients_tell(call: tuple[Layout, tuple[int, ...], int]) -> None:
    _, lead, batch = call
    groupings = [g for g in (c.bind(lead, batch, []) for c in conceivable(len(lead), 0)) if g is not None]
    together = agreed(groupings)
    everyone = {tuple(g.owners().flatten().tolist()) for g in groupings}
    assert (together is not None) == (len(everyone) == 1)


def test_no_grouping_agrees_with_nothing() -> None:
    assert agreed([]) is None
    assert Layout(0).bind((3,), 2, []) is None
    assert Layout(listed=0).bind((3,), 2, [Listed(torch.tensor([0, 1]), 2)]) is None
