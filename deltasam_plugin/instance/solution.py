"""The perturbation of every sample, and the second pass that runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from deltasam_plugin.errors import Refused
from deltasam_plugin.instance.apex import unfused_norms
from deltasam_plugin.instance.compilation import uncompiled
from deltasam_plugin.instance.coverage import REMEDY
from deltasam_plugin.instance.entanglement import allowed_change, half_in_turn, halves
from deltasam_plugin.instance.layers.base import CallArguments, CallKey, Layer, PlannedCall
from deltasam_plugin.instance.memo import Memo
from deltasam_plugin.instance.passes import CHECKPOINTED
from deltasam_plugin.instance.recording import intercept_layers
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation
from deltasam_plugin.precision import Rounding
from deltasam_plugin.replay import forward_only


class Comparison(NamedTuple):
    """The samples of this batch were told apart by further passes.

    Attributes:
        number: of the comparison, in a run.
        thorough: whether all halves are to be tried: samples may depend on each other in a new way, or only at the
            perturbed weights.
        dtypes: that the first pass computed in.
    """

    number: int
    thorough: bool
    dtypes: set[torch.dtype]


@dataclass(frozen=True)
class Solution:
    """What the first pass gives.

    Attributes:
        parameters: whose calls both passes look at, by name; covered or not.
        perturbation: of every sample.
        calls: what the second pass must repeat, in order.
        sizes: how many samples each perturbation is shared by, one for each group.
        comparison: None if the batch was not compared.
    """

    parameters: Mapping[str, nn.Parameter]
    perturbation: PerSamplePerturbation
    calls: list[PlannedCall]
    sizes: Tensor
    comparison: Comparison | None

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Each sample sees its own perturbed weights in the forward pass that runs within.

        Raises:
            Refused: that pass calls other layers, or on other shapes, than the recorded one.
        """
        perturbation, pending, once = self.perturbation, list(reversed(self.calls)), Memo()

        def handle(layer: Layer, arguments: CallArguments, key: CallKey, x: Tensor) -> Tensor:
            call = pending.pop() if pending else None
            if call is None or (call.key, call.leading_shape) != (key, arguments.leading_shape):
                raise Refused(_not_a_replay(call, key, arguments.leading_shape))
            y = layer.run_perturbed(call, arguments, x, perturbation) if call.perturbed else layer.run(arguments, x)
            if not pending:
                perturbation.release()
                once.clear()
            return y

        try:
            with uncompiled(), unfused_norms(), intercept_layers(self.parameters, handle, once, set()):
                yield
            if pending:
                raise Refused(_not_a_replay(pending[-1]))
        except CheckpointError as error:
            raise Refused(CHECKPOINTED) from error
        finally:
            perturbation.release()

    def refuse_mixed_values(self, losses: Tensor, replay: Callable[[], Tensor]) -> None:
        """If the batch was compared, perturb half of it alone: the losses of the others must stay what they are.

        Samples may depend on each other where no gradient shows it: by a statistic of the batch behind detach(), or by
        a row without gradient at w that belongs to another sample than it seems. Comparisons take turns in how they
        part the samples, or groups; where something is new, or rows may be routed anew, all ways are tried.

        Args:
            losses: at w, (B,).
            replay: the same forward pass, with its random numbers; returns per-sample losses.

        Raises:
            Refused: they do not.
        """
        if self.comparison is None:
            return
        number, thorough, dtypes = self.comparison
        count, device = len(self.sizes), losses.device
        group = torch.arange(count, device=device).repeat_interleave(self.sizes.long(), output_size=len(losses))
        ways = halves(count, device) if thorough else [half_in_turn(count, 2 * number, device)]
        allowed = allowed_change(losses, Rounding.of(dtypes, self.parameters.values()))

        def losses_with(chosen: Tensor) -> Tensor:
            with replace(self, perturbation=self.perturbation.of_samples(chosen)).perturbed():
                return replay()

        def changes(chosen: Tensor) -> Tensor:
            return (forward_only(partial(losses_with, chosen)) - losses).abs().nan_to_num(0)

        changed = torch.zeros_like(losses)
        for chosen in (half for way in ways for half in (way, ~way)):
            changed = torch.where(chosen[group], changed, torch.maximum(changed, changes(chosen)))
        # Losses that are differences of large numbers round more. How much is seen where nothing is perturbed.
        if bool((changed > allowed).any()):
            allowed = allowed + 4 * changes(torch.zeros_like(ways[0])).max()
        if bool((changed > allowed).any()):
            raise Refused(
                "Instance mode: the loss of a sample changes with the perturbation of another, though no "
                "gradient shows it. It must depend on the sample's own rows: statistics of the batch do not qualify, "
                f"not even behind detach(). Otherwise {REMEDY}."
            )


def _not_a_replay(call: PlannedCall | None, key: CallKey | None = None, leading_shape: tuple[int, ...] = ()) -> str:
    """The message for a second pass that does not repeat the first."""
    expected = "no further call" if call is None else f"{call.key} with leading sizes {call.leading_shape}"
    found = "ends" if key is None else f"calls {key} with leading sizes {leading_shape}"
    return (
        f"Instance mode: the second pass {found} where the first had {expected}. Both passes must run the "
        "same layers: replay the random numbers, on the same batch. With activation checkpointing, "
        f"{REMEDY}."
    )
