"""fairseq's ``--optimizer delta_sam``: the base optimizer itself, with the settings of δ-SAM attached.

The criterion computes the sharpness-aware gradient (see :mod:`deltasam_plugin.loss`), and the base optimizer takes the
step. fairseq gets an instance of the base's class, under the base's own name. So a checkpoint of δ-SAM continues a run
of the base optimizer, and the other way round.
"""

import logging
import weakref
from argparse import ArgumentParser
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import torch
from fairseq.distributed.utils import get_data_parallel_group, get_data_parallel_world_size
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import DictConfig
from torch import Tensor, nn

from deltasam_plugin import schedule
from deltasam_plugin.batch.momentum import check_momentum, momentum_of
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.workers import NO_SYNC, Workers
from deltasam_plugin.fairseq.announcements import TrainedBy, start_line, warn_of_half_precision
from deltasam_plugin.fairseq.backward import BackwardPasses
from deltasam_plugin.fairseq.base_options import NAME, BaseOptions
from deltasam_plugin.fairseq.config import DeltaSAMOptimizerConfig
from deltasam_plugin.fairseq.errors import Unsupported, one_message
from deltasam_plugin.fairseq.parameters import TrainedParameters, named_parameters, part_of
from deltasam_plugin.fairseq.refusals import option, refuse_unsupported
from deltasam_plugin.modes import Perturbations, chosen_parameters
from deltasam_plugin.settings import Settings

logger = logging.getLogger(__name__)


OPTIONS = BaseOptions("optimizer", DeltaSAMOptimizerConfig)

_latest: "weakref.ref[SharpnessAwareOptimizer] | None" = None


def active_optimizer() -> "SharpnessAwareOptimizer":
    """The δ-SAM optimizer of this process: the one built last.

    Raises:
        RuntimeError: there is none.
    """
    optimizer = _latest() if _latest is not None else None
    if optimizer is None:
        raise Unsupported(
            "Criterion 'delta_sam' trains without its optimizer. Did you forget --optimizer delta_sam "
            "(with --base-optimizer for the optimizer you had)?"
        )
    return optimizer


