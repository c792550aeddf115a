"""The slow truth about per-instance perturbation: one sample at a time, with autograd and real perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltasam_plugin.instance import InstanceEngine
from deltasam_plugin.instance.sample_perturbation import PerSamplePerturbation

Losses = Callable[[], Tensor]  # replays its random numbers itself


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Autograd's gradients, zeros for what is not used."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


def norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm over all of them."""
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5


def loop(losses: Losses, parameters: Sequence[Tensor], rho: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Σᵢ gᵢ(w), Σᵢ gᵢ(w + ρgᵢ/‖gᵢ‖) and ‖gᵢ‖ (B,), by a loop over the samples."""
    base = [torch.zeros_like(p) for p in parameters]
    perturbed = [torch.zeros_like(p) for p in parameters]
    norms = []
    for i in range(len(losses())):
        ascent = gradients(losses()[i], parameters)
        norms.append(norm(ascent))
        kept = [p.detach().clone() for p in parameters]
        for p, g in zip(parameters, ascent):
            p.data.add_(rho / norms[-1] * g if norms[-1] else 0 * g)
        descent = gradients(losses()[i], parameters)
        for p, k in zip(parameters, kept):
            p.data.copy_(k)
        for sums, gs in ((base, ascent), (perturbed, descent)):
            for total, g in zip(sums, gs):
                total.add_(g)
    return base, perturbed, torch.tensor(norms)


def engine_gradients(
    engine: InstanceEngine,
    losses: Losses,
    parameters: Sequence[Tensor],
    scale: float = 1.0,
    rows: Sequence[Tensor] = (),
) -> tuple[list[Tensor], PerSamplePerturbation]:
    """Σᵢ gᵢ(w + ρgᵢ/‖gᵢ‖) by the engine."""
    with engine.recording(rows) as tape:
        first = losses()
    solution = engine.solve(tape, first, scale)
    with solution.perturbed():
        second = losses().sum()
    return gradients(second, parameters), solution.perturbation


def correction_error(
    engine: InstanceEngine,
    losses: Losses,
    parameters: Sequence[Tensor],
    rows: Sequence[Tensor] = (),
    rtol: float = 1e-7,
) -> float:
    """‖(G − Σgᵢ) − (G* − Σgᵢ)‖ / ‖G* − Σgᵢ‖, and the norms are checked on the way."""
    base, perturbed, norms = loop(losses, parameters, engine.rho)
    found, correction = engine_gradients(engine, losses, parameters, rows=rows)
    torch.testing.assert_close(correction.norms.double(), norms.double(), rtol=rtol, atol=1e-12)
    error = norm([f - p for f, p in zip(found, perturbed)])
    return error / norm([p - b for p, b in zip(perturbed, base)])


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]
