r"""Directions of the ascent that the base optimizer's momentum m gives (``--sam-ascent noise`` and ``momentum``).

A momentum is a mean of past gradients, and the base optimizer keeps it anyway. So it needs no state here: a checkpoint
holds all that a resumed run needs, and every worker has the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from deltasam_plugin.batch.displacement import ascended
from deltasam_plugin.batch.orthogonal import orthogonal_part
from deltasam_plugin.batch.restoration import PerturbedParameter, copy_all, restored
from deltasam_plugin.loss import Statistics

MomentumOf = Callable[[PerturbedParameter], Tensor | None]

MOMENTA = ("exp_avg", "momentum_buffer")  # what torch's and fairseq's optimizers call it


def momentum_of(state: Mapping[str, Any]) -> Tensor | None:
    """The momentum in an optimizer's state of one parameter, up to a positive factor; None if there is none."""
    found = next((state[name] for name in MOMENTA if isinstance(state.get(name), Tensor)), None)
    scale = state.get("exp_avg_scale")  # of fairseq's --fp16-adam-stats, one for each parameter
    return found if found is None or scale is None else found.float() * scale


def check_momentum(states: Iterable[Mapping[str, Any]], ascent: str) -> None:
    """To be called after the base optimizer's first step, with its states of all parameters that got a gradient.

    Raises:
        ValueError: one of them has no momentum.
    """
    for state in states:
        if momentum_of(state) is None:
            raise ValueError(
                f"Invalid ascent={ascent!r} (--sam-ascent): the base optimizer keeps {', '.join(state) or 'nothing'}, "
                f"and no momentum ({' or '.join(MOMENTA)}). Give it momentum, or use another one such as adam."
            )


def gradient_noise(gradients: Sequence[Tensor | None], momenta: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The part of a batch's gradient that is orthogonal to the momentum: what other batches do not share.

    F-SAM ascends along the gradient less a running mean of gradients at w, which is a state of its own. Here the mean
    is the base optimizer's momentum, whose length does not matter. Before the first step this is the gradient itself.

    Args:
        gradients: one per perturbed parameter; None counts as zero.
        momenta: of their shapes; likewise.

    Reference: Li, Zhou, He, Cheng, Huang. Friendly Sharpness-Aware Minimization. CVPR 2024.
    """
    return orthogonal_part(gradients, momenta)


class MomentumDisplacement:
    r"""The perturbation of Momentum-SAM, :math:`\epsilon = -\rho\,m/\|m\|`, which needs no pass of its own.

    The next step along the momentum leads to about this place. Training swings to and fro across the steep directions
    of the loss, so the loss rises there.

    Args:
        parameters: what is perturbed.
        momenta: m, one per parameter, of its shape; None counts as zero. Before the first step nothing moves.
        rho: radius, L2 norm in parameter space.
        adaptive: see :func:`~deltasam_plugin.batch.displacement.ascended`.

    Reference: Becker, Altrock, Risse. Momentum-SAM: Sharpness Aware Minimization without Computational Overhead. arXiv
    2401.12033, 2024.
    """

    def __init__(
        self, parameters: Sequence[PerturbedParameter], momenta: Sequence[Tensor | None], rho: float, adaptive: bool
    ) -> None:
        self._parameters, self._momenta, self._rho, self._adaptive = parameters, momenta, rho, adaptive
        self._values: list[Tensor] = []

    @contextmanager
    def forward(self, statistics: Statistics) -> Iterator[None]:
        """Within this context the parameters are displaced; afterwards they are what they were.

        Args:
            statistics: those are filled that one pass can measure.
        """
        with ascended(self._parameters, list(self._momenta), -self._rho, adaptive=self._adaptive) as ascent:
            statistics.fill(ascent_gnorm=ascent.gradient_norm, eps_norm=ascent.moved, skipped=ascent.skipped)
            self._values = [item.parameter.detach().clone() for item in self._parameters]
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Within this context the parameters are what they were within the last :meth:`forward`."""
        with restored(self._parameters):
            copy_all([item.parameter for item in self._parameters], self._values)
            self._values = []
            yield