class SharpnessAwareOptimizer(FairseqOptimizer):
    """Mixed into the class of the base optimizer by :func:`sharpness_aware`: settings and perturbed parameters."""

    settings: Settings
    names: TrainedBy
    parameters: TrainedParameters
    backward_passes: BackwardPasses
    seed: int
    peak_lr: float
    _warned: bool = False
    _announced: bool = False
    _momentum_checked: bool = False
    _next_update: int | None = None  # its number, once it is known
    _perturbations: dict[tuple[nn.Module, ...], tuple[list[PerturbedParameter], Perturbations]]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """The base optimizer's step.

        Raises:
            RuntimeError: the gradient does not come from sharpness-aware backward passes alone.
        """
        self.backward_passes.check_step()
        if self._perturbations and not self._announced:  # no update was sharpness-aware before
            every = [perturbations for _, perturbations in self._perturbations.values()]
            perturbed, uncovered = (
                dict.fromkeys(chain(*groups))
                for groups in ([p.parameters for p in every], [p.uncovered for p in every])
            )
            logger.info(start_line(self.names, self.settings, perturbed, uncovered))
            self._announced = True
        super().step(*args, **kwargs)
        self._next_update = None if self._next_update is None else self._next_update + 1
        if self.settings.ascent != "gradient" and not self._momentum_checked:
            with one_message():
                states = (self._state_of(holder) for holder in self.parameters.given if holder.grad is not None)
                check_momentum(states, self.settings.ascent)
            self._momentum_checked = True

    @property
    def updates(self) -> int:
        """The number of updates before this one, in a resumed run too.

        fairseq's trainer tells an optimizer nothing of it. But it seeds torch with seed + updates before each update.

        Raises:
            Unsupported: something else has seeded torch.
        """
        found = torch.initial_seed() - self.seed
        self._next_update = max(found, 0) if self._next_update is None else self._next_update
        if found != self._next_update:
            raise Unsupported(
                "Interval, warm-up and schedule of the radius need the number of the update, which cannot be told: "
                f"fairseq seeds torch with {self.seed} plus that number before each update, and the seed is "
                f"{torch.initial_seed()}, not {self.seed + self._next_update}. The task, the model or the criterion "
                "seeds torch itself. Leave out torch.manual_seed there, or --sam-interval, --sam-warmup-updates and "
                "--sam-rho-schedule."
            )
        return found

    @property
    def perturbs(self) -> bool:
        """Whether this update is sharpness-aware."""
        return self.settings.interval == 1 or schedule.perturbs(self.settings, self.updates)

    @property
    def rho(self) -> float:
        """The radius in this update."""
        if not self.settings.rho_varies:
            return self.settings.radius
        return schedule.radius(self.settings, self.updates, self.get_lr() / self.peak_lr if self.peak_lr else 1.0)

    def change(self, **values: Any) -> None:
        """Go on with other settings, by name. What was learned about the model under the old ones is forgotten.

        Raises:
            ValueError: a value breaks its rule.
        """
        self.settings = replace(self.settings, **values)
        self._perturbations = {}

    def perturbations(self, *modules: nn.Module) -> Perturbations:
        """The perturbations of model and criterion, made anew when other parameters are trained."""
        parameters = self.parameters.of(*modules)
        if not self._warned:
            warn_of_half_precision(parameters, self.settings)
            self._warned = True
        known, perturbations = self._perturbations.get(modules, (None, None))
        if perturbations is None or known is not parameters:
            perturbed = {item.parameter: item for item in parameters}
            every = named_parameters(*modules)
            named = {name: perturbed[parameter] for name, parameter in every if parameter in perturbed}
            with one_message():
                named = chosen_parameters(named, self.settings)
            checks = None if perturbations is None else perturbations.checks
            leaves = [parameter for _, parameter in every]
            own = weakref.proxy(self)  # no cycle: an optimizer that nobody uses must be gone at once
            perturbations = Perturbations(
                named,
                self.settings,
                leaves,
                workers=self.workers,
                checks=checks,
                momentum=lambda item: own._momentum(item),
                loss_scaler=True,  # of --fp16 and --amp
            )
            self._perturbations[modules] = parameters, perturbations
        return perturbations

    def _momentum(self, item: PerturbedParameter) -> Tensor | None:
        """The base optimizer's momentum of a parameter; None before its first step."""
        holder = self.parameters.holder(item)
        momentum = momentum_of(self._state_of(holder))
        return None if momentum is None else part_of(item, holder, momentum)

    def _state_of(self, holder: Tensor) -> dict[str, Any]:
        """The state of what the base optimizer was given. A composite one has several optimizers."""
        optimizers = getattr(self, "optimizers", {NAME: self}).values()
        return next((own.optimizer.state[holder] for own in optimizers if holder in own.optimizer.state), {})

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
        root = cfg._get_root()
        with one_message():
            settings = Settings(**{item.name: cfg[f"sam_{item.name}"] for item in fields(Settings)})
            refuse_unsupported(root)
            name, base, base_cfg = OPTIONS.base_config(cfg)
        params = list(params)
        optimizer: Any = sharpness_aware(base)(base_cfg, params)
        optimizer.settings = settings
        optimizer.seed = option(root, "common", "seed") or 0
        rates = option(root, "optimization", "lr") or [1.0]
        optimizer.peak_lr = max(*rates, option(root, "lr_scheduler", "max_lr") or 0.0)  # triangular rises to --max-lr
        task, criterion = option(root, "task", "_name"), option(root, "criterion", "base_criterion")
        optimizer.names = TrainedBy(task, criterion, name)
        optimizer.backward_passes = BackwardPasses(optimizer.names)
        optimizer.parameters = TrainedParameters(params)
        optimizer._perturbations = {}
        _latest = weakref.ref(optimizer)
        return optimizer
