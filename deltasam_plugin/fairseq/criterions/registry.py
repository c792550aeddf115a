"""The registry of per-sample loss functions: one function for each criterion of fairseq.

The base criterion runs and logs as usual. Its per-sample loss function gets what the model returned in that run, and
returns each sample's part of the loss: the SUM over the sample's tokens, exactly as it enters the criterion's loss. The
first training batch of every run checks that these parts add up to the criterion's own loss.

A criterion of your own needs one function:

    from deltasam_plugin import per_sample_losses

    @per_sample_losses("my_criterion")
    def my_criterion(criterion, model, sample, net_output):
        return criterion.token_losses(net_output, sample["target"]).sum(dim=1)

The functions for fairseq's own criterions are in ``tokens``, ``sentences`` and ``speech``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from deltasam_plugin.loss import Logits, Objective

PerSampleLosses = Callable[..., Any]
PerSampleLogits = Callable[..., "Logits | None"]

PER_SAMPLE_LOSSES: dict[str, PerSampleLosses] = {}
LOGITS: dict[str, PerSampleLogits] = {}
CALLS: dict[str, Sequence[str]] = {}

REFUSED: dict[str, str] = {
    "composite_loss": "it builds another criterion inside and averages its losses over several outputs",
    "fastspeech2": "its terms are means over all frames and over all tokens of the batch",
    "latency_augmented_label_smoothed_cross_entropy": "the package simuleval computes its latency terms and "
    "returns their sum over the batch",
    "legacy_masked_lm_loss": "it adds a mean over the tokens of the batch to a mean over its sentence pairs; the task "
    "masked_lm trains with masked_lm, which is supported",
    "model": "the model computes the losses itself and returns their sum over the batch",
    "speech_dlm_criterion": "it weights several channels and divides by the numbers of edges in the whole batch",
    "speech_to_spectrogram": "its terms are means over all frames of the batch, and auxiliary tasks run criterions "
    "of their own on parts of the model",
    "speech_to_spectrogram_2pass": "its terms are means over all frames of the batch, and auxiliary tasks run "
    "criterions of their own on parts of the model",
    "speech_to_unit": "auxiliary tasks run criterions of their own on parts of the model, and give batch totals",
    "speech_to_unit_2pass": "auxiliary tasks run criterions of their own on parts of the model, and give batch totals",
    "speech_unit_lm_criterion": "no per-sample loss function is written for its three streams (unit, duration, F0)",
    "tacotron2": "its terms are means over all frames of the batch",
    "vocab_parallel_cross_entropy": "it splits the vocabulary over several workers, and δ-SAM needs whole parameters",
}


def per_sample_losses(
    name: str, calls: Sequence[str] = (), logits: PerSampleLogits | None = None
) -> Callable[[PerSampleLosses], PerSampleLosses]:
    """Register the per-sample loss function of a criterion.

    It is called as ``function(criterion, model, sample, *outputs)``. The outputs are what the model returned during the
    criterion's forward, one for each call of the model, in order. It must not draw random numbers, run layers of the
    model, or change anything. If the criterion calls more of the model than its forward, name that in `calls`.

    It returns one of

    - the per-sample losses, shape (B,), with graph;
    - a pair of these and a scalar, the shared part of the loss, which belongs to no sample (a diversity term, say). It
      is minimized and ascended but does not change the weights of the samples;
    - a triple of losses, shared part (or None) and ``[rows]``, for models with layers that see only selected positions
      (masked tokens). The rows name the sample of each selected position. ``--sam-perturbation instance`` needs them.

    Args:
        name: the criterion's name in fairseq.
        calls: methods and submodules of the model, by dotted path, such as ``get_normalized_probs`` or
            ``decoder.adaptive_softmax``. What they return is added to the outputs, in the order in which they return.
            A part that the model does not have, or that is not called, adds nothing.
        logits: for weightings that compare predictions (``kl``): a function that is called with the same arguments and
            returns :class:`deltasam_plugin.Logits`, the logits or log-probabilities of every prediction that the loss
            depends on; or None if the criterion, as it is set up, predicts no classes. It runs for these weightings
            only. Without it they are refused for this criterion.

    Raises:
        ValueError: this criterion already has a per-sample loss function.
    """

    def register(function: PerSampleLosses) -> PerSampleLosses:
        if name in PER_SAMPLE_LOSSES:
            raise ValueError(
                f"Criterion {name!r} already has a per-sample loss function, in {PER_SAMPLE_LOSSES[name].__module__}. "
                "Register yours under the name of your own criterion."
            )
        PER_SAMPLE_LOSSES[name] = function
        CALLS[name] = tuple(calls)
        if logits is not None:
            LOGITS[name] = logits
        return function

    return register


def per_sample_losses_of(name: str) -> PerSampleLosses:
    """The per-sample loss function of a criterion.

    Raises:
        ValueError: there is none. The message gives the reason, if known, and how to add one.
    """
    if name not in PER_SAMPLE_LOSSES:
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise ValueError(
            f"Criterion {name!r} (--base-criterion) gives no per-sample losses{reason}. Choose one of: "
            f"{', '.join(sorted(PER_SAMPLE_LOSSES))}; or write a per-sample loss function for it in your own "
            f"--user-dir, with @deltasam_plugin.per_sample_losses({name!r})."
        )
    return PER_SAMPLE_LOSSES[name]


@contextmanager
def recorded_outputs(model: nn.Module, name: str | None = None) -> Iterator[list[Any]]:
    """Within this context, what the model returns is appended to the yielded list.

    Args:
        model: without the wrapper for distributed training.
        name: of the criterion; what its per-sample loss function needs beyond the model's output is recorded too.
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


