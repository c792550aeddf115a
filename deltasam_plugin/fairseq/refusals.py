"""Configurations that would train something other than δ-SAM. They are refused at start-up."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from deltasam_plugin.fairseq.base_options import NAME

WHOLE = "δ-SAM needs every parameter whole in each process"
ALIKE = "δ-SAM needs gradients that are exchanged at every update"
OUTSIDE = (
    "it adds loss terms outside the criterion, where δ-SAM does not see them. Use another task, or train without δ-SAM."
)
REFUSED: list[tuple[str, str, str | int, str]] = [
    # section, option, the refused name or the largest allowed number, reason and remedy
    ("distributed_training", "ddp_backend", "fully_sharded", f"{WHOLE}. Use legacy_ddp or pytorch_ddp."),
    ("distributed_training", "ddp_backend", "slowmo", f"{ALIKE}. Use legacy_ddp or pytorch_ddp."),
    ("distributed_training", "pipeline_model_parallel", 0, f"{WHOLE}. Leave it out."),
    ("optimization", "use_bmuf", 0, f"{ALIKE}. Leave it out."),
    ("common", "tpu", 0, "δ-SAM replays random numbers, which it cannot do on a TPU. Leave it out. (--bf16 on the "
     "command line implies it. In fairseq-hydra-train common.bf16 does not.)"),
    ("common", "model_parallel_size", 1, f"{WHOLE}. Leave it out."),
    ("task", "_name", "multilingual_translation_latent_depth", OUTSIDE),
    ("task", "_name", "speech_to_text_head_selection", OUTSIDE),
    ("model", "quant_noise_scalar", 0, "every forward pass would count as an update, and probes would change "
     "the scales. Leave it out, or use --quant-noise-pq."),
]  # fmt: skip
REFUSED_WITH = [
    # δ-SAM's option and its values, the model's option, reason, remedy
    ("sam_perturbation", ("instance",), "checkpoint_activations",
     "it runs layers again in backward, where their output gradients are not recorded", "--sam-perturbation batch"),
    ("sam_perturbation", ("instance",), "quant_noise_pq", "the forward pass rewrites the weights",
     "--sam-perturbation batch"),
    ("sam_ascent", ("momentum",), "quant_noise_pq", "the forward pass rewrites the weights, and no pass runs at w",
     "--sam-ascent gradient"),
    ("sam_descent", ("weighted", "surrogate_gap"), "checkpoint_activations",
     "its backward pass cannot give a gradient without adding it up", "--sam-descent perturbed"),
]  # fmt: skip


def refuse_unsupported(root: DictConfig) -> None:
    """Refuse a configuration that would train something other than δ-SAM.

    Args:
        root: the whole configuration. Absent sections are not checked.

    Raises:
        ValueError: names value, rule and remedy.
    """
    optimizer, criterion = (option(root, section, "_name") for section in ("optimizer", "criterion"))
    if optimizer == NAME and criterion not in (None, NAME):
        raise ValueError(
            f"Optimizer 'delta_sam' with criterion {criterion!r}: it needs per-sample losses. "
            f"Use --criterion delta_sam --base-criterion {criterion}."
        )
    if criterion == NAME and optimizer not in (None, NAME):
        raise ValueError(
            f"Criterion 'delta_sam' with optimizer {optimizer!r}: its gradient is computed for 'delta_sam'. "
            f"Use --optimizer delta_sam --base-optimizer {optimizer}."
        )
    for section, name, limit, reason in REFUSED:
        found = option(root, section, name)
        if isinstance(limit, str):
            found = str(found)  # it may be an enumeration
            refused = found == limit
        else:
            refused = (found or 0) > limit
        if refused:
            name = section if name == "_name" else name
            raise ValueError(f"Invalid {name}={found!r} ({_flag(name)}): {reason}")
    for own, values, name, reason, remedy in REFUSED_WITH:
        chosen, found = option(root, "optimizer", own), option(root, "model", name)
        if chosen in values and found:
            raise ValueError(
                f"Invalid {name}={found!r} ({_flag(name)}) with {_flag(own)} {chosen}: {reason}. Leave it out, or use "
                f"{remedy}."
            )


def option(root: DictConfig, section: str, name: str) -> Any:
    """The value of an option, or None if section or option are absent. ``_name`` is the name of the component."""
    content = root.get(section)
    if name == "_name" and isinstance(content, str):
        return content
    return getattr(content, name, None)  # a DictConfig's get() raises for options that it does not have


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
