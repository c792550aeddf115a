"""fairseq-preprocess, which makes binary data of text."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from .experiment import program


def preprocess(options: Iterable[str], folder: Path) -> None:
    """Run fairseq-preprocess.

    Args:
        options: all but --destdir.
        folder: where the binary data go.

    Raises:
        SystemExit: it has failed; the message begins with what it printed.
    """
    command = [program("fairseq-preprocess"), *options, "--destdir", str(folder)]
    log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if log.returncode:
        sys.exit(f"{log.stdout}\nfairseq-preprocess failed on {folder} (exit code {log.returncode}).")
    (folder / "preprocess.log").unlink(missing_ok=True)  # it names folders that are renamed
