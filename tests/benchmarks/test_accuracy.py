"""The study of accuracies: its slices, its file, and its statistics."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import accuracy
from benchmarks.accuracy import METHODS, STUDIED, TUNING_SEED, Slice, wanted
from benchmarks.study import Row, best_value, differences, holm, interval
from benchmarks.study_tables import overview, summary, tables, tuning
from benchmarks.tasks import LAST, TASKS, Scores, Task
from examples.common.reviews import flipped
from examples.translation import evaluate
from tests.helpers.corpora import corpus

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


SEEDS = TASKS["sentiment"].seeds


def row(method: str, seed: int, value: float | None = None, accuracy: float = 70.0, noise: float = 0.3) -> Row:
    tested = (None, None) if seed == TUNING_SEED else (accuracy, 0.9)
    phase, scores = "tuning" if seed == TUNING_SEED else "final", (accuracy, *tested)
    return Row("sentiment", noise, method, value, seed, phase, 1060, *scores, *scores, 0.1, 10.0)


@given(P_VALUES)
def test_holm_is_between_no_correction_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c <= min(1.0, len(p_values) * p)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [corrected[i] for i in order] == sorted(corrected)


def test_holm_of_an_example() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


@given(st.lists(st.decimals(0, 100, places=4).map(float), min_size=3, max_size=6, unique=True))
def test_intervals_are_those_of_students_t(values: list[float]) -> None:
    centre, half = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=centre, scale=stats.sem(values))
    assert (centre - half, centre + half) == pytest.approx((low, high))


def test_the_value_with_the_best_validation_accuracy_is_chosen_and_the_least_among_equals() -> None:
    tried = [row("sam", 1, value, accuracy) for value, accuracy in ((0.05, 70.0), (0.2, 72.0), (0.1, 72.0))]
    assert best_value(tried) == 0.1
    assert best_value([]) is None


def test_differences_are_between_equal_seeds() -> None:
    rows = [row("sam", 2, 0.1, 71), row("sam", 4, 0.1, 75), row("adam", 4, None, 72), row("adam", 3, None, 1)]
    assert differences(rows, "sam", "adam") == [3]


def test_a_row_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.csv")
    assert accuracy.rows() == []
    given = [row("adam", 2)._replace(relative_sharpness=None), row("sam", 1, 0.05)]
    for one in given:
        accuracy.keep(one)
    assert accuracy.rows() == given
    with (tmp_path / "accuracy.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 3


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_so_many_labels_are_flipped_the_same_ones_each_time(noise: float) -> None:
    pairs = [(f"sentence {i}", i % 2) for i in range(4000)]
    found = flipped(pairs, noise)
    assert found == flipped(pairs, noise)
    assert [sentence for sentence, _ in found] == [sentence for sentence, _ in pairs]
    changed = sum(one != other for one, other in zip(found, pairs)) / len(pairs)
    assert changed == pytest.approx(noise, abs=0.03)


def all_slices(done: list[Row]) -> Iterator[Slice]:
    return (s for s in wanted(done) if (s.task, s.noise, s.method) == ("sentiment", 0.3, "sam"))


def test_seeds_follow_when_every_value_was_tried() -> None:
    values = METHODS["sam"].values
    tuning = [Slice("sentiment", 0.3, "sam", value, TUNING_SEED) for value in values]
    assert list(all_slices([])) == tuning
    tried = [row("sam", TUNING_SEED, value, 60 + 10 * value) for value in values]
    assert list(all_slices(tried[:-1])) == tuning
    final = [Slice("sentiment", 0.3, "sam", values[-1], seed) for seed in SEEDS]
    assert list(all_slices(tried)) == tuning + final
    assert all(TUNING_SEED not in task.seeds for task in TASKS.values())


def test_a_task_can_have_other_methods_and_be_run_alone() -> None:
    found = list(wanted([], ["translation"]))
    assert {chosen.task for chosen in found} == {"translation"}
    assert list(dict.fromkeys(chosen.method for chosen in found)) == list(STUDIED["translation", 0.0])


def test_every_task_is_studied_with_every_share_of_flipped_labels() -> None:
    assert set(STUDIED) == {(name, noise) for name, task in TASKS.items() for noise in task.noises}
    assert {name for methods in STUDIED.values() for name in methods} == set(METHODS)


def test_what_matters_most_comes_first() -> None:
    order = list(dict.fromkeys((chosen.method in accuracy.MAIN, -chosen.noise) for chosen in wanted([])))
    assert order[0] == (True, -0.3)
    assert [is_main for is_main, _ in order] == sorted((is_main for is_main, _ in order), reverse=True)
    first = [chosen.task for chosen in wanted([]) if chosen.method == "adam"]
    assert list(dict.fromkeys(first)) == list(TASKS)


def test_tables_show_what_was_not_for_tuning() -> None:
    rows = [row("adam", seed, None, 70 + seed) for seed in SEEDS]
    rows += [row("sam", seed, 0.1, 73 + 1.5 * seed) for seed in SEEDS]
    text = tables([*rows, row("sam", TUNING_SEED, 0.1, 99)])
    assert "sentiment, 30% of the labels flipped:" in text
    assert "99" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("| sam"))
    assert "79.0 ± 2.9" in line  # 73 + 1.5 · 4, and 2.776 · 1.5 · 1.581 / √5
    assert "+5.0 ± 1.0 (p < 0.001)" in line


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_summary_shows_gains_over_adam_with_the_same_seeds() -> None:
    rows = [row("adam", seed, None, 70 + seed) for seed in SEEDS]
    rows += [row("sam", seed, 0.1, 73 + 1.5 * seed) for seed in SEEDS]
    rows += [row("sam", seed, 0.1, 73, noise=0.0) for seed in SEEDS]  # without Adam there is no gain
    _, _, adam, sam = summary(rows).splitlines()
    assert cells(adam)[1:5] == ["adam", "", "74.0 ± 2.0", ""]
    assert cells(sam)[1:6] == ["sam", "0.1", "+5.0 ± 1.0 (p < 0.001)", "< 0.001", "+5.0 ± 1.0 (p < 0.001)"]


def test_the_overview_shows_a_column_for_each_task_and_what_is_beyond_chance_in_bold() -> None:
    rows = [row("adam", seed, None, 70 + seed, noise) for seed in SEEDS for noise in (0.3, 0.0)]
    rows += [row("sam", seed, 0.1, 73 + 1.5 * seed) for seed in SEEDS]
    rows += [row("sam", seed, 0.1, 70 + seed * (-1) ** seed, noise=0.0) for seed in SEEDS]
    head, _, adam, sam = overview(rows).splitlines()
    assert cells(head) == ["training", "sentiment, 30% of the labels flipped", "sentiment"]
    assert cells(adam) == ["adam", "74.0 ± 2.0", "74.0 ± 2.0"]
    assert cells(sam)[:2] == ["sam", "**+5.0 ± 1.0**"]
    assert cells(sam)[2].startswith("-3.2 ± ")
    narrow = [one for one in rows if one.seed < 4]  # two pairs have the same difference, but a p-value above 0.05
    assert "**" not in overview(narrow)


def test_every_value_that_was_tried_is_shown_and_the_chosen_one_in_bold() -> None:
    tried = [row("sam", TUNING_SEED, value, valid) for value, valid in ((0.2, 60.0), (0.05, 71.0), (0.1, 71.0))]
    _, _, line = tuning([*tried, row("sam", 2, 0.05, 99)]).splitlines()
    assert cells(line) == ["sentiment, 30% of the labels flipped", "sam", "0.05: **71.00**, 0.1: 71.00, 0.2: 60.00"]


def test_a_clone_in_a_folder_with_a_space(tmp_path: Path) -> None:
    """Every path is one word of a command."""
    root = Path(__file__).parents[2]
    for folder in ("examples", "benchmarks"):
        shutil.copytree(root / folder, tmp_path / "my clone" / folder, ignore=shutil.ignore_patterns("work"))
    (tmp_path / "my clone" / "deltasam_plugin").symlink_to(root / "deltasam_plugin")
    program = """
