"""Half precision: masters, rounding and overflow."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from deltasam_plugin.batch.displacement import ascended
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.fairseq.parameters import fp32_copies
from deltasam_plugin.loss import Objective, sharpness_aware_loss
from deltasam_plugin.settings import Settings
from tests.helpers.runs import ADAM, HALF, TRANSLATION, assert_same_model, base, delta, fairseq_train, scalars, trained

FIVE_MILLION = ["--encoder-layers", 3, "--decoder-layers", 3, "--encoder-attention-heads", 4]
FIVE_MILLION += ["--encoder-embed-dim", 256, "--decoder-embed-dim", 256, "--decoder-attention-heads", 4]
FIVE_MILLION += ["--encoder-ffn-embed-dim", 1024, "--decoder-ffn-embed-dim", 1024]

PRECISIONS: dict[str, list[object]] = {
    "fp16": HALF,
    "fp16 flattened": ["--fp16", "--fp16-init-scale", 4],
    "memory-efficient-fp16": ["--memory-efficient-fp16", "--fp16-init-scale", 4],
    "amp": ["--amp", "--fp16-init-scale", 4],
}


pytestmark = pytest.mark.usefixtures("cuda_is_cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_radius_zero_is_the_base_run(translation_data: Path, tmp_path: Path, precision: str) -> None:
    options = [*TRANSLATION, *ADAM, *PRECISIONS[precision], "--update-freq", 2]
    one = fairseq_train(translation_data, tmp_path / "base", *options, *base())
    other = fairseq_train(translation_data, tmp_path / "delta", *options, *delta(rho=0))
    assert_same_model(one, other)


@pytest.mark.parametrize("precision", ["fp16", "fp16 flattened"])
def test_perturbation_is_realised_in_half_precision(translation_data: Path, tmp_path: Path, precision: str) -> None:
    """Within 20 % of ρ on a model of 5.5 million weights, each of which moves by less than its own spacing."""
    options = [*TRANSLATION, *FIVE_MILLION, *ADAM, *PRECISIONS[precision], "--lr", 0.001]
    options += ["--tensorboard-logdir", tmp_path / "logs"]
    final = fairseq_train(translation_data, tmp_path, *options, *delta(), updates=4)
    assert sum(weight.numel() for weight in final["model"].values()) > 5_000_000
    moved = scalars(tmp_path / "logs", "sam_eps_norm")["sam_eps_norm"]
    assert moved == pytest.approx([0.05] * 4, rel=0.2)


def test_naive_half_precision_loses_the_perturbation() -> None:
    """ρ = 0.05 over 5 million weights: added to the rounded weights two fifths of it are lost, to the masters nothing.

    What is lost is the way along the gradient. The norm alone does not tell: where a step is below half the spacing,
    the naive way moves nothing, and the masters' way a whole spacing now and then, which makes the norm larger.
    """
    generator = torch.Generator().manual_seed(0)
    master = 0.15 * torch.randn(5_000_000, generator=generator)
    gradient = torch.randn(5_000_000, generator=generator)
    for weight in (PerturbedParameter(master.half()), PerturbedParameter(master.half(), master)):
        before = weight.parameter.clone()
        with ascended([weight], [gradient], rho=0.05) as ascent:
            along = (weight.parameter.float() - before.float()) @ gradient / gradient.norm()
            if weight.master is None:
                assert along < 0.8 * 0.05
            else:
                assert along == pytest.approx(0.05, rel=0.05)
                assert ascent.moved >= 0.05
        assert torch.equal(weight.parameter, before)


def test_fp32_copies_are_found_flattened_or_not() -> None:
    model = torch.nn.Linear(4, 3).half()
    copies = [parameter.detach().float() for parameter in model.parameters()]
    flat = torch.cat([copy.view(-1) for copy in copies])
    for given in (copies, [flat]):
        found = fp32_copies([model], given)
        assert list(found) == list(model.parameters())
        assert all(own is not None and torch.equal(own, copy) for own, copy in zip(found.values(), copies))
    flat.zero_()
    assert not any(view is None or view.any() for view in found.values())
    assert list(fp32_copies([model], list(model.parameters())).values()) == [None, None]


@pytest.mark.parametrize("given", [torch.zeros(7), torch.zeros(5)], ids=["more numbers", "other numbers"])
def test_optimizer_with_other_parameters_is_refused(given: torch.Tensor) -> None:
    message = (
        rf"The optimizer holds 1 tensors with {len(given)} elements, the model and criterion 2 trainable ones with 5\."
    )
    with pytest.raises(RuntimeError, match=message):
        fp32_copies([torch.nn.Linear(4, 1).half()], [given])


def test_memory_efficient_mode_says_what_it_loses(
    translation_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*TRANSLATION, *ADAM, *PRECISIONS["memory-efficient-fp16"]]
    with caplog.at_level(logging.WARNING, logger="deltasam_plugin"):
        fairseq_train(translation_data, tmp_path, *options, *delta(), updates=2)
    (warning,) = [record.message for record in caplog.records if "without fp32 master weights" in record.message]
    assert "a perturbation of rho=0.05 is 1.3e-04 per parameter, and the spacing of numbers is about" in warning
    assert "To lose nothing, use --fp16 without --memory-efficient-fp16, or --amp." in warning


WARNINGS = {
    "curvature": (
        "δ-SAM: in float16 rounding hides a part of what probes measure for the weighting 'curvature'. Probes are 0.03 "
        "of the weights' norm long, to rise above it. One more forward pass in each batch measures its size. "
    ),
    "kl": "δ-SAM: in float16 rounding hides a part of what probes measure for the weighting 'kl'. sam_probes_lost is",
}


@pytest.mark.parametrize("weighting", WARNINGS)
def test_probes_rise_above_rounding(
    translation_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, weighting: str
) -> None:
    options = [*TRANSLATION, *ADAM, *HALF, "--sam-weighting", weighting, "--tensorboard-logdir", tmp_path / "logs"]
    with caplog.at_level(logging.WARNING, logger="deltasam_plugin"):
        fairseq_train(translation_data, tmp_path, *options, *delta(), updates=6)
    found = scalars(tmp_path / "logs", "sam_ess", "sam_probes_lost")
    assert min(found["sam_ess"]) < 0.98
    assert min(found["sam_probes_lost"]) < 0.9
    (warning,) = [record.message for record in caplog.records if "rounding hides" in record.message]
    assert warning.startswith(WARNINGS[weighting])


@pytest.mark.parametrize("precision", ["fp16", "amp"])
def test_resumed_run_is_the_uninterrupted_one(translation_data: Path, tmp_path: Path, precision: str) -> None:
    """Bit for bit: what rounding does is measured anew in each batch. Under --fp16 fairseq's own run is not."""
    options = [*TRANSLATION, *ADAM, *PRECISIONS[precision], *delta(), "--save-interval-updates", 1]
    whole = fairseq_train(translation_data, tmp_path / "whole", *options, updates=6)
    again = fairseq_train(translation_data, tmp_path / "again", *options, updates=6)
    assert_same_model(whole, again)
    if precision == "amp":
        fairseq_train(translation_data, tmp_path / "parts", *options, updates=3)
        assert_same_model(whole, fairseq_train(translation_data, tmp_path / "parts", *options, updates=6))


