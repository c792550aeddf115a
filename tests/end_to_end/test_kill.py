"""Killed and interrupted runs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import ADAM, TRANSLATION, USER_DIR, assert_same_model, delta, fairseq_train

KILLS = 20


@pytest.mark.slow
def test_killed_run_continues_to_the_same_weights(translation_data: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments. The run still ends as the uninterrupted one does.

    Without --update-epoch-batch-itr fairseq itself forms other batches in a run that is resumed after its first epoch.
    """
    options = [*TRANSLATION, *ADAM, *delta(), "--label-smoothing", 0.1, "--update-freq", 2]
    options += ["--save-interval-updates", 2, "--keep-interval-updates", 2, "--no-epoch-checkpoints"]
    options += ["--disable-validation", "--update-epoch-batch-itr", True]
    options += ["--cpu", "--seed", 3, "--lr", 0.01, "--batch-size", 16, "--num-workers", 0, "--user-dir", USER_DIR]
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def start(folder: Path, end: int) -> subprocess.Popen[bytes]:
        command = [Path(sys.executable).parent / "fairseq-train", translation_data, *options]
        command += ["--save-dir", folder, "--max-update", end]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(list(map(str, command)), stdout=quiet, stderr=quiet, start_new_session=True)

    draw = random.Random(0)
    reached = [0]
    for _ in range(KILLS):
        process = start(killed, 100_000)
        begin = updates(killed)
        while updates(killed) == begin:  # one more checkpoint, then any moment
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reached.append(updates(killed))
        if not complete(killed):  # fairseq copies it in place
            shutil.copy(newest(killed), killed / "checkpoint_last.pt")
    assert len(set(reached)) == KILLS + 1
    end = reached[-1] + 7
    for folder in (killed, whole):
        assert start(folder, end).wait() == 0
    final = torch.load(killed / "checkpoint_last.pt")
    assert final["optimizer_history"][-1]["num_updates"] == end
    assert_same_model(final, torch.load(whole / "checkpoint_last.pt"))


def updates(folder: Path) -> int:
    """How far the checkpoints of a run have come."""
    return max(map(update_of, folder.glob("checkpoint_*_*.pt")), default=0)


def update_of(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint_*_*.pt"), key=update_of)


def complete(folder: Path) -> bool:
    """Whether checkpoint_last.pt can be read: fairseq copies it from another checkpoint, not atomically."""
    return zipfile.is_zipfile(folder / "checkpoint_last.pt")


def test_interrupt_from_the_keyboard(translation_data: Path, tmp_path: Path) -> None:
    """Ctrl-C at any moment, then resume: the same run."""
    options = [*TRANSLATION, *ADAM, *delta(), "--save-interval-updates", 1]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, updates=8)
    parts = tmp_path / "parts"
    for _ in range(2):
        begin = updates(parts)
        previous = signal.signal(signal.SIGALRM, partial(_interrupt, parts, begin))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        try:
            with pytest.raises(KeyboardInterrupt):
                fairseq_train(translation_data, parts, *options, updates=8)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    assert_same_model(whole, fairseq_train(translation_data, parts, *options, updates=8))
    assert torch.isfinite(whole["model"]["decoder.layers.0.fc1.weight"]).all()


def _interrupt(folder: Path, begin: int, *_: object) -> None:
    if updates(folder) > begin and complete(folder):
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt
