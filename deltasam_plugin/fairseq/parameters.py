"""The parameters that a run trains, each with the optimizer's fp32 copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.fairseq.errors import Unsupported


class TrainedParameters:
    """What is perturbed: the parameters that require a gradient now and that the optimizer holds.

    A task may freeze and unfreeze layers at the start of an epoch, so the list is made anew when they change.

    Args:
        given: what the optimizer was given: the parameters themselves, or fp32 copies of them.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.given = given
        self._copies: dict[tuple[nn.Module, ...], dict[Tensor, Tensor | None]] = {}
        self._lists: dict[tuple[nn.Module, ...], tuple[list[int], list[PerturbedParameter]]] = {}

    def of(self, *modules: nn.Module) -> list[PerturbedParameter]:
        """The trained parameters of `modules`. The same list object as long as they are the same parameters.

        Args:
            modules: model and criterion, in the order in which fairseq's trainer collects their parameters.
                Multilingual tasks pass a part of the model.

        Raises:
            RuntimeError: the optimizer holds neither these parameters nor copies of them.
        """
        parameters = [p for p in chain(*(module.parameters() for module in modules)) if p.requires_grad]
        key = [id(p) for p in parameters]
        if modules not in self._lists or self._lists[modules][0] != key:
            if modules not in self._copies:
                self._copies[modules] = fp32_copies(modules, self.given)
            copies = self._copies[modules]
            rewritten = {id(p) for module in modules for p in rewritten_parameters(module)}
            unused = {id(p) for module in modules for p in fast_path_copies(module)}
            trained = [p for p in parameters if p in copies and id(p) not in unused]
            self._lists[modules] = key, [PerturbedParameter(p, copies[p], id(p) in rewritten) for p in trained]
        return self._lists[modules][1]

    def holder(self, item: PerturbedParameter) -> Tensor:
        """What the optimizer was given for a parameter: itself, its fp32 copy, or the flat copy of all."""
        if item.master is None:
            return item.parameter
        return self.given[0] if len(self.given) == 1 else item.master


def part_of(item: PerturbedParameter, holder: Tensor, values: Tensor) -> Tensor:
    """The part of the optimizer's values that belongs to a parameter.

    Args:
        item: the parameter.
        holder: what the optimizer was given for it.
        values: one for each element of `holder`.
    """
    if holder.shape == item.parameter.shape:
        return values
    assert item.master is not None  # a view of the flat copy
    start = item.master.storage_offset() - holder.storage_offset()
    return values.flatten()[start : start + item.parameter.numel()].view(item.parameter.shape)


def named_parameters(model: nn.Module, criterion: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of model and criterion, each once, under different names."""
    names = {parameter: f"criterion.{name}" for name, parameter in criterion.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()} | names
    return [(name, parameter) for parameter, name in names.items()]


def fp32_copies(modules: Sequence[nn.Module], given: Sequence[Tensor]) -> dict[Tensor, Tensor | None]:
    """Match the parameters of model and criterion with the tensors that the optimizer was given.

    Args:
        modules: in fairseq's order.
        given: the parameters themselves; or a copy of each in the same order; or one flat copy of all.

    Returns:
        The copy of each parameter that the optimizer holds (a view if there is one flat copy), or None if it holds the
        parameter itself.

    Raises:
        RuntimeError: `given` is none of these.
    """
    parameters = list(chain(*(module.parameters() for module in modules)))
    own = {id(tensor) for tensor in given}
    if any(id(p) in own for p in parameters):
        return {p: None for p in parameters if id(p) in own}
    trainable = [p for p in parameters if p.requires_grad]
    for candidates in (trainable, parameters):  # a task may have frozen some since the optimizer was built
        copies = given
        if len(given) == 1 and given[0].numel() == sum(p.numel() for p in candidates):
            parts = given[0].detach().split([p.numel() for p in candidates])
            copies = [part.view_as(p) for p, part in zip(candidates, parts, strict=True)]
        if [p.shape for p in candidates] == [copy.shape for copy in copies]:
            pairs = list(zip(candidates, copies, strict=True))
            if all(torch.equal(p, copy.to(p.dtype)) for p, copy in pairs):
                return dict(pairs)
    raise Unsupported(
        f"The optimizer holds {len(given)} tensors with {sum(tensor.numel() for tensor in given)} elements, the model "
        f"and criterion {len(trainable)} trainable ones with {sum(p.numel() for p in trainable)}. δ-SAM must find "
        "every parameter whole in this process, and the fp32 copy of each if there are any. Use --ddp-backend "
        "legacy_ddp or pytorch_ddp without sharding. For a task that trains or freezes a part of the model at a time "
        "use --amp instead of --fp16."
    )


def rewritten_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters that fairseq's quantization noise (``quant_noise``) overwrites in every forward pass."""
    return [
        layer.get_parameter("weight")
        for layer in module.modules()
        for hook in layer._forward_pre_hooks.values()
        if getattr(hook, "__qualname__", "").startswith("quant_noise.")
    ]


def fast_path_copies(module: nn.Module) -> list[Tensor]:
    """The copies of an encoder layer's parameters that fairseq 0.12.2 keeps for fast inference.

    They are trainable, but no training loss depends on them. They are zero until a checkpoint is loaded, and then as
    large as the parameters. If they were perturbed, a resumed run would differ from the uninterrupted one.
    """
    return [p for layer in module.modules() if hasattr(layer, "BT_version") for p in layer.parameters(recurse=False)]
