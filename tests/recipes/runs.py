"""A recipe as a base run, and under δ-SAM by the change of two words that README shows."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tests.helpers.runs import USER_DIR
from tests.recipes.commands import EXAMPLES, drop
from tests.recipes.recipe import Recipe
from tests.recipes.worker import command

UPDATES, STOP = 3, 2
HERE = ["--cpu", "--num-workers", 0, "--data-buffer-size", 0, "--batch-size", 8, "--log-format", "json"]
HERE += ["--log-interval", 1, "--max-update", UPDATES, "--save-interval-updates", STOP, "--keep-interval-updates", -1]
HERE += ["--seed", 3]
HERE_HYDRA = {"common.cpu": True, "common.seed": 3, "common.log_interval": 1, "common.fp16": False}
HERE_HYDRA |= {"dataset.num_workers": 0, "dataset.data_buffer_size": 0, "dataset.batch_size": 8}
HERE_HYDRA |= {"optimization.max_update": UPDATES, "optimization.update_freq": [2]}
HERE_HYDRA |= {"checkpoint.save_interval_updates": STOP, "checkpoint.keep_interval_updates": -1}
HERE_HYDRA |= {"distributed_training.distributed_world_size": 1}
RESETS = ["--restore-file", "--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
SHORTER = {"--warmup-updates": 1, "--update-freq": 2}  # where the recipe has them


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
        folder: of its checkpoints, its TensorBoard files and its log.
        code: 0, unless it failed.
        printed: its log.
    """

    folder: Path
    code: int
    printed: str

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The last one."""
        assert self.code == 0, self.error
        checkpoint = dict(torch.load(self.folder / "checkpoint_last.pt"))
        # Of dynamic convolutions: never used and never initialised, so that no two runs start from the same.
        checkpoint["model"] = {k: v for k, v in checkpoint["model"].items() if not k.endswith(".conv_bias")}
        return checkpoint

    @property
    def error(self) -> str:
        """The message that ended it."""
        return message(self.printed)


def message(printed: str) -> str:
    """The message that ended a command: what follows the last frame of a traceback."""
    lines = printed.rstrip().splitlines()
    last = max((index for index, line in enumerate(lines) if line.startswith('  File "')), default=-1)
    return "\n".join(dropwhile(lambda line: line.startswith("  "), lines[last + 1 :]))


def two_words(options: list[str], rho: float, mode: str) -> list[str]:
    """The command with another optimizer and another criterion, of which the former ones are the base."""
    changed: list[str] = []
    for word in options:
        changed += (
            [word] if word not in ("--optimizer", "--criterion") else [word, "delta_sam", word.replace("--", "--base-")]
        )
    changed += [] if "--criterion" in options else ["--criterion", "delta_sam"]
    return [*changed, "--sam-rho", str(rho), "--sam-perturbation", mode]


def train(recipe: Recipe, data: Path, folder: Path, rho: float | None = None, mode: str = "batch") -> Finished:
    """Run the recipe.

    Args:
        recipe: which.
        data: its data folder.
        folder: for checkpoints; what is there already is resumed.
        rho: the radius; None is the base run.
        mode: of the perturbation.
    """
    options = overrides(recipe, data, folder, rho, mode) if recipe.hydra else typed(recipe, data, folder, rho, mode)
    code, printed = command("hydra_train" if recipe.hydra else "train", options, folder / "log")
    return Finished(folder, code, printed)


def typed(recipe: Recipe, data: Path, folder: Path, rho: float | None, mode: str) -> list[str]:
    """The command line of fairseq-train."""
    options = recipe.flags(data)
    if (folder / "checkpoint_last.pt").exists():
        options = drop(options, *RESETS)
    options += map(str, HERE)
    for name, value in SHORTER.items():
        options += [name, str(value)] if name in options else []
    options = ["--user-dir", str(user_directory(options, data.parent)), *drop(options, "--user-dir")]
    if rho is not None:
        options = two_words(options, rho, mode)
    return [str(data), *options, "--save-dir", str(folder), "--tensorboard-logdir", str(folder / "logs")]


def overrides(recipe: Recipe, data: Path, folder: Path, rho: float | None, mode: str) -> list[str]:
    """The command line of fairseq-hydra-train: Hydra's overrides of the YAML file."""
    path = EXAMPLES.parent / recipe.source
    yaml = OmegaConf.load(path)
    changed = [f"++{name}={value}" for name, value in HERE_HYDRA.items()]
    changed += [f"++{override}" for override in recipe.flags(data) if not override.startswith("hydra.")]
    changed += [override for override in recipe.flags(data) if override.startswith("hydra.")]
    changed += [f"++task.data={data}", f"++checkpoint.save_dir={folder}", f"hydra.run.dir={folder / 'hydra'}"]
    changed += [f"++common.user_dir={USER_DIR}"]  # the base run too: torch >= 2.6 reads no checkpoint without it
    changed += [f"++common.tensorboard_logdir={folder / 'logs'}"]
    changed += ["lr_scheduler.warmup_updates=1"] if "warmup_updates" in yaml.lr_scheduler else []
    if (folder / "checkpoint_last.pt").exists():
        changed = [override for override in changed if "restore_file" not in override]
        changed += [f"++checkpoint.{name}=false" for name in ("reset_optimizer", "reset_dataloader", "reset_meters")]
        changed += ["++checkpoint.restore_file=checkpoint_last.pt"]
    if rho is not None:
        criterion = yaml.criterion if isinstance(yaml.criterion, str) else yaml.criterion._name
        referred = ""
        if criterion == "sentence_prediction":  # its task refers to both before the plugin is there
            target = str(yaml.criterion.get("regression_target", False)).lower()
            referred = f",classification_head_name:sentence_classification_head,regression_target:{target}"
        changed += [f"+criterion={{_name:delta_sam,base_criterion:{criterion}{referred}}}"]
        changed += [f"+optimizer={{_name:delta_sam,base_optimizer:{yaml.optimizer._name}}}"]
        changed += [f"+optimizer.sam_rho={rho}", f"+optimizer.sam_perturbation={mode}"]
    return ["--config-dir", str(path.parent), "--config-name", path.stem, *changed]


def user_directory(options: list[str], root: Path) -> Path:
    """The plugin, or a copy of the recipe's own user directory whose last line imports the plugin."""
    if "--user-dir" not in options:
        return USER_DIR
    original = EXAMPLES / options[options.index("--user-dir") + 1].rpartition("examples/")[2]
    copied = root / "user_dir" / original.name
    if not copied.exists():
        shutil.copytree(original, copied)
        with (copied / "__init__.py").open("a") as file:
            file.write("\nimport deltasam_plugin\n")
    return copied
