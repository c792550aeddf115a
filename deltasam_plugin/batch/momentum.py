r"""The perturbation of Momentum-SAM, which comes from the base optimizer's state and needs no pass of its own.

.. math:: \epsilon = -\rho\,\frac{m}{\|m\|}

m is the momentum, a running mean of gradients. Where the next step along it leads, on the other side of the valley that
training is in, the loss tends to be higher.

Reference: Becker, Altrock, Risse. Momentum-SAM: Sharpness Aware Minimization without Computational Overhead. arXiv
2401.12033, 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from deltasam_plugin.batch.displacement import PerturbedParameter, ascended
from deltasam_plugin.loss import Statistics

MOMENTA = ("exp_avg", "momentum_buffer")  # what torch's and fairseq's optimizers call it


def momentum_of(state: Mapping[str, Any]) -> Tensor | None:
    """The momentum in an optimizer's state of one parameter, or None if there is none (yet)."""
    return next((state[name] for name in MOMENTA if isinstance(state.get(name), Tensor)), None)


def check_momentum(states: Iterable[Mapping[str, Any]], optimizer: str) -> None:
    """Refuse a base optimizer without momentum.

    Args:
        states: of its parameters, after a step.
        optimizer: its name.

    Raises:
        ValueError: no parameter has a momentum.
    """
    if all(momentum_of(state) is None for state in states):
        raise ValueError(
            f"Invalid ascent='momentum' (--sam-ascent) with the base optimizer {optimizer}: it keeps no momentum "
            f"({' or '.join(MOMENTA)}) in its state. Give it momentum, or use another one such as adam."
        )


@contextmanager
def displaced_by_momentum(
    parameters: Sequence[PerturbedParameter],
    momenta: Sequence[Tensor | None],
    rho: float,
    adaptive: bool,
    statistics: Statistics,
) -> Iterator[None]:
    """Within this context the parameters are displaced; afterwards they are what they were.

    Args:
        parameters: what is displaced.
        momenta: m, one per parameter, of its shape; None counts as zero. If all are zero nothing moves.
        rho: radius, L2 norm in parameter space.
        adaptive: see :func:`~deltasam_plugin.batch.displacement.ascended`.
        statistics: are filled, except for what is measured in samples.
    """
    with ascended(parameters, list(momenta), -rho, adaptive=adaptive) as ascent:
        statistics.fill(ascent_gnorm=ascent.gradient_norm, eps_norm=ascent.moved, skipped=ascent.skipped)
        yield
