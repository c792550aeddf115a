"""fairseq-train in two real processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_cli import preprocess

from tests.helpers.runs import ADAM, TRANSLATION, delta, distance, run, scalars, write_translation

SPY = "spying_label_smoothed_cross_entropy"
SPYING_USER_DIR = '''"""A user-dir of one's own, with a criterion that writes down which weights it saw in training."""
import ctypes, hashlib, os
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion, LabelSmoothedCrossEntropyCriterionConfig)
import torch
from deltasam_plugin import Logits, per_sample_losses

torch.cuda.ByteTensor = torch.ByteTensor  # fairseq gathers objects through CUDA even on a CPU
torch.Tensor.pin_memory = lambda tensor: tensor

@register_criterion("spying_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class SpyingCriterion(LabelSmoothedCrossEntropyCriterion):
    def forward(self, model, sample, reduce=True):
        if self.training and torch.is_grad_enabled():
            digest = hashlib.sha256()
            for parameter in model.parameters():
                # From memory: instance mode cannot know that what is read from a parameter is not used in the pass.
                size = parameter.numel() * parameter.element_size()
                digest.update(ctypes.string_at(parameter.data_ptr(), size))
            with open(os.environ["SPY"], "a") as notes:
                notes.write(digest.hexdigest() + "\\n")
            calls = len(open(os.environ["SPY"]).readlines())
            if os.environ["SPY"].endswith("notes1") and os.environ.get("MEMORY_ENDS_AT") == str(calls):
                raise RuntimeError("out of memory (simulated)")
        return super().forward(model, sample, reduce)

    @staticmethod
    def logging_outputs_can_be_summed():
        return "MEMORY_ENDS_AT" not in os.environ  # a sum would need an output of every worker

def logits(criterion, model, sample, net_output):
    return Logits.by_sample(net_output[0], sample["target"].ne(criterion.padding_idx))

@per_sample_losses("spying_label_smoothed_cross_entropy", logits=logits)
def losses(criterion, model, sample, net_output):
    values, _ = criterion.compute_loss(model, net_output, sample, reduce=False)
    return values.view(sample["target"].size(0), -1).sum(dim=1)
'''


def without_checks(digests: list[str]) -> list[str]:
    """What the two passes of each batch saw: batches 1, 2, 4 and so on run the first pass again, to compare."""
    kept, batch = [], 1
    while digests:
        checked = batch & (batch - 1) == 0
        kept += digests[:1] + digests[1 + checked : 2 + checked]
        digests, batch = digests[2 + checked :], batch + 1
    return kept


class Runs:
    """fairseq-train in one or several processes, with a criterion that records the weights."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data
        (root / "spying").mkdir()
        (root / "spying" / "__init__.py").write_text(SPYING_USER_DIR)

    def train(self, name: str, *options: object, workers: int) -> dict[str, Any]:
        """The last checkpoint, and in ``notes`` the weights that each worker saw: w, w + ε, w, w + ε, …"""
        folder = self.root / name
        folder.mkdir()
        command: list[object] = [Path(sys.executable).parent / "fairseq-train", self.data, *TRANSLATION, "--dropout", 0]
        command += ["--cpu", "--seed", 3, "--num-workers", 0, "--user-dir", self.root / "spying", "--save-dir", folder]
        command += ["--required-batch-size-multiple", 1, "--tensorboard-logdir", folder / "logs", "--log-interval", 1]
        command += ["--disable-validation", *delta(SPY), *options]
        if workers > 1:
            command += ["--ddp-backend", "legacy_ddp", "--distributed-world-size", workers, "--distributed-no-spawn"]
            command += ["--distributed-backend", "gloo", "--distributed-init-method", f"file://{folder}/workers"]
        processes = []
        for rank in range(workers):
            ranked = [*command, "--distributed-rank", rank] if workers > 1 else command
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPY": str(folder / f"notes{rank}")}
            with open(folder / f"output{rank}", "w") as output:
                started = subprocess.Popen(list(map(str, ranked)), env=environment, stdout=output, stderr=output)
            processes.append(started)
        codes = [process.wait() for process in processes]
        assert codes == [0] * workers, (folder / f"output{codes.index(max(codes))}").read_text()[-4000:]
        seen = [(folder / f"notes{rank}").read_text().split() for rank in range(workers)]
        notes = [without_checks(digests) for digests in seen]
        return {**torch.load(folder / "checkpoint_last.pt"), "notes": notes, "seen": seen, "logs": folder / "logs"}


@pytest.fixture
def runs(translation_data: Path, tmp_path: Path) -> Runs:
    return Runs(tmp_path, translation_data)


def test_workers_stay_identical_and_perturb_each_for_itself(runs: Runs) -> None:
    """m-sharpness: for 50 updates the weights agree bit for bit, and the perturbations differ."""
    final = runs.train("two", *ADAM, "--lr", 0.005, "--batch-size", 8, "--max-update", 51, workers=2)
    first, second = final["notes"]
    assert len(first) == 2 * 51
    assert first[0::2] == second[0::2]
    assert not set(first[1::2]) & set(second[1::2])
    assert set(first[0::2]).isdisjoint(first[1::2])
    assert scalars(final["logs"], "sam_eps_norm")["sam_eps_norm"] == pytest.approx([0.05] * 51, rel=1e-4)


def test_two_workers_are_two_micro_batches(runs: Runs) -> None:
    """Seven batches an epoch: one worker gets a dummy batch as the eighth, which changes nothing."""
    options = ["--optimizer", "delta_sam", "--base-optimizer", "sgd", "--lr", 0.02, "--batch-size", 24]
    options += ["--max-update", 8]
    two = runs.train("two", *options, workers=2)
    accumulated = runs.train("accumulated", *options, "--update-freq", 2, workers=1)
    unlike = runs.train("unlike", *options, "--update-freq", 2, "--sam-rho", 0.049, workers=1)
    assert two["notes"][0][0::2] == two["notes"][1][0::2]
    assert 5 * distance(two, accumulated) < distance(two, unlike)
    for name in ("sam_sharpness", "sam_ess", "loss"):
        one, other = (scalars(final["logs"], name)[name] for final in (two, accumulated))
        assert one == pytest.approx(other, rel=0.02), name


@pytest.mark.parametrize("call", [7, 8], ids=["ascent", "second pass"])
def test_a_worker_that_runs_out_of_memory_takes_the_step_of_the_others(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """In the third update the second worker has no gradient of its own."""
    monkeypatch.setenv("MEMORY_ENDS_AT", str(call))
    options = ["--optimizer", "delta_sam", "--base-optimizer", "sgd", "--lr", 0.02, "--batch-size", 8]
    first, second = runs.train("two", *options, "--max-update", 5, workers=2)["seen"]
    assert second[6] == first[6]
    assert [first[8], first[11]] == [second[call], second[call + 3]]  # w of the two updates that follow
    assert len(first) == 13


def test_a_refusal_is_one_message_of_each_worker(runs: Runs) -> None:
    with pytest.raises(AssertionError):
        runs.train("refused", "--optimizer", "delta_sam", "--lr", 0.02, "--batch-size", 8, "--sam-rho", -1, workers=2)
    for rank in range(2):
        output = (runs.root / "refused" / f"output{rank}").read_text()
        assert output.count("deltasam_plugin: error: Invalid rho=-1.0 (--sam-rho).") == 1
        assert "Traceback" not in output


@pytest.fixture
def one_batch(tmp_path: Path) -> Runs:
    """Runs on sixteen sentences."""
    write_translation(tmp_path / "train", 16, seed=7)
    source = ["--source-lang", "src", "--target-lang", "tgt", "--trainpref", tmp_path / "train"]
    run(preprocess.cli_main, *source, "--validpref", tmp_path / "train", "--destdir", tmp_path / "bin")
    return Runs(tmp_path, tmp_path / "bin")


def test_perturbations_of_instances_do_not_depend_on_the_worker(one_batch: Runs) -> None:
    """Two workers with half the batch each are one worker with the whole batch."""
    options = ["--optimizer", "delta_sam", "--base-optimizer", "sgd", "--lr", 0.02, "--max-update", 8]
    options += ["--sam-perturbation", "instance"]
    whole = one_batch.train("whole", *options, "--batch-size", 16, workers=1)
    two = one_batch.train("two", *options, "--batch-size", 8, workers=2)
    unlike = one_batch.train("unlike", *options, "--batch-size", 16, "--sam-rho", 0.049, workers=1)
    assert two["notes"][0] == two["notes"][1]
    assert 5 * distance(whole, two) < distance(whole, unlike)
    for name in ("sam_ascent_gnorm", "sam_sharpness"):
        one, other = (scalars(final["logs"], name)[name] for final in (whole, two))
        assert one == pytest.approx(other, rel=0.002), name


@pytest.mark.parametrize("weighting", ["curvature", "kl", "uniform"])
def test_synchronised_workers_are_one_worker(one_batch: Runs, weighting: str) -> None:
    """--sam-sync: the weights of all samples together, one ascent, as one process with the whole batch."""
    options = ["--optimizer", "delta_sam", "--base-optimizer", "sgd", "--lr", 0.02, "--max-update", 8]
    options += ["--sam-weighting", weighting]
    whole = one_batch.train("whole", *options, "--batch-size", 16, workers=1)
    synchronised = one_batch.train("synchronised", *options, "--batch-size", 8, "--sam-sync", workers=2)
    apart = one_batch.train("apart", *options, "--batch-size", 8, workers=2)
    assert synchronised["notes"][0] == synchronised["notes"][1]
    assert 5 * distance(whole, synchronised) < distance(whole, apart)
    weights = ("sam_ess", "sam_weight_max") if weighting != "uniform" else ()
    for name in (*weights, "sam_ascent_gnorm", "sam_sharpness"):
        one, other = (scalars(final["logs"], name)[name] for final in (whole, synchronised))
        assert one == pytest.approx(other, rel=0.02), name


@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
def test_a_synchronised_worker_with_a_dummy_batch_contributes_nothing(one_batch: Runs, weighting: str) -> None:
    """One batch for two workers: the same as without the second worker, bit for bit."""
    options = ["--optimizer", "delta_sam", "--base-optimizer", "sgd", "--lr", 0.02, "--max-update", 4]
    options += ["--batch-size", 16, "--sam-weighting", weighting]
    alone = one_batch.train("alone", *options, workers=1)
    joined = one_batch.train("joined", *options, "--sam-sync", workers=2)
    assert distance(alone, joined) == 0
    assert alone["notes"][0] == joined["notes"][0]


@pytest.mark.parametrize("weighting", ["curvature", "uniform"])
def test_synchronised_workers_and_a_dummy_batch(runs: Runs, weighting: str) -> None:
    """The worker with the dummy batch takes part in the exchange."""
    options = ["--lr", 0.02, "--batch-size", 24, "--max-update", 8, "--sam-sync", "--sam-weighting", weighting]
    final = runs.train("two", *options, "--optimizer", "delta_sam", "--base-optimizer", "sgd", workers=2)
    assert final["notes"][0] == final["notes"][1]
    assert scalars(final["logs"], "sam_skipped")["sam_skipped"] == [0] * 8
