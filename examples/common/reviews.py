"""Sentences of movie reviews with their sentiment.

The text is movieReviewSnippets_GroundTruth.txt (Hutto and Gilbert 2014; MIT licence), 10,605 sentences of movie reviews
with the mean of at least 20 human ratings from -4 to 4. It is part of the source distribution of vaderSentiment 3.3.2.
The label is the sign of the rating.
"""

import hashlib
import html
import io
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

from .experiment import shown
from .packages import download

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
NAME = "movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
SPLITS = ("train", "valid", "test")

Labelled = list[tuple[str, int]]  # sentences, label 1 for a positive and 0 for a negative one


def parts(work: Path) -> dict[str, Labelled]:
    """Return train, valid and test. The text file is kept in the folder `work`.

    Raises:
        SystemExit: the file cannot be downloaded, or its checksum is not the expected one.
    """
    return split(clean(source(work).decode("utf-8")))


def source(work: Path) -> bytes:
    file = work / NAME
    by_hand = f"put {NAME} (in {ARCHIVE} of the source distribution of {PACKAGE}) at {shown(file)} yourself"
    by_hand += " and run again."
    if not file.exists():
        print(f"prepare: downloading the source distribution of {PACKAGE}", flush=True)
        try:
            fetch(file)
        except RuntimeError as error:
            sys.exit(f"{error}\nInstead of pip, {by_hand}")
        except (ValueError, KeyError, tarfile.TarError) as error:
            sys.exit(f"{PACKAGE} was downloaded, but has no {NAME} ({error}).\nInstead of it, {by_hand}")
    text = file.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if digest != SHA256:
        sys.exit(f"{shown(file)} has sha256 {digest}; expected {SHA256}. Delete it and run again, or {by_hand}")
    return text


def fetch(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="download-") as folder:
        sdist = download(PACKAGE, Path(folder), "--no-binary", "vaderSentiment")
        text = member(member(sdist.read_bytes(), ARCHIVE), NAME)
        partial = Path(folder) / NAME
        partial.write_bytes(text)
        partial.rename(file)


def member(archive: bytes, name: str) -> bytes:
    """Return the content of the one file of a .tar.gz whose path ends with `name`."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        path = next((path for path in tar.getnames() if path.endswith(name)), name)
        extracted = tar.extractfile(path)
        if extracted is None:
            raise ValueError(f"{name} is no file")
        return extracted.read()


def clean(text: str) -> Labelled:
    """Return each sentence once, with the sign of its mean rating.

    Sentences are left out whose rating is exactly 0, or whose ratings have different signs.
    """
    ratings: dict[str, list[float]] = defaultdict(list)
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        sentence = html.unescape(sentence).replace("''", '"')
        ratings[" ".join(sentence.split())].append(float(rating))
    signs = {sentence: {(value > 0) - (value < 0) for value in values} for sentence, values in ratings.items()}
    return [(sentence, int(1 in sign)) for sentence, sign in signs.items() if sign in ({1}, {-1})]


def digest(sentence: str, purpose: str = "") -> int:
    """Return a number of 256 bits that depends on the sentence, whatever its case, and on what it is used for."""
    return int(hashlib.sha256(f"{purpose}{sentence.casefold()}".encode()).hexdigest(), 16)


def split(pairs: Labelled) -> dict[str, Labelled]:
    """Return train, valid and test (80 : 10 : 10), chosen by a hash of the sentence alone."""
    splits: dict[str, Labelled] = {name: [] for name in SPLITS}
    for sentence, label in pairs:
        tenth = digest(sentence) % 10
        splits["test" if tenth == 9 else "valid" if tenth == 8 else "train"].append((sentence, label))
    return splits


def balanced(pairs: Labelled, count: int) -> Labelled:
    """Return so many of the sentences, half of them positive, chosen by a hash of the sentence.

    Raises:
        ValueError: the number is odd, or there are not enough sentences.
    """
    ranked = sorted(pairs, key=lambda pair: digest(pair[0], "choose "))
    chosen = [[pair for pair in ranked if pair[1] == label][: count // 2] for label in (0, 1)]
    if sum(map(len, chosen)) != count:
        least = min(sum(label == wanted for _, label in pairs) for wanted in (0, 1))
        raise ValueError(f"{count} sentences were asked for. Choose an even number up to {2 * least}.")
    return chosen[0] + chosen[1]


def flipped(pairs: Labelled, noise: float) -> Labelled:
    """Return the same sentences with a share of the labels changed, chosen by a hash of the sentence."""
    return [(sentence, label ^ (digest(sentence, "flip ") < noise * 2**256)) for sentence, label in pairs]
