"""Updates by fairseq's own trainer, on the device of the rehearsal or on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from deltasam_plugin.fairseq.optimizer import SharpnessAwareOptimizer
from deltasam_plugin.instance.engine import ALWAYS_CHECKED
from deltasam_plugin.modes import Perturbations
from tests.helpers.rehearsal import Rehearsal, Wait
from tests.helpers.runs import USER_DIR


def built(data: Path, *arguments: object, bf16: bool = False) -> Trainer:
    """fairseq's trainer.

    Args:
        data: binarized data.
        arguments: of fairseq-train.
        bf16: train in bf16. The command line's --bf16 asks for a TPU, the configuration's does not.
    """
    common: list[object] = ["--seed", 3, "--lr", 0.01, "--batch-size", 16, "--num-workers", 0, "--user-dir", USER_DIR]
    command = list(map(str, [data, *common, *arguments]))
    utils.import_user_module(options.get_parser("user", "translation").parse_known_args(command[1:])[0])
    cfg: Any = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
    cfg.common.bf16 = bf16
    metrics.reset()
    utils.set_torch_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def updates(data: Path, *arguments: object, count: int, bf16: bool = False) -> Iterator[Trainer]:
    """Train, and yield the trainer after each update.

    Args:
        data, arguments, bf16: as for :func:`built`.
        count: number of updates. Epochs are repeated, and not shuffled.
    """
    trainer = built(data, *arguments, bf16=bf16)
    epochs = trainer.get_train_iterator(1)
    done = 0
    while done < count:
        for sample in epochs.next_epoch_itr(shuffle=False):
            if done == count:
                return
            trainer.train_step([sample])
            done += 1
            yield trainer


class Counts(NamedTuple):
    """What one update did on the device.

    Attributes:
        launches: of kernels.
        waits: of the host for the device.
    """

    launches: int
    waits: list[Wait]

    def added_waits(self, base: Counts, forwards: int, backwards: int) -> int:
        """The waits beyond those that the base run's code makes, if it runs some passes more often.

        Args:
            base: of the base run, with one forward and one backward pass.
            forwards, backwards: passes of this update.
        """
        return (
            self._count("deltasam_plugin")
            + max(0, self._count("fairseq", True) - forwards * base._count("fairseq", True))
            + max(0, self._count("autograd") - backwards * base._count("autograd"))
            + max(0, self._count("fairseq", False) - base._count("fairseq", False))
        )

    def _count(self, owner: str, in_pass: bool | None = None) -> int:
        return sum(wait.owner == owner and in_pass in (None, wait.in_pass) for wait in self.waits)


def steady(rehearsal: Rehearsal, updates: Iterator[Perturbations | None]) -> Counts:
    """The counts of an update that checks nothing.

    Args:
        rehearsal: active.
        updates: do one update for each item, four at least. An item is what δ-SAM keeps from batch to batch, or None.
    """
    for done, perturbations in enumerate(updates, 1):
        found = Counts(rehearsal.launches.total(), list(rehearsal.waits))
        rehearsal.clear()
        if done == 2 and perturbations is not None:
            skip_checks(perturbations)
    return found


def skip_checks(perturbations: Perturbations) -> None:
    """Go on as after the first sixteen batches, all of which are checked."""
    perturbations.checks._batches = ALWAYS_CHECKED
    if perturbations._engine is not None:
        perturbations._engine._batches = ALWAYS_CHECKED


def kept(trainer: Trainer) -> Perturbations | None:
    """What δ-SAM keeps from batch to batch in fairseq's trainer; None in a base run."""
    optimizer = getattr(trainer.optimizer, "fp32_optimizer", trainer.optimizer)
    if not isinstance(optimizer, SharpnessAwareOptimizer):
        return None
    ((_, perturbations),) = optimizer._perturbations.values()
    return perturbations
