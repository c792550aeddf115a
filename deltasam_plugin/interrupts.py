"""What Ctrl-C must not leave behind."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def closing_contexts() -> Iterator[None]:
    """If Ctrl-C strikes within, close the contexts that it kept from being entered or left.

    It may come between the body of a `with` and its end. Then nothing is undone as long as the traceback lives, in a
    notebook until the next error.
    """
    grad = torch.is_grad_enabled()
    try:
        yield
    except BaseException as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == contextlib.__file__:
                with contextlib.suppress(RuntimeError):  # it is still running
                    frame.clear()
        torch.set_grad_enabled(grad)
        raise
