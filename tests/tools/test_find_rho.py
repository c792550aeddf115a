"""The range test for ρ: what it measures, what it suggests, and that it touches nothing of the user's."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deltasam_plugin import find_rho
from deltasam_plugin.tools.range_test import RELATIVE_SHARPNESS, Point, radius_at, suggestion
from tests.helpers.runs import HALF, INSTANCE, TRANSLATION, USER_DIR, base, delta, distance, fairseq_train, scalars
from tests.tools.test_sharpness import LSTM, rows

SHARED: list[object] = ["--cpu", "--seed", 3, "--lr", 0.01, "--batch-size", 16, "--num-workers", 0]
SHARED += ["--data-buffer-size", 0, "--dropout", 0.3]
GRID: list[object] = ["--updates", 3, "--batches", 1, "--grid", 0.02, 0.2]


def arguments(data: Path, *options: object, own: list[object] | None = None) -> list[str]:
    """Of the program, for a command with these options."""
    return [str(word) for word in [*(GRID if own is None else own), "--", "fairseq-train", data, *SHARED, *options]]


def cells(output: str) -> list[list[float]]:
    """The numbers of the table."""
    return [[float(cell.strip("%")) / (100 if "%" in cell else 1) for cell in row] for row in rows(output)[1:]]


@pytest.mark.parametrize("mode", ["batch", "instance"])
def test_numbers_are_those_of_training(
    translation_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    """What fairseq-train logs and does in the fourth update, after three of the base optimizer."""
    task: list[object] = [*TRANSLATION, "--label-smoothing", 0.1, "--lr", 0.5]
    find_rho.main(arguments(translation_data, *task, *base(optimizer="sgd")))
    _, *measured = cells(capsys.readouterr().out)
    first = 1 if mode == "batch" else 4

    def train(folder: str, *options: object, updates: int) -> dict[str, Any]:
        return fairseq_train(translation_data, tmp_path / folder, *SHARED, *task, *options, updates=updates)

    third = train("base", *base(optimizer="sgd"), updates=3)
    shutil.copytree(tmp_path / "base", tmp_path / "third")
    fourth = train("base", *base(optimizer="sgd"), updates=4)
    for rho, *row in measured:
        relative, loss, change = row[first - 1 : first + 2]
        shutil.copytree(tmp_path / "third", tmp_path / f"{rho}")
        options = ["--sam-perturbation", mode, "--tensorboard-logdir", tmp_path / f"{rho}"]
        other = train(f"{rho}", *delta(optimizer="sgd", rho=rho), *options, updates=4)
        logged = scalars(tmp_path / f"{rho}", "loss", "sam_sharpness")
        assert loss == pytest.approx(logged["loss"][-1] + logged["sam_sharpness"][-1], abs=2e-3)
        assert relative == pytest.approx(logged["sam_sharpness"][-1] / logged["loss"][-1], abs=2e-3)
        assert change == pytest.approx(distance(other, fourth) / distance(fourth, third), rel=1e-2)


def test_base_command_and_sharpness_aware_command(translation_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two words make no difference, nor do the schedule and the radius that a command has."""
    find_rho.main(arguments(translation_data, *TRANSLATION, *base()))
    first = capsys.readouterr().out
    given: list[object] = [*delta(rho=0.3), "--sam-interval", 7, "--sam-warmup-updates", 100, *INSTANCE]
    find_rho.main(arguments(translation_data, *TRANSLATION, *given, "--user-dir", USER_DIR, "--sam-loss-budget", 1e-3))
    assert capsys.readouterr().out == first
    table = cells(first)
    assert [row[0] for row in table] == [0, 0.02, 0.2]
    assert table[0][1:] == [0, table[0][2], 0, 0, table[0][2], 0]
    for column in range(1, 7):  # all of it grows with the radius
        assert table[0][column] < table[1][column] < table[2][column]
    assert "After 3 updates, on 1 batches." in first
    assert first.splitlines()[-1].endswith("This is a suggestion, not a promise.")


@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize("precision", [HALF, ["--amp"]], ids=["fp16", "amp"])
def test_half_precision(translation_data: Path, capsys: pytest.CaptureFixture[str], precision: list[object]) -> None:
    """The table is that of single precision, up to rounding."""
    find_rho.main(arguments(translation_data, *TRANSLATION, *base()))
    expected = cells(capsys.readouterr().out)
    find_rho.main(arguments(translation_data, *TRANSLATION, *base(), *precision))
    for row, single in zip(cells(capsys.readouterr().out), expected, strict=True):
        assert row == pytest.approx(single, rel=0.2, abs=0.01)


