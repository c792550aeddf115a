"""torch's DistributedDataParallel: two real processes over gloo."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "ddp_worker.py"


@pytest.mark.parametrize("mode", ["loss", "step"])
def test_all_ranks_are_identical_after_fifty_updates(mode: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-W", "ignore", str(WORKER)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(rank), address, mode], **pipes) for rank in (0, 1)]
    outputs = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][1] + outputs[1][1]
    assert outputs[0][0] == outputs[1][0]
    assert math.isfinite(float(outputs[0][0].split()[1]))
