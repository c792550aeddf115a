"""Train the runs of an experiment, as many side by side as there are cores, and show their progress.

A finished run is kept. An interrupted run continues from its last checkpoint. A run whose command has changed starts
anew.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from .experiment import ENVIRONMENT, Experiment, program, shown

POLL = 0.5  # seconds


class Training:
    """One fairseq-train process. Its output goes to train.log in the run's folder, with TensorBoard events beside it.

    Args:
        run: the name of the run.
        options: those of fairseq-train, except for the folders it writes to.
        folder: the folder of the run.
        keep: file descriptors that stay open as long as the process lives.
    """

    def __init__(self, run: str, options: list[str], folder: Path, keep: Iterable[int] = ()) -> None:
        self.run = run
        self.log = folder / "train.log"
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [program("fairseq-train"), *options, "--save-dir", str(folder), "--tensorboard-logdir", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                pass_fds=tuple(keep),
            )
        self._reader: TextIO = self.log.open(errors="replace")
        self._reader.seek(0, os.SEEK_END)
        print(f"{self.run:9} | starts; full output: {shown(self.log)}", flush=True)

    def show_progress(self) -> None:
        """Print the lines on training and validation that are new since the last call."""
        for line in self._reader.readlines():
            _, _, message = line.rstrip().partition(" | INFO | ")
            logger, _, progress = message.partition(" | ")
            if logger in ("train_inner", "train", "valid") and progress.startswith("epoch"):
                print(f"{self.run:9} | {'' if logger == 'train_inner' else logger + ' '}{progress}", flush=True)

    def finished(self) -> bool:
        """Return whether the process has ended.

        Raises:
            SystemExit: the process has failed. The message holds the end of its output.
        """
        ended = self.process.poll() is not None
        self.show_progress()
        if self.process.returncode:
            tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-25:])
            sys.exit(f"{tail}\n{self.run}: fairseq-train failed ({self.process.returncode}); see {shown(self.log)}")
        return ended


def train_all(experiment: Experiment, keep: Iterable[int] = ()) -> None:
    """Train every run to its end.

    The last run of the experiment starts first. The first run is the cheapest and fills the gap at the end.

    Args:
        keep: file descriptors that stay open as long as any fairseq-train process lives.
    """
    waiting = [run for run in reversed(experiment.commands) if not ready(experiment, run)]
    running: list[Training] = []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                run = waiting.pop(0)
                running.append(Training(run, experiment.commands[run], experiment.folder(run), keep))
            time.sleep(POLL)
            for training in [training for training in running if training.finished()]:
                (experiment.folder(training.run) / "finished").touch()
                running.remove(training)
    finally:
        for training in running:
            training.process.terminate()
            training.process.wait()


def ready(experiment: Experiment, run: str) -> bool:
    """Prepare the folder of a run, and return whether the run is finished already."""
    folder = experiment.folder(run)
    command = " ".join(experiment.commands[run])
    record = folder / "command.txt"
    if folder.exists() and (not record.exists() or record.read_text() != command):
        print(f"{run:9} | its command has changed: starts anew", flush=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(command)
    if (folder / "finished").exists():
        print(f"{run:9} | is there", flush=True)
        return True
    discard_if_torn(folder / "checkpoint_last.pt")
    return False


def discard_if_torn(checkpoint: Path) -> None:
    """Remove a checkpoint that fairseq was still writing when it was killed."""
    if checkpoint.exists() and not zipfile.is_zipfile(checkpoint):
        checkpoint.unlink()
