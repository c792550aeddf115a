"""Parallel text from three Debian packages: pairs of a German and an English segment, each with its page.

libreoffice-help-de and libreoffice-help-en-us hold the same pages in both languages. Corresponding elements of a page
have the same id. trans-de-en is a dictionary with example sentences. It has one entry per line, and the German and the
English parts of an entry are in the same order. A page, which is never split, is an HTML page or a dictionary entry.
"""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

HELP = "usr/share/libreoffice/help"
DICTIONARY = "usr/share/trans/de-en"

BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
VOID = {"br", "hr", "img", "input", "link", "meta"}  # tags that are never closed

NEXT_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-ZÄÖÜ])")
LABELS = re.compile(r"\s*\[[^\]]*\]")  # [Br.], [coll.], [math.]
FULL_SENTENCE = re.compile(r"[\"„'‚]?[A-ZÄÖÜ][^/(){}<>…]*[.!?][\"“'’]?")  # / and ( ) mark variants within a sentence


class Pair(NamedTuple):
    """Two segments that translate each other. `page` says where they come from."""

    page: str
    source: str
    target: str


class Page(HTMLParser):
    """An HTML page. `elements[id]` is the text of the elements with this id; translators use ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: dict[str, list[str]] = {}
        self._id = ""
        self._text: list[str] = []
        self._hidden = 0  # number of open tags inside a hidden part
        self.feed(html)
        self._end_block()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in VOID:
            self._text.append(" ")
            return
        if tag in BLOCKS:
            self._end_block()
            self._id = attributes.get("id") or ""
        if self._hidden or ("hidden" in attributes and "class" in attributes):  # a variant for one operating system
            self._hidden += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self._end_block()
        if self._hidden and tag not in VOID:
            self._hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._text.append(data)

    def _end_block(self) -> None:
        if self._id.startswith(("par_", "hd_")):
            self.elements.setdefault(self._id, []).append(" ".join("".join(self._text).split()))
        self._id, self._text = "", []


def help_pairs(root: Path) -> Iterator[Pair]:
    """Yield the segments of the help pages. Paragraphs are cut into sentences if both sides have the same number.

    Args:
        root: where the packages were unpacked.
    """
    german, english = root / HELP / "de", root / HELP / "en-US"
    for path in sorted(path.relative_to(german) for path in german.rglob("*.html")):
        if not (english / path).exists():
            continue
        sources, targets = (Page((side / path).read_text(encoding="utf-8")).elements for side in (german, english))
        for name in sources:
            if len(sources[name]) != len(targets.get(name, [])):  # an id that occurs twice
                continue
            for source, target in zip(sources[name], targets[name]):
                for segments in zip(*sentences(source, target)):
                    yield Pair(path.as_posix(), *segments)


def sentences(source: str, target: str) -> tuple[list[str], list[str]]:
    """Return both segments cut into sentences, or whole if the numbers of sentences differ."""
    cut = NEXT_SENTENCE.split(source), NEXT_SENTENCE.split(target)
    return cut if len(cut[0]) == len(cut[1]) else ([source], [target])


def dictionary_pairs(root: Path) -> Iterator[Pair]:
    """Yield the example sentences of the dictionary, each with its first translation.

    Args:
        root: where the packages were unpacked.
    """
    for line in (root / DICTIONARY).read_text(encoding="utf-8").splitlines():
        german, separator, english = line.partition(" :: ")
        if line.startswith("#") or not separator:
            continue
        for parts in zip(german.split(" | "), english.split(" | ")):
            source, target = (LABELS.sub("", part).split("; ")[0].strip() for part in parts)
            if FULL_SENTENCE.fullmatch(source) and FULL_SENTENCE.fullmatch(target):
                yield Pair(german, source, target)


def line_pairs(source: Path, target: Path) -> Iterator[Pair]:
    """Yield the lines of two parallel files. Every hundred lines are a page.

    Raises:
        ValueError: the files have different numbers of lines.
    """
    sides = [path.read_text(encoding="utf-8").split("\n") for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{source} has {len(sides[0])} lines and {target} has {len(sides[1])}. "
            "Parallel files have the same number: line n of one translates line n of the other."
        )
    for number, segments in enumerate(zip(*sides)):
        yield Pair(f"lines {number // 100}", *(" ".join(segment.split()) for segment in segments))
