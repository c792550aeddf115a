"""The training commands in the READMEs of fairseq's examples, which fairseq's package holds."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

EXAMPLES = Path(find_spec("fairseq").origin).parent / "examples"  # type: ignore[union-attr, arg-type]

CONTINUED = re.compile(r"\\[ \t]*(?:#.*)?\n")
ASSIGNED = re.compile(r"^\s*(?:export )?(\w+)=(\S+)", re.MULTILINE)
TRAINING = re.compile(r"^.*?(?:fairseq-train\)?|train\.py)(?=\s)(.*)$", re.MULTILINE)


def training_command(source: str, marked: str) -> list[str]:
    """The options of one fairseq-train command, as a README writes them, without data and checkpoint folders.

    Args:
        source: the README, from the root of fairseq's repository.
        marked: text that the wanted command alone holds; of several such commands the first is taken.

    Raises:
        ValueError: the README has no such command.
    """
    text = CONTINUED.sub(" ", (EXAMPLES.parent / source).read_text())
    for found in TRAINING.finditer(text):
        if marked in found.group(1):
            before: dict[str, str] = {}
            for name, value in ASSIGNED.findall(text[: found.start()]):
                if not value.startswith("<"):
                    before[name] = _expand(value, before)
            return _without_folders(_options(_expand(found.group(1), before)))
    raise ValueError(f"{source} has no training command with {marked!r}.")


def drop(options: list[str], *names: str) -> list[str]:
    """These options without some, and without the values of those."""
    kept, dropping = [], False
    for word in options:
        if word.startswith("-") and not _is_number(word):
            dropping = word in names
        if not dropping:
            kept.append(word)
    return kept


def _expand(command: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name.group(1), name.group(0)), command)


def _options(command: str) -> list[str]:
    """Words of the command; a list that the README forgot to quote is one word again."""
    options: list[str] = []
    for word in shlex.split(command, comments=True):
        name, equals, value = word.partition("=")
        if equals and name.startswith("--"):
            options += [name, value]
        elif options and options[-1].count("(") + options[-1].count("[") > options[-1].count(")") + options[-1].count(
            "]"
        ):
            options[-1] += " " + word
        else:
            options.append(word)
    return options


# The data folder: the one word that is no option's value. Its name tells.
_DATA = re.compile(
    r".*(data-bin|-bin|data/bin|binarized|_data|DATA|_ROOT|databin|^bin$|/bin|/data|/manifest|output-dir|CommonsenseQA).*"
)


def _without_folders(options: list[str]) -> list[str]:
    kept = [word for word in drop(options, "--save-dir", "--data") if word not in ("\\", ";", "```")]
    values = {index + 1 for index, word in enumerate(kept) if word in ("--user-dir", "--restore-file", "--lang-pairs")}
    return [word.rstrip(";") for index, word in enumerate(kept) if index in values or not _DATA.fullmatch(word)]


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-[\d.]+(e-?\d+)?", word) is not None
