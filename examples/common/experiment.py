"""The fairseq-train commands that an example compares."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# One thread for each run: the matrices are too small for two threads, and the runs train side by side.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Experiment:
    """A few runs of fairseq-train.

    Attributes:
        work: the folder for everything that the example makes.
        commands: for each run, by its name, the options of fairseq-train, except for the folders it writes to. The
            first run is the one that the others are compared with.
        timing_rounds: how often each run takes its turn when seconds per update are measured.
    """

    work: Path
    commands: dict[str, list[str]]
    timing_rounds: int = 12

    def folder(self, run: str) -> Path:
        """Return the folder of a run's checkpoints, events and output."""
        return self.work / "runs" / run

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other processes out of the work folder.

        Yields:
            The lock's file descriptor. The lock is held as long as any process keeps it open.

        Raises:
            SystemExit: another process holds the lock.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"Another process works in {shown(self.work)}. Wait for it, or end it, and run again.")
            yield lock.fileno()


def delta_sam(criterion: str) -> str:
    """Return the options of fairseq-train for δ-SAM around Adam and a criterion."""
    return f"--optimizer delta_sam --base-optimizer adam --criterion delta_sam --base-criterion {criterion}"


def program(name: str) -> str:
    """Return the path of a command that was installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def shown(path: str | Path) -> str:
    """Return a path as it is typed in the current directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as a Markdown table. The first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
