"""The report: what it says is what the event files of real runs hold; bad input ends with one line."""

from __future__ import annotations

import html
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from deltasam_plugin import report
from deltasam_plugin.fairseq.scalars import MEANINGS
from deltasam_plugin.tools.events import EVENTS, Curve, read_run
from deltasam_plugin.tools.report_figures import PANELS, averaged, styles
from deltasam_plugin.tools.report_page import COLUMNS, cells
from tests.helpers.runs import INSTANCE, SENTENCES, base, delta, fairseq_train

RUNS: dict[str, list[object]] = {
    "plain": base("sentence_prediction"),
    "shared": delta("sentence_prediction"),
    "own": [*delta("sentence_prediction"), *INSTANCE],
}


@pytest.fixture(scope="module")
def logs(sentence_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Event files of runs of fairseq-train, two epochs each."""
    root = tmp_path_factory.mktemp("logs")
    for name, options in RUNS.items():
        own = ["--classification-head-name", "head", "--num-classes", 2, "--tensorboard-logdir", root / name]
        fairseq_train(sentence_data["class"], root / f"{name}-saved", *SENTENCES, *options, *own, updates=14)
    return {name: root / name for name in RUNS}


def last(folder: Path, name: str) -> float:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars(name)[-1].value


def table(page: str) -> list[dict[str, str]]:
    """The rows of the table, by the heads of its columns; the second of two equal heads is numbered."""
    heads = [html.unescape(head) for head in re.findall(r"<th>(.*?)</th>", page)]
    heads = [f"{head} {i}" if head in heads[:i] else head for i, head in enumerate(heads)]
    found = []
    for line in re.findall(r"<tr><td.*?</tr>", page, re.DOTALL):
        cells = [
            re.sub(r"<svg.*?</svg>|<[^>]+>", "", c, flags=re.DOTALL).strip() for c in re.split(r"</td>", line)[:-1]
        ]
        found.append(dict(zip(heads, cells, strict=True)))
    return found


def make(*arguments: object) -> None:
    report.main([str(argument) for argument in arguments])


def test_the_page_says_what_the_event_files_hold(logs: dict[str, Path], tmp_path: Path) -> None:
    make(*logs.values(), "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    rows = {row["run"]: row for row in table(page)}
    assert rows.keys() == RUNS.keys()
    for name, row in rows.items():
        inner, valid = logs[name] / "train_inner", logs[name] / "valid"
        assert row["updates"] == "14"
        assert row["training loss"] == f"{last(inner, 'loss'):.3f}"
        assert row["validation loss"] == f"{last(valid, 'loss'):.3f}"
        assert row["validation accuracy, %"] == f"{last(valid, 'accuracy'):.1f}"
        assert (row["sharpness"] == "") == (name == "plain")
        if name != "plain":
            assert row["sharpness"] == f"{last(inner, 'sam_sharpness'):.3f}"
            relative = last(inner, "sam_sharpness") / last(inner, "loss")
            assert row["relative sharpness"] == f"{relative:.3f}"
            assert row["length of ε"] == "0.0500"
        assert (row["effective sample size"] == "") == (name != "shared")
    titles = [panel.title for panel in PANELS]
    drawn = len(re.findall(r"<figure>", page))
    assert drawn == len(titles) - len({"Validation BLEU", "Radius", "Skipped"})
    assert MEANINGS["sam_ascent_gnorm"].replace("`", "") in html.unescape(page)


def test_the_page_needs_nothing_outside_it(logs: dict[str, Path], tmp_path: Path) -> None:
    make(logs["own"], "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)', page)
    names = re.findall(r'\bid="([^"]+)"', page)
    used = {name for name in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page) for name in name if name}
    assert used <= set(names)


def test_a_base_run_alone_has_no_columns_of_delta_sam(logs: dict[str, Path], tmp_path: Path) -> None:
    make(logs["plain"], "--output", tmp_path / "page.html")
    (row,) = table((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert row.keys().isdisjoint({"sharpness", "relative sharpness", "effective sample size", "length of ε"})
    assert set(COLUMNS) > {"sharpness", "relative sharpness", "effective sample size", "length of ε"}


def test_a_torn_file_is_read_as_far_as_it_goes(
    logs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(logs["own"], tmp_path / "torn")
    (file,) = (tmp_path / "torn" / "train_inner").glob(EVENTS)
    file.write_bytes(file.read_bytes()[:-20])
    make(tmp_path / "torn", "--output", tmp_path / "page.html")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "middle of a record" in line)
    assert str(file) in line
    assert "middle of a record" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert read_run(tmp_path / "torn").training("loss").updates[0] == 1


def test_the_subset_valid_is_shown_and_not_the_first_by_name(logs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(logs["own"], tmp_path / "run")
    shutil.copytree(logs["plain"] / "valid", tmp_path / "run" / "test")
    shown = read_run(tmp_path / "run").validation("loss").last
    assert shown == last(logs["own"] / "valid", "loss") != last(logs["plain"] / "valid", "loss")


def test_runs_of_the_same_name_are_told_apart(logs: dict[str, Path], tmp_path: Path) -> None:
    for parent in "ab":
        shutil.copytree(logs["plain"], tmp_path / parent / "run")
    make(tmp_path / "a" / "run", tmp_path / "b" / "run", "--output", tmp_path / "page.html")
    rows = table((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [row["run"] for row in rows] == ["a", "b"]


def write(folder: Path, steps: Iterable[int], **scalars: Callable[[int], float]) -> None:
    """What one process writes."""
    time.sleep(1.1)  # files are told apart by the second
    writer = SummaryWriter(str(folder))
    for step in steps:
        for name, value in scalars.items():
            writer.add_scalar(name, value(step), step)
    writer.close()


def test_where_a_later_process_starts_an_earlier_one_is_void(tmp_path: Path) -> None:
    """A run that is begun anew in the same folder, and one that is resumed with another log interval."""
    for name, steps in {"anew": range(10, 60, 10), "resumed": range(45, 80, 5)}.items():
        write(tmp_path / name / "train_inner", range(10, 110, 10), loss=lambda step: 9.0)
        write(tmp_path / name / "train_inner", steps, loss=lambda step: 1.0)
    anew, resumed = (read_run(tmp_path / name).training("loss") for name in ("anew", "resumed"))
    assert (anew.updates, set(anew.values)) == ([10, 20, 30, 40, 50], {1.0})
    assert resumed.updates == [10, 20, 30, 40, *range(45, 80, 5)]
    assert resumed.values == [9.0] * 4 + [1.0] * 7


def test_seconds_of_slow_updates(tmp_path: Path) -> None:
    """fairseq logs updates per second with two decimals."""
    for seconds in (27, 210):
        logged = {"ups": round(1 / seconds, 2), "wps": round(4096 / seconds, 1), "wpb": 4096.0, "loss": 1.0}
        values = {name: (lambda step, value=value: value) for name, value in logged.items()}
        write(tmp_path / str(seconds) / "train_inner", (10, 20, 30), **values)
        (shown,) = (cell for cell, head in zip(cells(read_run(tmp_path / str(seconds))), COLUMNS) if head == "s/update")
        assert float(shown) == pytest.approx(seconds, rel=0.01)


def test_values_at_the_end_are_those_of_the_last_epoch_if_it_ends_later(tmp_path: Path) -> None:
    write(tmp_path / "train_inner", (100,), loss=lambda step: 0.9)
    write(tmp_path / "train", (31, 155), loss=lambda step: step / 1000)
    write(tmp_path / "valid", (31, 155), loss=lambda step: math.nan if step == 31 else 2.0)
    shown = dict(zip(COLUMNS, cells(read_run(tmp_path))))
    assert (shown["updates"], shown["training loss"]) == ("155", "0.155")
    assert cells(read_run(tmp_path))[2:4] == ["2.000", "2.000"]  # a NaN is not the best


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent", r"No such folder: .*absent\. Give what --tensorboard-logdir was given\."),
        ("empty", r"No event files in .*empty/train_inner and the like\. Train with --tensorboard-logdir"),
        ("foreign", r"The event files in .*foreign are not fairseq-train's: there is no scalar 'loss' in train\."),
        ("twice", r"plain is given twice\. Give each run once\."),
        ("folder", r"--output .* cannot be written\. Give a file in a folder that exists\."),
    ],
)
def test_bad_input_ends_with_one_line(
    logs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    with SummaryWriter(str(tmp_path / "foreign" / "train")) as writer:
        writer.add_scalar("epsilon", 1.0, 1)
    paths = {"twice": [logs["plain"], logs["plain"]], "folder": [logs["plain"]]}.get(given, [tmp_path / given])
    output = tmp_path if given == "folder" else tmp_path / "page.html"
    with pytest.raises(SystemExit) as error:
        make(*paths, "--output", output)
    assert error.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert re.search(message, line)
    assert not (tmp_path / "page.html").exists()


@given(st.lists(st.floats(-1e6, 1e6), max_size=80))
def test_running_means_stay_between_the_least_and_the_greatest(values: list[float]) -> None:
    found = averaged(values)
    assert len(found) == len(values)
    assert all(min(values) - 1e-6 <= value <= max(values) + 1e-6 for value in found)


@given(st.floats(-10, 10), st.integers(1, 80))
def test_running_means_of_equal_values_are_equal(value: float, count: int) -> None:
    assert averaged([value] * count) == pytest.approx([value] * count)


def test_no_two_of_28_runs_look_alike() -> None:
    assert len({(style.stroke, style.marker) for style in styles(28)}) == 28


def test_quotients_are_taken_at_common_updates() -> None:
    found = Curve([1, 2, 3], [1.0, 2.0, 3.0]).over(Curve([2, 3, 4], [4.0, 0.0, 1.0]))
    assert found == Curve([2], [0.5])
