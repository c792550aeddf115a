"""Seconds per update of the runs of an experiment, measured side by side.

A machine's speed drifts, so the runs take turns: in every round each does a block of updates, on the same batches. What
counts is the ratio to the first run within a round. Each run has its own process, which sleeps while the others work.
"""

import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from statistics import median

from .experiment import ENVIRONMENT, Experiment

UPDATES = 5  # in one block
WARM_UP = 16  # updates before the first round: in the first 16 batches instance mode checks itself by further passes

Seconds = dict[str, list[float]]  # per update, one value a round, for each run


def measure(experiment: Experiment) -> Seconds:
    """Return seconds per update. Reuses an earlier measurement of the same commands."""
    commands = {run: " ".join(options) for run, options in experiment.commands.items()}
    result = experiment.work / "timing.json"
    if result.exists():
        known = json.loads(result.read_text())
        if known["commands"] == commands:
            print("timing    | is there", flush=True)
            return known["seconds"]
    seconds = alternate(experiment)
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps({"commands": commands, "seconds": seconds}, indent=1))
    partial.rename(result)
    return seconds


def alternate(experiment: Experiment) -> Seconds:
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    processes = []
    for run, options in experiment.commands.items():
        workers[run], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(options, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    seconds: Seconds = {run: [] for run in workers}
    for worker in workers.values():  # all at once
        worker.send(WARM_UP)
    for worker in workers.values():
        worker.recv()
    for turn in range(1, experiment.timing_rounds + 1):
        for run, worker in workers.items():
            worker.send(UPDATES)
            seconds[run].append(worker.recv() / UPDATES)
        line = ", ".join(f"{run} {values[-1]:.3f}" for run, values in seconds.items())
        print(f"timing    | round {turn} / {experiment.timing_rounds}: seconds per update {line}", flush=True)
    for worker, process in zip(workers.values(), processes):
        worker.close()  # which ends it
        process.join()
    return seconds


def work(options: list[str], connection: Connection) -> None:
    """Receive numbers of updates; do so many and send back the seconds they took."""
    logging.disable(logging.WARNING)  # the training runs have logged all of it
    warnings.simplefilter("ignore")
    train_step = updates(options)
    while True:
        try:
            count = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        for _ in range(count):
            next(train_step)
        connection.send(time.perf_counter() - start)


def updates(options: list[str]) -> Iterator[None]:
    """Yield after every update of fairseq's own trainer, which is set up as in fairseq-train."""
    sys.argv = ["fairseq-train", *options]
    from fairseq import options as fairseq_options
    from fairseq import tasks, utils
    from fairseq.data import iterators
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.logging import metrics
    from fairseq.trainer import Trainer

    arguments = fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser())
    cfg = convert_namespace_to_omegaconf(arguments)
    utils.set_torch_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    criterion = task.build_criterion(cfg.criterion)
    task.load_dataset("train")
    trainer = Trainer(cfg, task, model, criterion)
    epoch = trainer.get_train_iterator(epoch=1, load_dataset=False)
    trainer.lr_step_update()
    with metrics.aggregate("train"):
        while True:  # one epoch may be shorter than the measurement
            for samples in iterators.GroupedIterator(epoch.next_epoch_itr(), 1):
                trainer.train_step(samples)
                yield


def ratios(seconds: Seconds, run: str) -> str:
    """Return as text the median, least and greatest ratio to the first run within a round."""
    first = next(iter(seconds.values()))
    values = [mine / base for mine, base in zip(seconds[run], first)]
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
