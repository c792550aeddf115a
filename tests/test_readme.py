"""What the README lists is what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from deltasam_plugin.fairseq.criterion import DeltaSAMCriterionConfig
from deltasam_plugin.fairseq.criterions.registry import PER_SAMPLE_LOSSES
from deltasam_plugin.fairseq.optimizer import DeltaSAMOptimizerConfig
from deltasam_plugin.loss import Statistics

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_criterions() -> None:
    listed = re.search(r"Criterions: (.*?)\.\n", README, re.DOTALL)
    assert listed is not None
    base = "label_smoothed_cross_entropy"
    names = {base + n if n.startswith("_") else n for n in re.findall(r"`(\w+)`", listed[1])}
    assert names == {
        name for name, adaptor in PER_SAMPLE_LOSSES.items() if adaptor.__module__.startswith("deltasam_plugin.")
    }


def test_options_and_their_defaults() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", README, re.MULTILINE)
    options = {
        item.name: item.default for cls in (DeltaSAMOptimizerConfig, DeltaSAMCriterionConfig) for item in fields(cls)
    }
    del options["_name"]
    expected = {name.replace("_", "-"): "off" if value is False else str(value) for name, value in options.items()}
    assert {name: value.strip() for name, value in rows} == expected


def test_scalars() -> None:
    assert set(re.findall(r"`(sam_\w+)`", README)) == {f"sam_{item.name}" for item in fields(Statistics)}
