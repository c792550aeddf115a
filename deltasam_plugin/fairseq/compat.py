"""Changes to fairseq itself, for its older tasks and models and for its checkpoints. `register()` makes them."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from fairseq import models, tasks
from fairseq.data import Dictionary

from deltasam_plugin.fairseq.base_options import NAME, BaseOptions


def show_base_components(options: Sequence[BaseOptions]) -> None:
    """Show tasks and models the names and the options of the base components in place of δ-SAM's.

    Tasks and models that still use argparse get the whole command line. Some look up the criterion there: the task
    sentence_ranking insists on its own, and the models lstm, lstm_lm and fconv_lm build an adaptive softmax for
    adaptive_loss only. Some read its options: s2t_transformer builds a layer for CTC if ``ctc_weight`` is positive,
    which is the criterion's default. A checkpoint keeps all this too, and fairseq reads it without the plugin.

    Args:
        options: of the optimizers and of the criterions.
    """
    tasks.setup_task = showing_base_components(tasks.setup_task, options)
    models.build_model = showing_base_components(models.build_model, options)


def showing_base_components(build: Callable[..., Any], options: Sequence[BaseOptions]) -> Callable[..., Any]:
    """Wrap a function that builds a task or a model: it sees the base components.

    Args:
        build: takes the configuration as its first argument. A namespace is a whole command line: it is changed in
            place. Any other configuration is left alone.
        options: of the optimizers and of the criterions.
    """

    @wraps(build)
    def wrapper(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(cfg, Namespace):
            for registered in options:
                if getattr(cfg, registered.registry, None) == NAME:
                    base = getattr(cfg, f"base_{registered.registry}")
                    setattr(cfg, registered.registry, base)
                    defaults = registered.options_of(base) if base in registered.components else {}
                    for name, default in defaults.items():  # as the base's own command line would have them
                        if default is not None and not hasattr(cfg, name):
                            setattr(cfg, name, default)
        return build(cfg, *args, **kwargs)

    return wrapper


def allow_checkpoints() -> None:
    """Let fairseq read its own checkpoints under torch >= 2.6.

    There ``torch.load`` only builds objects of listed classes. fairseq's checkpoints may hold others:
    ``argparse.Namespace`` (configurations of components that still use argparse), ``fairseq.data.Dictionary`` (the
    state of tasks that train on audio with labels), and arrays and numbers of numpy (metrics, such as the counts of
    BLEU). They only hold data, so that ``torch.load`` stays safe.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        rebuild: list[Any] = [value.__reduce__()[0] for value in (np.zeros(1), np.float64())]
        types = [type(np.dtype(name)) for name in ("int32", "int64", "float32", "float64")]
        torch.serialization.add_safe_globals([Namespace, Dictionary, np.ndarray, np.dtype, *types, *rebuild])
