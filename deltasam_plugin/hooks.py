"""Callbacks on modules that are about to run, for the length of a context."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as registry


class _Callbacks(threading.local):
    def __init__(self) -> None:
        self.active: list[Callable[[nn.Module], None]] = []


_callbacks = _Callbacks()
_handle: Any = None


def _run(module: nn.Module, inputs: Any) -> None:
    for callback in _callbacks.active:
        callback(module)


@contextmanager
def before_forward(callback: Callable[[nn.Module], None]) -> Iterator[None]:
    """Within this context, call back with each module of this thread before its forward pass.

    The hook that does so is registered once and stays. torch.compile guards on the registered hooks, and would compile
    again for each new one.
    """
    global _handle
    if _handle is None or _handle.id not in registry._global_forward_pre_hooks:
        _handle = registry.register_module_forward_pre_hook(_run)
    _callbacks.active.append(callback)
    try:
        yield
    finally:
        _callbacks.active.remove(callback)
