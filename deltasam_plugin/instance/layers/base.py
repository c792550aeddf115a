r"""What the engine has to know of a kind of layer.

Each is described by four things: how a call is read, what rows it runs on, what an output gradient says about the
per-instance gradients of its weights, and what a second pass adds to its output:

.. math::
    \text{linear:}\quad & y = (W + s_i G_i) x + b + s_i g^b_i \\
    \text{embedding:}\quad & y_v = W_v + s_i G_i[v] \\
    \text{layer norm:}\quad & y = (w + s_i g^w_i) \circ \hat x + b + s_i g^b_i \\
    \text{convolution:}\quad & y = (W + s_i G_i) * x + b + s_i g^b_i

What is added is differentiable in x and constant in everything else, so that an ordinary backward pass of the perturbed
loss gives :math:`\sum_i \nabla\ell_i(w + s_i g_i)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltasam_plugin.instance.gradients import PerSampleGradients, PerSamplePerturbation
from deltasam_plugin.instance.interception import ParameterSlice
from deltasam_plugin.instance.layout import Grouping


@dataclass
class CallArguments:
    """A call, read.

    Attributes:
        x: its input.
        weight: or None.
        bias: or None.
        lead: sizes of the leading dimensions of x, one row of the output for each of their entries.
        options: what else is needed to run it.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lead: tuple[int, ...]
    options: tuple[Any, ...] = ()


@dataclass
class RecordedCall:
    """A call in the first pass.

    Attributes:
        operation: what was called.
        weight: the parameter or part of one, None where it is not perturbed.
        bias: likewise.
        key: names the call from pass to pass.
        lead: sizes of the leading dimensions.
        options: as in the call.
        shape: of the weight.
        x: input rows, detached; None once spent.
        grouping: of the rows by sample, once known.
        formed: whether the per-instance gradient of the weight is formed and not kept as factors.
        affine: whether the bias is part of the weight's factor.
    """

    operation: Layer
    weight: ParameterSlice | None
    bias: ParameterSlice | None
    key: tuple[Any, ...]
    lead: tuple[int, ...]
    options: tuple[Any, ...]
    shape: torch.Size
    x: Tensor | None
    grouping: Grouping | None = None
    formed: bool = False
    affine: bool = False


class Layer:
    """One kind of layer."""

    name: str
    role: str  # of the weight: "matrix", "filter" or "vector"

    def read(self, *args: Any, **kwargs: Any) -> CallArguments | None:
        """The call's arguments, None for variants that are not covered."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """x as the operation takes it."""
        return x

    def run(self, call: CallArguments, x: Tensor) -> Tensor:
        """Run it on ``rows(x)``. The result is no view, so that it can be written to."""
        raise NotImplementedError

    def finish(self, call: CallArguments, y: Tensor) -> Tensor:
        """The result of :meth:`run` in the shape that the caller expects."""
        return y

    def touched(self, gradient: Tensor, rows: int) -> Tensor:
        """Which rows (N,) a gradient of the result of :meth:`run` is non-zero in."""
        return gradient.reshape(rows, -1).ne(0).any(1)

    def dense(self, site: RecordedCall, gradient: Tensor) -> dict[ParameterSlice, Tensor]:
        """The ordinary weight gradients that belong to an output gradient, by target."""
        raise NotImplementedError

    def contribute(self, site: RecordedCall, gradient: Tensor, ledger: PerSampleGradients) -> None:
        """Enter the per-instance gradients that belong to an output gradient."""
        raise NotImplementedError

    def correct(self, site: RecordedCall, x: Tensor, y: Tensor, correction: PerSamplePerturbation) -> Tensor:
        """Add to y, in place, what the perturbation of the weights adds."""
        raise NotImplementedError
