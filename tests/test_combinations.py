"""The tables of README that say which options are which method, and which of them combine."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from typing import Any

import pytest
import torch

from deltasam_plugin import DeltaSAM, Settings
from tests.test_choice import Net, losses_of
from tests.test_readme import README, rows


def settings_of(cell: str) -> dict[str, Any]:
    """The settings that options of a cell stand for."""
    words, settings = shlex.split(cell.strip("`")), {}
    while words:
        name = words.pop(0).removeprefix("--sam-").replace("-", "_")
        value = words.pop(0) if words and not words[0].startswith("--") else "True"
        kind = type(getattr(Settings, name)) if getattr(Settings, name) is not None else None
        number = float(value) if re.fullmatch(r"[\d.]+", value) else value
        settings[name] = value == "True" if kind is bool else int(value) if kind is int else number
    return settings


PAIRS = [
    (row, column, verdict)
    for line in rows(README, "with")
    for row in [line.pop("with")]
    for column, verdict in line.items()
    if verdict
]
ALONE = sorted({cell for row, column, _ in PAIRS for cell in (row, column)})
ALWAYS: dict[str, Any] = {
    "parameters": "norm|leave", "adaptive": True, "interval": 2, "warmup_updates": 3, "rho_schedule": "lr",
}  # fmt: skip
DETAILS = {"rho", "probes", "probe_scale", "descent_weight"}  # how much of what another option chooses


def of_cells(*cells: str) -> dict[str, Any]:
    """Settings with uniform weights, which a descent needs, unless a cell chooses others."""
    settings = {"weighting": "uniform"}
    for cell in cells:
        settings |= settings_of(cell)
    return settings if settings.get("group", 1) == 1 or len(cells) > 1 else {**settings, "perturbation": "instance"}


def final(settings: dict[str, Any] | None) -> list[torch.Tensor]:
    """The parameters after three steps, with a learning rate that falls. None is for the base optimizer."""
    torch.manual_seed(0)  # of probes
    model, base = Net(), {"lr": 0.1, "momentum": 0.9}
    optimizer: Any = torch.optim.SGD(model.parameters(), **base)
    if settings is not None:
        optimizer = DeltaSAM(model.named_parameters(), torch.optim.SGD, **{"rho": 0.3, **settings}, **base)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        if settings is None:
            optimizer.zero_grad()
            losses_of(model)().mean().backward()
            optimizer.step()
        else:
            optimizer.step(losses_of(model))
        scheduler.step()
    return list(model.parameters())


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_every_option_is_in_the_table_or_goes_with_all() -> None:
    named = {name for cell in ALONE for name in settings_of(cell)}
    assert named | ALWAYS.keys() | DETAILS == {item.name for item in fields(Settings)}


@pytest.mark.parametrize(("row", "column", "verdict"), PAIRS)
def test_a_pair_is_what_the_table_says(row: str, column: str, verdict: str) -> None:
    """Refused; or it has an effect beside the row's; or none."""
    settings = of_cells(row, column)
    if verdict == "–":
        with pytest.raises(ValueError, match=r"^Invalid .* with .*: .*, or leave it out\.$"):
            Settings(**settings)
        return
    assert verdict in ("✓", "(✓)")
    Settings(**settings)
    if "sync" not in settings:  # that is for several processes
        assert equal(final(settings), final(of_cells(row))) == (verdict == "(✓)")


@pytest.mark.parametrize("option", ALWAYS)
@pytest.mark.parametrize("cell", [cell for cell in ALONE if "sync" not in cell])
def test_what_is_not_in_the_table_goes_with_all(cell: str, option: str) -> None:
    settings = of_cells(cell)
    assert not equal(final({**settings, option: ALWAYS[option]}), final(settings))


@pytest.mark.parametrize("cell", [cell for cell in ALONE if "sync" not in cell])
def test_limits(cell: str) -> None:
    """Radius zero, a choice of all parameters, a budget that is never reached: bit for bit."""
    settings = of_cells(cell)
    assert equal(final({**settings, "rho": 0.0}), final(None))
    assert not equal(final(settings), final(None))
    assert equal(final({**settings, "parameters": ""}), final(settings))
    assert equal(final({**settings, "interval": 1, "warmup_updates": 0}), final(settings))
    if settings.get("ascent") != "momentum" and "loss_budget" not in settings:
        assert equal(final({**settings, "loss_budget": 1e9}), final(settings))


@pytest.mark.parametrize("row", rows(README, "method"), ids=lambda row: row["method"].split(",")[0])
def test_a_method_is_made_of_options_that_there_are(row: dict[str, str]) -> None:
    settings = {} if row["options"] == "none" else settings_of(row["options"])
    made = Settings(**settings)
    assert all(getattr(made, name) == value for name, value in settings.items())
    assert made != Settings() or not settings
