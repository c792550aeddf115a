"""Measure all trained classifiers in the same way, independently of the plugin's training code."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .experiment import Experiment

BATCH = 64
SHARPNESS_SENTENCES = 1024  # the first ones of the training part, or all if they are fewer


@dataclass
class Result:
    """The measures of a model: accuracies in percent, loss and sharpness per sentence in base 2."""

    valid_accuracy: float
    test_accuracy: float
    test_loss: float
    sharpness: float


def evaluate_all(experiment: Experiment, rho: float) -> dict[str, Result]:
    """Return the measures of every run's last checkpoint, without dropout.

    As many models as there are cores are measured at a time, each in a process of one thread.

    Args:
        rho: distance at which sharpness is measured.
    """
    runs, context = experiment.commands, multiprocessing.get_context("spawn")
    print(f"measuring | accuracy, loss and sharpness of {', '.join(runs)}", flush=True)
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # leaving the pool ends its processes
    with context.Pool(min(len(runs), os.cpu_count() or 1), initializer=ignore_interrupt) as pool:
        results = pool.map(partial(evaluate, experiment, rho=rho), runs, chunksize=1)
        pool.close()  # its processes end by themselves, and leave nothing behind
        pool.join()
    return dict(zip(runs, results))


def evaluate(experiment: Experiment, run: str, rho: float) -> Result:
    """Return the measures of one run's last checkpoint; see :func:`evaluate_all`."""
    torch.set_num_threads(1)
    data, *_ = experiment.commands[run]
    model, task = load(experiment.folder(run) / "checkpoint_last.pt", Path(data))
    for split in ("train", "valid", "test"):
        task.load_dataset(split)
    valid_accuracy, _ = accuracy_and_loss(model, task.dataset("valid"))
    test_accuracy, test_loss = accuracy_and_loss(model, task.dataset("test"))
    return Result(valid_accuracy, test_accuracy, test_loss, sharpness(model, task.dataset("train"), rho))


def load(checkpoint: Path, data: Path) -> tuple[Any, Any]:
    """Return the model and the task of a checkpoint."""
    for name in ("fairseq", "hydra"):  # their messages would bury the table
        logging.getLogger(name).setLevel(logging.WARNING)
    from fairseq import checkpoint_utils, utils

    import deltasam_plugin  # noqa: F401  (lets torch read fairseq's checkpoints)

    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint), {"data": str(data)})
    utils.import_user_module(state["cfg"].common)  # the model may be one of the user-dir
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], state=state)
    return models[0].eval(), task


def batches(dataset: Any, sentences: int) -> Iterator[dict[str, Any]]:
    """Yield the first sentences of a dataset, those of similar length together: less padding takes less time."""
    order = sorted(range(sentences), key=dataset.num_tokens)
    for start in range(0, sentences, BATCH):
        yield dataset.collater([dataset[i] for i in order[start : start + BATCH]])


def losses(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return for each sentence its cross-entropy in base 2, and whether it is classified correctly."""
    logits, _ = model(**batch["net_input"], features_only=True, classification_head_name="sentiment")
    target = batch["target"].view(-1)
    return F.cross_entropy(logits, target, reduction="none") / log(2), logits.argmax(-1) == target


def accuracy_and_loss(model: Any, dataset: Any) -> tuple[float, float]:
    with torch.no_grad():
        results = [losses(model, batch) for batch in batches(dataset, len(dataset))]
    loss, correct = (torch.cat(columns) for columns in zip(*results))
    return 100 * correct.double().mean().item(), loss.double().mean().item()


def sharpness(model: Any, dataset: Any, rho: float) -> float:
    r"""Return how much the loss rises along its own gradient, and leave the model as it was.

    .. math:: L(w + \rho\, g / \lVert g \rVert) - L(w), \qquad g = \nabla L(w)

    Args:
        rho: ρ, L2 norm in parameter space.
        dataset: L is the mean loss of its first SHARPNESS_SENTENCES sentences, in base 2.
    """
    count = min(len(dataset), SHARPNESS_SENTENCES)

    def total(backward: bool) -> float:
        value = 0.0
        for batch in batches(dataset, count):
            with torch.set_grad_enabled(backward):
                loss = losses(model, batch)[0].sum() / count
            if backward:
                loss.backward()
            value += loss.item()
        return value

    model.zero_grad(set_to_none=True)
    before = total(backward=True)
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    copies = [parameter.detach().clone() for parameter in moved]
    norm = torch.stack([parameter.grad.norm() for parameter in moved]).norm()
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(rho * parameter.grad / norm)
        after = total(backward=False)
        for parameter, copy in zip(moved, copies):
            parameter.copy_(copy)
    return after - before
