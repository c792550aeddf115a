r"""What the engine must know about a kind of layer.

Each kind is described by four things: how a call is read, which rows it runs on, which per-sample gradients an output
gradient stands for, and what a second pass adds to the output:

.. math::
    \text{linear:}\quad & y = (W + s_i G_i) x + b + s_i g^b_i \\
    \text{embedding:}\quad & y_v = W_v + s_i G_i[v] \\
    \text{layer norm:}\quad & y = (w + s_i g^w_i) \circ \hat x + b + s_i g^b_i \\
    \text{convolution:}\quad & y = (W + s_i G_i) * x + b + s_i g^b_i

What is added is differentiable in x and constant in everything else. An ordinary backward pass of the perturbed loss
therefore gives :math:`\sum_i \nabla\ell_i(w + s_i g_i)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.layout import Grouping
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
from deltasam_plugin.instance.slices import ParameterSlice


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a call.

    Attributes:
        x: the input.
        weight: or None.
        bias: or None.
        leading_shape: sizes of the leading dimensions of x. The output has one row for each of their entries.
        options: what else is needed to run it.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    leading_shape: tuple[int, ...]
    options: tuple[Any, ...] = ()


class CallKey(NamedTuple):
    """What identifies a call from pass to pass.

    Attributes:
        layer: name of its kind.
        weight, bias: the parameters that it uses.
        use: how many calls of this layer with these parameters came before it.
        rank: how many leading dimensions its input has.
    """

    layer: str
    weight: ParameterSlice | None
    bias: ParameterSlice | None
    use: int
    rank: int

    def __str__(self) -> str:
        return f"{self.layer}({', '.join(part.name for part in (self.weight, self.bias) if part is not None)})"


class Form(Enum):
    """How the per-sample gradients G of a matrix are kept, and how the perturbed layer runs on them."""

    FACTORED = "as factors; Wx + sGx"
    BESIDE = "formed; Wx + sGx"
    OWN = "formed; (W + sG)x, in one product"


@dataclass(frozen=True)
class PlannedCall:
    """A recorded call, and how it is perturbed.

    Attributes:
        layer: its kind.
        key: its name.
        leading_shape: sizes of its leading dimensions.
        options: as in the call.
        weight_shape: of the weight; empty if there is none.
        weight: what is perturbed of it, or None.
        bias: likewise.
        grouping: of its rows, by sample.
        form: in which the per-sample gradients of the weight are kept.
        affine: whether the bias is part of the weight's factor.
    """

    layer: Layer
    key: CallKey
    leading_shape: tuple[int, ...]
    options: tuple[Any, ...]
    weight_shape: torch.Size
    weight: ParameterSlice | None
    bias: ParameterSlice | None
    grouping: Grouping
    form: Form = Form.FACTORED
    affine: bool = False

    @property
    def perturbed(self) -> bool:
        """Whether any parameter of it is."""
        return self.weight is not None or self.bias is not None


class Layer:
    """One kind of layer."""

    name: str
    weight_kind: str  # "matrix", "filter" or "vector"
    may_be_shared = False  # whether all samples may use the same rows, as embedded positions

    def read(self, *args: Any, **kwargs: Any) -> CallArguments | None:
        """The call's arguments, None for variants that are not covered."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """x as the layer takes it."""
        return x

    def run(self, arguments: CallArguments, x: Tensor) -> Tensor:
        """Run it on ``rows(x)``. The result is not a view and may be written to."""
        raise NotImplementedError

    def finish(self, arguments: CallArguments, y: Tensor) -> Tensor:
        """The result of :meth:`run` in the shape that the caller expects."""
        return y

    def accumulate(self, call: PlannedCall, x: Tensor, gradient: Tensor, gradients: PerSampleGradients) -> None:
        """Add the per-sample gradients of the call's parameters.

        Args:
            call: with at least one parameter that is perturbed.
            x: ``rows(x)`` of the first pass, detached.
            gradient: of the losses' sum with respect to the result of :meth:`run`.
            gradients: where to add.
        """
        raise NotImplementedError

    def run_perturbed(
        self, call: PlannedCall, arguments: CallArguments, x: Tensor, perturbation: PerSamplePerturbation
    ) -> Tensor:
        """:meth:`run` with the parameters of each sample."""
        y = self.run(arguments, x)
        with torch.autocast(y.device.type, enabled=False):
            return self.perturb_output(call, x, y, perturbation)

    def perturb_output(self, call: PlannedCall, x: Tensor, y: Tensor, perturbation: PerSamplePerturbation) -> Tensor:
        """Add to y, in place, what the perturbation of the parameters adds.

        Args:
            call: with at least one parameter that is perturbed.
            x: ``rows(x)`` of the second pass.
            y: the result of :meth:`run`.
            perturbation: of all parameters.
        """
        raise NotImplementedError


def added_to(y: Tensor, call: PlannedCall, added: Tensor) -> Tensor:
    """y plus what is added to each sample's rows, (B, T, ...), in place."""
    return y.add_(call.grouping.ungroup(added).reshape(y.shape).to(y.dtype))
