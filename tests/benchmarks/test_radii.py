"""The grid over ρ beside find_rho's suggestion: its runs, its file and its table, on toy data."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import radii
from benchmarks.radii import GRIDS, Radius
from benchmarks.tasks import Task


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_task: Task) -> None:
    """The grid on one toy task."""
    monkeypatch.setattr(radii, "TASKS", {"sentiment": toy_task})
    monkeypatch.setattr(radii, "RESULTS", tmp_path / "radii.csv")


@pytest.mark.usefixtures("toy")
def test_a_run_of_the_base_alone_and_of_each_mode() -> None:
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
