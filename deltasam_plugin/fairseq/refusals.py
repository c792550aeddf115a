"""Configurations that would train something other than δ-SAM. They are refused at start-up."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from deltasam_plugin.fairseq.config import NAME

WHOLE = "δ-SAM needs every parameter whole in each process"
ALIKE = "δ-SAM needs gradients that are exchanged at every update"
REFUSED: list[tuple[str, str, str | int, str]] = [
    # section, option, the refused name or the largest allowed number, reason and remedy
    ("distributed_training", "ddp_backend", "fully_sharded", f"{WHOLE}. Use legacy_ddp or pytorch_ddp."),
    ("distributed_training", "ddp_backend", "slowmo", f"{ALIKE}. Use legacy_ddp or pytorch_ddp."),
    ("distributed_training", "pipeline_model_parallel", 0, f"{WHOLE}. Leave it out."),
    ("optimization", "use_bmuf", 0, f"{ALIKE}. Leave it out."),
    ("common", "tpu", 0, "δ-SAM replays random numbers, which it cannot do on a TPU. Leave it out. (--bf16 on the "
     "command line implies it. In fairseq-hydra-train common.bf16 does not.)"),
    ("common", "model_parallel_size", 1, f"{WHOLE}. Leave it out."),
    ("model", "quant_noise_scalar", 0, "every forward pass would count as an update, and probes would change "
     "the scales. Leave it out, or use --quant-noise-pq."),
]  # fmt: skip
REFUSED_PER_INSTANCE = {
    "checkpoint_activations": "it runs layers again in backward, where their output gradients are not recorded",
    "quant_noise_pq": "the forward pass rewrites the weights",
}


def refuse_unsupported(root: DictConfig) -> None:
    """Refuse a configuration that would train something other than δ-SAM.

    Args:
        root: the whole configuration. Absent sections are not checked.

    Raises:
        ValueError: names value, rule and remedy.
    """
    optimizer, criterion = (_name(root.get(section)) for section in ("optimizer", "criterion"))
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
    for section, option, limit, reason in REFUSED:
        found = _value(root.get(section), option)
        if isinstance(limit, str):
            found = str(found)  # it may be an enumeration
            refused = found == limit
        else:
            refused = (found or 0) > limit
        if refused:
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"Invalid {option}={found!r} ({flag}): {reason}")
    if _value(root.get("optimizer"), "sam_perturbation") == "instance":
        for option, reason in REFUSED_PER_INSTANCE.items():
            if found := _value(root.get("model"), option):
                flag = "--" + option.replace("_", "-")
                raise ValueError(
                    f"Invalid {option}={found!r} ({flag}) with --sam-perturbation instance: {reason}. "
                    "Leave it out, or use --sam-perturbation batch."
                )


def _name(section: Any) -> str | None:
    name = section if isinstance(section, str) else getattr(section, "_name", None)
    return None if name is None else str(name)


def _value(section: Any, option: str) -> Any:
    return getattr(section, option, None)  # a DictConfig's get() raises for options it does not have
