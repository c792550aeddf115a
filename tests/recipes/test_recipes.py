"""fairseq's own recipes under δ-SAM, in both modes: they train, or are refused before the first update."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_invariants import logged
from tests.helpers.runs import USER_DIR, assert_same_model, distance, scalars
from tests.recipes.all_recipes import RECIPES, TRAINS, Recipe
from tests.recipes.data import data_of
from tests.recipes.runs import Finished, message, train, user_directory
from tests.recipes.worker import command

RHO = 0.05
CASES = [
    pytest.param(recipe, mode, id=f"{recipe.name} {mode}", marks=[pytest.mark.slow] if recipe.slow else [])
    for recipe in RECIPES.values()
    for mode in ("batch", "instance")
]


@pytest.fixture(scope="session")
def base_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe, Path], Finished]:
    """The base run of each recipe, run once."""
    done: dict[str, Finished] = {}

    def base_run(recipe: Recipe, data: Path) -> Finished:
        if recipe.name not in done:
            done[recipe.name] = train(recipe, data, tmp_path_factory.mktemp("base"))
        return done[recipe.name]

    return base_run


@pytest.mark.parametrize(("recipe", "mode"), CASES)
def test_recipe(
    recipe: Recipe,
    mode: str,
    base_runs: Callable[[Recipe, Path], Finished],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    data = data_of(recipe.data, tmp_path_factory.getbasetemp())
    if recipe.outcome(mode) != TRAINS:
        assert_refused(train(recipe, data, tmp_path / "delta", RHO, mode), recipe.outcome(mode))
        return
    base = base_runs(recipe, data)
    zero = train(recipe, data, tmp_path / "zero", 0, mode)
    assert_same_model(base.checkpoint, zero.checkpoint)
    assert logged(base.checkpoint) == logged(zero.checkpoint)
    delta = train(recipe, data, tmp_path / "delta", RHO, mode)
    assert distance(base.checkpoint, delta.checkpoint) > 0
    assert_logged(delta, mode, recipe.half)
    assert_resumes(recipe, data, base, delta, mode)
    assert_read(recipe, data, delta)


def assert_refused(run: Finished, pinned: str) -> None:
    """It ended with this message, before any update."""
    assert run.code != 0, f"trained, although it should have been refused: {pinned}"
    assert re.search(pinned, run.error), run.error
    assert '"num_updates"' not in run.printed
    assert not list(run.folder.glob("checkpoint*.pt"))


def assert_logged(run: Finished, mode: str, half: bool) -> None:
    """Every update has its scalars in TensorBoard."""
    names = ["sam_sharpness", "sam_ascent_gnorm", *(["sam_eps_norm"] if mode == "batch" else [])]
    values = scalars(run.folder / "logs", *names)
    assert {len(series) for series in values.values()} == {3}
    assert all(math.isfinite(value) and value != 0 for series in values.values() for value in series), values
    if mode == "batch":
        assert values["sam_eps_norm"] == pytest.approx([RHO] * 3, rel=0.2 if half else 0.01)


def assert_resumes(recipe: Recipe, data: Path, base: Finished, whole: Finished, mode: str) -> None:
    """Stopped and started again it is the uninterrupted run, wherever the base run is."""
    resumed = resume(recipe, data, whole, RHO, mode)
    if recipe.resumes:
        assert_same_model(whole.checkpoint, resumed.checkpoint)
        return
    assert resumed.checkpoint["optimizer_history"][-1]["num_updates"] == 3
    with pytest.raises(AssertionError):
        assert_same_model(base.checkpoint, resume(recipe, data, base).checkpoint)


def resume(recipe: Recipe, data: Path, whole: Finished, *options: Any) -> Finished:
    folder = whole.folder.with_name(whole.folder.name + "-resumed")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(whole.folder / "checkpoint_1_2.pt", folder / "checkpoint_last.pt")
    resumed = train(recipe, data, folder, *options)
    assert resumed.code == 0, resumed.error
    assert "Loaded checkpoint" in resumed.printed
    return resumed


def assert_read(recipe: Recipe, data: Path, run: Finished) -> None:
    """fairseq's own command reads the checkpoint and does its work."""
    if not recipe.then:
        return
    name, *options = shlex.split(recipe.then.replace("{data}", str(data)))
    own = user_directory(recipe.flags(data), data.parent) if not recipe.hydra else USER_DIR
    common = ["--path", str(run.folder / "checkpoint_last.pt"), "--cpu", "--user-dir", str(own), "--num-workers", "0"]
    code, printed = command(name, [str(data), *common, *options], run.folder / "read.log")
    assert code == 0, message(printed)
