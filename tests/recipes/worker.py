"""Commands of fairseq, each in a fresh process that has fairseq imported already, which saves seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

# Neither the plugin nor anything that imports it: that is for --user-dir to do, as late as in a user's process.
IMPORTED = ["fairseq_cli.train", "fairseq_cli.generate", "fairseq_cli.eval_lm", "fairseq_cli.validate"]
IMPORTED += ["fairseq_cli.hydra_train", "torch.utils.tensorboard", "torch._dynamo", "sacrebleu"]
LIMIT = 300  # seconds


def command(name: str, options: list[str], log: Path) -> tuple[int, str]:
    """Run one of fairseq's commands, from the folder of its log.

    Args:
        name: of the module in fairseq_cli.
        options: the command line.
        log: a file for everything that is printed.

    Returns:
        The exit code, and what was printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(name, options, log))
    process.start()
    try:
        process.join(LIMIT)
        if process.is_alive():
            raise TimeoutError(f"{name} was not done after {LIMIT} seconds: {log.read_text()[-2000:]}")
    finally:
        with suppress(ProcessLookupError):  # nothing outlives its command, workers that load data included
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode or 0, log.read_text()


def _run(name: str, options: list[str], log: Path) -> None:
    os.setsid()  # a process group of its own
    multiprocessing.set_start_method("fork", force=True)  # as in a user's process; ours was inherited
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import fairseq
    import numpy as np
    import torch

    torch.set_num_threads(1)
    seed_audio_masks(np)
    np.float = float  # the CRF of fairseq's non-autoregressive models needs numpy < 1.24
    sys.path.append(str(Path(fairseq.__file__).parent))  # for `import examples`, as from the root of its repository
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.chdir(log.parent)
    sys.argv = [name, *options]
    try:
        import_module(f"fairseq_cli.{name}").cli_main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def seed_audio_masks(np: ModuleType) -> None:
    """fairseq's audio models draw masks from generators without a seed: not even base runs could be repeated."""
    fresh = np.random.default_rng
    np.random.default_rng = lambda seed=None: fresh(7 if seed is None else seed)
