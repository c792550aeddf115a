"""In which order the operations of a batch take its rows piece by piece, or write them one by one.

An order is told by properties that hold for every batch size. A batch in which one of them holds no longer is new.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

from deltasam_plugin.instance.operations import CUTTING, Graph, Operation, signed

_WRITTEN: Operation = ("written",)


class Order(NamedTuple):
    """What an operation keeps of the samples' order.

    Attributes:
        operation: which.
        use: the number of its kind in the graph, from the losses on; 0 for all of its kind together.
        kept: what ``indices``, :func:`pieces` or :func:`writes` says, each True or False.
    """

    operation: Operation
    use: int
    kept: tuple[bool, ...]

    def as_loose(self) -> list[Order]:
        """The orders that keep no more than this one does, itself included."""
        return [self._replace(kept=kept) for kept in product(*({False, each} for each in self.kept))]


def pieces(graph: Graph) -> list[Order]:
    """Whether pieces are equally long; and of those of each tensor what :func:`_steps` says."""
    lengths: defaultdict[Operation, set[int]] = defaultdict(set)
    places: defaultdict[tuple[Operation, Hashable], list[int]] = defaultdict(list)
    whole = _Whole()
    for name, node, number in graph.cuts:
        operation: Operation = name, node.name()
        if hasattr(node, "_saved_split_sizes"):
            lengths[operation].update(node._saved_split_sizes)
        elif hasattr(node, "_saved_start"):
            sizes = node._saved_self_sym_sizes
            size = sizes[signed(node._saved_dim) % max(1, len(sizes))]
            lengths[operation].add(min(node._saved_end, size) - min(node._saved_start, size))
        places[operation, whole.of(node)].append(_place(node, number))
    taken: defaultdict[Operation, list[list[int]]] = defaultdict(list)
    for (operation, _), each in places.items():
        taken[operation].append(each)
    return [Order(operation, 0, (len(lengths[operation]) <= 1, *_steps(each))) for operation, each in taken.items()]


def writes(places: Sequence[tuple[Hashable, int]]) -> list[Order]:
    """What :func:`_steps` says of rows that are written to their places.

    Args:
        places: what was written to, and where it begins there, in order.
    """
    by_tensor: defaultdict[Hashable, list[int]] = defaultdict(list)
    for tensor, place in places:
        by_tensor[tensor].append(place)
    return [Order(_WRITTEN, 0, _steps(by_tensor.values()))] if by_tensor else []


def _steps(places: Iterable[Sequence[int]]) -> tuple[bool, bool, bool]:
    """Whether the places in each tensor come from first to last, or the reverse, and whether in equal steps."""
    steps = [{after - before for before, after in pairwise(each)} for each in places]
    every = set().union(*steps)
    return min(every, default=0) >= 0, max(every, default=0) <= 0, all(len(own) <= 1 for own in steps)


def _place(node: Any, number: int) -> int:
    """Where a piece lies in its tensor: its index, or where it begins; of several results, their number."""
    return getattr(node, "_saved_start", getattr(node, "_saved_index", number))


class _Whole:
    """Names the tensor that a piece is cut off: by the operation that made it, and which piece it is of what that gave.

    The name is the same if the tensor is made anew for each piece. Every node is looked at once.
    """

    def __init__(self) -> None:
        self._names: dict[Any, Hashable] = {}
        self._numbers: dict[Hashable, int] = {}  # short names: those of pieces of pieces would grow

    def of(self, node: Any) -> Hashable:
        """The name of what a node takes."""
        way: list[tuple[Any, tuple[Any, int]]] = []
        while node not in self._names:
            links = [(before, number) for before, number in node.next_functions if before is not None]
            if len(links) != 1:
                self._names[node] = node
                break
            way.append((node, links[0]))
            node = links[0][0]
        for after, (before, number) in reversed(way):
            name = self._names[before]
            if before.name().startswith(CUTTING):
                piece = name, _place(before, number)
                name = self._numbers.setdefault(piece, len(self._numbers))
            self._names[after] = name
        return self._names[way[0][0]] if way else self._names[node]
