"""Checks that a task trains by the criterion's loss, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from deltasam_plugin.checks import is_power_of_two
from deltasam_plugin.errors import LISTED
from deltasam_plugin.fairseq.announcements import TrainedBy
from deltasam_plugin.fairseq.errors import Unsupported


class BackwardPasses:
    """The sharpness-aware backward passes before an optimizer step.

    Args:
        names: of task, criterion and base optimizer, for messages.
    """

    def __init__(self, names: TrainedBy) -> None:
        self._names = names
        self._ready = False  # whether a sharpness-aware backward pass has run since the last step
        self._inside = False  # whether one is running
        self._plain = False  # whether this update needs none
        self._updates = 0  # sharpness-aware ones
        self._hooks: dict[int, RemovableHandle] = {}
        self._foreign: dict[str, None] = {}

    def skip(self) -> None:
        """This update is a plain one of the base optimizer."""
        self._ready = self._plain = True

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A forward pass of the criterion in training.

        If it fails, the next step needs no gradient of it: fairseq drops a batch that runs out of memory, and takes the
        step with the gradients of the other workers.
        """
        try:
            yield
        except BaseException:
            self._ready = True
            raise

    def follow(self, loss: Tensor, named_parameters: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Follow the backward pass of a sharpness-aware loss, and all gradients in updates 1, 2, 4, 8 and so on.

        Args:
            loss: the loss itself.
            named_parameters: asked for only in these updates.
        """
        self._inside = False  # a backward pass that failed has not said so
        node: Any = loss.grad_fn
        node.register_prehook(self._begin)
        node.register_hook(self._end)
        if is_power_of_two(self._updates + 1):
            for name, parameter in named_parameters():
                if parameter.requires_grad and id(parameter) not in self._hooks:
                    hook = parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._arrive(name))
                    self._hooks[id(parameter)] = hook

    def check_step(self) -> None:
        """To be called before every optimizer step.

        Raises:
            RuntimeError: no sharpness-aware backward pass came before it, or gradients from elsewhere did.
        """
        task, criterion, optimizer = self._names
        remedy = f"Use another task, or train without δ-SAM: --optimizer {optimizer} --criterion {criterion}."
        if not self._ready:
            raise Unsupported(
                f"Task {task!r} takes an optimizer step without a sharpness-aware gradient: its train_step does not "
                f"take the loss from criterion(model, sample). {remedy}"
            )
        if self._foreign:
            listed = ", ".join([*list(self._foreign)[:LISTED], *(["…"] if len(self._foreign) > LISTED else [])])
            raise Unsupported(
                f"Task {task!r} adds loss terms outside the criterion, where δ-SAM does not see them: they gave "
                f"gradients to {len(self._foreign)} parameters ({listed}). {remedy}"
            )
        self._updates += not self._plain
        self._ready = self._plain = False
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _begin(self, gradients: Any) -> None:
        self._ready = self._inside = True

    def _end(self, inputs: Any, outputs: Any) -> None:
        self._inside = False

    def _arrive(self, name: str) -> None:
        if not self._inside:
            self._foreign[name] = None
