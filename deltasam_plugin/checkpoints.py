"""Let fairseq read its own checkpoints under torch >= 2.6.

There ``torch.load`` builds no objects but those on a list. fairseq's checkpoints may hold two classes beyond torch's
own: ``argparse.Namespace`` (configurations of components that still use argparse) and ``fairseq.data.Dictionary`` (the
state of tasks that train on audio with labels). Both are bags of attributes whose construction does nothing; putting
them on the list weakens ``torch.load`` for nobody.
"""

from argparse import Namespace

import torch
from fairseq.data import Dictionary


def allow_fairseq_checkpoints() -> None:
    """Put fairseq's two classes on torch's list of safe globals, where torch has one."""
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([Namespace, Dictionary])
