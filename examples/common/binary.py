"""Labelled sentences in fairseq's binary format, for the task sentence_prediction."""

from collections.abc import Callable
from pathlib import Path

from .preprocess import preprocess
from .reviews import Labelled


def write(splits: dict[str, Labelled], pieces: Callable[[str], list[str]], folder: Path) -> None:
    """Write SPLIT.input0, the pieces of each sentence, and SPLIT.label."""
    for name, pairs in splits.items():
        lines = [" ".join(pieces(sentence)) for sentence, _ in pairs]
        (folder / f"{name}.input0").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.label").write_text("".join(f"{label}\n" for _, label in pairs), encoding="utf-8")


def binarize(folder: Path, dictionary: Path | None = None) -> Path:
    """Run fairseq-preprocess on what `write` has written; return the folder it made.

    Args:
        folder: where the written files are.
        dictionary: the pieces of a pretrained model, in its order. Without it, those of the training part.
    """
    splits = sorted(file.stem for file in folder.glob("*.input0"))
    for column in ("input0", "label"):
        options = [option for name in splits for option in (f"--{name}pref", str(folder / f"{name}.{column}"))]
        if column == "input0" and dictionary is not None:
            options += ["--srcdict", str(dictionary)]
        preprocess(["--only-source", *options], folder / "data-bin" / column)
    return folder / "data-bin"
