"""Sentences of movie reviews to fairseq's binary data: work/data-bin/input0 and work/data-bin/label.

Results are written under a temporary name and renamed when they are complete.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import sentencepiece

from ..common.binary import binarize, write
from ..common.experiment import shown
from ..common.reviews import Labelled, parts
from .recipe import DATA, WORK

VOCABULARY = 3000


def main() -> None:
    if DATA.exists():
        print(f"prepare: {shown(DATA)} is there", flush=True)
        return
    WORK.mkdir(parents=True, exist_ok=True)
    splits = parts(WORK)
    for name, pairs in splits.items():
        positive = sum(label for _, label in pairs)
        print(f"prepare: {name} {len(pairs)} sentences, {positive} positive", flush=True)
    with tempfile.TemporaryDirectory(dir=WORK, prefix="prepare-") as folder:
        encode(splits, Path(folder))
        binarize(Path(folder)).rename(DATA)
    print(f"prepare: wrote {shown(DATA)}", flush=True)


def encode(splits: dict[str, Labelled], folder: Path) -> None:
    """Write the labels, and the sentences in pieces that sentencepiece learns from the training part only."""
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
    write(splits, partial(pieces.encode, out_type=str), folder)


if __name__ == "__main__":
    main()
