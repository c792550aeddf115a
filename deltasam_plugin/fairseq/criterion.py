"""fairseq's ``--criterion delta_sam``: the base criterion itself, with a sharpness-aware gradient.

fairseq gets an instance of the base criterion's class, under the base's own name. Logging, saving and validation stay
the base's own. Only ``forward`` in training is δ-SAM's.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.models import BaseFairseqModel
from omegaconf import DictConfig
from torch import Tensor, nn

from deltasam_plugin.errors import Refused
from deltasam_plugin.fairseq.base_options import NAME, BaseOptions
from deltasam_plugin.fairseq.config import DeltaSAMCriterionConfig
from deltasam_plugin.fairseq.criterions.registry import (
    PER_SAMPLE_LOSSES,
    PerSampleLosses,
    check,
    logits_of,
    objective_of,
    per_sample_losses_of,
    recorded_outputs,
)
from deltasam_plugin.fairseq.errors import one_message
from deltasam_plugin.fairseq.optimizer import active_optimizer
from deltasam_plugin.fairseq.parameters import named_parameters
from deltasam_plugin.fairseq.refusals import refuse_unsupported
from deltasam_plugin.fairseq.scalars import ENTRIES, log_entries, log_scalars
from deltasam_plugin.loss import Objective

OPTIONS = BaseOptions("criterion", DeltaSAMCriterionConfig, PER_SAMPLE_LOSSES.__contains__)


class SharpnessAwareCriterion(FairseqCriterion):
    """Mixed into the class of the base criterion by :func:`sharpness_aware`."""

    _per_sample_losses: PerSampleLosses
    _base_name: str
    _checked: bool = False

    def forward(self, model: nn.Module, sample: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """The base criterion's forward. In training the loss has the sharpness-aware gradient.

        Returns:
            The loss at w, the sample size, and the base criterion's logging output with δ-SAM's statistics. The
            backward pass fills in the statistics.
        """
        forward = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(model, sample, *args, **kwargs)
        optimizer = active_optimizer()
        if not optimizer.perturbs:
            optimizer.backward_passes.skip()
            return forward(model, sample, *args, **kwargs)
        inner = unwrapped(model)  # the ascent must not start a distributed wrapper's exchange of gradients
        results: list[Sequence[Any]] = []  # sample size and logging output of each pass
        rho = optimizer.rho

        def objective(network: nn.Module) -> tuple[Objective, tuple[Any, dict[str, Any]]]:
            with recorded_outputs(inner, self._base_name) as outputs:
                loss, sample_size, logging_output = forward(network, sample, *args, **kwargs)
            losses = self._per_sample_losses(self, inner, sample, *outputs)
            logits = None
            if optimizer.settings.compares_logits:
                with one_message():
                    logits = logits_of(self._base_name, self, inner, sample, *outputs)
            return objective_of(loss, losses, logits), (sample_size, logging_output)

        def first() -> Objective:
            found, result = objective(inner)
            if not results:  # replays run this too; the ascent forward is the first
                results.append(result)
            if not self._checked:
                with one_message():
                    check(self._base_name, found, sample)
                self._checked = True
            return found

        # A criterion's own layers run twice in the first pass: for its loss and for the per-sample losses. Samples are
        # perturbed in the latter, so the second pass must repeat both.
        layered = optimizer.settings.perturbs_samples and any(p.requires_grad for p in self.parameters())

        def second() -> Tensor:
            if layered:
                return objective(model)[0].losses.sum()
            loss, *result = forward(model, sample, *args, **kwargs)
            results.append(result)
            return loss.reshape(())  # adaptive_loss gives (1,)

        with optimizer.backward_passes.forward_pass():
            perturbations, errors = optimizer.perturbations(inner, self), partial(one_message, (Refused,))
            loss, statistics = perturbations.loss(first, second, 0, rho, errors)
        optimizer.backward_passes.follow(loss, partial(named_parameters, inner, self))
        sample_size, logging_output = results[0]
        logging_output.update(log_entries(statistics, optimizer.settings, rho, sample_size))
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the base criterion's scalars, and in training δ-SAM's."""
        own = [{key: log[key] for key in log if key not in ENTRIES} for log in logging_outputs]
        super().reduce_metrics(own)  # without ours, because wav2vec logs every entry
        log_scalars(logging_outputs)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its distributed wrappers, which are not fairseq models."""
    while "module" in model._modules and not isinstance(model, BaseFairseqModel):
        model = model.module  # type: ignore[assignment]
    return model


def sharpness_aware(base: type[FairseqCriterion]) -> type[SharpnessAwareCriterion]:
    """A subclass of the base criterion with a sharpness-aware gradient.

    It keeps the base's name, which fairseq compares with the one in a checkpoint.
    """
    return type(base.__name__, (SharpnessAwareCriterion, base), {"__module__": __name__, "__doc__": base.__doc__})


@register_criterion(NAME, dataclass=DeltaSAMCriterionConfig)
class FairseqDeltaSAMCriterion(FairseqCriterion):
    """The entry in fairseq's registry. :meth:`build_criterion` returns the sharpness-aware base criterion."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the options of all base criterions to a command line."""
        OPTIONS.add_args(parser)

    @classmethod
    def build_criterion(cls, cfg: DictConfig, task: Any) -> SharpnessAwareCriterion:
        """Build the base criterion for `task`.

        Raises:
            ValueError: the base does not exist or has no per-sample losses, or the optimizer is not δ-SAM's.
        """
        with one_message():
            refuse_unsupported(cfg._get_root())
            name, base, base_cfg = OPTIONS.base_config(cfg)
            losses = per_sample_losses_of(name)
        criterion: Any = sharpness_aware(base).build_criterion(base_cfg, task)
        criterion._per_sample_losses = losses
        criterion._base_name = name
        return criterion