@pytest.mark.parametrize("where", ["ascent", "second pass"])
def test_overflow_shows_in_the_gradient(where: str) -> None:
    """Whichever pass overflows half precision, the gradient is not finite, as dynamic loss scaling expects; w stays."""
    master = torch.tensor([1.0, -2.0, 0.5])
    weight = torch.nn.Parameter(master.half())
    inputs = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).half()
    scales = {"ascent": iter([2.0**12, 1.0]), "second pass": iter([1.0, 2.0**12])}[where]

    def forward() -> Objective:
        losses = (inputs @ weight).square().float() * next(scales)
        return Objective(losses.sum(), losses)

    settings = Settings(0.05, "uniform")
    perturbation = BatchPerturbation([PerturbedParameter(weight, master)], [weight], settings, loss_scaler=True)
    devices = {weight.device}
    loss, statistics = sharpness_aware_loss(forward, lambda: forward().loss, perturbation, devices)
    (loss * 16).backward()
    assert weight.grad is not None
    assert not torch.isfinite(weight.grad).all()
    assert torch.equal(weight.detach(), master.half())
    assert statistics.skipped == (where == "ascent")


@pytest.mark.parametrize("perturbation", ["batch", "instance"])
def test_overflow_skips_the_update_as_in_the_base_run(
    translation_data: Path, tmp_path: Path, perturbation: str
) -> None:
    """Loss scales that are too large at first: halved until they fit, and the same scale in the end."""
    options = [*TRANSLATION, *ADAM, *HALF, "--fp16-init-scale", 2**17, "--disable-validation"]
    changed = {"base": base(), "zero": delta(rho=0), "delta": [*delta(), "--sam-perturbation", perturbation]}
    finals = {
        name: fairseq_train(translation_data, tmp_path / name, *options, *own, updates=4)
        for name, own in changed.items()
    }
    assert_same_model(finals["base"], finals["zero"])
    scales = {name: final["last_optimizer_state"]["loss_scale"] for name, final in finals.items()}
    assert scales["base"] == scales["zero"] == scales["delta"] < 2**17
    assert finals["delta"]["optimizer_history"][-1]["num_updates"] == 4
    assert all(torch.isfinite(weight).all() for weight in trained(finals["delta"]["model"]).values())


@pytest.mark.parametrize("optimizer", ["lamb", "cpu_adam"])
def test_what_a_base_optimizer_lacks_is_said_by_itself(translation_data: Path, tmp_path: Path, optimizer: str) -> None:
    """Those that need apex or CUDA are there by delegation only."""
    errors = []
    for name, changed in {"base": base(optimizer=optimizer), "delta": delta(optimizer=optimizer)}.items():
        with pytest.raises(ImportError) as error:
            fairseq_train(translation_data, tmp_path / name, *TRANSLATION, *changed, updates=1)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
