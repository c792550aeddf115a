"""The grid over ρ beside find_rho's suggestion: its runs, its file and its table, on toy data."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import radii
from benchmarks.radii import GRIDS, Radius
from benchmarks.tasks import TASKS


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sentence_data: dict[str, Path]) -> Path:
    """One task, two updates a run."""
    folder = tmp_path / "toy"
    shutil.copytree(sentence_data["class"], folder)
    task = replace(TASKS["sentiment"], data=lambda noise: folder, updates=2, work=tmp_path / "work")
    monkeypatch.setattr(radii, "TASKS", {"sentiment": task})
    monkeypatch.setattr(radii, "RESULTS", tmp_path / "radii.csv")
    return folder


def test_a_run_of_the_base_alone_and_of_each_mode(toy: Path) -> None:
    chosen = [Radius("sentiment", "batch", 0.0), *(Radius("sentiment", mode, grid[0]) for mode, grid in GRIDS.items())]
    for radius in chosen:
        assert radius in radii.radii()
        radii.run(radius)
    found = radii.results()
    assert list(found) == chosen
    assert [result["relative_sharpness"] is None for result in found.values()] == [True, False, False]
    assert all(0 <= result["valid"] <= 100 for result in found.values())
    printed = radii.report()
    assert "| adam" in printed
    assert "| instance | 0.005" in printed
    assert "This is a suggestion, not a promise." in printed
