"""Checkpoints of every criterion can be measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from deltasam_plugin import sharpness
from tests.helpers.corpora import RECIPES, corpus
from tests.helpers.runs import ADAM, base, fairseq_train

QUICK: list[object] = ["--disable-validation", "--batch-size", 8]
ONE_BY_ONE = {"adaptive_loss lstm", "regularized", "wav2vec 2.0", "wav2vec", "wav2vec infonce", "hubert"}
UNCOMPUTED = {"ctc": "Cannot compute ctc without dropout: No module named 'editdistance'"}  # as fairseq's validation


@pytest.mark.usefixtures("reproducible_masks")
@pytest.mark.parametrize("name", RECIPES)
def test_sharpness(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    recipe = RECIPES[name]
    data = corpus(recipe.corpus, tmp_path_factory.getbasetemp())
    fairseq_train(data, tmp_path, *QUICK, *recipe.command(data, ADAM), *base(recipe.criterion), updates=2)
    capsys.readouterr()
    options = ["--gen-subset", "train", "--radii", 0.02, "--max-batches", 1, "--batch-size", 8, "--directions", 1]
    command = [str(word) for word in [data, "--path", tmp_path / "checkpoint_last.pt", *options, "--cpu"]]
    if name in UNCOMPUTED:
        with pytest.raises(SystemExit):
            sharpness.main(command)
        assert UNCOMPUTED[name] in capsys.readouterr().err
        return
    sharpness.main(command)
    output, messages = capsys.readouterr()
    *_, loss, random, batch, per_sample, _, _ = output.splitlines()[2].strip("| ").split(" | ")
    assert all(map(math.isfinite, map(float, (loss, random, batch, per_sample))))
    assert 0 < float(batch) <= float(per_sample)
    assert ("one by one" in messages) == (name in ONE_BY_ONE)
