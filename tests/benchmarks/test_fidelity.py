"""Fidelity: gradients belong to the right samples, no weights are better than the best, a study goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from benchmarks import fidelity
from benchmarks.fidelity import Neighbourhood, Row, batches, best_weights, compared, measure, report
from deltasam_plugin.tools.checkpoints import Checkpoint, load
from tests.helpers.runs import TRANSLATION, base, fairseq_train

RHO = 0.1
MATRICES = arrays.arrays("f8", (2, 4, 6), elements=st.integers(-8, 8))


@pytest.fixture(scope="module")
def path(translation_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a real run."""
    folder = tmp_path_factory.mktemp("run")
    fairseq_train(translation_data, folder, *TRANSLATION, *base(), updates=12)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def checkpoint(path: Path, translation_data: Path) -> Checkpoint:
    """The same, loaded."""
    return load(path, str(translation_data), cpu=True)


def first_order_error(moved: Tensor, units: Tensor, exact: Tensor, c: Tensor) -> float:
    return float((c @ moved / (c @ units).norm().clamp(min=1e-15) - exact).norm())


@given(MATRICES, arrays.arrays("f8", 4, elements=st.integers(0, 4)))
def test_the_best_weights_are_no_worse_than_any_start(values: Tensor, drawn: Tensor) -> None:
    moved, directions = (torch.from_numpy(part) for part in values)
    units = torch.eye(4, 6).double() + torch.nn.functional.normalize(directions, dim=1) / 4
    exact = moved.sum(0) + 1
    starts = [torch.ones(4).double(), torch.from_numpy(drawn) + 0.1]
    best = best_weights(moved, units, exact, starts)
    assert (best >= 0).all()
    for start in starts:
        error = first_order_error(moved, units, exact, start)
        assert first_order_error(moved, units, exact, best) <= error + 1e-6 * exact.norm()


def test_weights_that_give_the_exact_correction_are_found() -> None:
    torch.manual_seed(0)
    moved, units, c = torch.randn(5, 30).double(), torch.eye(5, 30).double(), torch.tensor([1.0, 0, 2, 3, 0]).double()
    exact = c @ moved / (c @ units).norm()
    best = best_weights(moved, units, exact, [torch.ones(5)])
    assert best / best.norm() == pytest.approx(c / c.norm(), abs=1e-3)


def test_error_and_cosine_of_an_example() -> None:
    assert compared(torch.tensor([2.0, 0]), torch.tensor([1.0, 0])) == pytest.approx((1, 1))
    assert compared(torch.tensor([0.0, 3]), torch.tensor([4.0, 0])) == pytest.approx((1.25, 0))


def test_gradients_belong_to_the_samples_of_the_batch_in_its_order(checkpoint: Checkpoint) -> None:
    dataset, possible = checkpoint.batches("train", None, 6)
    indices = next(batches(dataset, possible, 6, 1))
    near = Neighbourhood(checkpoint, dataset, indices)
    together = checkpoint.forward(checkpoint.sample(dataset, indices))[0].losses
    for loss, gradient in zip(together, near.own, strict=True):
        found = torch.autograd.grad(loss, list(checkpoint.parameters.values()), retain_graph=True)
        torch.testing.assert_close(torch.cat([g.flatten() for g in found]), gradient, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(near.own.sum(0), near.whole, rtol=1e-3, atol=1e-4)


def test_one_perturbation_is_exact_for_a_sample_that_is_repeated(checkpoint: Checkpoint) -> None:
    dataset, _ = checkpoint.batches("train", None, 6)
    before = [parameter.clone() for parameter in checkpoint.parameters.values()]
    found = measure(Neighbourhood(checkpoint, dataset, [7, 7, 7]), RHO, seed=1, by_logits=True)
    for error, cosine in found.values():
        assert error < 0.01
        assert cosine > 0.999
    assert all(map(torch.equal, before, checkpoint.parameters.values()))


def test_groups_come_nearer_the_smaller_they_are_and_nothing_beats_the_best_weights(checkpoint: Checkpoint) -> None:
    dataset, possible = checkpoint.batches("train", None, 16)
    found = measure(
        Neighbourhood(checkpoint, dataset, next(batches(dataset, possible, 16, 1))), RHO, seed=1, by_logits=True
    )
    errors = {method: error for method, (error, _) in found.items()}
    assert errors["groups of 2"] < errors["groups of 4"] < errors["uniform"]
    assert errors["best"] == min(error for method, error in errors.items() if not method.startswith("groups"))


def test_a_report_shows_means_and_intervals() -> None:
    rows = [Row("end", 16, 0.05, i, "uniform", 0.8 + 0.1 * i, 0.5) for i in range(3)]
    rows += [Row("end", 16, 0.05, i, "kl", 1.0 + 0.11 * i, 0.4) for i in range(3)]
    errors, differences, cosines, counts = re.split(r"^.*:$", report(rows), flags=re.MULTILINE)[1:]
    assert "| 0.90 ± 0.25 | 1.11 ± 0.27 |" in errors  # 4.303 · 0.1 / √3
    assert "| 0.00 ± 0.00 | 0.21 ± 0.02 |" in differences
    assert "| 0.50 ± 0.00 | 0.40 ± 0.00 |" in cosines
    assert re.search(r"kl +\| 1 +\| 0 +\| 0 +\| 1 +\| 0 +\| 1 ", counts)


def test_a_study_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: Path,
    translation_data: Path,
) -> None:
    monkeypatch.setattr(fidelity, "RESULTS", tmp_path / "fidelity.csv")
    command = ["fidelity", str(translation_data), f"toy={path}", "--batch-size", "4", "--rho", "0.1"]
    for number in ("1", "2", "2"):
        monkeypatch.setattr(sys, "argv", [*command, "--batches", number, "--report"])
        fidelity.main()
    output = capsys.readouterr().out
    assert output.count("batch 1 / ") == 1
    assert output.count("batch 2 / ") == 1
    assert "| toy        | 4     | 0.1 | 2       |" in output
    found = fidelity.rows()
    assert {row.batch for row in found} == {0, 1}
    assert len(found) == len({row[:5] for row in found})
