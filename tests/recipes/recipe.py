"""One of fairseq's recipes: a command of its READMEs, or a YAML file of its examples, made tiny."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.recipes.commands import drop, training_command

TRAINS = "trains"


@dataclass(frozen=True)
class Recipe:
    """A training command of fairseq's own, and what becomes of it under δ-SAM.

    Attributes:
        name: of the recipe, in the tests and in README.
        source: the README that has the command, or the YAML file, from the root of fairseq's repository.
        data: name of a corpus.
        tiny: options that override the command's: sizes, languages, files. For a YAML file, Hydra's overrides.
        marked: text that tells the command from others of the README.
        batch: `TRAINS`, or a regular expression that the refusal matches, with --sam-perturbation batch.
        instance: the same with --sam-perturbation instance; by default what `batch` is.
        then: the command of fairseq that reads the checkpoint, and its options.
        without: options that are left out.
        resumes: the resumed base run is the uninterrupted one, bit for bit.
        slow: like another recipe, and left to `make test-all`.
    """

    name: str
    source: str
    data: str
    tiny: str
    marked: str = ""
    batch: str = TRAINS
    instance: str = ""
    then: str = "validate"
    without: tuple[str, ...] = ("--fp16",)
    resumes: bool = True
    slow: bool = False

    @property
    def hydra(self) -> bool:
        """Run by fairseq-hydra-train."""
        return self.source.endswith(".yaml")

    @property
    def half(self) -> bool:
        """Trained in half precision."""
        return "fp16_no_flatten_grads" in self.tiny.replace("-", "_")

    def flags(self, data: Path) -> list[str]:
        """The options as fairseq has them, then those that make it tiny; {data} in these is the data folder."""
        own = [] if self.hydra else drop(training_command(self.source, self.marked), *self.without)
        return own + shlex.split(self.tiny.replace("{data}", str(data)))

    def outcome(self, mode: str) -> str:
        """`TRAINS`, or what a refusal matches."""
        return {"batch": self.batch, "instance": self.instance or self.batch}[mode]


def transformer(*sides: str) -> str:
    """Options for a tiny Transformer."""
    sizes = "--{0}-layers 2 --{0}-embed-dim 32 --{0}-ffn-embed-dim 64 --{0}-attention-heads 2"
    return " ".join(sizes.format(side) for side in sides)
