"""Numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def arriving(value: Tensor) -> Callable[[], int]:
    """Start to copy a whole number to the host, and do not wait for it.

    Args:
        value: integer scalar.

    Returns:
        A function that gives the number. It waits only if the device has not come so far by then.
    """
    if not value.is_cuda:
        return lambda: int(value)
    there = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    there.copy_(value, non_blocking=True)
    event = torch.cuda.current_stream(value.device).record_event()

    def number() -> int:
        event.synchronize()
        return int(there)

    return number
