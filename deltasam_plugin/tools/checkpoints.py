"""Any checkpoint of fairseq, ready to be measured: model, criterion and data as fairseq itself sets them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from torch import nn

from deltasam_plugin.fairseq.base_options import NAME
from deltasam_plugin.fairseq.criterions.registry import (
    PerSampleLosses,
    check,
    logits_of,
    objective_of,
    per_sample_losses_of,
    recorded_outputs,
)
from deltasam_plugin.fairseq.parameters import fast_path_copies, named_parameters
from deltasam_plugin.fairseq.refusals import option
from deltasam_plugin.loss import Objective
from deltasam_plugin.tools.console import BadInput, one_line, one_line_for


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its criterion, both in eval mode: without dropout.

    Attributes:
        task, model, criterion: fairseq's.
        criterion_name: in fairseq; of δ-SAM's criterion the base's.
        losses: the criterion's per-sample losses.
        config: fairseq's, as it was in training.
        device: where model and criterion are.
    """

    task: Any
    model: Any
    criterion: Any
    criterion_name: str
    losses: PerSampleLosses
    config: Any
    device: torch.device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What was trained, by name."""
        unused = {id(p) for module in (self.model, self.criterion) for p in fast_path_copies(module)}
        every = named_parameters(self.model, self.criterion)
        return {name: p for name, p in every if p.requires_grad and id(p) not in unused}

    def forward(self, sample: Any, with_logits: bool = False) -> tuple[Objective, int]:
        """One forward pass: the losses of a batch, and the size by which fairseq divides them."""
        with recorded_outputs(self.model, self.criterion_name) as outputs:
            loss, size, _ = self.criterion(self.model, sample)
        results = (self.criterion, self.model, sample, *outputs)
        logits = logits_of(self.criterion_name, *results) if with_logits else None
        return objective_of(loss, self.losses(*results), logits), int(size)

    def sample(self, dataset: Any, indices: Sequence[int]) -> Any:
        """A batch of these samples of a dataset, on the model's device."""
        sample = dataset.collater([dataset[index] for index in indices])
        if hasattr(self.task, "inject_noise"):  # translation_lev: what the model refines
            sample["prev_target"] = self.task.inject_noise(sample["target"])
        return utils.move_to_cuda(sample, self.device) if self.device.type == "cuda" else sample

    def check(self, sample: Any) -> None:
        """Check that the forward pass runs, and that per-sample losses add up to the criterion's own.

        Raises:
            BadInput: it does not, or they do not, without dropout.
        """
        with one_line_for(f"Cannot compute {self.criterion_name} without dropout"):
            check(self.criterion_name, self.forward(sample)[0], sample)

    def batches(self, split: str, max_tokens: int | None, max_sentences: int | None) -> tuple[Any, list[list[int]]]:
        """A part of the data, and the indices of its samples, by batches.

        Raises:
            BadInput: there is no such part, or nothing in it.
        """
        with one_line_for(f"Cannot read the part {split!r} of {self.config.task.data} (--gen-subset)"):
            self.task.load_dataset(split, combine=False, epoch=1)
            dataset = self.task.dataset(split)
            limits = utils.resolve_max_positions(self.task.max_positions(), self.model.max_positions())
            iterator = self.task.get_batch_iterator(
                dataset,
                max_tokens=max_tokens,
                max_sentences=max_sentences,
                max_positions=limits,
                ignore_invalid_inputs=True,
            )
            batches = [[int(index) for index in batch] for batch in iterator.frozen_batches]
        if not batches:
            raise BadInput(
                f"The part {split!r} of {self.config.task.data} has no samples that this model takes. Choose another: "
                "--gen-subset."
            )
        return dataset, batches


def load(path: Path, data: str, cpu: bool = False, seed: int | None = None) -> Checkpoint:
    """Load a checkpoint. The file is only read.

    Args:
        path: of the file.
        data: the folder of the data, in place of the one in the checkpoint.
        cpu: use no GPU, even if there is one.
        seed: of the order of the data, of masks and the like, in place of the one in the checkpoint.

    Raises:
        BadInput: it is no checkpoint, its data is not there, or its criterion gives no per-sample losses.
    """
    if not path.is_file():
        raise BadInput(f"No such file: {path} (--path).")
    overrides = {"data": data} if seed is None else {"data": data, "seed": seed}
    with one_line_for(f"{path} (--path) is no whole checkpoint of fairseq"):
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path), overrides)
        _check_components(state["cfg"], path)
    with one_line_for(f"Cannot set up the model of {path} on {data}"):
        (model,), config, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides, state=state)
        for layer in model.modules():
            if hasattr(layer, "BT_version"):  # fairseq 0.12.2's kernels for inference have no gradient
                layer.ever_training = True
        name = option(config, "criterion", "_name")
        name = config.criterion.base_criterion if name == NAME else name
    try:
        losses = per_sample_losses_of(name)
    except ValueError as error:
        raise BadInput(f"{path}: {one_line(error)}") from error
    with one_line_for(f"Cannot set up the criterion of {path}"):
        criterion = task.build_criterion(config.criterion)
        if state.get("criterion"):
            criterion.load_state_dict(state["criterion"])
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    return Checkpoint(task, model.eval().to(device), criterion.eval().to(device), name, losses, config, device)


def _check_components(config: Any, path: Path) -> None:
    """Refuse a checkpoint whose components are in a user-dir that was not imported.

    Raises:
        BadInput: fairseq does not know its task, model or criterion.
    """
    known = {"task": TASK_REGISTRY, "model": {**ARCH_MODEL_REGISTRY, **MODEL_REGISTRY}, "criterion": CRITERION_REGISTRY}
    folder = option(config, "common", "user_dir")
    trained = f" It was trained with --user-dir {folder}." if folder else ""
    for kind, registry in known.items():
        name = option(config, kind, "_name")
        if name not in registry:
            raise BadInput(
                f"{path} (--path): fairseq has no {kind} {name!r}.{trained} Name the folder that registers it, by "
                "--user-dir."
            )
