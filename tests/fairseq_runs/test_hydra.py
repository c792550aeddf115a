"""fairseq-hydra-train with the YAML of the examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from runs import USER_DIR

EXAMPLE = USER_DIR.parent / "examples" / "hydra"


def test_the_examples_yaml(translation_data: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "fairseq-hydra-train"
    overrides = [f"task.data={translation_data}", f"common.user_dir={USER_DIR}", "common.cpu=true"]
    overrides += ["optimization.max_update=3", "dataset.max_tokens=300", "optimizer.sam_rho=0.02"]
    overrides += ["criterion.label_smoothing=0.2", f"checkpoint.save_dir={tmp_path / 'saved'}", "dataset.num_workers=0"]
    finished = subprocess.run(
        [str(program), "--config-dir", str(EXAMPLE), "--config-name", "translation", *overrides],
        cwd=tmp_path, env={**os.environ, "HYDRA_FULL_ERROR": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    saved = torch.load(tmp_path / "saved" / "checkpoint_last.pt")
    assert saved["cfg"]["optimizer"]["base_optimizer"] == "adam"
    assert saved["cfg"]["optimizer"]["sam_rho"] == 0.02
    assert saved["cfg"]["criterion"]["label_smoothing"] == 0.2
    assert tuple(saved["last_optimizer_state"]["param_groups"][0]["betas"]) == (0.9, 0.98)
    logs = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "sam_sharpness" in finished.stdout + finished.stderr + logs
