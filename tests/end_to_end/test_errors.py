"""Misuse is refused at start-up or at the first batch. The message names value, rule and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import fairseq
import pytest
from omegaconf import OmegaConf

from deltasam_plugin.fairseq.criterions.registry import PER_SAMPLE_LOSSES, REFUSED, per_sample_losses
from deltasam_plugin.fairseq.refusals import refuse_unsupported
from tests.end_to_end.test_criterions import typed, user_directory
from tests.helpers.corpora import corpus, small
from tests.helpers.runs import ADAM, HALF, SMOOTHED, TRANSLATION, base, delta, fairseq_train

ERRORS: dict[str, tuple[list[object], str]] = {
    "optimizer alone": (
        ["--optimizer", "delta_sam", "--criterion", SMOOTHED],
        "Optimizer 'delta_sam' with criterion 'label_smoothed_cross_entropy': it needs per-sample losses. "
        "Use --criterion delta_sam --base-criterion label_smoothed_cross_entropy.",
    ),
    "criterion alone": (
        ["--optimizer", "adam", "--criterion", "delta_sam", "--base-criterion", SMOOTHED],
        "Criterion 'delta_sam' with optimizer 'adam': its gradient is computed for 'delta_sam'. "
        "Use --optimizer delta_sam --base-optimizer adam.",
    ),
    "no per-sample losses": (
        delta("tacotron2"),
        "Criterion 'tacotron2' (--base-criterion) gives no per-sample losses: its terms are means over all frames of "
        "the batch. Choose one of: adaptive_loss, cross_entropy, ctc, ",
    ),
    "unknown criterion": (
        delta("cross_entorpy"),
        "Unknown base_criterion='cross_entorpy' (--base-criterion). Choose one of: adaptive_loss, ",
    ),
    "unknown optimizer": (
        delta(optimizer="adamm"),
        "Unknown base_optimizer='adamm' (--base-optimizer). Choose one of: adadelta, ",
    ),
    "itself": (
        delta(optimizer="delta_sam"),
        "Unknown base_optimizer='delta_sam' (--base-optimizer). Choose one of: adadelta, ",
    ),
    "foreign option": (
        [*delta(), "--momentum", 0.9],
        "Invalid option momentum=0.9: the base optimizer 'adam' has no such option. "
        "Remove it, or choose a base that has it: nag, sgd.",
    ),
    "foreign criterion option": (
        [*delta("cross_entropy"), "--label-smoothing", 0.1],
        "Invalid option label_smoothing=0.1: the base criterion 'cross_entropy' has no such option. "
        "Remove it, or choose a base that has it: ",
    ),
    "negative radius": (
        delta(rho=-1),
        "Invalid rho=-1.0 (--sam-rho). Must be a finite number >= 0; 0.05 is the usual start.",
    ),
    "unknown weighting": (
        [*delta(), "--sam-weighting", "hessian"],
        "Unknown weighting='hessian' (--sam-weighting). Choose one of: curvature, kl, gradient_norm, normalized, "
        "uniform",
    ),
    "no probes": (
        [*delta(), "--sam-probes", 0],
        "Invalid probes=0 (--sam-probes). Must be an integer >= 1; for no probes at all use the weighting 'uniform'.",
    ),
    "probe scale": (
        [*delta(), "--sam-probe-scale", 0],
        "Invalid probe_scale=0.0 (--sam-probe-scale). Must be a fraction of the norm of the weights, between 0 and 1 "
        "exclusive; 0.01 is the default.",
    ),
    "block momentum": (
        [*delta(), "--use-bmuf"],
        "Invalid use_bmuf=True (--use-bmuf): δ-SAM needs gradients that are exchanged at every update. Leave it out.",
    ),
    "slow momentum": (
        [*delta(), "--ddp-backend", "slowmo"],
        "Invalid ddp_backend='slowmo' (--ddp-backend): δ-SAM needs gradients that are exchanged at every update. Use "
        "legacy_ddp or pytorch_ddp.",
    ),
    "scalar quantization": (
        [*delta(), "--quant-noise-scalar", 0.5],
        "Invalid quant_noise_scalar=0.5 (--quant-noise-scalar): every forward pass would count as an update, and "
        "probes would change the scales. Leave it out, or use --quant-noise-pq.",
    ),
    "unknown perturbation": (
        [*delta(), "--sam-perturbation", "layer"],
        "Unknown perturbation='layer' (--sam-perturbation). Choose one of: batch, instance.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refused_at_start_up(translation_data: Path, tmp_path: Path, case: str) -> None:
    options, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *options)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("distributed_training", "ddp_backend", "fully_sharded", "Invalid ddp_backend='fully_sharded' (--"),
        ("distributed_training", "pipeline_model_parallel", True, "Invalid pipeline_model_parallel=True (--pipeline-"),
        (
            "task",
            "_name",
            "speech_to_text_head_selection",
            "Invalid task='speech_to_text_head_selection' (--task): it adds",
        ),
        ("common", "tpu", True, "Invalid tpu=True (--tpu): δ-SAM replays random numbers, which it cannot do on a TPU."),
        (
            "common",
            "model_parallel_size",
            4,
            "Invalid model_parallel_size=4 (--model-parallel-size): δ-SAM needs every",
        ),
    ],
)
def test_what_this_machine_cannot_start_is_refused(section: str, option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse_unsupported(OmegaConf.create({section: {option: value}}))


@pytest.mark.parametrize("case", ["unknown criterion", "foreign criterion option"])
def test_refused_criterions_are_not_offered(translation_data: Path, tmp_path: Path, case: str) -> None:
    with pytest.raises(ValueError, match=r"Choose one of|choose a base") as error:
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *ERRORS[case][0])
    assert "label_smoothed_cross_entropy_with_alignment" in str(error.value)
    assert not [name for name in REFUSED if f"{name}," in str(error.value)]


def test_per_sample_losses_that_do_not_sum_to_the_loss(
    translation_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likely mistake is a mean instead of a sum. The first batch finds it."""
    right = PER_SAMPLE_LOSSES["cross_entropy"]
    monkeypatch.setitem(PER_SAMPLE_LOSSES, "cross_entropy", lambda *arguments: right(*arguments) / 7)
    with pytest.raises(RuntimeError, match="The per-sample losses of criterion 'cross_entropy' sum to"):
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *delta("cross_entropy"))


