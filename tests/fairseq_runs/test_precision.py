"""Half precision: where the perturbation comes from, what becomes of it, and what overflow does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from fairseq.optim import OPTIMIZER_REGISTRY
from runs import ADAM, TRANSLATION, assert_same_model, base, delta, fairseq_train, scalars

from deltasam_plugin.batch import BatchPerturbation
from deltasam_plugin.fairseq_optimizer import pair_masters
from deltasam_plugin.gradient import Objective, sharpness_aware_loss
from deltasam_plugin.perturbation import Weight, ascended
from deltasam_plugin.settings import Settings

HALF = ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4]
FIVE_MILLION = ["--encoder-layers", 3, "--decoder-layers", 3, "--encoder-attention-heads", 4]
FIVE_MILLION += ["--encoder-embed-dim", 256, "--decoder-embed-dim", 256, "--decoder-attention-heads", 4]
FIVE_MILLION += ["--encoder-ffn-embed-dim", 1024, "--decoder-ffn-embed-dim", 1024]

PRECISIONS: dict[str, list[object]] = {
    "fp16": HALF,
    "memory-efficient-fp16": ["--memory-efficient-fp16", "--fp16-init-scale", 4],
    "amp": ["--amp", "--fp16-init-scale", 4],
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_radius_zero_is_the_base_run(translation_data: Path, tmp_path: Path, precision: str) -> None:
    options = [*TRANSLATION, *ADAM, *PRECISIONS[precision], "--update-freq", 2]
    one = fairseq_train(translation_data, tmp_path / "base", *options, *base())
    other = fairseq_train(translation_data, tmp_path / "delta", *options, *delta(rho=0))
    assert_same_model(one, other)


def test_perturbation_is_realised_in_half_precision(translation_data: Path, tmp_path: Path) -> None:
    """Within 20 % of ρ on a model of 5.5 million weights, each of which moves by less than its own spacing."""
    options = [*TRANSLATION, *FIVE_MILLION, *ADAM, *HALF, "--lr", 0.001, "--tensorboard-logdir", tmp_path / "logs"]
    final = fairseq_train(translation_data, tmp_path, *options, *delta(), updates=4)
    assert sum(weight.numel() for weight in final["model"].values()) > 5_000_000
    moved = scalars(tmp_path / "logs", "sam_eps_norm")["sam_eps_norm"]
    assert moved == pytest.approx([0.05] * 4, rel=0.2)


def test_naive_half_precision_loses_the_perturbation() -> None:
    """ρ = 0.05 over 5 million weights of size 0.03: added to the rounded weight it is gone, to the master it is not."""
    generator = torch.Generator().manual_seed(0)
    master = 0.03 * torch.randn(5_000_000, generator=generator)
    gradient = torch.randn(5_000_000, generator=generator)
    for weight in (Weight(master.half()), Weight(master.half(), master)):
        before = weight.parameter.clone()
        with ascended([weight], [gradient], rho=0.005) as ascent:
            along = (weight.parameter.float() - before.float()) @ gradient / gradient.norm()
            if weight.master is None:
                assert along < 0.8 * 0.005
            else:  # rounding adds noise across, and takes nothing away along the gradient
                assert along == pytest.approx(0.005, rel=0.05)
                assert ascent.moved >= 0.005
        assert torch.equal(weight.parameter, before)


def test_masters_are_found_flattened_or_not() -> None:
    """Flattening needs a CUDA device in fairseq, so here the pairing alone."""
    parameters = [torch.randn(3, 4).half(), torch.randn(5).half()]
    copies = [parameter.float() for parameter in parameters]
    flat = torch.cat([copy.view(-1) for copy in copies])
    for given in (copies, [flat]):
        for copy, master in zip(copies, pair_masters(parameters, given), strict=True):
            assert master is not None
            assert torch.equal(copy, master)
    views = pair_masters(parameters, [flat])
    flat.zero_()
    assert all(view is not None and not view.any() for view in views)
    assert pair_masters(parameters, parameters) == [None, None]


def test_optimizer_with_other_parameters_is_refused() -> None:
    message = r"The optimizer holds 1 tensors with 7 elements, the model and criterion 2 trainable ones with 5\."
    with pytest.raises(RuntimeError, match=message):
        pair_masters([torch.zeros(2), torch.zeros(3)], [torch.zeros(7)])


def test_memory_efficient_mode_says_what_it_loses(
    translation_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*TRANSLATION, *ADAM, *PRECISIONS["memory-efficient-fp16"]]
    with caplog.at_level(logging.WARNING, logger="deltasam_plugin"):
        fairseq_train(translation_data, tmp_path, *options, *delta(), updates=2)
    (warning,) = [record.message for record in caplog.records if "without fp32 master weights" in record.message]
    assert "a perturbation of rho=0.05 is 1.3e-04 per weight, the weights' own spacing about" in warning
    assert "Use --fp16 without --memory-efficient-fp16, or --amp, to keep it." in warning


def test_probes_in_half_precision_do_not_pose_as_curvature(
    translation_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the probes see is below the rounding floor of half precision: weights are uniform, and the log says so."""
    options = [*TRANSLATION, *ADAM, *HALF, "--tensorboard-logdir", tmp_path / "logs"]
    with caplog.at_level(logging.WARNING, logger="deltasam_plugin"):
        fairseq_train(translation_data, tmp_path, *options, *delta(), updates=3)
    assert scalars(tmp_path / "logs", "sam_ess")["sam_ess"] == pytest.approx([1.0] * 3)
    (warning,) = [record.message for record in caplog.records if "curvature probe" in record.message]
    assert warning.startswith("δ-SAM: in float16 a curvature probe sees nothing below 0.4% of a sample's loss")


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

    perturbation = BatchPerturbation([Weight(weight, master)], [weight], Settings(0.05, "uniform"))
    devices = {weight.device}
    loss, statistics = sharpness_aware_loss(forward, lambda: forward().loss, perturbation, devices)
    (loss * 16).backward()
    assert weight.grad is not None
    assert not torch.isfinite(weight.grad).all()
    assert torch.equal(weight.detach(), master.half())
    assert statistics.skipped == (where == "ascent")


def test_base_optimizers_are_all_known() -> None:
    """What needs apex or CUDA is there by name, by delegation only."""
    expected = {"adam", "adamax", "adagrad", "adadelta", "adafactor", "sgd", "nag", "composite", "lamb", "cpu_adam"}
    assert expected <= set(OPTIMIZER_REGISTRY)
