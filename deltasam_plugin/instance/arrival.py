"""Numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def arriving(value: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host, and do not wait for it.

    Args:
        value: on any device.

    Returns:
        A function that gives the copy. It waits only if the device has not come so far by then.
    """
    if not value.is_cuda:
        return lambda: value
    there = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    there.copy_(value, non_blocking=True)
    event = torch.cuda.current_stream(value.device).record_event()

    def arrived() -> Tensor:
        event.synchronize()
        return there

    return arrived
