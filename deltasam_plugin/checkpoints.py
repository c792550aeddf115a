"""Let fairseq read its own checkpoints under torch >= 2.6.

There ``torch.load`` builds no objects but those on a list. fairseq's checkpoints may hold one class beyond torch's own,
``argparse.Namespace`` (configurations of components that still use argparse). It is a bag of attributes without
behaviour; putting it on the list weakens ``torch.load`` for nobody.
"""

from argparse import Namespace

import torch


def allow_fairseq_checkpoints() -> None:
    """Put ``argparse.Namespace`` on torch's list of safe globals, where torch has one."""
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([Namespace])
