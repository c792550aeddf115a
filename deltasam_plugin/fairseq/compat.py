"""What fairseq's older tasks, models and checkpoints need beside the optimizer and the criterion."""

from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from fairseq import models, tasks
from fairseq.data import Dictionary

from deltasam_plugin.fairseq.config import NAME


def show_base_names() -> None:
    """Show tasks and models the names of the base components in place of δ-SAM's.

    Those that still use argparse get the whole command line, and some ask it which criterion is to come: the task
    sentence_ranking insists on its own, the models lstm, lstm_lm and fconv_lm build an adaptive softmax only for
    adaptive_loss. A checkpoint keeps these names too, and fairseq reads them there without the plugin.
    """
    tasks.setup_task = showing_base_names(tasks.setup_task)
    models.build_model = showing_base_names(models.build_model)


def showing_base_names(build: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with a command line that names the base components.

    Args:
        build: takes the configuration of a task or model as its first argument. A namespace is a whole command line,
            and its names are changed in place. Anything else is left alone.
    """

    @wraps(build)
    def wrapper(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(cfg, Namespace):
            for registry in ("criterion", "optimizer"):
                if getattr(cfg, registry, None) == NAME:
                    setattr(cfg, registry, getattr(cfg, f"base_{registry}"))
        return build(cfg, *args, **kwargs)

    return wrapper


def allow_checkpoints() -> None:
    """Let fairseq read its own checkpoints under torch >= 2.6.

    There ``torch.load`` builds no objects but those on a list. fairseq's checkpoints may hold two classes beyond
    torch's own: ``argparse.Namespace`` (configurations of components that still use argparse) and
    ``fairseq.data.Dictionary`` (the state of tasks that train on audio with labels). Both only hold attributes, so
    allowing them does not make ``torch.load`` less safe.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([Namespace, Dictionary])
