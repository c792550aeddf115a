"""What fairseq's older tasks and models see of the command line: the names of the base components.

Those that still use argparse get the whole command line, and some ask it which criterion is to come: the task
sentence_ranking insists on its own, the models lstm, lstm_lm and fconv_lm build an adaptive softmax only for
adaptive_loss. So they are shown the base's names. These are also what a checkpoint keeps of them, and what fairseq
without the plugin reads there.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from typing import Any

from fairseq import models, tasks

from deltasam_plugin.fairseq_config import NAME


def showing_base_names(build: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with a command line that names the base components in place of δ-SAM.

    Args:
        build: takes the configuration of a task or model as its first argument: a namespace where it is a whole
            command line, whose names are changed in place; anything else is left alone.
    """

    @wraps(build)
    def wrapper(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(cfg, Namespace):
            for registry in ("criterion", "optimizer"):
                if getattr(cfg, registry, None) == NAME:
                    setattr(cfg, registry, getattr(cfg, f"base_{registry}"))
        return build(cfg, *args, **kwargs)

    return wrapper


tasks.setup_task = showing_base_names(tasks.setup_task)
models.build_model = showing_base_names(models.build_model)
