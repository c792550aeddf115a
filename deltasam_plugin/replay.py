"""Run a forward pass again under the conditions of its first run.

A second forward pass repeats the first only if it draws the same random numbers (dropout, LayerDrop, masking) and
computes in the same autocast precision. It must also leave no trace in the statistics that the model collects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deltasam_plugin.hooks import before_forward
from deltasam_plugin.randomness import RandomState, UnseededGenerators


@contextmanager
def frozen_statistics() -> Iterator[None]:
    """Within this context batch and instance normalisation leave their running statistics as they were.

    A module hook finds the layers as they run: the caller may know no model, only a closure.
    """
    originals: dict[Tensor, Tensor] = {}

    def remember(module: nn.Module) -> None:
        # DataParallel runs copies of its layers in other threads; those on the first device share their buffers.
        for layer in module.modules() if isinstance(module, nn.DataParallel) else [module]:
            if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats:
                for buffer in layer.buffers(recurse=False):
                    originals.setdefault(buffer, buffer.clone())

    try:
        with before_forward(remember):
            yield
    finally:
        for buffer, value in originals.items():
            buffer.data.copy_(value)  # a graph may be alive: its version check must not see this


class _TakesGradients(Exception):
    """A forward pass has run a backward pass of its own."""


def _not_saved(packed: None) -> Tensor:
    raise _TakesGradients


def forward_only(forward: Callable[[], Tensor]) -> Tensor:
    """Run a pass with gradients enabled whose backward pass is never run: nothing is saved for it.

    A pass that takes gradients itself (gradient penalties, adversarial inputs, torch.func) is run again, and saves.

    Args:
        forward: may be run twice, with the same result.

    Returns:
        Its result, detached.
    """
    with torch.enable_grad():
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _not_saved):
                return forward().detach()
        except _TakesGradients:
            pass
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # torch.func has none
                raise
        return forward().detach()


@dataclass(frozen=True)
class ThreadState:
    """What torch keeps for each thread and a pass depends on: autocast and the default device."""

    autocast: dict[str, tuple[bool, torch.dtype]]
    cache: bool
    device: torch.device

    @classmethod
    def capture(cls, devices: set[torch.device]) -> ThreadState:
        """Record the state of this thread; autocast for the kinds of `devices` and the CPU."""
        kinds = {device.type for device in devices} | {"cpu"}
        autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
        return cls(autocast, torch.is_autocast_cache_enabled(), torch.get_default_device())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Repeat this state for the length of the context, in any thread."""
        before = ThreadState.capture({torch.device(kind) for kind in self.autocast})
        try:
            # No weight cache: it would hand the second pass the casts of the first pass's weights.
            self._set_autocast(cache=False)
            with nullcontext() if before.device == self.device else self.device:
                yield
        finally:
            try:
                before._set_autocast(before.cache)
            except BaseException:  # Ctrl-C in the middle
                before._set_autocast(before.cache)
                raise

    def without_autocast(self) -> ThreadState:
        """This state, but autocast switched off."""
        return replace(self, autocast={kind: (False, dtype) for kind, (_, dtype) in self.autocast.items()})

    def _set_autocast(self, cache: bool) -> None:
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cache)


@contextmanager
def unchanged_versions(parameters: Iterable[Tensor]) -> Iterator[None]:
    """For forward passes while the graph of an earlier one is alive, which leave the parameters what they are.

    Some write to them all the same (``max_norm`` of an embedding), and autograd would then refuse the earlier graph.
    """
    with ExitStack() as stack:
        for parameter in parameters:
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(parameter))
        yield


@dataclass(frozen=True)
class Conditions:
    """What a forward pass depends on besides parameters and inputs: random state, autocast and default device.

    Capture them before the first run. Every `with conditions.replayed():` repeats them, and leaves generators, thread
    state and batch-norm statistics as it found them.
    """

    random: RandomState
    thread: ThreadState
    generators: UnseededGenerators = field(default_factory=UnseededGenerators)

    @classmethod
    def capture(cls, devices: set[torch.device]) -> Conditions:
        """Record the present conditions.

        Args:
            devices: where the model lives; CUDA generators and autocast are per device.
        """
        return cls(RandomState.capture(devices), ThreadState.capture(devices))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Repeat the captured conditions for the length of the context."""
        before = RandomState.capture({torch.device("cuda", index) for index in self.random.cuda})
        try:
            with self.generators.replayed(), frozen_statistics(), self.thread.replayed():
                self.random.restore()
                yield
        finally:
            before.restore()
