"""Hypothesis profiles, and small real data in fairseq's binary format. The data is made once per session."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq_cli import preprocess
from hypothesis import settings

from tests.helpers.runs import run, write_labels, write_translation

torch.set_num_threads(1)  # a second thread slows small models down, above all on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def translation_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy translation corpus."""
    root = tmp_path_factory.mktemp("translation")
    write_translation(root / "train", 160, seed=0)
    write_translation(root / "valid", 24, seed=1)
    pairs = ["--trainpref", root / "train", "--validpref", root / "valid", "--testpref", root / "valid"]
    run(preprocess.cli_main, "--source-lang", "src", "--target-lang", "tgt", *pairs, "--destdir", root / "bin")
    return root / "bin"


@pytest.fixture(scope="session")
def sentence_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A toy corpus of sentences by kind of label: ``class`` or ``score``."""
    root = tmp_path_factory.mktemp("sentences")
    write_labels(root / "train", 120, seed=2)
    write_labels(root / "valid", 24, seed=3)
    made = {}
    for kind in ("class", "score"):
        made[kind] = root / kind
        for part, suffix in {"input0": "txt", "label": kind}.items():
            for split in ("train", "valid"):
                link = root / f"{kind}.{part}.{split}"
                link.write_text((root / f"{split}.{suffix}").read_text())
            if kind == "score" and part == "label":
                (made[kind] / "label").mkdir(parents=True)
                for split in ("train", "valid"):
                    (made[kind] / "label" / f"{split}.label").write_text((root / f"{kind}.{part}.{split}").read_text())
                continue
            texts = ["--trainpref", root / f"{kind}.{part}.train", "--validpref", root / f"{kind}.{part}.valid"]
            run(preprocess.cli_main, "--only-source", *texts, "--destdir", made[kind] / part)
    return made


@pytest.fixture
def cuda_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq asks for CUDA even on a CPU (overflow, flat gradients, --amp). Here it gets the CPU."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", partial(torch.amp.GradScaler, "cpu"))
    monkeypatch.setattr(torch.cuda.amp, "autocast", partial(torch.autocast, "cpu", dtype=torch.bfloat16))


@pytest.fixture
def reproducible_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq's audio models draw their masks from generators without a seed: not even base runs can be repeated."""
    fresh = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: fresh(7 if seed is None else seed))