def test_gradient_change(translation_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With batches of one sentence both modes are SAM."""
    find_rho.main(arguments(translation_data, *TRANSLATION, *base(), "--batch-size", 1, "--sam-weighting", "uniform"))
    for _, *row in cells(capsys.readouterr().out):
        assert row[:3] == pytest.approx(row[3:], rel=2e-3, abs=1e-3)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below a folder."""
    every = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in every}


def test_nothing_is_touched(translation_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the folders that the command writes to, and not those of a run that it continues."""
    folders: list[object] = ["--save-dir", tmp_path / "run", "--tensorboard-logdir", tmp_path / "events"]
    folders += ["--log-file", tmp_path / "log"]
    find_rho.main(arguments(translation_data, *TRANSLATION, *base(), *folders))
    assert "After 3 updates" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    fairseq_train(translation_data, tmp_path / "run", *SHARED, *TRANSLATION, *base(), *folders[2:4])
    capsys.readouterr()
    before = files(tmp_path)
    assert before
    find_rho.main(arguments(translation_data, *TRANSLATION, *base(), *folders))
    assert "After 9 updates" in capsys.readouterr().out  # 6 in the checkpoint and 3 more
    assert files(tmp_path) == before


def test_a_crash_writes_nothing(translation_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fairseq's trainer saves crash.pt when gradients are not finite."""
    options = [*TRANSLATION, *base(optimizer="sgd"), "--lr", 1e38, "--save-dir", tmp_path]
    with pytest.raises(SystemExit) as error:
        find_rho.main(arguments(translation_data, *options))
    assert error.value.code == 2
    assert "deltasam-find-rho: error: fairseq-train fails on this command: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_are_left_alone(
    translation_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters after the measurement are those before it: every mode and radius measures at the same."""
    seen = []

    def measure(trainer, *rest):
        before = [p.detach().clone() for p in trainer.model.parameters()]
        found = original(trainer, *rest)
        seen.append(all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before)))
        seen.append(all(p.grad is None for p in trainer.model.parameters()))
        return found

    original = find_rho.measure
    monkeypatch.setattr(find_rho, "measure", measure)
    find_rho.main(arguments(translation_data, *TRANSLATION, *base()))
    assert seen == [True] * 4


def test_accumulation_and_the_end_of_the_data(translation_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """160 sentences: the fourth update of 64 begins a new epoch."""
    own: list[object] = ["--updates", 4, "--batches", 5, "--grid", 0.1]
    find_rho.main(arguments(translation_data, *TRANSLATION, *base(), "--update-freq", 4, own=own))
    assert "After 4 updates, on 5 batches." in capsys.readouterr().out


def test_instance_mode_is_left_out(translation_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it does not cover the model, or the options exclude it."""
    noise = [*delta(), "--sam-weighting", "uniform", "--sam-ascent", "noise"]
    for options, reason in (
        ([*LSTM, *base()], "Instance mode does not cover "),
        ([*TRANSLATION, *base(), "--quant-noise-pq", 0.1], "Invalid quant_noise_pq=0.1 (--quant-noise-pq) with "),
        ([*TRANSLATION, *noise], "Invalid ascent='noise' (--sam-ascent)"),
    ):
        find_rho.main(arguments(translation_data, *options))
        output, messages = capsys.readouterr()
        (line,) = [line for line in re.split(r"[\r\n]+", messages) if "left out" in line]
        assert line.strip().startswith(f"instance is left out. {reason}")
        assert [len(row) for row in rows(output)] == [4] * 4
        assert "instance" not in output


def points(*relative: float) -> list[Point]:
    return [Point(0, 0, 1, 0), *(Point(0.1 * (i + 1), value, 1 + value, 0) for i, value in enumerate(relative))]


def test_suggestions() -> None:
    least, greatest = RELATIVE_SHARPNESS
    steps = points(least / 2, 2 * greatest)
    assert radius_at(steps, least / 2) == pytest.approx(0.1)
    slope = 0.1 / (2 * greatest - least / 2)
    low, high = 0.1 + slope * least / 2, 0.1 + slope * (greatest - least / 2)
    assert suggestion(steps, "batch") == f"batch: --sam-perturbation batch --sam-rho {low:.2g} to {high:.2g}"
    assert suggestion(points(least / 4, least / 2), "batch") == (
        "batch: every ρ of the grid is too small. Try larger ones than 0.2 (--grid)."
    )
    assert suggestion(points(2 * greatest, 3 * greatest), "batch") == (
        "batch: every ρ of the grid is too large. Try smaller ones than 0.1 (--grid)."
    )
    inside = (least + greatest) / 2
    assert suggestion(points(inside, math.inf), "batch").endswith(f"--sam-rho {0.1 * least / inside:.2g} to 0.1")
    assert suggestion(points(-0.1, inside), "batch").startswith("batch: --sam-perturbation batch --sam-rho 0.1")
    for lost in (math.nan, math.inf):
        assert suggestion(points(lost, lost), "batch") == (
            "batch: every ρ of the grid is too large. Try smaller ones than 0.1 (--grid)."
        )
        assert suggestion(points(least / 2, lost), "batch") == (
            "batch: 0.1 is too small, and at 0.2 the loss is not finite. Try values between (--grid)."
        )
        ends = suggestion(points(inside, lost, lost), "batch")
        assert ends.endswith(f"--sam-rho {0.1 * least / inside:.2g} to 0.1")
    assert "not finite at ρ = 0" in suggestion([Point(0, 0, math.nan, 0), *points(inside)[1:]], "batch")


def test_groups_of_samples_are_measured_as_the_command_has_them(
    translation_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch mode knows no groups, and is measured first."""
    command = arguments(translation_data, *TRANSLATION, *delta(), *INSTANCE, "--sam-group", 4, "--user-dir", USER_DIR)
    found = []
    for modes in (("batch", "instance"), ("instance",)):
        monkeypatch.setattr(find_rho, "MODES", modes)
        find_rho.main(command)
        found.append([row[-3:] for row in cells(capsys.readouterr().out)])
    assert found[0] == found[1]


def test_a_radius_that_is_given_twice_is_measured_once(
    translation_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for grid in ([0.02, 0.02, 0.2], [0.02, 0.2]):
        own = ["--updates", 3, "--batches", 1, "--grid", *grid]
        find_rho.main(arguments(translation_data, *TRANSLATION, *base(), own=own))
        found.append(cells(capsys.readouterr().out))
    assert found[0] == found[1]


COMMANDS: dict[str, tuple[list[object], str]] = {
    "nothing": ([], "No fairseq-train command after --. Give the whole command: -- fairseq-train DATA --arch …"),
    "no options": (["--", "fairseq-train"], "No fairseq-train command after --."),
    "another program": (["--", "python", "train.py"], "No fairseq-train command after --."),
    "hydra": (["--", "fairseq-hydra-train", "--config-dir", "x"], "Commands of fairseq-hydra-train are not read here."),
    "no data": (["--", "fairseq-train", "nowhere", *SHARED, *TRANSLATION, *base()], "fairseq-train cannot run this"),
    "no optimizer": (["--", "fairseq-train", "DATA", *SHARED, *TRANSLATION], "fairseq-train: give --optimizer."),
    "unknown option": (
        ["--", "fairseq-train", "DATA", *SHARED, *TRANSLATION, *base(), "--drop-out", 1],
        "fairseq-train: unrecognized arguments: --drop-out 1",
    ),
    "no batch size": (
        ["--", "fairseq-train", "DATA", *TRANSLATION, *base(), "--cpu"],
        "fairseq-train: give the size of a batch, --max-tokens or --batch-size.",
    ),
    "workers": (
        ["--", "fairseq-train", "DATA", *SHARED, *TRANSLATION, *base(), "--distributed-world-size", 2],
        "This command trains in 2 processes (--distributed-world-size), and the range test runs in one.",
    ),
    "criterion": (
        ["--", "fairseq-train", "DATA", *SHARED, *TRANSLATION, *base("tacotron2")],
        "Criterion 'tacotron2' (--base-criterion) gives no per-sample losses: ",
    ),
    "torn checkpoint": (
        ["--", "fairseq-train", "DATA", *SHARED, *TRANSLATION, *base(), "--restore-file", "TORN"],
        "fairseq-train cannot run this command: ",
    ),
    "grid": (["--grid", 0, "--", "fairseq-train", "DATA"], "argument --grid: '0' is no radius."),
    "updates": (["--updates", "x", "--", "fairseq-train", "DATA"], "argument --updates: 'x' is no count."),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_input_gets_one_line(
    translation_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    command, message = COMMANDS[case]
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    names = {"DATA": translation_data, "TORN": tmp_path / "torn.pt"}
    with pytest.raises(SystemExit) as error:
        find_rho.main([str(names.get(word, word)) if isinstance(word, str) else str(word) for word in command])
    assert error.value.code == 2
    output, messages = capsys.readouterr()
    assert not output
    (line,) = messages.splitlines()
    assert line.startswith(f"deltasam-find-rho: error: {message}")
