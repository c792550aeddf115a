"""fairseq's ``--optimizer delta_sam``: the base optimizer itself, with the settings of δ-SAM attached.

The criterion computes the sharpness-aware gradient (see :mod:`deltasam_plugin.loss`), and the base optimizer takes the
step. fairseq gets an instance of the base's class, under the base's own name. So a checkpoint of δ-SAM continues a run
of the base optimizer, and the other way round.
"""

import weakref
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fairseq.dataclass import FairseqDataclass
from fairseq.distributed.utils import get_data_parallel_group, get_data_parallel_world_size
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import DictConfig
from torch import Tensor, nn

from deltasam_plugin.batch.displacement import PerturbedParameter
from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.batch.workers import NO_SYNC, Workers
from deltasam_plugin.fairseq.announcements import warn_of_half_precision
from deltasam_plugin.fairseq.config import NAME, BaseOptions
from deltasam_plugin.fairseq.parameters import TrainedParameters
from deltasam_plugin.fairseq.refusals import option, refuse_unsupported
from deltasam_plugin.perturbations import Perturbations
from deltasam_plugin.settings import PERTURBATIONS, Settings


@dataclass
class DeltaSAMOptimizerConfig(FairseqDataclass):
    base_optimizer: str = field(default="adam", metadata={"help": "optimizer that takes the step, by its fairseq name"})
    sam_rho: float = field(
        default=Settings.rho, metadata={"help": "radius of the perturbation: L2 norm in parameter space"}
    )
    sam_weighting: str = field(
        default=Settings.weighting,
        metadata={"help": f"weights of the samples in the ascent: {', '.join(WEIGHTINGS)} (uniform is plain SAM)"},
    )
    sam_probes: int = field(
        default=Settings.probes, metadata={"help": "curvature probes per batch, two forward passes each"}
    )
    sam_probe_scale: float = field(
        default=Settings.probe_scale,
        metadata={"help": "length of a probe's displacement as a fraction of the L2 norm of the weights"},
    )
    sam_perturbation: str = field(
        default=Settings.perturbation, metadata={"help": f"what is perturbed: {', '.join(PERTURBATIONS)}"}
    )
    sam_sync: bool = field(
        default=Settings.sync,
        metadata={"help": "one perturbation common to all data-parallel workers, instead of one for each"},
    )


OPTIONS = BaseOptions("optimizer", DeltaSAMOptimizerConfig)

_latest: "weakref.ref[SharpnessAwareOptimizer] | None" = None


def active_optimizer() -> "SharpnessAwareOptimizer":
    """The δ-SAM optimizer of this process: the one built last.

    Raises:
        RuntimeError: there is none.
    """
    optimizer = _latest() if _latest is not None else None
    if optimizer is None:
        raise RuntimeError(
            "Criterion 'delta_sam' trains without its optimizer. Did you forget --optimizer delta_sam "
            "(with --base-optimizer for the optimizer you had)?"
        )
    return optimizer


class TrainedBy(NamedTuple):
    """The names in fairseq of what trains the model."""

    task: str | None
    criterion: str | None
    optimizer: str


class SharpnessAwareOptimizer(FairseqOptimizer):
    """Mixed into the class of the base optimizer by :func:`sharpness_aware`: settings and perturbed parameters."""

    settings: Settings
    names: TrainedBy
    parameters: TrainedParameters
    gradient_ready: bool = False  # whether a sharpness-aware backward pass has run since the last step
    _warned: bool = False
    _perturbations: dict[tuple[nn.Module, ...], tuple[list[PerturbedParameter], Perturbations]]

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A forward pass of the criterion in training.

        If it fails, the next step needs no gradient of it: fairseq drops a batch that runs out of memory, and takes the
        step with the gradients of the other workers.
        """
        try:
            yield
        except BaseException:
            self.gradient_ready = True
            raise

    def backward_begins(self, gradient: Tensor) -> None:
        """Hook on the loss."""
        self.gradient_ready = True

    def step(self, *args: Any, **kwargs: Any) -> None:
        """The base optimizer's step.

        Raises:
            RuntimeError: no sharpness-aware backward pass came before it.
        """
        if not self.gradient_ready:
            names = self.names
            raise RuntimeError(
                f"Task {names.task!r} takes an optimizer step without a sharpness-aware gradient: its train_step does "
                "not take the loss from criterion(model, sample). Use a task that does, or train without δ-SAM: "
                f"--optimizer {names.optimizer} --criterion {names.criterion}."
            )
        self.gradient_ready = False
        super().step(*args, **kwargs)

    def perturbations(self, *modules: nn.Module) -> Perturbations:
        """The perturbations of model and criterion, made anew when other parameters are trained."""
        parameters = self.parameters.of(*modules)
        if not self._warned:
            warn_of_half_precision(parameters, self.settings)
            self._warned = True
        known, perturbations = self._perturbations.get(modules, (None, None))
        if perturbations is None or known is not parameters:
            names = {
                parameter: prefix + name
                for prefix, module in zip(("", "criterion."), modules, strict=True)
                for name, parameter in module.named_parameters()
            }
            named = {names[item.parameter]: item for item in parameters}  # type: ignore[index]
            checks = None if perturbations is None else perturbations.checks
            perturbations = Perturbations(named, self.settings, list(names), self.workers, checks)
            self._perturbations[modules] = parameters, perturbations
        return perturbations

    @property
    def workers(self) -> Workers:
        """The workers that share a perturbation with this one."""
        if self.settings.sync and get_data_parallel_world_size() > 1:
            return Workers(get_data_parallel_group())
        return NO_SYNC


def sharpness_aware(base: type[FairseqOptimizer]) -> type[SharpnessAwareOptimizer]:
    """A subclass of the base optimizer with δ-SAM's settings.

    It keeps the base's name, which fairseq compares with the one in a checkpoint.
    """
    return type(base.__name__, (SharpnessAwareOptimizer, base), {"__module__": __name__, "__doc__": base.__doc__})


@register_optimizer(NAME, dataclass=DeltaSAMOptimizerConfig)
class FairseqDeltaSAM(FairseqOptimizer):
    """The entry in fairseq's registry. :meth:`build_optimizer` returns the base optimizer with settings."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add δ-SAM's options and those of all base optimizers to a command line."""
        OPTIONS.add_args(parser)

    @classmethod
    def build_optimizer(cls, cfg: DictConfig, params: list[Tensor]) -> SharpnessAwareOptimizer:
        """Build the base optimizer for `params`.

        Raises:
            ValueError: an option is out of range, the base does not exist, the criterion is not δ-SAM's, or
                parameters would be sharded.
        """
        global _latest
        settings = Settings(
            cfg.sam_rho, cfg.sam_weighting, cfg.sam_probes, cfg.sam_probe_scale, cfg.sam_perturbation, cfg.sam_sync
        )
        root = cfg._get_root()
        refuse_unsupported(root)
        name, base, base_cfg = OPTIONS.base_config(cfg)
        params = list(params)
        optimizer: Any = sharpness_aware(base)(base_cfg, params)
        optimizer.settings = settings
        task, criterion = option(root, "task", "_name"), option(root, "criterion", "base_criterion")
        optimizer.names = TrainedBy(task, criterion, name)
        optimizer.parameters = TrainedParameters(params)
        optimizer._perturbations = {}
        _latest = weakref.ref(optimizer)
        return optimizer
