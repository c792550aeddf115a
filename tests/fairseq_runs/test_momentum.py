"""--sam-ascent momentum through the real fairseq-train."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import PRECISIONS, TRANSLATION, assert_same_model, base, delta, distance, fairseq_train, scalars

MOMENTUM: list[object] = ["--sam-ascent", "momentum"]


@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_radius_zero_is_the_base_run_and_a_radius_is_realised(
    translation_data: Path, tmp_path: Path, precision: str
) -> None:
    options: list[object] = [*TRANSLATION, *PRECISIONS.get(precision, []), "--update-freq", 2]
    plain = fairseq_train(translation_data, tmp_path / "plain", *options, *base(), updates=4)
    zero = fairseq_train(translation_data, tmp_path / "zero", *options, *delta(rho=0), *MOMENTUM, updates=4)
    assert_same_model(plain, zero)
    logs = ["--tensorboard-logdir", tmp_path / "logs"]
    moved = fairseq_train(translation_data, tmp_path / "moved", *options, *delta(rho=0.5), *MOMENTUM, *logs, updates=4)
    assert distance(moved, plain) > 0
    events = scalars(tmp_path / "logs", "sam_eps_norm", "sam_skipped", "sam_ascent_gnorm")
    assert events["sam_skipped"] == [2, 0, 0, 0]  # both micro-batches of the first update: there is no momentum yet
    assert events["sam_eps_norm"][0] == 0
    assert events["sam_eps_norm"][1:] == pytest.approx([0.5] * 3, rel=1e-4 if precision in ("fp32", "amp") else 0.2)
    assert all(value > 0 for value in events["sam_ascent_gnorm"][1:])
    with pytest.raises(KeyError):
        scalars(tmp_path / "logs", "sam_sharpness")


def test_a_resumed_run_is_the_uninterrupted_one(translation_data: Path, tmp_path: Path) -> None:
    options: list[object] = [*TRANSLATION, *delta(rho=0.5), *MOMENTUM, "--save-interval-updates", 3]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, updates=6)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint_1_3.pt", tmp_path / "resumed" / "checkpoint_last.pt")
    assert_same_model(whole, fairseq_train(translation_data, tmp_path / "resumed", *options, updates=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (delta(optimizer="adadelta"), "with the base optimizer adadelta: it keeps no momentum"),
        (
            [*delta(), "--quant-noise-pq", 0.1],
            "Invalid quant_noise_pq=0.1 (--quant-noise-pq) with --sam-ascent momentum",
        ),
    ],
    ids=["no momentum", "quantization noise"],
)
def test_what_is_refused(translation_data: Path, tmp_path: Path, options: list[object], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *options, *MOMENTUM)
    assert message in str(error.value)
