"""What the command lines of the instruments share: one line for bad input, silence from fairseq, Markdown tables."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from deltasam_plugin.fairseq.errors import InvalidValue, Unsupported

STATUS = 2  # of a program that was given bad input, as argparse has it


class BadInput(ValueError):
    """Something that the user gave. The message names it and the remedy."""


class Parser(ArgumentParser):
    """A parser that says what is wrong in one line, and does not repeat the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(STATUS, f"{self.prog}: error: {message}\n")


@contextmanager
def console(program: str) -> Iterator[None]:
    """Run an instrument: bad input ends it with one line, and fairseq's log and warnings are not shown.

    Raises:
        SystemExit: with status 2.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", "Instance mode leaves unperturbed")
            yield
    except (BadInput, InvalidValue, Unsupported) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(STATUS) from error
    finally:
        logging.disable(disabled)


@contextmanager
def one_line_for(what: str) -> Iterator[None]:
    """fairseq, torch and pickle raise errors of every kind for files and options that are not what they expect."""
    try:
        yield
    except (BadInput, InvalidValue, Unsupported):
        raise
    except Exception as error:
        raise BadInput(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_sentence(error: BaseException) -> str:
    """The beginning of a long message, which says what is wrong: without its full stop."""
    return one_line(error).partition(". ")[0].removesuffix(".")


def radius(text: str) -> float:
    """A radius on a command line.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is no radius. Must be a finite number > 0")
    return value


def count(text: str) -> int:
    """A number of things on a command line, at least one.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} is no count. Must be an integer >= 1")
    return int(text)


def missing(*modules: str) -> list[str]:
    """Those of the modules that are not installed."""
    return [module for module in modules if find_spec(module) is None]


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names of files or folders: of their paths what differs."""
    if len(paths) == 1:
        return ["/".join(paths[0].parts[-2:])]
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while all(len(names) > 1 and names[end] == parts[0][end] for names in parts):
            for names in parts:
                del names[end]
    return ["/".join(names) for names in parts]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table. The first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])
