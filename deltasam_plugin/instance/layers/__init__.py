"""The layers whose perturbed form is known: one file for each kind, and the table of the functions that call them.

A new kind of layer is a subclass of :class:`~deltasam_plugin.instance.layers.base.Layer` and a line in this table.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_plugin.instance.layers.base import Layer
from deltasam_plugin.instance.layers.convolution import Convolution
from deltasam_plugin.instance.layers.elementwise import Addition, Expansion, Scaling
from deltasam_plugin.instance.layers.embedding import Embedding
from deltasam_plugin.instance.layers.layer_norm import LayerNorm, RMSNorm
from deltasam_plugin.instance.layers.linear import Linear

LAYERS: dict[Callable[..., Any], Layer] = {
    F.linear: Linear(),
    F.embedding: Embedding(),
    F.layer_norm: LayerNorm(),
    F.rms_norm: RMSNorm(),
    F.conv1d: Convolution("conv1d", F.conv1d),
    F.conv2d: Convolution("conv2d", F.conv2d),
    **dict.fromkeys((torch.add, Tensor.add), Addition()),
    Tensor.expand: Expansion(),
    **dict.fromkeys((torch.mul, Tensor.mul), Scaling()),
}
