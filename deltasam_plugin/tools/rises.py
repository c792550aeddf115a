r"""By how much the losses of a batch rise near the parameters w, in three directions.

=============  ===============================================================================================
``random``     :math:`\ell_i(w \pm \rho\,u/\|u\|) - \ell_i(w)`, u ~ N(0, I); the mean over both signs and several u
``batch``      :math:`\ell_i(w + \rho\,g/\|g\|) - \ell_i(w)`, g the gradient of the batch: what SAM sees
``per sample`` :math:`\ell_i(w + \rho\,g_i/\|g_i\|) - \ell_i(w)`: what instance mode sees
=============  ===============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltasam_plugin.batch.displacement import ascended
from deltasam_plugin.batch.perturbation import stashed_gradients
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.errors import Refused
from deltasam_plugin.instance import InstanceEngine
from deltasam_plugin.loss import Objective
from deltasam_plugin.replay import forward_only

Forward = Callable[[], Objective]


def at_w(forward: Forward) -> Tensor:
    """Losses of the samples, (B,). A part of the loss that belongs to no sample is shared out among them."""
    return forward_only(lambda: shared_out(forward()))  # without gradient fairseq's layers may take other kernels


def shared_out(objective: Objective) -> Tensor:
    """The losses of the samples, which add up to the loss: detached, (B,)."""
    losses = objective.losses.detach()
    return losses if objective.shared is None else losses + objective.shared.detach() / losses.numel()


def along_random(
    parameters: Sequence[nn.Parameter], radii: Sequence[float], forward: Forward, count: int, seed: int
) -> Tensor:
    """Mean rises along random directions and their opposites, the same for every batch.

    Args:
        parameters: w.
        radii: R of them, L2 norms in parameter space.
        forward: the forward pass of one batch.
        count: number of directions.
        seed: of the directions.

    Returns:
        Shape (R, B).
    """
    generator = torch.Generator().manual_seed(seed)
    before, found = at_w(forward), []
    for _ in range(count):
        direction = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        found.append(_along(parameters, direction, radii, forward))
        found.append(_along(parameters, [-u for u in direction], radii, forward))
    return torch.stack(found).mean(0) - before


def along_gradient(parameters: Sequence[nn.Parameter], radii: Sequence[float], forward: Forward) -> Tensor:
    """Rises along the gradient of the batch, (R, B). Arguments as for :func:`along_random`."""
    with stashed_gradients(parameters):
        with torch.enable_grad():
            objective = forward()
        objective.loss.backward()
        gradient = [p.grad for p in parameters]
    return _along(parameters, gradient, radii, forward) - shared_out(objective)


def along_own_gradients(engine: InstanceEngine, radii: Sequence[float], forward: Forward) -> Tensor:
    """Rises of each sample along its own gradient, all samples at once, (R, B).

    Raises:
        Refused: instance mode does not cover this model or this loss.
    """
    found = []
    for rho in radii:
        with torch.enable_grad(), engine.recording() as tape:
            objective = forward()
        if objective.shared is not None:
            raise Refused("A part of the loss belongs to the batch and to no sample.")
        tape.rows, losses = objective.rows, objective.losses
        before = losses.detach()
        solution = engine.solve(tape, losses, rho=rho)
        solution.refuse_mixed_values(before, lambda: forward().losses)
        with solution.perturbed():
            found.append(at_w(forward) - before)
    return torch.stack(found)


def _along(
    parameters: Sequence[nn.Parameter],
    direction: Sequence[Tensor | None],
    radii: Sequence[float],
    forward: Forward,
) -> Tensor:
    """Losses at all radii along one direction, (R, B)."""
    perturbed, found = [PerturbedParameter(p) for p in parameters], []
    for rho in radii:
        with ascended(perturbed, list(direction), rho):
            found.append(at_w(forward))
    return torch.stack(found)
