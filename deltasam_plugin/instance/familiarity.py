"""Notice a batch whose rows may be in an order that no batch before had, though known layouts fit its sizes.

Layouts were learned in batches that were compared with gradients. They hold for other batches as long as the model
does the same with them. It may not: it sorts sentences by length, picks out labelled tokens, or adds a loss term later
in training. Every batch therefore has features, and a batch with a feature that is new is compared, too:

- the operations of the graph, each with those before it;
- how many rows a sample has, in a call without a dimension for the samples;
- how often a layer is used: its layouts are known by the number of the use;
- whether the indices that move rows about keep the samples in order, and whether pieces are equally long.

No feature needs a backward pass. Indices are on the device. What they tell is known one batch later on a GPU.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltasam_plugin.instance.arrival import arriving
from deltasam_plugin.instance.recording import RecordedCall

Operation = tuple[str, ...]  # the name of a node of the graph, and those of the nodes before it
FEW = 4  # inputs of an operation
MOVING = re.compile("Index|Gather|Scatter|MaskedSelect")  # in the name of an operation that moves rows by indices


class Order(NamedTuple):
    """How an operation's indices arrange the samples.

    Attributes:
        operation: which.
        use: the number of its kind in the graph, from the losses on.
        outer: all rows of the first sample come first, then as many of the second, and so on.
        inner: the first rows of all samples come first, then their second ones, and so on.
    """

    operation: Operation
    use: int
    outer: bool
    inner: bool

    def as_loose(self) -> list[Order]:
        """The orders that keep no more than this one does, itself included."""
        pairs = product({False, self.outer}, {False, self.inner})
        return [self._replace(outer=outer, inner=inner) for outer, inner in pairs]


class Familiarity:
    """The features of all batches that were compared.

    Attributes:
        lost: whether a batch was not compared that should have been.
        rearranged: whether the present batch has an operation or an order that is new.
    """

    def __init__(self) -> None:
        self.lost = self.rearranged = False
        self._known: set[Hashable] = set()
        self._present: set[Hashable] = set()
        self._compared = False
        self._orders: Callable[[], list[Order]] = list  # of the latest batch, if they come from a GPU

    def strange(self, calls: Sequence[RecordedCall], losses: Tensor) -> bool:
        """Whether this batch has features that are new.

        Args:
            calls: of the pass.
            losses: per-sample losses with graph, (B,).
        """
        self._look_back()
        batch = losses.numel()
        operations = _operations(losses)
        orders = _orders(operations, batch)
        kinds, counts = {operation for _, operation in operations}, _counts(calls, batch) | _uses(calls)
        if losses.is_cuda:
            self._orders, orders = orders, list
        found = orders() + _pieces(operations)
        self.rearranged = not kinds <= self._known or not self._allow(found)
        self._present, self._compared = {*kinds, *counts, *found}, False
        return self.rearranged or not counts <= self._known

    def learn(self) -> None:
        """The present batch was compared."""
        self._known |= self._present
        self._compared = True

    def _allow(self, orders: Sequence[Order]) -> bool:
        """Whether each operation has had indices that were as loose."""
        return not any(self._known.isdisjoint(order.as_loose()) for order in orders)

    def _look_back(self) -> None:
        """At what has arrived since the latest batch."""
        orders, self._orders = self._orders(), list
        if self._compared:
            self._known.update(orders)
        elif not self._allow(orders) and not self.lost:
            self.lost = True
            warnings.warn(
                "Instance mode: the latest batch moved its rows about in another order than all batches "
                "before, in which each row's sample was looked up. In this one update the perturbations may have been "
                "those of other samples. From now on rows are looked up in every batch.",
                stacklevel=5,
            )


def _operations(losses: Tensor) -> list[tuple[Any, Operation]]:
    """The nodes of the graph, from the losses on. Each is asked for its name once: this runs in every batch."""
    names: dict[Any, str] = {None: ""}
    waiting: list[Any] = [losses.grad_fn] if losses.requires_grad else []
    names.update((node, _kind(node)) for node in waiting)
    found = []
    while waiting:
        node = waiting.pop()
        inputs = []
        for before, _ in node.next_functions:
            if before not in names:
                names[before] = _kind(before)
                waiting.append(before)
            inputs.append(names[before])
        # Of many tensors that are joined the kinds count, not how they are mixed: else every batch could be new.
        found.append((node, (names[node], *(inputs if len(inputs) <= FEW else sorted(set(inputs))))))
    return found


def _kind(node: Any) -> str:
    """The name of an operation; for batch normalization also whether it trains, which the name does not tell."""
    name: str = node.name()
    return f"{name} in training" if "BatchNorm" in name and getattr(node, "_saved_training", False) else name


def _counts(calls: Sequence[RecordedCall], batch: int) -> set[Hashable]:
    """Rows of each sample in calls without a dimension for the samples, unless other calls have a dimension so long."""
    lengths: set[int] = set()
    for lead in {call.leading_shape for call in calls if batch in call.leading_shape}:
        place = lead.index(batch)
        lengths.update(lead[:place] + lead[place + 1 :])
    found: set[Hashable] = set()
    for call in calls:
        lead = call.leading_shape
        if len(lead) == 1 or batch not in lead:
            counts = [size // batch for size in lead if size % batch == 0]
            found.add((call.key[:3], *("length" if count in lengths and count > 1 else count for count in counts)))
    return found


def _uses(calls: Sequence[RecordedCall]) -> set[Hashable]:
    """How many calls each layer has."""
    return set(Counter(call.key[:3] for call in calls).items())


def _orders(operations: Sequence[tuple[Any, Operation]], batch: int) -> Callable[[], list[Order]]:
    """Start to find out how indices arrange the samples, and return what tells it."""
    uses: list[tuple[Operation, int]] = []
    kept: list[Tensor] = []
    count: Counter[Operation] = Counter()
    moving = {name for name in {operation[0] for _, operation in operations} if MOVING.search(name)}
    for node, operation in operations:
        for index, places in _indices(node) if operation[0] in moving else ():
            count[operation] += 1
            uses.append((operation, count[operation]))
            kept += _kept(index, places, batch)
    if not uses:
        return list
    arrived = arriving(torch.stack(kept))

    def orders() -> list[Order]:
        values = arrived().tolist()
        return [Order(*use, outer, inner) for use, outer, inner in zip(uses, values[::2], values[1::2])]

    return orders


def _pieces(operations: Sequence[tuple[Any, Operation]]) -> list[Order]:
    """Whether an operation cuts rows into pieces that are equally long."""
    lengths: defaultdict[Operation, set[int]] = defaultdict(set)
    for node, operation in operations:
        if operation[0].startswith("SplitWithSizes"):
            lengths[operation].update(node._saved_split_sizes)
        elif operation[0].startswith("Slice"):
            sizes = node._saved_self_sym_sizes
            size = sizes[_dim(node, len(sizes))]
            lengths[operation].add(min(node._saved_end, size) - min(node._saved_start, size))
    return [Order(operation, 0, len(found) == 1, False) for operation, found in lengths.items()]


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


def _dim(node: Any, rank: int) -> int:
    """The dimension along which it works. Negative numbers are read without their sign."""
    dim = node._saved_dim
    return (dim - 2**64 if dim >= 2**63 else dim) % max(1, rank)


def _kept(index: Tensor, places: int, batch: int) -> list[Tensor]:
    """Whether an index is :attr:`Order.outer`, and whether it is :attr:`Order.inner`."""
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
