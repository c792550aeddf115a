"""Commands are taken from fairseq's READMEs whole: what they say, without what belongs to somebody's machine."""

from __future__ import annotations

import pytest

from tests.recipes.all_recipes import ALL, RECIPES
from tests.recipes.commands import EXAMPLES, drop, training_command


def test_a_command_of_a_readme() -> None:
    options = training_command("examples/roberta/README.race.md", "--arch")
    assert options[:4] == ["--ddp-backend", "legacy_ddp", "--restore-file", "/path/to/roberta/model.pt"]
    assert options[-2:] == ["--max-epoch", "5"], "a variable of the script"
    assert "/path/to/race-output-dir" not in options, "its data folder"


def test_a_list_that_the_readme_does_not_quote_is_one_word() -> None:
    options = training_command("examples/wav2vec/README.md", "--arch wav2vec --task")
    assert options[options.index("--conv-feature-layers") + 1].startswith("[(512, 10, 5), (512, 8, 4), ")
    assert "--save-dir" not in options


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"examples/rxf/README\.md has no training command with '--arch fconv'"):
        training_command("examples/rxf/README.md", "--arch fconv")


def test_an_option_is_dropped_with_its_values() -> None:
    assert drop(["--fp16", "--lr", "-1.0", "--seed", "1"], "--lr", "--fp16") == ["--seed", "1"]


def test_the_list() -> None:
    """At least 25, with different names, each from a file of fairseq."""
    assert len(RECIPES) == len(ALL) >= 25
    assert all((EXAMPLES.parent / recipe.source).is_file() for recipe in ALL)
