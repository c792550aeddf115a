"""Sharpness of checkpoints: the numbers are those of a loop in double precision; bad input ends with one line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_cli import preprocess
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from deltasam_plugin import sharpness
from deltasam_plugin.tools.checkpoints import load
from deltasam_plugin.tools.profile import SEED, half_share, measure
from tests.helpers.runs import SENTENCES, TRANSLATION, base, delta, fairseq_train, run

RADII = (0.02, 0.1)
LSTM: list[object] = ["--task", "translation", "--arch", "lstm", "--encoder-hidden-size", 16]
LSTM += [word for part in ("encoder-embed", "decoder-embed", "decoder-hidden", "decoder-out-embed")
         for word in (f"--{part}-{'size' if 'hidden' in part else 'dim'}", 16)]  # fmt: skip
RUNS: dict[str, list[object]] = {
    "base": [*TRANSLATION, *base("cross_entropy")],
    "delta": [*TRANSLATION, *delta("cross_entropy")],
    "lstm": [*LSTM, *base("cross_entropy")],
}


@pytest.fixture(scope="module")
def runs(translation_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of runs of fairseq-train."""
    root = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        fairseq_train(translation_data, root / name, *options, updates=12)
    return {name: root / name / "checkpoint_last.pt" for name in RUNS}


def rows(output: str) -> list[list[str]]:
    """The cells of the table that a program prints."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| -")]


def by_hand(path: Path, data: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss, and rises of the losses of all sentences: with autograd, one sentence at a time, in double precision."""
    checkpoint = load(path, str(data), cpu=True)
    model = checkpoint.model.double()
    dataset, _ = checkpoint.batches("valid", None, 24)
    parameters = [p for p in model.parameters() if p.requires_grad]
    originals = [p.detach().clone() for p in parameters]

    def losses(*indices: int) -> Tensor:
        sample = dataset.collater([dataset[index] for index in indices])
        logits, _ = model(**sample["net_input"])
        pad = dataset.tgt_dict.pad()
        order = sample["id"].argsort()
        return F.cross_entropy(logits.mT, sample["target"], ignore_index=pad, reduction="none").sum(1)[order]

    def moved(direction: list[Tensor], rho: float, value: Callable[[], Tensor]) -> Tensor:
        norm = sum(float(part.square().sum()) for part in direction) ** 0.5
        for parameter, part in zip(parameters, direction):
            parameter.data.add_(part, alpha=rho / norm)
        with torch.no_grad():
            found = value()
        for parameter, original in zip(parameters, originals):
            parameter.data.copy_(original)
        return found

    every = range(len(dataset))
    whole = lambda: losses(*every)  # noqa: E731
    before = whole().detach()
    gradient = list(torch.autograd.grad(whole().sum(), parameters))
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(p.shape, generator=generator).double() for p in parameters]
    own = [list(torch.autograd.grad(losses(index).sum(), parameters)) for index in every]
    found = {
        "random": [sum(moved([sign * u for u in drawn], rho, whole) for sign in (1, -1)) / 2 for rho in RADII],
        "batch": [moved(gradient, rho, whole) for rho in RADII],
        "per sample": [
            torch.cat([moved(own[index], rho, lambda index=index: losses(index)) for index in every]) for rho in RADII
        ],
    }
    tokens = sum(len(dataset[index]["target"]) for index in every)
    return float(before.sum()) / tokens / math.log(2), {k: torch.stack(v) - before for k, v in found.items()}


@pytest.mark.parametrize("run", RUNS)
def test_rises_are_those_of_a_loop(runs: dict[str, Path], translation_data: Path, run: str) -> None:
    loss, expected = by_hand(runs[run], translation_data)
    checkpoint = load(runs[run], str(translation_data), cpu=True)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    dataset, _ = checkpoint.batches("valid", None, 24)
    profile = measure(checkpoint, run, dataset, [list(range(24))], RADII, count=1)
    assert profile.loss == pytest.approx(loss, rel=1e-5)
    order = dataset.collater([dataset[index] for index in range(24)])["id"].argsort()
    for direction, rises in expected.items():
        found = profile.rises[direction].double()
        found = found if "per" in direction and run == "lstm" else found[:, order]
        torch.testing.assert_close(found, rises, rtol=2e-3, atol=2e-5)
    assert all(torch.equal(value, before[name]) for name, value in checkpoint.model.state_dict().items())


