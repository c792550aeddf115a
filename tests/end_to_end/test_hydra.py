"""fairseq-hydra-train with our YAML and with files of fairseq."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fairseq
import pytest
import torch
from omegaconf import OmegaConf

from tests.end_to_end.test_criterions import CRITERION, LOSSES, user_directory
from tests.helpers.corpora import corpus
from tests.helpers.runs import USER_DIR, distance

EXAMPLE = USER_DIR.parent / "examples" / "hydra"


def hydra_train(
    config_dir: Path, folder: Path, *overrides: str, name: str = "translation"
) -> tuple[dict[str, Any], str]:
    """The last checkpoint of a run, and all that it printed and logged."""
    folder.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).parent / "fairseq-hydra-train"), "--config-dir", str(config_dir)]
    command += ["--config-name", name, f"checkpoint.save_dir={folder / 'saved'}", *overrides]
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    printed = finished.stdout + finished.stderr
    assert finished.returncode == 0, printed[-6000:]
    logs = "".join(path.read_text() for path in folder.rglob("*.log"))
    return torch.load(folder / "saved" / "checkpoint_last.pt"), printed + logs


def test_the_examples_yaml(translation_data: Path, tmp_path: Path) -> None:
    overrides = [f"task.data={translation_data}", f"common.user_dir={USER_DIR}", "common.cpu=true"]
    overrides += ["optimization.max_update=3", "dataset.max_tokens=300", "optimizer.sam_rho=0.02"]
    overrides += ["criterion.label_smoothing=0.2", "dataset.num_workers=0"]
    saved, output = hydra_train(EXAMPLE, tmp_path, *overrides)
    assert saved["cfg"]["optimizer"]["base_optimizer"] == "adam"
    assert saved["cfg"]["optimizer"]["sam_rho"] == 0.02
    assert "rho=0.02, perturbation=batch, weighting=curvature, probes=1, parameters=^(?!.*embed_tokens)" in output
    assert "warmup_updates=1000" in output
    assert saved["cfg"]["criterion"]["label_smoothing"] == 0.2
    assert tuple(saved["last_optimizer_state"]["param_groups"][0]["betas"]) == (0.9, 0.98)
    assert "sam_sharpness" in output


# Every option that a YAML or an override can give, in two runs: some belong to instance mode, some to batch mode.
CHOICES = {
    "batch": {
        "weighting": "uniform",
        "ascent": "noise",
        "descent": "weighted",
        "descent_weight": 2.0,
        "adaptive": True,
    },
    "instance": {"perturbation": "instance", "group": 4, "loss_budget": 0.1, "interval": 2, "rho_schedule": "lr"},
}


@pytest.mark.parametrize("mode", CHOICES)
def test_options_by_overrides(translation_data: Path, tmp_path: Path, mode: str) -> None:
    overrides = [f"task.data={translation_data}", f"common.user_dir={USER_DIR}", "common.cpu=true"]
    overrides += ["optimization.max_update=2", "dataset.max_tokens=300", "dataset.num_workers=0"]
    overrides += [f"+optimizer.sam_{name}={value}" for name, value in CHOICES[mode].items()]
    overrides += ["~optimizer.sam_parameters", "+model.encoder_embed_dim=32", "+model.decoder_embed_dim=32"]
    saved, output = hydra_train(EXAMPLE, tmp_path, *overrides)
    for name, value in CHOICES[mode].items():
        assert saved["cfg"]["optimizer"][f"sam_{name}"] == value
        assert f"{name}={value}" in output


def test_a_composite_base_optimizer(translation_data: Path, tmp_path: Path) -> None:
    """It exists in YAML only. Radius zero is its own run, another radius is not."""
    group = {
        "lr_float": 0.01,
        "optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)"},
        "lr_scheduler": {"_name": "fixed", "warmup_updates": 0},
    }
    base = {"optimizer": {"_name": "composite", "groups": {"default": group}}, "criterion": {"_name": "cross_entropy"}}

    def delta(rho: float) -> dict[str, Any]:
        optimizer = {**base["optimizer"], "_name": "delta_sam", "base_optimizer": "composite", "sam_rho": rho}
        return {"optimizer": optimizer, "criterion": {"_name": "delta_sam", "base_criterion": "cross_entropy"}}

    finals = []
    for name, changed in {"base": base, "zero": delta(0.0), "delta": delta(0.05)}.items():
        config = {
            "common": {"cpu": True, "seed": 1, "user_dir": str(USER_DIR)},
            "task": {"_name": "translation", "data": str(translation_data)},
            "dataset": {"batch_size": 16, "num_workers": 0, "disable_validation": True},
            "optimization": {"lr": [0.01], "max_update": 3},
            "lr_scheduler": {"_name": "pass_through"},
            "model": {"_name": "transformer_tiny", "dropout": 0.3, "base_layers": 0},
        }
        (tmp_path / name).mkdir()
        OmegaConf.save(OmegaConf.create({**config, **changed}), tmp_path / name / "translation.yaml")
        finals.append(hydra_train(tmp_path / name, tmp_path / name)[0])
    assert distance(finals[0], finals[1]) == 0
    assert distance(finals[0], finals[2]) > 0


@pytest.mark.slow
def test_a_user_directory_that_imports_the_plugin_last(translation_data: Path, tmp_path: Path) -> None:
    """The options of its criterion are options of δ-SAM too."""
    mine = user_directory(tmp_path / "mine", {"__init__.py": CRITERION + LOSSES})
    overrides = [f"task.data={translation_data}", f"common.user_dir={mine}", "common.cpu=true"]
    overrides += ["optimization.max_update=2", "dataset.max_tokens=300", "dataset.num_workers=0"]
    overrides += [
        "criterion.base_criterion=my_criterion",
        "~criterion.label_smoothing",
        "+criterion.my_temperature=1.5",
    ]
    saved, output = hydra_train(EXAMPLE, tmp_path / "run", *overrides)
    assert saved["cfg"]["criterion"]["my_temperature"] == 1.5
    assert "sam_sharpness" in output


CONFIG = Path(fairseq.__file__).parent / "examples" / "roberta" / "config"
SMALL = ["optimization.max_update=2", "common.fp16=false", "common.cpu=true", "dataset.num_workers=0"]
SMALL += ["dataset.disable_validation=true", "+model.encoder_layers=1", "+model.encoder_embed_dim=32"]
SMALL += ["+model.encoder_ffn_embed_dim=32", "+model.encoder_attention_heads=2", f"common.user_dir={USER_DIR}"]
OPTIMIZER = ["optimizer._name=delta_sam", "+optimizer.base_optimizer=adam"]
SENTENCES = ["criterion._name=delta_sam", "+criterion.base_criterion=sentence_prediction"]
# The task refers to two options of the criterion before fairseq imports the plugin.
SENTENCES += ["+criterion.classification_head_name=sentence_classification_head"]
CLASSES = "+criterion.regression_target=false"
GLUE = [path.stem for path in sorted((CONFIG / "finetuning").glob("*.yaml"))]
QUICK = ("rte", "sts_b")  # one file with classes, and the only one with scores


@pytest.fixture
def glue(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The overrides for small data and a small model, for one of the files in ``finetuning``."""

    def overrides(name: str) -> list[str]:
        data = corpus("scores" if name == "sts_b" else "sentences", tmp_path_factory.getbasetemp())
        sizes = ["task.num_classes=3"] if name == "sts_b" else []
        return [*SMALL, *sizes, f"task.data={data}", "checkpoint.restore_file=none.pt"]

    return overrides


