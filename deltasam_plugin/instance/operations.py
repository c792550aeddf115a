"""The operations in the graph of a batch, each with those before it and the dimensions that they work along."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

Operation = tuple[str, ...]  # the name of a node of the graph, and those of the nodes before it
FEW = 4  # inputs of an operation
# These begin the names of operations that give pieces, and of views. Others are named alike: SliceScatter, ViewAsReal.
CUTTING = tuple(
    f"{kind}Backward0"
    for kind in ("Select", "Slice", "Split", "SplitWithSizes", "Unbind", "UnsafeSplit", "UnsafeSplitWithSizes")
)
VIEW = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")

_DIMENSIONS = tuple(
    f"_saved_{argument}" for argument in ("dim", "dim0", "dim1", "dim2", "dims", "dimension", "k", "training")
)
# Of these arguments, which differ from sample count to sample count, so much is told:
_IN_SHORT = {
    "_saved_repeats": lambda repeats: [repeat != 1 for repeat in repeats],
    "_saved_shifts": lambda shifts: [shift != 0 for shift in shifts],
    "_saved_pad": lambda widths: [(width > 0) - (width < 0) for width in map(signed, widths)],
    "_saved_stride": lambda strides: sorted(range(len(strides)), key=lambda i: -strides[i]),
}


def signed(number: int) -> int:
    """A number as it was given: nodes show negative ones as unsigned."""
    return number - 2**64 if number >= 2**63 else number


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
        name = f"{name} {_IN_SHORT[attribute](value) if attribute in _IN_SHORT else value}"
    if name.startswith(VIEW):
        sizes = node._saved_self_sym_sizes[:2]
        return f"{name} {sizes.index(batch)}" if batch in sizes else name
    return name


@cache
def _told_by(kind: type) -> list[str]:
    """The attributes of a kind of node that tell along which dimensions it works, and whether it trains."""
    return [attribute for attribute in (*_DIMENSIONS, *_IN_SHORT) if hasattr(kind, attribute)]
