"""Notice a batch whose rows may be in an order that no batch before had, though known layouts fit its sizes.

Layouts were learned in batches that were compared with gradients. They hold for other batches as long as the model
does the same with them. It may not: it sorts sentences by length, picks out labelled tokens, or adds a loss term later
in training. Every batch therefore has features, and a batch with a feature that is new is compared, too:

- how many rows a sample has, in a call without a dimension for the samples;
- how often a layer is used, and where in the graph: its layouts are known by the number of the use;
- the operations of the graph (``operations``), and the orders in which they take rows (``orders``).

No feature needs a backward pass. Indices are on the device. What they tell is known one batch later on a GPU.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from deltasam_plugin.instance.indices import indices
from deltasam_plugin.instance.operations import Graph, Operation
from deltasam_plugin.instance.orders import Order, pieces, writes
from deltasam_plugin.instance.recording import RecordedCall


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

    def strange(
        self, calls: Sequence[RecordedCall], losses: Tensor, written: Sequence[tuple[Hashable, int]] = ()
    ) -> bool:
        """Whether this batch has features that are new.

        Args:
            calls: of the pass.
            losses: per-sample losses with graph, (B,).
            written: places that rows were written to, in order: the tensor, and where in it.
        """
        self._look_back()
        batch = losses.numel()
        graph = Graph.of(losses)
        # On a GPU conditions would be known too late, and many that are new, as for the first padding, are harmless.
        orders = indices(graph, conditions=not losses.is_cuda)
        kinds, counts = {operation for _, operation in graph.nodes}, _counts(calls, batch) | _uses(calls)
        if losses.is_cuda:
            self._orders, orders = orders, list
        found = orders() + pieces(graph) + writes(written) + _turns(calls, graph)
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


def _turns(calls: Sequence[RecordedCall], graph: Graph) -> list[Order]:
    """Whether the calls of each layer stand in the graph from the first to the last, or the reverse."""
    of_node = {call.output.node: call.key for call in calls}
    uses: defaultdict[Operation, list[int]] = defaultdict(list)
    for node, _ in graph.nodes:
        if node in of_node:
            uses[("calls", *map(str, of_node[node][:3]))].append(of_node[node].use)
    return [
        Order(layer, 0, (own == sorted(own), own == sorted(own, reverse=True)))
        for layer, own in uses.items()
        if len(own) > 1
    ]