def test_a_glue_file_at_radius_zero_is_the_base_run(glue: Callable[[str], list[str]], tmp_path: Path) -> None:
    base, _ = hydra_train(CONFIG / "finetuning", tmp_path / "base", *glue("rte"), name="rte")
    changed = [*glue("rte"), *OPTIMIZER, *SENTENCES, CLASSES, "+optimizer.sam_rho=0"]
    zero, _ = hydra_train(CONFIG / "finetuning", tmp_path / "zero", *changed, name="rte")
    assert distance(base, zero) == 0


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in GLUE])
def test_the_glue_files_by_overrides(glue: Callable[[str], list[str]], tmp_path: Path, name: str) -> None:
    changed = [*OPTIMIZER, *SENTENCES, *([] if name == "sts_b" else [CLASSES])]
    saved, output = hydra_train(CONFIG / "finetuning", tmp_path, *glue(name), *changed, name=name)
    assert "sam_sharpness" in output
    assert saved["cfg"]["optimizer"]["weight_decay"] == 0.1
    assert saved["cfg"]["criterion"]["regression_target"] == (name == "sts_b")


def test_a_glue_file_edited(glue: Callable[[str], list[str]], tmp_path: Path) -> None:
    config = OmegaConf.load(CONFIG / "finetuning" / "rte.yaml")
    config.optimizer.update({"_name": "delta_sam", "base_optimizer": "adam"})
    config.criterion.update({"_name": "delta_sam", "base_criterion": "sentence_prediction"})
    config.criterion.update({"regression_target": False, "classification_head_name": "sentence_classification_head"})
    OmegaConf.save(config, tmp_path / "mine.yaml")
    assert "sam_sharpness" in hydra_train(tmp_path, tmp_path / "run", *glue("rte"), name="mine")[1]


@pytest.mark.parametrize("edited", [False, True], ids=["overrides", "edited"])
def test_the_masked_language_model(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, edited: bool) -> None:
    """Its criterion is a string. The override puts a section in its place."""
    overrides = [*SMALL, f"task.data={corpus('text', tmp_path_factory.getbasetemp())}", "task.tokens_per_sample=64"]
    overrides += ["optimization.update_freq=[2]"]
    folder = CONFIG / "pretraining"
    if edited:
        folder = tmp_path
        config = OmegaConf.load(CONFIG / "pretraining" / "base.yaml")
        config.criterion = {"_name": "delta_sam", "base_criterion": "masked_lm"}
        config.optimizer.update({"_name": "delta_sam", "base_optimizer": "adam"})
        OmegaConf.save(config, tmp_path / "base.yaml")
    else:
        overrides += [*OPTIMIZER, "criterion={_name:delta_sam,base_criterion:masked_lm}"]
    saved, output = hydra_train(folder, tmp_path / "run", *overrides, name="base")
    assert "sam_sharpness" in output
    assert saved["cfg"]["optimizer"]["weight_decay"] == 0.01


def test_a_refusal_is_one_message(translation_data: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "fairseq-hydra-train"), "--config-dir", str(EXAMPLE)]
    command += ["--config-name", "translation", f"task.data={translation_data}", f"common.user_dir={USER_DIR}"]
    command += ["common.cpu=true", "optimizer.sam_rho=-1"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "\nInvalid rho=-1.0 (--sam-rho). Must be a finite number >= 0" in refused.stderr
    assert "Traceback" not in refused.stderr
