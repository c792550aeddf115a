"""Options of the base components, of fairseq's other sections, and of components that users write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import homemade
from tests.helpers.corpora import S2T, corpus
from tests.helpers.nested import NESTED
from tests.helpers.runs import ADAM, TRANSLATION, assert_same_model, base, delta, fairseq_train, scalars

CTC = "label_smoothed_cross_entropy_with_ctc"


def test_a_model_that_reads_an_option_of_the_criterion(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The speech Transformer builds a layer for CTC if its weight is positive, which is the default."""
    place = S2T.index("--ctc-weight")
    options = [*S2T[:place], *S2T[place + 2 :], *ADAM]
    data = corpus("features", tmp_path_factory.mktemp("corpus"))
    one = fairseq_train(data, tmp_path / "base", *options, *base(CTC), updates=2)
    other = fairseq_train(data, tmp_path / "delta", *options, *delta(CTC, rho=0), updates=2)
    assert any("ctc_proj" in name for name in one["model"])
    assert_same_model(one, other)


def test_another_criterion_with_nested_options_is_not_in_the_way(translation_data: Path, tmp_path: Path) -> None:
    options = [*TRANSLATION, *ADAM]
    one = fairseq_train(translation_data, tmp_path / "base", *options, *base("cross_entropy"), updates=2)
    other = fairseq_train(translation_data, tmp_path / "delta", *options, *delta("cross_entropy", rho=0), updates=2)
    assert_same_model(one, other)


@pytest.mark.parametrize(("given", "strength"), [([], 0.5), (["--strength", 0.75], 0.75)])
def test_a_base_criterion_with_nested_options_and_scalars_of_its_own(
    translation_data: Path, tmp_path: Path, given: list[object], strength: float
) -> None:
    finals = []
    for name, own in {"base": base(NESTED), "delta": delta(NESTED, rho=0)}.items():
        logs = tmp_path / name / "logs"
        options = [*TRANSLATION, *ADAM, *own, *given, "--tensorboard-logdir", logs]
        finals.append(fairseq_train(translation_data, tmp_path / name, *options, updates=2))
        assert scalars(logs, "sam_score") == {"sam_score": [strength] * 2}
    assert_same_model(*finals)


@pytest.mark.parametrize("option", [["--sam-interval", 2], ["--sam-warmup-updates", 100]])
def test_a_task_that_seeds_torch_itself(translation_data: Path, tmp_path: Path, option: list[object]) -> None:
    options = ["--task", homemade.SEEDING, "--arch", "transformer_tiny", *ADAM, *delta(), *option]
    with pytest.raises(Exception, match=r"number of the update.*seeds torch itself.*torch\.manual_seed"):
        fairseq_train(translation_data, tmp_path, *options, updates=3)


@pytest.mark.parametrize(
    ("rates", "radii"),
    [
        (["--lr", 0.01, "--lr-scheduler", "triangular", "--max-lr", 0.02, "--lr-period-updates", 4], [0.1, 0.15, 0.2]),
        (["--lr", 0], [0.2] * 3),
    ],
)
def test_the_radius_follows_the_greatest_learning_rate(
    translation_data: Path, tmp_path: Path, rates: list[object], radii: list[float]
) -> None:
    options = [*TRANSLATION, *delta(rho=0.2), "--sam-weighting", "uniform", "--sam-rho-schedule", "lr", *rates]
    fairseq_train(translation_data, tmp_path, *options, "--tensorboard-logdir", tmp_path / "logs", updates=3)
    assert scalars(tmp_path / "logs", "sam_rho")["sam_rho"] == pytest.approx(radii, abs=1e-6)
