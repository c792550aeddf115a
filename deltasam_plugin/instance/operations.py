"""What the graph of a batch tells of how its operations move rows about.

Three things: the operations, each with those before it and the dimensions that they work along; whether the indices
that they take keep the samples in order; and in which order pieces are cut off, or rows taken one by one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltasam_plugin.instance.arrival import arriving

Operation = tuple[str, ...]  # the name of a node of the graph, and those of the nodes before it
FEW = 4  # inputs of an operation
MOVING = re.compile("Index|Gather|Scatter|MaskedSelect")  # in the name of an operation that moves rows by indices
# These begin the names of operations that give pieces, and of views. Others are named alike: SliceScatter, ViewAsReal.
CUTTING = tuple(
    f"{kind}Backward0"
    for kind in ("Select", "Slice", "Split", "SplitWithSizes", "Unbind", "UnsafeSplit", "UnsafeSplitWithSizes")
)
VIEW = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")

_DIMENSIONS = ("_saved_dim", "_saved_dim0", "_saved_dim1", "_saved_dims", "_saved_training")
_AMOUNTS = {"_saved_repeats": 1, "_saved_shifts": 0}  # in each dimension; what these values are is moved nowhere


class Order(NamedTuple):
    """What an operation keeps of the samples' order.

    Attributes:
        operation: which.
        use: the number of its kind in the graph, from the losses on; 0 for all of its kind together.
        kept: what :func:`indices` or :func:`pieces` says, each True or False.
    """

    operation: Operation
    use: int
    kept: tuple[bool, ...]

    def as_loose(self) -> list[Order]:
        """The orders that keep no more than this one does, itself included."""
        return [self._replace(kept=kept) for kept in product(*({False, each} for each in self.kept))]


class Graph(NamedTuple):
    """The graph of per-sample losses.

    Attributes:
        nodes: all, from the losses on, each with what it computes.
        cuts: the inputs of nodes that are pieces: the name of the node, the one that cuts, the number of its result.
        batch: B.
    """

    nodes: list[tuple[Any, Operation]]
    cuts: list[tuple[str, Any, int]]
    batch: int

    @classmethod
    def of(cls, losses: Tensor) -> Graph:
        """Go through the graph of losses (B,). Each node is asked for its name once: this runs in every batch."""
        names: dict[Any, str] = {None: ""}
        waiting: list[Any] = [losses.grad_fn] if losses.requires_grad else []
        names.update((node, _name(node, losses.numel())) for node in waiting)
        graph = cls([], [], losses.numel())
        while waiting:
            node = waiting.pop()
            inputs = []
            for before, number in node.next_functions:
                if before not in names:
                    names[before] = _name(before, graph.batch)
                    waiting.append(before)
                name = names[before]
                inputs.append(name)
                if name.startswith(CUTTING):
                    graph.cuts.append((names[node], before, number))
            # Of many tensors that are joined the kinds count, not how they are mixed: else every batch could be new.
            graph.nodes.append((node, (names[node], *(inputs if len(inputs) <= FEW else sorted(set(inputs))))))
        return graph


def _name(node: Any, batch: int) -> str:
    """What a node computes, and along which dimensions; for a view also which of the first two is the samples'."""
    name: str = node.name()
    for attribute in _told_by(node.__class__):
        value = getattr(node, attribute)
        if attribute in _AMOUNTS:
            value = [amount != _AMOUNTS[attribute] for amount in value]
        name = f"{name} {value}"
    if name.startswith(VIEW):
        sizes = node._saved_self_sym_sizes[:2]
        return f"{name} {sizes.index(batch)}" if batch in sizes else name
    return name


@cache
def _told_by(kind: type) -> list[str]:
    """The attributes of a kind of node that tell along which dimensions it works, and whether it trains."""
    return [attribute for attribute in (*_DIMENSIONS, *_AMOUNTS) if hasattr(kind, attribute)]


def indices(graph: Graph) -> Callable[[], list[Order]]:
    """Start to find out how indices arrange the samples, and return what tells it.

    An order says whether all rows of the first sample come first, then as many of the second, and so on; and whether
    the first rows of all samples come first, then their second ones, and so on.
    """
    uses: list[tuple[Operation, int]] = []
    kept: list[Tensor] = []
    count: Counter[Operation] = Counter()
    moving = {name for name in {operation[0] for _, operation in graph.nodes} if MOVING.search(name)}
    for node, operation in graph.nodes:
        for index, places in _indices(node) if operation[0] in moving else ():
            count[operation] += 1
            uses.append((operation, count[operation]))
            kept += _kept(index, places, graph.batch)
    if not uses:
        return list
    arrived = arriving(torch.stack(kept))

    def orders() -> list[Order]:
        values = arrived().tolist()
        return [Order(*use, kept) for use, kept in zip(uses, zip(values[::2], values[1::2]))]

    return orders


