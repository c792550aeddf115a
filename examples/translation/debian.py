"""Debian packages, fetched with apt-get and unpacked with dpkg-deb. This installs nothing and needs no privilege."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def fetch(packages: list[str], folder: Path) -> list[Path]:
    """Return the packages' .deb files in `folder`, and download into it those that are missing.

    Raises:
        RuntimeError: a tool is missing, or a package cannot be downloaded. The message says what was tried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {package: sorted(folder.glob(f"{package}_*.deb")) for package in packages}
    missing = [package for package in packages if not files[package]]
    for tool in ["apt-get", "dpkg-deb"] if missing else ["dpkg-deb"]:
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} was not found: this is no Debian or Ubuntu system.")
    if missing:
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as partial:
            download(missing, Path(partial))
            for file in Path(partial).glob("*.deb"):
                file.rename(folder / file.name)
    return [max(folder.glob(f"{package}_*.deb")) for package in packages]


def download(packages: list[str], folder: Path) -> None:
    """Run apt-get download. If apt's package lists do not know the packages, run it again with new lists.

    The new lists go to `folder`. The system's own lists stay as they are.
    """
    print(f"prepare: apt-get download {' '.join(packages)}", flush=True)
    if apt_get(["download", *packages], folder) == 0:
        return
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder}"]
    print("prepare: apt-get update, into a folder of its own", flush=True)
    if apt_get([*own, "update"], folder) != 0 or apt_get([*own, "download", *packages], folder) != 0:
        raise RuntimeError(f"apt-get could not download {', '.join(packages)}, not even with new package lists.")


def apt_get(arguments: list[str], folder: Path) -> int:
    """Run apt-get in `folder` and return its exit code."""
    # Run by root, apt would complain that its unprivileged user may not write here. That user is not needed.
    return subprocess.run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *arguments], cwd=folder, stdout=sys.stderr
    ).returncode


def unpack(files: list[Path], folder: Path) -> None:
    """Unpack .deb files into a folder."""
    for file in files:
        subprocess.run(["dpkg-deb", "-x", str(file), str(folder)], check=True)
