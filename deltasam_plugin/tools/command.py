"""A fairseq-train command of the user, set up as fairseq-train does it, but under δ-SAM and without writing a file."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import iterators
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from deltasam_plugin.fairseq.base_options import NAME
from deltasam_plugin.tools.console import BadInput, one_line_for

PROGRAM = "fairseq-train"


def sharpness_aware(command: Sequence[str]) -> list[str]:
    """The options of a command, with the two words in them.

    Args:
        command: ``fairseq-train`` and its options.

    Raises:
        BadInput: it is no command of fairseq-train.
    """
    name, *given = [*command] or [""]
    if os.path.basename(name) == "fairseq-hydra-train":
        raise BadInput("Commands of fairseq-hydra-train are not read here. Write the same options for fairseq-train.")
    if os.path.basename(name) != PROGRAM or not given:
        raise BadInput(f"No {PROGRAM} command after --. Give the whole command: -- {PROGRAM} DATA --arch …")
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--optimizer")
    parser.add_argument("--criterion", default="cross_entropy")
    known, _ = parser.parse_known_args(given)
    if known.optimizer is None:
        raise BadInput(f"{PROGRAM}: give --optimizer. It has no default.")
    for part in ("optimizer", "criterion"):
        base = getattr(known, part)
        if base != NAME:
            given += [f"--{part}", NAME, f"--base-{part}", base]
    return given


@contextmanager
def trainer_of(command: Sequence[str]) -> Iterator[tuple[Trainer, Iterator[list[Any]]]]:
    """fairseq's trainer for a command, and the batches of one update after another.

    A checkpoint is restored if the command restores one. Nothing is written to the command's folders.

    Raises:
        BadInput: fairseq cannot set it up, or it needs several processes.
    """
    cfg = _configuration(sharpness_aware(command))
    size = cfg.distributed_training.distributed_world_size
    if size > 1:
        raise BadInput(
            f"This command trains in {size} processes (--distributed-world-size), and the range test runs in one. Add "
            "--distributed-world-size 1 to it."
        )
    with TemporaryDirectory() as elsewhere:
        with one_line_for("fairseq-train cannot run this command"):
            np.random.seed(cfg.common.seed)
            utils.set_torch_seed(cfg.common.seed)
            task = tasks.setup_task(cfg.task)
            model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
            trainer = Trainer(cfg, task, model, criterion)
            _, epoch = checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)
        cfg.checkpoint.save_dir = elsewhere  # for crash.pt
        yield trainer, _updates(trainer, epoch)


def _configuration(given: list[str]) -> Any:
    """fairseq's configuration for the options of fairseq-train."""

    def refuse(message: str) -> NoReturn:
        raise BadInput(f"{PROGRAM}: {message}")

    user = ArgumentParser(add_help=False, allow_abbrev=False)
    user.add_argument("--user-dir")
    with one_line_for(f"{PROGRAM} cannot read this command"):
        utils.import_user_module(user.parse_known_args(given)[0])  # before the parser lists tasks and models
        parser = options.get_training_parser()
        parser.error = refuse
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, given))
        add_defaults(cfg)
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise BadInput(f"{PROGRAM}: give the size of a batch, --max-tokens or --batch-size.")
    return cfg


def _updates(trainer: Trainer, epoch: Any) -> Iterator[list[Any]]:
    """The batches of each update, over epoch after epoch, as fairseq-train forms them."""
    cfg = trainer.cfg
    while True:
        batches = epoch.next_epoch_itr(shuffle=epoch.next_epoch_idx > cfg.dataset.curriculum)
        frequencies = cfg.optimization.update_freq
        frequency = frequencies[min(epoch.epoch, len(frequencies)) - 1]
        trainer.begin_epoch(epoch.epoch)
        remainder = cfg.optimization.skip_remainder_batch
        yield from iterators.GroupedIterator(batches, frequency, skip_remainder_batch=remainder)
        trainer.lr_step(epoch.epoch)
        sharded = trainer.task.has_sharded_data("train")
        epoch = trainer.get_train_iterator(epoch.next_epoch_idx, load_dataset=sharded)