def _indices(node: Any) -> Iterator[tuple[Tensor, int]]:
    """Indices that may move rows of one sample to another's place, and the number of places (0 if it is not known).

    They go along the first dimension or the second one, where the samples are, and not along the last, within a row.
    """
    places = getattr(node, "_saved_self_sym_sizes", ())
    several = getattr(node, "_saved_indices", None)
    if isinstance(several, tuple):  # x[i, j]
        found = list(enumerate(several[:2]))
    elif (mask := getattr(node, "_saved_mask", None)) is not None:
        found = [(0, mask)]
    else:
        index = getattr(node, "_saved_index", None)
        if not isinstance(index, Tensor):
            return
        rank = index.dim()
        dim = _dim(node, rank)
        if rank > 1:
            index = index.movedim(dim, 0).flatten(1)[:, :1]
        found = [(dim, index)] if dim < max(1, min(2, rank - 1)) else []
    for dim, index in found:
        if index is not None and index.numel():
            yield index, places[dim] if dim < len(places) else 0


def _kept(index: Tensor, places: int, batch: int) -> list[Tensor]:
    """The two properties of an index, see :func:`indices`."""
    if index.numel() % batch or index.dtype not in (torch.bool, torch.int32, torch.int64):
        return [index.new_zeros((), dtype=torch.bool)] * 2
    if index.dtype == torch.bool:
        counts = index.reshape(batch, -1).sum(1)
        return [(counts == counts[0]).all(), index.all()]
    samples = index.flatten() // (places // batch if places and places % batch == 0 else 1)
    outer, inner = samples.view(batch, -1), samples.view(-1, batch)
    return [
        (outer == outer[:, :1]).all() & (outer[:, 0].diff() > 0).all(),
        (inner == inner[:1]).all() & (inner[0].diff() > 0).all(),
    ]


def pieces(graph: Graph) -> list[Order]:
    """Whether pieces are equally long, and whether those of each tensor come from first to last, or the reverse."""
    lengths: defaultdict[Operation, set[int]] = defaultdict(set)
    places: defaultdict[tuple[Operation, Hashable], list[int]] = defaultdict(list)
    for name, node, number in graph.cuts:
        operation: Operation = name, node.name()
        if hasattr(node, "_saved_split_sizes"):
            lengths[operation].update(node._saved_split_sizes)
        elif hasattr(node, "_saved_start"):
            sizes = node._saved_self_sym_sizes
            size = sizes[_dim(node, len(sizes))]
            lengths[operation].add(min(node._saved_end, size) - min(node._saved_start, size))
        places[operation, _whole(node)].append(_place(node, number))
    steps: defaultdict[Operation, list[int]] = defaultdict(list)
    for (operation, _), taken in places.items():
        steps[operation] += [after - before for before, after in pairwise(taken)]
    return [
        Order(operation, 0, (len(lengths[operation]) <= 1, min(found, default=0) >= 0, max(found, default=0) <= 0))
        for operation, found in steps.items()
    ]


def _place(node: Any, number: int) -> int:
    """Where a piece lies in its tensor: its index, or where it begins; of several results, their number."""
    return getattr(node, "_saved_start", getattr(node, "_saved_index", number))


def _whole(node: Any) -> Hashable:
    """The tensor that a piece is cut off, also if it is made anew for each piece: by what, and which piece of that."""
    path: list[int] = []
    links = _links(node)
    while len(links) == 1:
        ((node, number),) = links
        if node.name().startswith(CUTTING):
            path.append(_place(node, number))
        links = _links(node)
    return node, *path


def _links(node: Any) -> list[tuple[Any, int]]:
    """The inputs of a node that have a gradient."""
    return [(before, number) for before, number in node.next_functions if before is not None]


def _dim(node: Any, rank: int) -> int:
    """The dimension along which it works. Negative numbers are read without their sign."""
    dim = node._saved_dim
    return (dim - 2**64 if dim >= 2**63 else dim) % max(1, rank)
