"""What the graph of a value shows: its nodes, and the leaves that a backward pass reaches."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def nodes_of(value: Tensor, known: Container[Any] = ()) -> Iterator[Any]:
    """The nodes of the graph of `value`, each once.

    Args:
        value: a tensor; without a graph it has no nodes.
        known: nodes to leave out, with all that is reached only through them.
    """
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in known:
            continue
        seen.add(node)
        yield node
        waiting.extend(before for before, _ in node.next_functions)


def leaves_of(value: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from `value` accumulates gradients in, as far as the graph shows them."""
    return [node.variable for node in nodes_of(value) if hasattr(node, "variable")]


def visible_leaves(*values: Tensor | None) -> tuple[list[Tensor], bool]:
    """The leaves that the graphs of `values` show, and whether these are all.

    A Function written in Python may run a backward pass of its own (activation checkpointing, reversible layers) and
    reach more leaves. It is taken for such unless it was given leaves itself.
    """
    leaves, complete = [], True
    for node in (node for value in values if value is not None for node in nodes_of(value)):
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        elif isinstance(node, BackwardCFunction):
            complete = complete and any(hasattr(before, "variable") for before, _ in node.next_functions)
    return leaves, complete