import json
from benchmarks.tasks import TASKS
from examples import finetune, sentiment, translation
from examples.finetune.recipe import EXPERIMENT as a
from examples.sentiment.recipe import EXPERIMENT as b
from examples.translation.recipe import EXPERIMENT as c
print(json.dumps([*(words for e in (a, b, c) for words in e.commands.values()), *(t.options for t in TASKS.values())]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "my clone", capture_output=True, text=True, check=True
    )
    commands = json.loads(done.stdout.splitlines()[-1])
    assert len(commands) == 3 + 4 + 4 + 3
    for command in commands:
        assert Path(command[command.index("--user-dir") + 1]).is_dir()


def test_the_figure_shows_what_was_not_for_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.csv")
    figure, drawn = tmp_path / "accuracy.png", []
    for one in [row("sam", TUNING_SEED, 0.1), row("sam", TUNING_SEED, 0.2), row("adam", 2), row("adam", 3, None, 72)]:
        accuracy.keep(one)
        drawn.append(figure.exists())
    assert drawn == [False, False, False, True]
    assert figure.read_bytes().startswith(b"\x89PNG")
    before = figure.read_bytes()
    accuracy.keep(row("adam", 4, None, 60, noise=0.0))
    assert figure.read_bytes() == before  # one run alone has no interval
    accuracy.keep(row("adam", 4, None, 60))
    assert figure.read_bytes() != before


def test_runs_that_end_together_draw_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.csv")
    seen: list[int | None] = []

    def slow_draw(rows: list[Row], *_: object) -> None:
        seen.append(len(rows))
        time.sleep(0.3)
        seen.append(None)

    monkeypatch.setattr(accuracy, "draw", slow_draw)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(accuracy.keep, [row("adam", seed) for seed in SEEDS[:3]]))
    assert seen[1::2] == [None] * 3
    assert seen[-2] == 3  # the last figure shows all