def test_program(
    runs: dict[str, Path], translation_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints a table of all checkpoints, draws it, and leaves the files alone."""
    before = {path: path.read_bytes() for run in runs.values() for path in run.parent.iterdir()}
    command = [translation_data, "--path", *runs.values(), "--radii", *RADII, "--batch-size", 24, "--directions", 1]
    sharpness.main([str(word) for word in [*command, "--plot", tmp_path / "figure.svg"]])
    output, messages = capsys.readouterr()
    _, *cells = rows(output)
    truth = {name: by_hand(path, translation_data) for name, path in runs.items()}
    tokens = sum(len(line.split()) + 1 for line in (translation_data.parent / "valid.tgt").open())
    assert [row[:2] for row in cells] == [[f"{rho:g}", name] for rho in RADII for name in RUNS]
    for rho, name, loss, *sharp, batch_share, sample_share in cells:
        expected_loss, expected = truth[name]
        assert float(loss) == pytest.approx(expected_loss, abs=1e-3)
        index = RADII.index(float(rho))
        for shown, rises in zip(sharp, expected.values()):
            assert float(shown) == pytest.approx(float(rises[index].sum()) / tokens / math.log(2), abs=2e-4)
        shares = [half_share(expected[direction][index]) for direction in ("batch", "per sample")]
        assert [batch_share, sample_share] == [f"{share:.0%}" for share in shares]
    assert "24 samples of valid" in output
    one_by_one = [line for line in messages.splitlines() if "measured one by one" in line]
    assert len(one_by_one) == 1
    assert "lstm: samples are measured one by one. Instance mode does not cover" in one_by_one[0]
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    assert {path: path.read_bytes() for run in runs.values() for path in run.parent.iterdir()} == before


def test_batches_are_spread_over_the_data(
    runs: dict[str, Path], translation_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [translation_data, "--path", runs["base"], "--radii", 0.1, "--batch-size", 6, "--directions", 1]
    losses = []
    for most in (2, 4, 100):
        sharpness.main([str(word) for word in [*command, "--max-batches", most]])
        output = capsys.readouterr().out
        losses.append(rows(output)[1][2])
        assert f"{min(6 * most, 24)} samples of valid" in output
    assert losses[0] != losses[1] == losses[2]


def test_checkpoints_of_different_seeds_are_measured_on_the_same_samples(
    sentence_data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed of a run shuffles the sentences of this task."""
    own = ["--classification-head-name", "head", "--num-classes", 2, "--seed", 3]
    data = sentence_data["class"]
    fairseq_train(data, tmp_path / "one", *SENTENCES, *base("sentence_prediction"), *own, updates=3)
    state = torch.load(tmp_path / "one" / "checkpoint_last.pt", weights_only=False)
    for part in ("common", "task"):
        state["cfg"][part]["seed"] = 4
    torch.save(state, tmp_path / "other.pt")
    paths = [tmp_path / "one" / "checkpoint_last.pt", tmp_path / "other.pt"]
    options = ["--batch-size", 4, "--max-batches", 2, "--radii", 0.05, "--cpu"]
    sharpness.main([str(word) for word in [data, "--path", *paths, *options]])
    _, first, second = rows(capsys.readouterr().out)
    assert first[2:] == second[2:]


@given(st.lists(st.floats(-1, 5), min_size=1, max_size=30))
def test_half_share(rises: list[float]) -> None:
    ordered = sorted(rises, reverse=True)
    share = half_share(torch.tensor(rises, dtype=torch.float64))
    if not sum(ordered) > 1e-9:
        assert math.isnan(share) or sum(ordered) > 0
        return
    count = round(share * len(rises))
    sums = [0.0, *accumulate(ordered)]
    assert sums[count] >= sums[-1] / 2 - 1e-9
    assert sums[count - 1] <= sums[-1] / 2 + 1e-9


def test_half_share_of_few_and_of_all() -> None:
    assert half_share(torch.tensor([0.0, 10, 0, 0])) == 0.25
    assert half_share(torch.ones(10)) == 0.5
    assert math.isnan(half_share(-torch.ones(3)))


def test_names_of_checkpoints() -> None:
    names = ["runs/adam/checkpoint_best.pt", "runs/sam/checkpoint_best.pt"]
    assert sharpness.labels([Path(name) for name in names]) == ["adam", "sam"]
    names = ["a/checkpoint1.pt", "a/checkpoint2.pt"]
    assert sharpness.labels([Path(name) for name in names]) == ["checkpoint1.pt", "checkpoint2.pt"]
    assert sharpness.labels([Path("x/y/z.pt")]) == ["y/z.pt"]
    assert sharpness.labels([Path("a.pt"), Path("b/a.pt")]) == ["a.pt", "b/a.pt"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"path": "none.pt"}, r"No such file: none\.pt \(--path\)\."),
    "torn": ({"path": "{torn}"}, r"torn\.pt \(--path\) is no whole checkpoint of fairseq: "),
    "another program's": ({"path": "{foreign}"}, r"foreign\.pt \(--path\) is no whole checkpoint of fairseq: "),
    "no data": ({"data": "nowhere"}, r"Cannot set up the model of .* on nowhere: "),
    "no subset": ({"--gen-subset": "dev"}, r"Cannot read the part 'dev' of .* \(--gen-subset\): Dataset not found"),
    "empty": ({"data": "{empty}"}, r"Cannot read the part 'valid' of .* \(--gen-subset\): cannot mmap an empty file"),
    "too long": (
        {"path": "{short}"},
        r"The part 'valid' of .* has no samples that this model takes\. Choose another: ",
    ),
    "criterion": ({"path": "{model}"}, r"Criterion 'model' \(--base-criterion\) gives no per-sample losses: "),
    "unknown model": (
        {"path": "{mine}"},
        r"mine\.pt \(--path\): fairseq has no model 'mine'\. It was trained with --user-dir old/place\. Name",
    ),
    "unknown criterion": (
        {"path": "{theirs}"},
        r"theirs\.pt \(--path\): fairseq has no criterion 'theirs'\. Name the fold",
    ),
    "no user-dir": ({"--user-dir": "nowhere"}, r"Cannot import nowhere \(--user-dir\): "),
    "radius": ({"--radii": "-1"}, r"argument --radii: '-1' is no radius\. Must be a finite number > 0"),
    "count": ({"--max-batches": "0"}, r"argument --max-batches: '0' is no count\. Must be an integer >= 1"),
    "format": ({"--plot": "figure.bmp"}, r"Invalid --plot figure\.bmp\. Its name must end with \.pdf, \.png, \.svg\."),
    "folder": ({"--plot": "none/f.png"}, r"No such folder: none \(--plot\)\."),
    "words": ({"--pathology": "1"}, r"unrecognized arguments: --pathology 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(
    runs: dict[str, Path], translation_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    changed, message = BAD[case]
    whole = runs["base"].read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pt")
    state = torch.load(runs["base"])
    state["cfg"]["criterion"] = {"_name": "model"}
    torch.save(state, tmp_path / "model.pt")
    state = torch.load(runs["base"])
    state["cfg"]["task"]["max_source_positions"] = 1
    torch.save(state, tmp_path / "short.pt")
    state = torch.load(runs["base"])
    state["cfg"]["common"]["user_dir"], state["cfg"]["model"]._name = "old/place", "mine"
    torch.save(state, tmp_path / "mine.pt")
    state = torch.load(runs["base"])
    state["cfg"]["common"]["user_dir"], state["cfg"]["criterion"] = None, {"_name": "theirs"}
    torch.save(state, tmp_path / "theirs.pt")
    (tmp_path / "empty").mkdir()
    for file in translation_data.iterdir():
        (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    empty_dataset(tmp_path / "empty")
    names = {name: str(tmp_path / f"{name}.pt") for name in ("torn", "foreign", "model", "short", "mine", "theirs")}
    names["empty"] = str(tmp_path / "empty")
    changed = {key: value.format(**names) for key, value in changed.items()}
    path = changed.pop("path", runs["base"])
    command = [changed.pop("data", translation_data), "--path", path, *(w for pair in changed.items() for w in pair)]
    with pytest.raises(SystemExit) as error:
        sharpness.main([str(word) for word in command])
    assert error.value.code == 2
    output, messages = capsys.readouterr()
    assert not output
    (line,) = messages.splitlines()
    assert line.startswith("deltasam-sharpness: error: ")
    assert re.search(message, line), line


def empty_dataset(folder: Path) -> None:
    """Replace the validation part of a translation corpus by one without sentences."""
    for side in ("src", "tgt"):
        (folder / f"none.{side}").write_text("")
    out = folder / "made"
    dicts = ["--srcdict", folder / "dict.src.txt", "--tgtdict", folder / "dict.tgt.txt"]
    run(preprocess.cli_main, "--source-lang", "src", "--target-lang", "tgt", "--validpref", folder / "none", *dicts,
        "--destdir", out)  # fmt: skip
    for file in out.glob("valid*"):
        (folder / file.name).write_bytes(file.read_bytes())
