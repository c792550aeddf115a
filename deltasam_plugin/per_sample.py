"""Per-sample losses of fairseq's criterions: one small adaptor for each.

A base criterion runs as it is and logs what it always logs. Its adaptor looks at the model's output of that same run
and says which sample contributed how much: the SUM over the sample's tokens, exactly as it enters the criterion's loss.
The first training batch of every run checks that the sum over the samples is the criterion's own loss.

A criterion of your own needs one function:

    from deltasam_plugin import per_sample_losses

    @per_sample_losses("my_criterion")
    def my_criterion(criterion, model, sample, net_output):
        return criterion.token_losses(net_output, sample["target"]).sum(dim=1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin.gradient import Objective

Adaptor = Callable[..., "Tensor | tuple[Tensor, Tensor]"]

ADAPTORS: dict[str, Adaptor] = {}


def per_sample_losses(name: str) -> Callable[[Adaptor], Adaptor]:
    """Register the adaptor of a criterion.

    The adaptor is called as ``adaptor(criterion, model, sample, *outputs)``, with what the model returned during the
    criterion's forward, one output per call of the model, in order. It returns the per-sample losses, shape (B,), with
    graph; or a pair of these and a scalar, the part of the loss that belongs to the batch and to no sample (a diversity
    term, say), which is minimized and ascended but has no part in the weights. It must draw no random numbers.

    Args:
        name: under which the criterion is registered in fairseq.

    Raises:
        ValueError: the name has an adaptor already.
    """

    def register(adaptor: Adaptor) -> Adaptor:
        if name in ADAPTORS:
            raise ValueError(
                f"Criterion {name!r} has an adaptor already, in {ADAPTORS[name].__module__}. "
                "Register yours under the name of your own criterion."
            )
        ADAPTORS[name] = adaptor
        return adaptor

    return register


def adaptor_of(name: str) -> Adaptor:
    """The adaptor of a criterion.

    Raises:
        ValueError: it has none; the message says how to add one.
    """
    if name not in ADAPTORS:
        raise ValueError(
            f"Criterion {name!r} (--base-criterion) gives no per-sample losses. Choose one of: "
            f"{', '.join(sorted(ADAPTORS))}; or add an adaptor for it in your own --user-dir with "
            f"@deltasam_plugin.per_sample_losses({name!r})."
        )
    return ADAPTORS[name]


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[list[Any]]:
    """Within this context, everything the model returns is appended to the yielded list."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def objective_of(loss: Tensor, adapted: Tensor | tuple[Tensor, Tensor]) -> Objective:
    """The criterion's loss together with what its adaptor returned."""
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


@per_sample_losses("cross_entropy")
@per_sample_losses("label_smoothed_cross_entropy")
def _token_losses(criterion: Any, model: Any, sample: dict[str, Any], net_output: Any) -> Tensor:
    losses, _ = criterion.compute_loss(model, net_output, sample, reduce=False)
    return losses.view(sample["target"].size(0), -1).sum(dim=1)


@per_sample_losses("sentence_prediction")
def _sentence_losses(criterion: Any, model: Any, sample: dict[str, Any], net_output: Any) -> Tensor:
    logits = net_output[0]
    targets = model.get_targets(sample, [logits]).view(-1)
    if criterion.regression_target:
        return F.mse_loss(logits.view(-1).float(), targets.float(), reduction="none")
    return F.nll_loss(F.log_softmax(logits, dim=-1, dtype=torch.float32), targets, reduction="none")