@pytest.mark.usefixtures("toy")
def test_a_slice_is_run_again_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.csv")
    chosen = Slice("sentiment", 0.3, "adam", None, 2)
    with pytest.raises(SystemExit, match=r'\["sentiment", 0.3, "adam", null, 2\] is no slice that is done'):
        accuracy.again(chosen)
    accuracy.keep(accuracy.run(chosen))
    before = (tmp_path / "accuracy.csv").read_text()
    _, _, kept, new = map(cells, accuracy.again(chosen).splitlines())
    assert (kept[0], new[0]) == ("kept", "again")
    assert kept[1:-1] == new[1:-1] == before.splitlines()[1].split(",")[:-1]  # all but the time
    assert (tmp_path / "accuracy.csv").read_text() == before
    monkeypatch.setattr(sys, "argv", ["accuracy", "--slice", json.dumps(chosen)])
    with pytest.raises(SystemExit, match="is done, and would count twice"):
        accuracy.main()


def test_the_study_stops_when_a_slice_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.csv")
    monkeypatch.setattr(accuracy, "wanted", lambda *_: [("no", "slice")])
    with pytest.raises(SystemExit, match=r"'no', 'slice'.* failed"):
        accuracy.work([], 1, None)


def test_no_slice_starts_while_the_pause_file_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.csv")
    monkeypatch.setattr(accuracy, "wanted", lambda *_: [("no", "slice")])
    pause, sleep, printed = tmp_path / "pause", time.sleep, []
    pause.touch()

    def counted(seconds: float) -> None:
        printed.append(capsys.readouterr().out)
        if len(printed) == 3:
            pause.unlink()
        sleep(0.1)

    monkeypatch.setattr(time, "sleep", counted)
    with pytest.raises(SystemExit):
        accuracy.work([], 1, pause)
    assert printed[:3] == ["", "", ""]
    assert "starts ('no', 'slice')" in printed[3]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, toy_task: Task) -> Task:
    """The study on toy data."""
    monkeypatch.setitem(TASKS, "sentiment", toy_task)
    return toy_task


@pytest.mark.parametrize(("method", "seed"), [("adam", 2), ("sam_on", TUNING_SEED), ("adam, r-drop", 2)])
def test_a_slice_trains_and_measures(toy: Task, method: str, seed: int) -> None:
    value = METHODS[method].values[0] if METHODS[method].values else None
    found = accuracy.run(Slice("sentiment", 0.3, method, value, seed))
    assert (found.method, found.phase, found.updates) == (method, "tuning" if seed == TUNING_SEED else "final", 2)
    assert 0 <= found.valid_last <= 100
    assert found.cpu_seconds > 0
    assert (found.relative_sharpness is not None) == (method == "sam_on")
    assert (found.test_last is None) == (found.test_loss_best is None) == (seed == TUNING_SEED)
    assert list(toy.work.iterdir()) == []  # nothing is left behind


@pytest.mark.usefixtures("toy")
def test_of_a_moving_average_the_average_is_measured() -> None:
    one, other, none = (accuracy.run(Slice("sentiment", 0.3, *chosen, 2)).test_loss_last for chosen in
                        (("adam", None), ("adam, moving average", 0.5), ("adam, moving average", 0.0)))  # fmt: skip
    assert other != one
    assert none == pytest.approx(one, rel=1e-6)  # it forgets all but the last parameters


def test_a_translation_is_measured_by_bleu_and_by_the_loss_of_both_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    toy = corpus("aligned", tmp_path_factory.getbasetemp())
    data = tmp_path / "data"
    data.mkdir()
    for file in toy.iterdir():
        name = file.name.replace("src", "source").replace("tgt", "target")
        shutil.copy(file, data / name)
        if name.startswith("valid"):
            shutil.copy(file, data / name.replace("valid", "test"))
    shutil.copy(toy.parent / "valid.tgt", data / "test.target")
    monkeypatch.setattr(evaluate, "DATA", data)
    task = replace(TASKS["translation"], data=lambda noise: data, updates=2, work=tmp_path / "work")

    def scores(method: str) -> list[Scores]:
        options = METHODS[method].options.format(criterion=task.criterion, value=1)
        with task.trained(task.command(0.0, options, 2)) as left:
            return [task.measure(left.folder / LAST, data, with_test) for with_test in (False, True)]

    tuned, found = scores("adam")
    assert tuned == (found.valid, None, None)
    assert found.test is not None
    assert 0 <= found.test <= 100
    assert found.test_loss == -found.valid > 0  # the parts are the same here
    _, other = scores("adam, r-drop")
    assert other.test_loss == pytest.approx(found.test_loss, rel=0.1)  # in training R-Drop's is twice as much
