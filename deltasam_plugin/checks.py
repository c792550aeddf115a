"""Checks of a run that cost a forward pass or wait for the device: made on batches 1, 2, 4, 8 and so on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from deltasam_plugin.errors import Refused
from deltasam_plugin.hooks import before_forward
from deltasam_plugin.loss import Objective
from deltasam_plugin.precision import coarsest
from deltasam_plugin.replay import Conditions, forward_only

# By how much kernels that add in varying order may change a loss, relative to 1 + the largest loss of the batch.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

PATIENCE = 16  # batches before which nothing is said about what probes cannot see


class Checks:
    """What must hold in every batch of a run. One object serves one model."""

    def __init__(self) -> None:
        self._batches = 0
        self._failed: Tensor | None = None  # added up on the device between the batches that look at it
        self._warned = False
        self._lost: Tensor | None = None  # likewise
        self._warned_of_lost = False

    def next_batch(self) -> None:
        """To be called once for each batch, before its checks."""
        self._batches += 1

    @property
    def _due(self) -> bool:
        return is_power_of_two(self._batches)

    def replay(
        self,
        objective: Objective,
        forward: Callable[[], Objective],
        conditions: Conditions,
        dtypes: Iterable[torch.dtype],
    ) -> None:
        """Run the forward pass again, and compare.

        Args:
            objective: result of the forward pass.
            forward: the same forward pass at the same parameters.
            conditions: of the forward pass.
            dtypes: those in which it computes.

        Raises:
            Refused: the losses differ by more than rounding. The message names likely causes.
        """
        if not self._due:
            return

        def replayed() -> Tensor:
            with conditions.replayed(), before_forward(_refuse_spectral_norm):
                return _values(forward())

        again = forward_only(replayed)  # with gradient, as the second pass
        losses = _values(objective)
        largest = torch.where(losses.isfinite(), losses.abs(), 0).amax()
        bound = TOLERANCE[coarsest(dtypes)] * (1 + float(largest))
        differs = (again - losses).abs() > bound if again.shape == losses.shape else torch.ones(())
        if bool((differs & losses.isfinite()).any()):
            raise Refused(
                "The forward pass cannot be replayed: run twice on one batch, at the same weights and with the same "
                f"random numbers, it gave the losses {_listing(losses)} and {_listing(again)}. δ-SAM runs it several "
                "times for one update, so it must depend on nothing but weights, inputs and the global random number "
                "generators. Likely causes: the model keeps memory between forward passes (Transformer-XL, adaptive "
                "span), draws from a torch.Generator of its own, sets parameters in its first forward pass after they "
                "were used, or updates buffers that it reads (spectral norm, codebooks with moving averages). Draw "
                "from the global generators, run one forward pass before training, or train this model without δ-SAM."
            )

    def probes(self, failed: Tensor) -> None:
        """Warn once if a probe has given a loss that is not finite.

        Args:
            failed: number of such probes in this batch, scalar.
        """
        if self._warned:
            return
        self._failed = failed if self._failed is None else self._failed + failed
        if self._due and bool(self._failed > 0):
            self._warned = True
            warnings.warn(
                "A probe gave losses that are not finite. Its batch was weighted uniformly; the statistic "
                "probes_failed (sam_probes_failed) counts such probes. Use a smaller probe scale (--sam-probe-scale), "
                "or look for parameters that hold huge or non-finite numbers.",
                stacklevel=2,
            )

    def lost(self, lost: Tensor) -> None:
        """Warn once if probes have seen nothing but rounding in most batches of a run.

        Args:
            lost: whether it was so in this batch, boolean scalar.
        """
        if self._warned_of_lost:
            return
        self._lost = lost.long() if self._lost is None else self._lost + lost
        if self._due and self._batches >= PATIENCE and 2 * int(self._lost) > self._batches:
            self._warned_of_lost = True
            warnings.warn(
                f"In {int(self._lost)} of {self._batches} batches the probes saw nothing but rounding, and the weights "
                "were uniform. Use a larger probe scale (--sam-probe-scale), the weighting 'kl' (--sam-weighting), or "
                "'uniform', which costs no probes.",
                stacklevel=2,
            )


def is_power_of_two(count: int) -> bool:
    """Whether a positive number is a power of two. Checks on such batches cost nothing in the long run."""
    return count.bit_count() == 1


def _refuse_spectral_norm(module: nn.Module) -> None:
    """Its vectors change in every forward pass, by less than the tolerance once they have converged."""
    hooks = module._forward_pre_hooks.values()
    if module.training and (isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)):
        raise Refused(
            "The forward pass cannot be replayed: spectral norm updates its vectors in every one. Use no norm, or "
            "weight norm in batch mode, or train this model without δ-SAM."
        )


def _values(objective: Objective) -> Tensor:
    """The losses, and the part of the loss that belongs to no sample."""
    parts = [objective.losses] if objective.shared is None else [objective.losses, objective.shared.reshape(1)]
    return torch.cat(parts).detach()


def _listing(losses: Tensor) -> str:
    shown = ", ".join(f"{value:.6g}" for value in losses.flatten()[:4].tolist())
    return f"[{shown}{', …' if losses.numel() > 4 else ''}]"
