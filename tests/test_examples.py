"""What the examples do with their data, and the options of their runs."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from examples.finetune import recipe as finetune
from examples.sentiment import recipe as sentiment
from examples.translation import evaluate, prepare
from examples.translation import recipe as translation
from examples.translation.corpus import Page, Pair, line_pairs, sentences
from examples.translation.prepare import clean, split
from tests.helpers.corpora import corpus
from tests.helpers.runs import fairseq_train

RUNS = [(recipe, run) for recipe in (sentiment, translation) for run in recipe.OPTIMIZERS]


@pytest.mark.parametrize(("recipe", "run"), RUNS)
def test_every_run_trains(tmp_path_factory, tmp_path: Path, sentence_data: dict[str, Path], recipe, run: str) -> None:
    """One update by fairseq-train on a toy corpus, with the options of the example."""
    _, *options = recipe.EXPERIMENT.commands[run]
    data, own = sentence_data["class"], ["--max-update", 1, "--no-save-optimizer-state"]
    if recipe is translation:
        data = corpus("aligned", tmp_path_factory.getbasetemp())
        own += ["--source-lang", "src", "--target-lang", "tgt"]
    config = fairseq_train(data, tmp_path, *options, *own)["cfg"]
    assert (config["optimizer"]["_name"] == "delta_sam") == (run != "adam")
    if run == "instance":
        assert (config["optimizer"]["sam_perturbation"], config["optimizer"]["sam_rho"]) == ("instance", 0.01)


@pytest.mark.parametrize("recipe", [sentiment, finetune, translation])
def test_the_readme_shows_the_commands_that_run(recipe) -> None:
    (block,) = re.findall(r"```bash\n(fairseq-train .*?)```", (recipe.HERE / "README.md").read_text(), re.DOTALL)
    commands = shlex.split(block.replace("\\\n", " "), comments=True)
    shown = " ".join(commands).split("fairseq-train work/data-bin ")[1:]
    assert [command.split(" … ")[1].strip() for command in shown] == list(recipe.OPTIMIZERS.values())


def test_without_apt_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(prepare, "WORK", tmp_path)
    with pytest.raises(SystemExit) as error:
        prepare.packages()
    assert str(error.value).startswith("apt-get was not found: this is no Debian or Ubuntu system.\n")
    assert "make example-translation SOURCE_FILE=<file> TARGET_FILE=<file>" in str(error.value)


def test_files_of_different_length_are_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("eins\nzwei\n")
    target.write_text("one\ntwo\n")
    assert [pair[1:] for pair in line_pairs(source, target)][:2] == [("eins", "one"), ("zwei", "two")]
    target.write_text("one\n")
    with pytest.raises(
        ValueError, match=r"source has 3 lines and .*target has 2\. Parallel files have the same number"
    ):
        list(line_pairs(source, target))


def test_elements_of_a_help_page_are_found_by_their_id() -> None:
    page = Page(
        '<h1 id="hd_1">A <b>short</b> title</h1>'
        '<p id="par_2">One.<br>Two. <span class="MAC" hidden="">Not this.</span></p>'
        '<p>No id.</p><p id="par_2">Again.</p><p id="bm_3">A bookmark.</p>'
    )
    assert page.elements == {"hd_1": ["A short title"], "par_2": ["One. Two.", "Again."]}


def test_segments_are_cut_into_sentences_where_both_have_the_same_number() -> None:
    assert sentences("Eins. Zwei.", "One. Two.") == (["Eins.", "Zwei."], ["One.", "Two."])
    assert sentences("Eins. Zwei.", "One, two.") == (["Eins. Zwei."], ["One, two."])


def test_no_page_is_in_two_parts_and_nothing_is_seen_in_training() -> None:
    pages = ["".join(draw) for draw in itertools.product("abcdefg", repeat=3)]
    pairs = [Pair(page, f"Satz {i} auf {page}.", f"Sentence {i} on {page}.") for page in pages for i in "xyz"]
    pairs += [Pair(page, "Das steht auf jeder Seite.", f"This is on every page, {page}.") for page in pages]
    parts = split(clean(pairs))
    assert {name for name, members in parts.items() if members} == {"train", "valid", "test"}
    found = {name: {pair.page for pair in members} for name, members in parts.items()}
    assert not found["train"] & found["valid"] | found["train"] & found["test"] | found["valid"] & found["test"]
    trained = {side for pair in parts["train"] for side in pair[1:]}
    assert not trained & {side for name in ("valid", "test") for pair in parts[name] for side in pair[1:]}


def test_translations_are_compared_with_their_own_references(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """sacrebleu would compare one with another's if any were missing."""
    monkeypatch.setattr(evaluate, "DATA", tmp_path)
    sentences = ["This is the first sentence.", "Here we have the second one.", "And that makes three of them."]
    (tmp_path / "test.target").write_text("".join(f"{sentence}\n" for sentence in sentences))
    assert evaluate.bleu(sentences)[0] == pytest.approx(100)
    with pytest.raises(SystemExit, match=r"fairseq-generate translated 2 of 3 segments of the test part\."):
        evaluate.bleu(sentences[1:])
