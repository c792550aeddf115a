"""Per-sample losses of fairseq's criterions: one small adaptor for each.

A base criterion runs as it is and logs what it always logs. Its adaptor looks at what the model returned in that same
run and says which sample contributed how much: the SUM over the sample's tokens, exactly as it enters the criterion's
loss. The first training batch of every run checks that the sum over the samples is the criterion's own loss.

A criterion of your own needs one function:

    from deltasam_plugin import per_sample_losses

    @per_sample_losses("my_criterion")
    def my_criterion(criterion, model, sample, net_output):
        return criterion.token_losses(net_output, sample["target"]).sum(dim=1)

The adaptors of fairseq's own criterions are in the package ``adaptors``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from deltasam_plugin.loss import Objective

PerSampleLosses = Callable[..., Any]

PER_SAMPLE_LOSSES: dict[str, PerSampleLosses] = {}
CALLS: dict[str, Sequence[str]] = {}

REFUSED: dict[str, str] = {
    "composite_loss": "it builds another criterion inside, averages its losses over several outputs, and is not the "
    "object that is trained",
    "fastspeech2": "its terms are means over all frames and over all tokens of the batch",
    "latency_augmented_label_smoothed_cross_entropy": "its latency terms are computed by the package simuleval, which "
    "returns their sum over the batch",
    "legacy_masked_lm_loss": "it adds a mean over the tokens of the batch to a mean over its sentence pairs; the task "
    "masked_lm trains with masked_lm, which is supported",
    "model": "the model computes its losses itself and returns them reduced over the batch",
    "speech_dlm_criterion": "it weights several channels and divides by the numbers of edges in the whole batch",
    "speech_to_spectrogram": "its terms are means over all frames of the batch, and auxiliary tasks run criterions of "
    "their own on parts of the model",
    "speech_to_spectrogram_2pass": "its terms are means over all frames of the batch, and auxiliary tasks run "
    "criterions of their own on parts of the model",
    "speech_to_unit": "auxiliary tasks run criterions of their own on parts of the model, and give batch totals",
    "speech_to_unit_2pass": "auxiliary tasks run criterions of their own on parts of the model, and give batch totals",
    "speech_unit_lm_criterion": "no adaptor has been written and tested for its three streams (unit, duration, F0)",
    "tacotron2": "its terms are means over all frames of the batch",
    "vocab_parallel_cross_entropy": "it splits the vocabulary over several workers, and δ-SAM needs whole parameters",
}


def per_sample_losses(name: str, calls: Sequence[str] = ()) -> Callable[[PerSampleLosses], PerSampleLosses]:
    """Register the adaptor of a criterion.

    The adaptor is called as ``adaptor(criterion, model, sample, *outputs)``, with what the model returned during the
    criterion's forward, one output per call of the model, in order. It returns the per-sample losses, shape (B,), with
    graph; or a pair of these and a scalar, the part of the loss that belongs to the batch and to no sample (a diversity
    term, say), which is minimized and ascended but has no part in the weights. Where layers of the model see only a
    selection of all positions (masked tokens), a third element, ``[rows]``, says which sample each selected position
    belongs to, for ``--sam-perturbation instance``. The adaptor must draw no random numbers, use no
    weights and change nothing: what the criterion asks of the model beyond its output is recorded, with `calls`, and
    not computed anew.

    Args:
        name: under which the criterion is registered in fairseq.
        calls: methods and submodules of the model, by dotted path, such as ``get_normalized_probs`` or
            ``decoder.adaptive_softmax``. What they return stands among the outputs, in the order in which they return.
            One that a model does not have, or that is not called, is left out.

    Raises:
        ValueError: the name has an adaptor already.
    """

    def register(adaptor: PerSampleLosses) -> PerSampleLosses:
        if name in PER_SAMPLE_LOSSES:
            raise ValueError(
                f"Criterion {name!r} has an adaptor already, in {PER_SAMPLE_LOSSES[name].__module__}. "
                "Register yours under the name of your own criterion."
            )
        PER_SAMPLE_LOSSES[name] = adaptor
        CALLS[name] = tuple(calls)
        return adaptor

    return register


def per_sample_losses_of(name: str) -> PerSampleLosses:
    """The adaptor of a criterion.

    Raises:
        ValueError: it has none; the message says why, where that is known, and how to add one.
    """
    if name not in PER_SAMPLE_LOSSES:
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise ValueError(
            f"Criterion {name!r} (--base-criterion) gives no per-sample losses{reason}. Choose one of: "
            f"{', '.join(sorted(PER_SAMPLE_LOSSES))}; or add an adaptor for it in your own --user-dir with "
            f"@deltasam_plugin.per_sample_losses({name!r})."
        )
    return PER_SAMPLE_LOSSES[name]


@contextmanager
def recorded_outputs(model: nn.Module, name: str | None = None) -> Iterator[list[Any]]:
    """Within this context, everything the model returns is appended to the yielded list.

    Args:
        model: not wrapped for distributed training.
        name: of a criterion, whose adaptor may ask for more than the model's output.
    """
    outputs: list[Any] = []
    with ExitStack() as stack:
        for path in CALLS.get(name or "", ()):
            stack.enter_context(_recorded_call(model, path, outputs))
        handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        stack.callback(handle.remove)
        yield outputs


@contextmanager
def _recorded_call(model: nn.Module, path: str, outputs: list[Any]) -> Iterator[None]:
    *parents, last = path.split(".")
    owner: Any = model
    for parent in parents:
        owner = getattr(owner, parent, None)
    called = getattr(owner, last, None)
    if called is None:
        yield
    elif isinstance(called, nn.Module):
        handle = called.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        with handle:
            yield
    else:

        @wraps(called)
        def recording(*args: Any, **kwargs: Any) -> Any:
            output = called(*args, **kwargs)
            outputs.append(output)
            return output

        before = vars(owner).get(last)
        vars(owner)[last] = recording
        try:
            yield
        finally:
            del vars(owner)[last]
            if before is not None:
                vars(owner)[last] = before


def objective_of(loss: Tensor, adapted: Tensor | tuple[Any, ...]) -> Objective:
    """The criterion's loss, as a scalar, together with what its adaptor returned."""
    loss = loss.reshape(())  # adaptive_loss gives (1,)
    return Objective(loss, *adapted) if isinstance(adapted, tuple) else Objective(loss, adapted)


def check_sum(name: str, objective: Objective) -> None:
    """Compare the sum over the samples, and the shared part, with the criterion's own loss.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    parts = [objective.losses] if objective.shared is None else [objective.losses, objective.shared]
    values = torch.cat([part.detach().double().view(-1) for part in parts])
    total, magnitude, own = values.sum().item(), values.abs().sum().item(), objective.loss.detach().item()
    if abs(total - own) > 1e-3 * max(magnitude, abs(own)):
        raise RuntimeError(
            f"The adaptor of criterion {name!r} gives per-sample losses that sum to {total:.6g}, but the criterion's "
            f"own loss is {own:.6g}. They must be equal: every sample's losses summed over its tokens, neither "
            "averaged nor weighted. Mend the adaptor."
        )
