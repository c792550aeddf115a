"""fairseq's ``--optimizer delta_sam``: the base optimizer itself, with the settings of δ-SAM attached.

The criterion computes the sharpness-aware gradient (see :mod:`deltasam_plugin.loss`), and the base optimizer takes the
step. fairseq gets an instance of the base's class, under the base's own name. So a checkpoint of δ-SAM continues a run
of the base optimizer, and the other way round.
"""

import logging
import weakref
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed.utils import get_data_parallel_group, get_data_parallel_world_size
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import DictConfig
from torch import Tensor, nn

from deltasam_plugin.batch.displacement import PerturbedParameter
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.weighting import ROUNDING_FACTOR, WEIGHTINGS
from deltasam_plugin.batch.workers import NO_SYNC, Workers
from deltasam_plugin.fairseq.config import NAME, BaseOptions
from deltasam_plugin.fairseq.refusals import refuse_unsupported
from deltasam_plugin.instance import InstanceEngine, InstancePerturbation
from deltasam_plugin.loss import Perturbation
from deltasam_plugin.precision import coarsest, observed_dtypes, spacing
from deltasam_plugin.settings import PERTURBATIONS, Settings

logger = logging.getLogger(__name__)


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


class SharpnessAwareOptimizer(FairseqOptimizer):
    """Mixed into the class of the base optimizer by :func:`sharpness_aware`: settings and perturbed parameters."""

    settings: Settings
    _given: list[Tensor]
    _weights: dict[tuple[nn.Module, ...], list[PerturbedParameter]]
    _engines: dict[tuple[nn.Module, ...], InstanceEngine]

    def weights(self, *modules: nn.Module) -> list[PerturbedParameter]:
        """The trained parameters of `modules`, each with the optimizer's fp32 copy of it if there is one.

        Args:
            modules: model and criterion, in the order in which fairseq's trainer collects their parameters.
                Multilingual tasks pass a part of the model.

        Raises:
            RuntimeError: the optimizer holds neither these parameters nor copies of them.
        """
        if modules not in self._weights:
            parameters = [p for p in chain(*(module.parameters() for module in modules)) if p.requires_grad]
            rewritten = {id(p) for module in modules for p in rewritten_parameters(module)}
            idle = {id(p) for module in modules for p in fast_path_copies(module)}
            paired = zip(parameters, pair_masters(parameters, self._given), strict=True)
            weights = [PerturbedParameter(p, master, id(p) in rewritten) for p, master in paired if id(p) not in idle]
            warn_of_half_precision(weights, self.settings)
            self._weights[modules] = weights
        return self._weights[modules]

    def perturbation(self, *modules: nn.Module) -> Perturbation:
        """The perturbation of one (micro-)batch of model and criterion."""
        weights = self.weights(*modules)
        if self.settings.perturbation == "batch" or self.settings.rho == 0:
            leaves = [parameter for module in modules for parameter in module.parameters()]
            return BatchPerturbation(weights, leaves, self.settings, workers=self.workers)
        if modules not in self._engines:
            perturbed = {id(weight.parameter) for weight in weights}
            names = {
                parameter: prefix + name
                for prefix, module in zip(("", "criterion."), modules, strict=True)
                for name, parameter in module.named_parameters()
                if id(parameter) in perturbed
            }
            named = [(name, parameter) for parameter, name in names.items()]
            self._engines[modules] = InstanceEngine(named, self.settings.rho)
        return InstancePerturbation(self._engines[modules])

    @property
    def workers(self) -> Workers:
        """The workers that share a perturbation with this one."""
        if self.settings.sync and get_data_parallel_world_size() > 1:
            return Workers(get_data_parallel_group())
        return NO_SYNC


def rewritten_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters that fairseq's quantization noise (``quant_noise``) overwrites in every forward pass."""
    return [
        layer.get_parameter("weight")
        for layer in module.modules()
        for hook in layer._forward_pre_hooks.values()
        if getattr(hook, "__qualname__", "").startswith("quant_noise.")
    ]


def fast_path_copies(module: nn.Module) -> list[Tensor]:
    """The copies of an encoder layer's parameters that fairseq 0.12.2 keeps for fast inference.

    They are trainable, but no training loss depends on them. They are zero until a checkpoint is loaded, and then as
    large as the parameters. If they were perturbed, a resumed run would differ from the uninterrupted one.
    """
    return [p for layer in module.modules() if hasattr(layer, "BT_version") for p in layer.parameters(recurse=False)]


def warn_of_half_precision(weights: Sequence[PerturbedParameter], settings: Settings) -> None:
    """Warn in numbers: in half precision perturbations fall below the spacing of numbers, and probes below rounding."""
    parameters = [weight.parameter for weight in weights]
    with observed_dtypes(parameters) as dtypes:
        dtype = coarsest(dtypes)
    name, eps = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps
    if settings.perturbation != "batch" or eps <= torch.finfo(torch.float32).eps:
        return
    if settings.weighting == "curvature":
        logger.warning(
            f"δ-SAM: in {name} a curvature probe sees nothing below {ROUNDING_FACTOR * eps:.1%} of a sample's loss, "
            "the rounding floor. A batch whose samples are all below it gets uniform weights, and sam_ess is 1. A "
            "larger --sam-probe-scale raises the signal. --sam-weighting uniform saves the probes."
        )
    without_master = [w.parameter for w in weights if w.master is None and w.parameter.dtype == dtype]
    if without_master:
        step, size, distance = spacing(without_master, settings.rho)
        logger.warning(
            f"δ-SAM: in {name} without fp32 master weights a perturbation of rho={settings.rho} is {step:.1e} per "
            f"parameter, and the spacing of numbers is about {distance:.1e} (at their root mean square, {size:.1e}). "
            f"sam_eps_norm shows what rounding loses: it should be {settings.rho}. To lose nothing, use --fp16 "
            "without --memory-efficient-fp16, or --amp."
        )


def pair_masters(parameters: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor | None]:
    """Match the model's parameters with the tensors that the optimizer was given.

    Args:
        parameters: of the model, in fairseq's order, each once.
        given: the same tensors and perhaps others; or a copy of each in the same order; or one flat copy of all.

    Returns:
        The fp32 copy of each parameter (a view if there is one flat copy), or None if there is no copy.

    Raises:
        RuntimeError: `given` is none of these.
    """
    if {id(p) for p in parameters} <= {id(p) for p in given}:
        return [None] * len(parameters)
    if [p.shape for p in parameters] == [p.shape for p in given]:
        return list(given)
    if len(given) == 1 and given[0].numel() == sum(p.numel() for p in parameters):
        parts = given[0].detach().split([p.numel() for p in parameters])
        return [part.view_as(p) for p, part in zip(parameters, parts, strict=True)]
    raise RuntimeError(
        f"The optimizer holds {len(given)} tensors with {sum(p.numel() for p in given)} elements, the model and "
        f"criterion {len(parameters)} trainable ones with {sum(p.numel() for p in parameters)}. δ-SAM must find every "
        "parameter whole in this process, and the fp32 copy of each if there are any. Use --ddp-backend legacy_ddp or "
        "pytorch_ddp without sharding. For a task that trains a part of the model at a time (multilingual ones) use "
        "--amp instead of --fp16."
    )


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
        refuse_unsupported(cfg._get_root())
        _, base, base_cfg = OPTIONS.base_config(cfg)
        params = list(params)
        optimizer: Any = sharpness_aware(base)(base_cfg, params)
        optimizer.settings = settings
        optimizer._given = params
        optimizer._weights, optimizer._engines = {}, {}
        _latest = weakref.ref(optimizer)
        return optimizer
