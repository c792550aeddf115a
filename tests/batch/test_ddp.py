"""torch's DistributedDataParallel: two real processes over gloo."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "ddp_worker.py"


def two_workers(mode: str, folder: Path) -> tuple[list[int | None], list[tuple[str, str]]]:
    """Exit codes and outputs of two processes that meet in this folder."""
    address = f"file://{folder}/workers"
    command = [sys.executable, "-W", "ignore", str(WORKER)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(rank), address, mode], **pipes) for rank in (0, 1)]
    outputs = [worker.communicate() for worker in workers]
    return [worker.returncode for worker in workers], outputs


MODES = ["loss", "sync", "step", "static", "instance", "momentum", "noise", "weighted", "surrogate_gap"]


@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_are_identical_after_fifty_updates(tmp_path: Path, mode: str) -> None:
    codes, outputs = two_workers(mode, tmp_path)
    assert codes == [0, 0], outputs[0][1] + outputs[1][1]
    assert outputs[0][0] == outputs[1][0]
    assert math.isfinite(float(outputs[0][0].split()[1]))


def test_a_static_graph_is_refused_in_instance_mode(tmp_path: Path) -> None:
    codes, outputs = two_workers("static-instance", tmp_path)
    assert codes == [1, 1]
    for _, errors in outputs:
        assert "DistributedDataParallel with static_graph=True: in instance mode" in errors
