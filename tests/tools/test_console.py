"""The programs are installed under their names, and say what they take."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import setuptools

from deltasam_plugin.tools.console import Parser, table

ROOT = Path(__file__).resolve().parents[2]


def test_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """setup.py names functions that exist, and each program calls itself by the name under which it is installed."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    exec(compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    scripts = dict(line.split(" = ") for line in given["entry_points"]["console_scripts"])
    assert {"deltasam-find-rho", "deltasam-sharpness"} <= scripts.keys()
    for name, place in scripts.items():
        module, _, function = place.partition(":")
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as end:
            getattr(import_module(module), function)()
        assert end.value.code == 0
        assert f"usage: {name} " in capsys.readouterr().out


@pytest.mark.parametrize("module", ["find_rho", "sharpness"])
def test_modules(module: str) -> None:
    """`python -m` runs them; without arguments they end with one line."""
    command = [sys.executable, "-m", f"deltasam_plugin.{module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("INFO:fairseq")]
    assert line.startswith(f"deltasam-{module.replace('_', '-')}: error: ")


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        Parser("program").parse_args(["--unknown"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "program: error: unrecognized arguments: --unknown\n"


def test_table() -> None:
    assert table([("ρ", "loss"), ("0.05", "1")]) == "| ρ    | loss |\n| ---- | ---- |\n| 0.05 | 1    |"
