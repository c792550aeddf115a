"""Data for recipes that need other than the corpora of the criterions, made on first use."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from fairseq_cli import preprocess

from tests.helpers.corpora import corpus, sentences
from tests.helpers.runs import WORDS, run, write_labels, write_translation
from tests.recipes.recipe import transformer
from tests.recipes.worker import command

LANGUAGES = ("de", "fr")


def data_of(name: str, root: Path) -> Path:
    """The data folder of a corpus of this module, or of the criterions' ones."""
    if name in MADE:
        data = root / f"recipe-{name}" / "data"
        if not data.exists():
            data.parent.mkdir()
            MADE[name](data.parent)
    else:
        data = corpus(name, root)
    if (data / "input0").exists() and not (data.parent / "roberta.pt").exists():
        pretrain(data.parent)
    return data


def pretrain(folder: Path) -> None:
    """A masked language model of these sentences, for recipes that continue one."""
    options = ["--task", "masked_lm", "--arch", "roberta", "--criterion", "masked_lm", "--max-positions", "512"]
    options += [
        *transformer("encoder").split(),
        "--tokens-per-sample",
        "32",
        "--sample-break-mode",
        "eos",
        "--optimizer",
        "adam",
        "--lr",
        "0.01",
    ]
    options += ["--optimizer", "adam", "--lr", "0.01"]
    options += ["--cpu", "--batch-size", "8", "--max-update", "1", "--save-dir", str(folder / "pretrained")]
    code, printed = command("train", [str(folder / "data" / "input0"), *options], folder / "pretrained" / "log")
    assert code == 0, printed[-6000:]
    shutil.copy(folder / "pretrained" / "checkpoint_last.pt", folder / "roberta.pt")


def languages(folder: Path) -> None:
    """Two languages that are translated into a third, with one dictionary."""
    for seed, language in enumerate(LANGUAGES):
        for split, count in (("train", 80), ("valid", 12)):
            written = folder / f"{split}.{language}-en"
            write_translation(folder / "pair", count, seed + count)
            (folder / "pair.src").rename(written.with_name(f"{written.name}.{language}"))
            (folder / "pair.tgt").rename(written.with_name(f"{written.name}.en"))
    dictionary: list[object] = ["--joined-dictionary"]
    for language in LANGUAGES:
        prefixes = ["--trainpref", folder / f"train.{language}-en", "--validpref", folder / f"valid.{language}-en"]
        pair = ["--source-lang", language, "--target-lang", "en"]
        run(preprocess.cli_main, *pair, *prefixes, "--destdir", folder / "data", *dictionary)
        dictionary = [f"--{side}dict" for side in ("src", "tgt")]
        dictionary = [item for option in dictionary for item in (option, folder / "data" / "dict.en.txt")]
    (folder / "data" / "languages.txt").write_text("de\nfr\nen\n")


def scores(folder: Path) -> None:
    """Sentences with a score."""
    sentences(folder)
    shutil.rmtree(folder / "data" / "label")
    (folder / "data" / "label").mkdir()
    for split, count, seed in (("train", 120, 2), ("valid", 24, 3)):
        write_labels(folder / split, count, seed)
        (folder / "data" / "label" / f"{split}.label").write_text((folder / f"{split}.score").read_text())


def commonsense(folder: Path) -> None:
    """Questions with five answers, and a byte-pair encoding of bytes without pairs."""
    data = folder / "data"
    data.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyzABQ:Ġ"
    (data / "encoder.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (data / "vocab.bpe").write_text("#version: 0.2\n")
    (data / "dict.txt").write_text("".join(f"{index} 1\n" for index in range(len(letters))))
    for split, count, seed in (("train", 80, 4), ("valid", 16, 5)):
        draw = random.Random(seed)
        rows = []
        for _ in range(count):
            choices = [{"label": label, "text": draw.choice(WORDS)} for label in "ABCDE"]
            question = {"stem": " ".join(draw.choices(WORDS, k=draw.randint(2, 5))), "choices": choices}
            rows.append(json.dumps({"question": question, "answerKey": draw.choice("ABCDE")}))
        (data / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


MADE = {function.__name__: function for function in (languages, scores, commonsense)}
