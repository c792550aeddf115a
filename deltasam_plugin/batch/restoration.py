"""Restore parameters bit for bit after they were moved.

Parameters are written through ``.data``: autograd's version check must not see a move that is undone before anything is
read again. A copy is made before the move and copied back in ``finally``. Nothing is recomputed by subtraction, or
inferred from which parameters have a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerturbedParameter:
    """A parameter that is perturbed, with its fp32 master.

    Args:
        parameter: what the forward pass reads.
        master: the optimizer's fp32 copy, of the same shape; None if the optimizer works on `parameter` itself. In half
            precision a small step is far below the spacing of the numbers. It is added to the master and then rounded,
            which keeps it on average; added to the rounded parameter it would be lost.
        rewritten: the forward pass replaces the parameter by a function of it (fairseq's quantization noise). A second
            forward pass must start from the value that the first one started from.
    """

    parameter: Tensor
    master: Tensor | None = None
    rewritten: bool = False

    @property
    def value(self) -> Tensor:
        """The parameter in the best precision that is kept of it, detached."""
        return self.parameter.detach() if self.master is None else self.master.detach()


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors bit for bit, unseen by autograd's version check."""
    if targets:
        torch._foreach_copy_([target.data for target in targets], [source.detach() for source in sources])


def originals_of_rewritten(parameters: Sequence[PerturbedParameter]) -> list[Tensor | None]:
    """Copies of the parameters that a forward pass is about to rewrite; None for all others."""
    return [p.parameter.detach().clone() if p.rewritten else None for p in parameters]


@contextmanager
def restored(
    parameters: Sequence[PerturbedParameter], rewritten: Sequence[Tensor | None] = ()
) -> Iterator[list[Tensor]]:
    """After this context the parameters are what they were before it, bit for bit, whatever happens inside.

    Args:
        parameters: all that may move.
        rewritten: from :func:`originals_of_rewritten`, taken before a forward pass rewrote parameters.

    Yields:
        The originals to displace from, one per parameter: the values at entry, or those in `rewritten`. Read only.
    """
    tensors = [p.parameter for p in parameters]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    copy_all(copies, tensors)
    # A forward pass that rewrites a parameter gives it other memory. Graphs of earlier passes go on reading this one.
    memory = [(p.parameter, p.parameter.data) for p in parameters if p.rewritten]
    rewritten = rewritten or [None] * len(parameters)
    try:
        yield [copy if old is None else old for copy, old in zip(copies, rewritten, strict=True)]
    finally:
        try:
            _put_back(memory, tensors, copies)
        except BaseException:  # Ctrl-C in the middle
            _put_back(memory, tensors, copies)
            raise


def _put_back(memory: Sequence[tuple[Tensor, Tensor]], tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    for parameter, data in memory:
        parameter.data = data
    copy_all(tensors, copies)


@contextmanager
def rewound(parameters: Sequence[PerturbedParameter], rewritten: Sequence[Tensor | None]) -> Iterator[None]:
    """Within this context the parameters are what they were before a forward pass rewrote some of them.

    Args:
        parameters: of the model.
        rewritten: from :func:`originals_of_rewritten`, one per parameter.
    """
    pairs = [(p, original) for p, original in zip(parameters, rewritten, strict=True) if original is not None]
    with restored([p for p, _ in pairs]):
        for p, original in pairs:
            p.parameter.data.copy_(original)
        yield