EXAMPLES = Path(fairseq.__file__).parent / "examples"
LATENT: list[object] = ["--user-dir", EXAMPLES / "latent_depth" / "latent_depth_src"]
LATENT += ["--task", "multilingual_translation_latent_depth", "--arch", "latent_multilingual_transformer"]
LATENT += ["--lang-pairs", "src-tgt,tgt-src", "--share-encoders", "--share-decoders", "--decoder-latent-layer"]
LATENT += [*small("encoder", "decoder"), "--sparsity-weight", 1, "--target-layers", 1]
MOE: list[object] = ["--user-dir", EXAMPLES / "translation_moe" / "translation_moe_src", "--task", "translation_moe"]
MOE += ["--arch", "transformer_tiny", "--method", "hMoEup", "--num-experts", 2]


def test_one_loss_for_each_sentence(translation_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum alone does not tell how the losses belong to the sentences."""
    right = PER_SAMPLE_LOSSES["cross_entropy"]
    monkeypatch.setitem(PER_SAMPLE_LOSSES, "cross_entropy", lambda *arguments: right(*arguments).repeat(2) / 2)
    message = "gives 32 per-sample losses for a batch of 16 sentences. Must be one loss for each sentence"
    with pytest.raises(RuntimeError, match=message):
        fairseq_train(translation_data, tmp_path, *TRANSLATION, *delta("cross_entropy"))


@pytest.mark.parametrize("perturbation", ["batch", "instance"])
def test_latent_depth(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, perturbation: str) -> None:
    message = (
        "Invalid task='multilingual_translation_latent_depth' (--task): it adds loss terms outside the criterion, "
        "where δ-SAM does not see them. Use another task, or train without δ-SAM."
    )
    data = corpus("aligned", tmp_path_factory.getbasetemp())
    with pytest.raises(ValueError, match=re.escape(message)):
        fairseq_train(data, tmp_path, *LATENT, *delta(), "--sam-perturbation", perturbation)


@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize(
    "precision",
    [[], HALF, ["--memory-efficient-fp16"], ["--amp"]],
    ids=["fp32", "fp16", "memory-efficient-fp16", "amp"],
)
def test_a_task_that_does_not_call_the_criterion(translation_data: Path, tmp_path: Path, precision: list) -> None:
    """Nothing else would tell that the base optimizer trains alone."""
    message = (
        "Task 'translation_moe' takes an optimizer step without a sharpness-aware gradient: its train_step does not "
        "take the loss from criterion(model, sample). Use another task, or train without δ-SAM: --optimizer adam "
        "--criterion label_smoothed_cross_entropy."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        fairseq_train(translation_data, tmp_path, *MOE, *delta(), *precision, "--fp16-init-scale", 4)
    assert not list(tmp_path.glob("checkpoint*.pt"))


def test_a_second_per_sample_loss_function_for_a_criterion() -> None:
    with pytest.raises(
        ValueError, match=r"'cross_entropy' already has .* in deltasam_plugin\.fairseq\.criterions\.tokens"
    ):
        per_sample_losses("cross_entropy")(lambda *arguments: None)


def test_plugin_leaves_other_runs_alone(translation_data: Path, tmp_path: Path) -> None:
    """--user-dir alone changes nothing: no option of ours appears, an ordinary run stays ordinary."""
    checkpoint = fairseq_train(translation_data, tmp_path, *TRANSLATION, *ADAM, *base(), updates=1)
    for section in ("optimizer", "criterion"):
        assert not [key for key in checkpoint["cfg"][section] if key.startswith(("sam_", "base_"))]


@pytest.mark.parametrize(
    ("architecture", "mode", "message"),
    [
        ("lstm", "instance", "Instance mode does not cover "),
        ("remembering", "batch", "The forward pass cannot be replayed: "),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_message(
    translation_data: Path, tmp_path: Path, architecture: str, mode: str, message: str
) -> None:
    """Of the first backward pass, and of the first forward pass."""
    user_dir = user_directory(tmp_path / "mine", {"__init__.py": REMEMBERING})
    options = ["--arch", architecture, *delta(), "--label-smoothing", 0.1, "--sam-perturbation", mode]
    refused = typed(translation_data, user_dir, tmp_path / "checkpoints", *options)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"deltasam_plugin: error: {message}"), refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.glob("checkpoints/*.pt"))


REMEMBERING = """
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, tiny_architecture


@register_model("remembering")
class Remembering(TransformerModel):
    passes = 0

    def forward(self, *args, **kwargs):
        self.passes += 1
        output, extra = super().forward(*args, **kwargs)
        return output * self.passes, extra


register_model_architecture("remembering", "remembering")(tiny_architecture)

import deltasam_plugin
"""
