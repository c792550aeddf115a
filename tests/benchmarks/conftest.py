"""A task of the studies that is trained in a second."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tasks import TASKS, Task


@pytest.fixture
def toy_task(tmp_path: Path, sentence_data: dict[str, Path]) -> Task:
    """Sentiment on toy data, two updates a run; the test part is the validation part."""
    folder = tmp_path / "toy"
    shutil.copytree(sentence_data["class"], folder)
    for file in folder.glob("*/valid.*"):
        shutil.copy(file, file.with_name(file.name.replace("valid", "test")))
    return replace(TASKS["sentiment"], data=lambda noise: folder, updates=2, work=tmp_path / "work")
