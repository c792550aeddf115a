"""The scalars of a run of fairseq-train, read back from its TensorBoard event files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from deltasam_plugin.tools.console import BadInput

EVENTS = "events.out.tfevents.*"
TRAIN, EPOCHS = "train_inner", "train"  # one value each log interval, and one each epoch
NOT_VALIDATION = (TRAIN, EPOCHS)


@dataclass(frozen=True)
class Curve:
    """One scalar over updates.

    Attributes:
        updates: numbers of updates, increasing.
        values: as many.
    """

    updates: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def last(self) -> float | None:
        """The last value, if there is one."""
        return self.values[-1] if self.values else None

    def over(self, other: Curve) -> Curve:
        """The quotients where both have a value and the other is not zero."""
        divisors = dict(zip(other.updates, other.values))
        pairs = [(u, v / divisors[u]) for u, v in zip(self.updates, self.values) if divisors.get(u)]
        return Curve([u for u, _ in pairs], [v for _, v in pairs])


@dataclass(frozen=True)
class Run:
    """A run of fairseq-train.

    Attributes:
        path: what was given to ``--tensorboard-logdir``.
        scalars: curves by name, for every part: ``train_inner``, ``train``, and the validation subsets.
        torn: event files that end in the middle of a record. What is before that was read.
    """

    path: Path
    scalars: Mapping[str, Mapping[str, Curve]]
    torn: list[Path]

    def at_end(self, name: str) -> Curve:
        """A scalar of that part of the training log which ends later. An epoch may end between two log intervals."""
        parts = [self.scalars[part] for part in (TRAIN, EPOCHS) if "loss" in self.scalars.get(part, {})]
        return max(parts, key=lambda part: part["loss"].updates[-1]).get(name, Curve()) if parts else Curve()

    def training(self, name: str) -> Curve:
        """A scalar of the training log, at its finest."""
        return self.scalars.get(TRAIN, {}).get(name) or self.scalars.get(EPOCHS, {}).get(name) or Curve()

    def validation(self, name: str) -> Curve:
        """A scalar of the validation subset ``valid``, or of the first one by name if there is none called so."""
        subsets = sorted(set(self.scalars) - {*NOT_VALIDATION}, key=lambda part: (part != "valid", part))
        return self.scalars[subsets[0]].get(name, Curve()) if subsets else Curve()


def read_run(path: Path) -> Run:
    """Read all event files of a run.

    Raises:
        BadInput: there is no such folder, or nothing of fairseq-train's in it.
    """
    if not path.is_dir():
        raise BadInput(f"No such folder: {path}. Give what --tensorboard-logdir was given.")
    folders = sorted({file.parent for file in path.glob(f"*/{EVENTS}")})
    if not folders:
        raise BadInput(
            f"No event files in {path}/train_inner and the like. Train with --tensorboard-logdir {path}, or give the "
            "folder of one run."
        )
    scalars = {folder.name: _curves(folder) for folder in folders}
    if not any("loss" in curves for curves in scalars.values()):
        raise BadInput(
            f"The event files in {path} are not fairseq-train's: there is no scalar 'loss' in {', '.join(scalars)}."
        )
    torn = [file for folder in folders for file in sorted(folder.glob(EVENTS)) if _is_torn(file)]
    return Run(path, scalars, torn)


def _curves(folder: Path) -> dict[str, Curve]:
    """Each process writes a file. Where a later one starts, what earlier ones wrote from there on is void."""
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted(folder.glob(EVENTS)):
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0})
        events.Reload()
        own = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()[SCALARS]}
        start = min((step for values in own.values() for step in values), default=math.inf)
        for name in [*found]:
            found[name] = {step: value for step, value in found[name].items() if step < start}
        for name, values in own.items():
            found[name].update(values)
    ordered = {name: dict(sorted(values.items())) for name, values in found.items() if values}
    return {name: Curve([*values], [*values.values()]) for name, values in ordered.items()}


def _is_torn(file: Path) -> bool:
    reader = PyRecordReader_New(str(file))
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            return False
        except errors.DataLossError:
            return True
