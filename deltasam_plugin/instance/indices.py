"""How the indices, masks and lengths that operations take arrange the samples: see ``orders``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.instance.arrival import arriving
from deltasam_plugin.instance.operations import Graph, Operation, signed
from deltasam_plugin.instance.orders import Order

WRITING = ("IndexPut", "IndexAdd", "IndexCopy", "IndexFill", "IndexReduce", "Scatter")
COLUMNS = 256  # of an index that are looked at


def indices(graph: Graph, conditions: bool = True) -> Callable[[], list[Order]]:
    """Start to find out how indices, masks and lengths arrange the samples, and return what tells it.

    Of indices an order says whether all rows of the first sample come first, then as many of the second, and so on; and
    whether the first rows of all samples come first, then their second ones. Both are said twice: for indices into rows
    that lie sample by sample, and for those that lie position by position. For the others see :func:`_of_mask`,
    :func:`_of_condition` and :func:`_of_lengths`.

    Args:
        graph: of the losses.
        conditions: whether to look at masks that let values through, too.
    """
    uses: list[tuple[Operation, int]] = []
    kept: list[Tensor] = []
    count: Counter[Operation] = Counter()
    known: dict[Hashable, tuple[Tensor, Tensor]] | None = {} if conditions else None
    for node, operation in graph.nodes:
        for found in _found(node, graph.batch, known) if _arguments(node.__class__) else ():
            count[operation] += 1
            uses.append((operation, count[operation]))
            kept.append(found)
    if not uses:
        return list
    device = next((found.device for found in kept if found.device.type != "cpu"), kept[0].device)
    arrived = arriving(torch.stack([found.to(device) for found in kept]))  # indices may be on the CPU
    return lambda: [Order(*use, tuple(kept)) for use, kept in zip(uses, arrived().tolist())]


@cache
def _arguments(kind: type) -> list[str]:
    """The attributes of a kind of node that move rows about, or let some through."""
    names = ("index", "indices", "mask", "condition", "lengths", "offsets")
    found = [name for name in names if hasattr(kind, f"_saved_{name}")]
    # The single indices of Sort, Max and the like are results, and move nothing across their dimension.
    return [] if found == ["indices"] and not kind.__name__.startswith(("Index", "Embedding")) else found


def _found(node: Any, batch: int, conditions: dict[Hashable, tuple[Tensor, Tensor]] | None) -> Iterator[Tensor]:
    """The properties of each argument of an operation, (4,) bool.

    Args:
        node: of the operation.
        batch: B.
        conditions: masks that were looked at, and what was found: layers share them. None to look at none.
    """
    name = node.__class__.__name__
    if name.startswith("Embedding") and _is_of_parameter(node):
        return
    for argument in _arguments(node.__class__):
        elementwise = argument in ("mask", "condition") and not name.startswith(("MaskedSelect", "MaskedScatter"))
        if elementwise and conditions is None:
            continue
        value = getattr(node, f"_saved_{argument}")
        if isinstance(value, tuple):  # x[i, j]
            sizes = _sizes(node)
            for dim, index in enumerate(value):
                places = sizes[dim] if dim < len(sizes) else 0
                if index is not None and index.numel() and _may_be_samples(dim, len(sizes), places, batch):
                    yield _of_mask(index, batch) if index.dtype == torch.bool else _of_index(index, places, batch)
        elif not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
            continue
        elif argument in ("lengths", "offsets"):
            yield _of_lengths(value if argument == "lengths" else value.diff())
        elif argument in ("index", "indices"):
            yield from _of_dimension(node, value, batch)
        elif elementwise and conditions is not None:
            key = value.data_ptr(), value.shape, value.stride()
            if key not in conditions:
                conditions[key] = value, _of_condition(value)  # the mask is kept: its place may not be taken by another
            yield conditions[key][1]
        else:
            yield _of_mask(value, batch)


def _is_of_parameter(node: Any) -> bool:
    """Whether an embedding looks words up, and no rows of another layer."""
    ((weight, _), *_) = node.next_functions
    return weight is None or bool(hasattr(weight, "variable"))


def _may_be_samples(dim: int, rank: int, places: int, batch: int) -> bool:
    """Whether the samples may be along a dimension: one of the first two that is not the last, or one of their number.

    Args:
        dim: the dimension.
        rank: how many there are; 0 if this is not known.
        places: its size; 0 if this is not known.
        batch: B.
    """
    return dim < (max(1, min(2, rank - 1)) if rank else 2) or places == batch


def _of_dimension(node: Any, index: Tensor, batch: int) -> Iterator[Tensor]:
    """Properties of the index of index_select, gather, scatter, take and the like."""
    sizes = _sizes(node)
    if node.__class__.__name__.startswith("Take"):
        sizes = (prod(sizes),)
    rank = len(sizes) or getattr(node, "_saved_source_dim", index.dim())
    dim = signed(getattr(node, "_saved_dim", 0)) % max(1, rank)
    places = sizes[dim] if dim < len(sizes) else 0
    if not _may_be_samples(dim, rank, places, batch):
        return
    if index.dim() > 1 and hasattr(node, "_saved_dim"):
        index = index.movedim(dim, 0)
        for other in reversed(range(1, index.dim())):  # expanded to the width of a row
            index = index.select(other, 0) if index.stride(other) == 0 else index
        columns = index.flatten(1) if index.dim() > 1 else index.unsqueeze(1)
        columns = columns[:, :: -(-columns.shape[1] // COLUMNS)]
        yield torch.stack([_of_index(columns[:, :1], places, batch), _of_columns(columns, places, batch)]).all(0)
    else:
        yield _of_index(index, places, batch)


def _sizes(node: Any) -> Sequence[int]:
    """Of what an operation takes from or writes to; empty if that is not known."""
    if node.__class__.__name__.startswith(WRITING):  # their result is as large as what they write to
        before, number = node, 0
    else:
        before, number = node.next_functions[0]
    shapes = getattr(before, "_input_metadata", ())  # of gradients of results; some kinds of nodes have none
    return tuple(shapes[number].shape) if number < len(shapes) else getattr(node, "_saved_self_sym_sizes", ())


def _of_columns(columns: Tensor, places: int, batch: int) -> Tensor:
    """Properties that the index has in every column, where each is as the first one says."""
    same = (_samples(columns, places, batch) == _samples(columns[:, :1], places, batch)).flatten(1).all(1)
    return same.expand(2).repeat(2)


def _samples(index: Tensor, places: int, batch: int) -> Tensor:
    """The sample of each place of an index (...), if rows lie sample by sample, and position by position: (2, ...).

    Where the number of places tells no difference, or is not known, an index is taken for a sample: (1, ...).
    """
    many = places > batch and places % batch == 0
    return torch.stack([index // (places // batch), index % batch]) if many else index.unsqueeze(0)


def _of_index(index: Tensor, places: int, batch: int) -> Tensor:
    """See :func:`indices`.

    Args:
        index: integer.
        places: that it may name; 0 if this is not known.
        batch: B.
    """
    if index.numel() % batch or index.dtype not in (torch.int32, torch.int64):
        return torch.zeros(4, dtype=torch.bool, device=index.device)
    samples = _samples(index.flatten(), places, batch)
    outer, inner = samples.view(len(samples), batch, -1), samples.view(len(samples), -1, batch).transpose(1, 2)
    kept = [(way == way[:, :, :1]).flatten(1).all(1) & (way[:, :, 0].diff() > 0).all(1) for way in (outer, inner)]
    return torch.stack([each.expand(2) for each in kept]).flatten()


def _of_mask(mask: Tensor, batch: int) -> Tensor:
    """Whether it picks as many of each sample, if rows lie sample by sample, or position by position; or everything."""
    if mask.numel() % batch:
        return torch.zeros(4, dtype=torch.bool, device=mask.device)
    outer, inner, everything = mask.reshape(batch, -1).sum(1), mask.reshape(-1, batch).sum(0), mask.all()
    return torch.stack([(outer == outer[0]).all(), (inner == inner[0]).all(), everything, everything])


def _of_condition(mask: Tensor) -> Tensor:
    """Whether it lets all pass, and whether nothing: what is behind it may be of other samples."""
    mask = mask.bool()
    everything, nothing = mask.all(), ~mask.any()
    return torch.stack([everything, nothing, everything, nothing])


def _of_lengths(lengths: Tensor) -> Tensor:
    """Whether all are the same."""
    return (lengths == lengths.flatten()[:1]).all().expand(4)
