"""Failures in every pass: afterwards the weights are w, and fairseq continues or stops as in the base run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import faulty
from tests.helpers.runs import (
    ADAM,
    HALF,
    TRANSLATION,
    assert_same_model,
    base,
    delta,
    distance,
    fairseq_train,
    scalars,
    trained,
)

OPTIONS = [*TRANSLATION, *ADAM, *delta(faulty.NAME), "--save-interval-updates", 1]


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faulty, "plan", faulty.Plan())


@pytest.fixture(scope="module")
def reference(translation_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """The checkpoints of a run without a failure, by number of updates."""
    root = tmp_path_factory.mktemp("undisturbed")
    fairseq_train(translation_data, root, *OPTIONS, updates=5)
    return {update: torch.load(root / f"checkpoint_1_{update}.pt") for update in (3, 5)}


@pytest.mark.parametrize("where", faulty.PASSES)
def test_crash_holds_the_weights(translation_data: Path, tmp_path: Path, reference: dict, where: str) -> None:
    """crash.pt, which fairseq writes then, holds the state after update 3. Resuming gives the usual update 5."""
    faulty.plan = faulty.Plan(batch=3, where=where, error=ValueError("cosmic ray"))
    with pytest.raises(ValueError, match="cosmic ray"):
        fairseq_train(translation_data, tmp_path, *OPTIONS, updates=5)
    assert_same_model(torch.load(tmp_path / "crash.pt"), reference[3])

    faulty.plan = faulty.Plan()
    assert_same_model(fairseq_train(translation_data, tmp_path, *OPTIONS, updates=5), reference[5])


@pytest.mark.parametrize("where", faulty.PASSES)
def test_out_of_memory_drops_the_batch(translation_data: Path, tmp_path: Path, where: str) -> None:
    """fairseq continues without the batch. The result is the same for every pass."""
    finals = []
    for folder, failing in {"one": "probe -" if where == "probe +" else "probe +", "other": where}.items():
        faulty.plan = faulty.Plan(batch=2, where=failing, error=RuntimeError("CUDA out of memory (simulated)"))
        finals.append(fairseq_train(translation_data, tmp_path / folder, *OPTIONS, updates=5))
    assert_same_model(*finals)


def test_nan_loss_is_fairseqs_own_error(translation_data: Path, tmp_path: Path, reference: dict) -> None:
    """A NaN loss ends the run as it ends the base run, with w in crash.pt."""
    ends = []
    for name, options in {"base": base(faulty.NAME), "delta": delta(faulty.NAME)}.items():
        faulty.plan = faulty.Plan(batch=3, where="second forward", base=name == "base")
        with pytest.raises((FloatingPointError, StopIteration)) as end:
            fairseq_train(translation_data, tmp_path / name, *TRANSLATION, *ADAM, *options, updates=5)
        error: BaseException | None = end.value
        while not isinstance(error, FloatingPointError):  # fairseq's detector may stumble over what it looks into
            assert error is not None
            error = error.__context__
        ends.append((type(end.value), str(error)))
    assert ends[0] == ends[1]
    assert ends[0][1] == "gradients are Nan/Inf"
    assert_same_model(torch.load(tmp_path / "delta" / "crash.pt"), reference[3])


def test_nan_in_the_ascent_gives_no_ascent(translation_data: Path, tmp_path: Path) -> None:
    """Without an ascent the gradient is taken at w, and the batch is counted."""
    faulty.plan = faulty.Plan(batch=1, where="ascent")
    options = [*OPTIONS, "--tensorboard-logdir", tmp_path / "logs"]
    final = fairseq_train(translation_data, tmp_path, *options, updates=3)
    logged = scalars(tmp_path / "logs", "sam_skipped", "sam_eps_norm", "sam_ascent_gnorm")
    assert logged["sam_skipped"] == [0, 1, 0]
    assert logged["sam_eps_norm"] == pytest.approx([0.05, 0, 0.05], rel=1e-3)
    assert logged["sam_ascent_gnorm"][1] == 0
    assert all(torch.isfinite(weight).all() for weight in trained(final["model"]).values())


def test_nan_in_the_probes_gives_uniform_weights(translation_data: Path, tmp_path: Path) -> None:
    faulty.plan = faulty.Plan(batch=3, where="probe +")
    final = fairseq_train(translation_data, tmp_path, *OPTIONS, updates=5)
    assert all(torch.isfinite(weight).all() for weight in trained(final["model"]).values())


MATRIX = {
    "fp32": [],
    "fp16": HALF,
    "memory-efficient-fp16": ["--memory-efficient-fp16", "--fp16-init-scale", 4],
    "amp": ["--amp", "--fp16-init-scale", 4],
}


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize("fault", ["crash", "out of memory"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", MATRIX)
def test_every_fault_in_every_pass(
    translation_data: Path, tmp_path: Path, precision: str, accumulation: int, fault: str
) -> None:
    """Fault × pass × precision × accumulation, in the last micro-batch of update 3.

    After a crash the weights are w, and the resumed run equals the uninterrupted one. After out-of-memory the run
    continues without the batch, with the same result for every pass.
    """
    options = [*OPTIONS, *MATRIX[precision], "--update-freq", accumulation]
    calm, ends = tmp_path / "calm", []
    before = fairseq_train(translation_data, calm, *options, updates=2)
    resumed = fairseq_train(translation_data, calm, *options, updates=4)
    error = ValueError("cosmic ray") if fault == "crash" else RuntimeError("CUDA out of memory (simulated)")
    for where in faulty.PASSES:
        folder = tmp_path / where.replace(" ", "")
        batch, half = 2 * accumulation + accumulation - 1, precision != "fp32"
        faulty.plan = faulty.Plan(batch=batch, where=where, error=error, half=half)
        if fault == "crash":
            with pytest.raises(ValueError, match="cosmic ray"):
                fairseq_train(translation_data, folder, *options, updates=4)
            assert_same_model(torch.load(folder / "crash.pt"), before)
            faulty.plan = faulty.Plan()
            (folder / "checkpoint_last.pt").unlink(missing_ok=True)
            (folder / "checkpoint_1_2.pt").replace(folder / "checkpoint_last.pt")
            ends.append(resumed)
        ends.append(fairseq_train(translation_data, folder, *options, updates=4))
        assert ends[-1]["optimizer_history"][-1]["num_updates"] == 4
        assert_same_model(ends[0], ends[-1])


@pytest.mark.usefixtures("cuda_is_cpu")
def test_amp_tries_the_batch_again(translation_data: Path, tmp_path: Path) -> None:
    """After a non-finite gradient under --amp fairseq runs the batch again. At ρ = 0 this is the base run."""
    options = [*TRANSLATION, *ADAM, "--amp", "--fp16-init-scale", 4, "--disable-validation"]
    runs = {"base": base(faulty.NAME), "zero": delta(faulty.NAME, rho=0), "delta": delta(faulty.NAME)}
    finals = {}
    for name, changed in runs.items():
        faulty.plan = faulty.Plan(batch=2, where="second forward", base=name == "base", half=True)
        finals[name] = fairseq_train(translation_data, tmp_path / name, *options, *changed, updates=4)
    faulty.plan = faulty.Plan()
    calm = fairseq_train(translation_data, tmp_path / "calm", *options, *base(faulty.NAME), updates=4)
    assert_same_model(finals["base"], finals["zero"])
    assert distance(finals["base"], calm) > 0  # the second attempt draws other random numbers
    assert finals["delta"]["optimizer_history"][-1]["num_updates"] == 4
    assert all(torch.isfinite(weight).all() for weight in trained(finals["delta"]["model"]).values())
