"""Run compiled modules uncompiled: interception does not see the calls in compiled code."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[None]:
    """Within this context compiled modules and functions run uncompiled; with torch 2.6 and newer.

    Compiled code draws other random numbers, so that every pass of an update must run within.
    """
    compiles = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()