def objective_of(loss: Tensor, parts: Tensor | tuple[Any, ...], logits: Logits | None = None) -> Objective:
    """The criterion's loss as a scalar, what its per-sample loss function returned, and the logits if needed."""
    loss = loss.reshape(())  # adaptive_loss gives (1,)
    parts = parts if isinstance(parts, tuple) else (parts,)
    return Objective(loss, *parts)._replace(logits=logits)


def logits_of(name: str, *arguments: Any) -> Logits:
    """The logits of a criterion's predictions.

    Args:
        name: of the criterion.
        arguments: criterion, model, sample and outputs, as for its per-sample loss function.

    Raises:
        ValueError: there are none.
    """
    logits = LOGITS[name](*arguments) if name in LOGITS else None
    if logits is None:
        condition = ", as it is set up," if name in LOGITS else ""
        raise ValueError(
            f"Criterion {name!r} (--base-criterion){condition} gives no logits, and the weighting (--sam-weighting) "
            "compares them. Choose another weighting, such as curvature; or a criterion that gives logits: "
            f"{', '.join(sorted(LOGITS))}. One of your own needs the argument logits of "
            "@deltasam_plugin.per_sample_losses."
        )
    return logits


def check(name: str, objective: Objective, sample: Any) -> None:
    """Check that there is one loss for each sentence, and that they add up to the criterion's own loss.

    Args:
        name: of the criterion.
        objective: its per-sample losses and shared part beside its own loss.
        sample: the batch.

    Raises:
        RuntimeError: there are more or fewer losses, or the sums differ by more than rounding.
    """
    losses = objective.losses.numel()
    # Two counts, because the task denoising gives the length of a sentence as nsentences. Some tasks give neither.
    given = sample if isinstance(sample, dict) else {}
    counts = [int(given["nsentences"])] if "nsentences" in given else []
    counts += [given["id"].numel()] if torch.is_tensor(given.get("id")) else []
    if counts and losses not in counts:
        raise RuntimeError(
            f"Criterion {name!r} gives {losses} per-sample losses for a batch of {counts[-1]} sentences. Must be one "
            "loss for each sentence, summed over its tokens or targets. Fix the per-sample loss function."
        )
    parts = [objective.losses] if objective.shared is None else [objective.losses, objective.shared]
    values = torch.cat([part.detach().double().view(-1) for part in parts])
    total, magnitude, own = values.sum().item(), values.abs().sum().item(), objective.loss.detach().item()
    if abs(total - own) > 1e-3 * max(magnitude, abs(own)):
        raise RuntimeError(
            f"The per-sample losses of criterion {name!r} sum to {total:.6g}, but the criterion's own loss is "
            f"{own:.6g}. They must be equal: sum each sample's loss over its tokens, without average or weights. Fix "
            "the per-sample loss function."
        )
