"""Parallel text to fairseq's binary data: work/data-bin, with the test part as plain text beside it.

Results are written under a temporary name and renamed when they are complete.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from ..common.experiment import shown
from ..common.preprocess import preprocess
from .corpus import Pair, dictionary_pairs, help_pairs, line_pairs
from .debian import fetch, unpack
from .recipe import DATA, WORK

ORIGIN = DATA / "origin.txt"  # the files that the data were made from

PACKAGES = ["libreoffice-help-de", "libreoffice-help-en-us", "trans-de-en"]

VOCABULARY = 6000
SPLITS = ("train", "valid", "test")
SIDES = ("source", "target")
SHORTEST, LONGEST = 3, 40  # words in a segment
LEAST = 10_000  # pairs for training


def main(files: tuple[Path, Path] | None = None) -> None:
    """Make work/data-bin, unless it is there and was made from the same files.

    Args:
        files: parallel files, source and target, to use instead of Debian's packages.
    """
    debs = [] if files else packages()
    origin = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()} {file.name}\n" for file in files or debs)
    if DATA.exists() and ORIGIN.read_text() == origin:
        print(f"prepare: {shown(DATA)} is there", flush=True)
        return
    with tempfile.TemporaryDirectory(dir=WORK, prefix="prepare-") as name:
        folder = Path(name)
        try:
            pairs = clean(line_pairs(*files) if files else pairs_of(debs, folder))
        except ValueError as error:  # not UTF-8, or not parallel
            sys.exit(f"prepare: {error}")
        splits = split(pairs)
        for part, members in splits.items():
            print(f"prepare: {part} {len(members)} pairs from {len({pair.page for pair in members})} pages", flush=True)
        if len(splits["train"]) < LEAST or not all(splits.values()):
            sys.exit(f"prepare: too little text is left. Training takes {LEAST} pairs or more; no part may be empty.")
        encode(splits, folder)
        binarize(folder)
        (folder / "data-bin" / ORIGIN.name).write_text(origin)
        if (WORK / "runs").exists():
            print("prepare: the data are new, the runs start anew", flush=True)
        for old in (WORK / "runs", DATA):
            shutil.rmtree(old, ignore_errors=True)
        (WORK / "timing.json").unlink(missing_ok=True)
        (folder / "data-bin").rename(DATA)
    print(f"prepare: wrote {shown(DATA)}", flush=True)


def packages() -> list[Path]:
    try:
        return fetch(PACKAGES, WORK / "debian")
    except RuntimeError as error:
        sys.exit(
            f"{error}\nThe text of this example is in the Debian packages {', '.join(PACKAGES)}. Without them, use two "
            "parallel files of your own:\n    make example-translation SOURCE_FILE=<file> TARGET_FILE=<file>\n"
            "one segment a line, line n of one file translating line n of the other; 20,000 lines or more."
        )


def pairs_of(debs: list[Path], folder: Path) -> list[Pair]:
    print("prepare: reading the packages", flush=True)
    unpack(debs, folder / "packages")
    return [*help_pairs(folder / "packages"), *dictionary_pairs(folder / "packages")]


def clean(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs that look like translated text, each once."""
    return list({(pair.source, pair.target): pair for pair in pairs if is_text(pair)}.values())


def is_text(pair: Pair) -> bool:
    """Return whether both sides have a fair and similar length, differ, and consist of words rather than code."""
    lengths = [len(text.split()) for text in (pair.source, pair.target)]
    return (
        min(lengths) >= SHORTEST
        and max(lengths) <= min(LONGEST, 2 * min(lengths))
        and pair.source != pair.target
        and all(share_of_letters(text) > 0.7 and not set(text) & set("<>") for text in (pair.source, pair.target))
    )


def share_of_letters(text: str) -> float:
    return sum(character.isalpha() or character == " " for character in text) / len(text)


def split(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Return train, valid and test (93 : 3 : 4), chosen by a hash of the page.

    A pair is left out of the validation part if the training part has one of its sides, and out of the test part if one
    of the other two parts has it. Case, digits and punctuation do not count.
    """
    parts: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for pair in pairs:
        hundredth = int(hashlib.sha256(pair.page.encode()).hexdigest(), 16) % 100
        parts["test" if hundredth < 4 else "valid" if hundredth < 7 else "train"].append(pair)
    known: set[tuple[str, str]] = set()
    for name, members in parts.items():
        parts[name] = [pair for pair in members if not keys(pair) & known]
        known.update(*map(keys, members))
    return parts


def keys(pair: Pair) -> set[tuple[str, str]]:
    sides = zip(SIDES, (pair.source, pair.target))
    return {(side, "".join(filter(str.isalpha, text.casefold()))) for side, text in sides}


def encode(splits: dict[str, list[Pair]], folder: Path) -> None:
    """Write SPLIT.SIDE in pieces that sentencepiece learns from both sides of the training part only.

    The plain text of the test part goes to data-bin/test.SIDE.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for pair in splits["train"] for text in (pair.source, pair.target)),
        model_prefix=str(folder / "sentencepiece"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        minloglevel=1,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    (folder / "data-bin").mkdir()
    shutil.copy(folder / "sentencepiece.model", folder / "data-bin")
    for name, pairs in splits.items():
        for side in SIDES:
            texts = [getattr(pair, side) for pair in pairs]
            write(folder / f"{name}.{side}", (" ".join(pieces.encode(text, out_type=str)) for text in texts))
            if name == "test":
                write(folder / "data-bin" / f"{name}.{side}", texts)


def write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def binarize(folder: Path) -> None:
    """Run fairseq-preprocess on the pieces, with one vocabulary for both sides."""
    prefixes = [option for name in SPLITS for option in (f"--{name}pref", str(folder / name))]
    languages = ["--source-lang", "source", "--target-lang", "target", "--joined-dictionary"]
    preprocess([*languages, *prefixes], folder / "data-bin")


if __name__ == "__main__":
    main()
