"""Instance mode through its public interface, judged step by step: exact, refused in words, or silently wrong."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltasam_plugin import DeltaSAM

Losses = Callable[[], Tensor]  # () to per-sample losses (B,)

TOLERANCE = 1e-7  # of the correction G − ḡ
ROUNDING = 1e-6  # a correction smaller than this share of ḡ is measured by ḡ: it is rounding
TOLERATED = 0.01  # share of the weights that may stay unperturbed, with a warning
REMEDY = re.compile(r"perturbation[ =][\"']?batch|Remedy|Must be")
STEP_LENGTH = 0.1  # of every update: what the weights are later does not depend on the scale of the loss


@dataclass(frozen=True)
class Verdict:
    """What one step was.

    Attributes:
        kind: exact, warned (exact but for what a warning names), refused, silent (the worst) or crashed.
        detail: the relative error of the correction, or the message.
    """

    kind: str
    detail: str

    @property
    def allowed(self) -> bool:
        """Whether it is what instance mode promises."""
        return self.kind in ("exact", "warned", "refused")

    @property
    def reason(self) -> str:
        """The message without its sizes and names, to count by."""
        reasons = "; ".join(sorted(set(re.findall(r"parameter \d+ \((.+?)\)(?=[,.])", self.detail))))
        if reasons:
            return f"does not cover: {reasons}"[:110]
        return re.sub(r"\([^()]*\)|\d+(\.\d+)?", "#", self.detail)[:110]


class Comparison:
    """A DeltaSAM in instance mode, compared with a loop over the samples at every step.

    Args:
        parameters: as for the optimizer.
        rho: radius.
        tolerance: relative error of the correction G − ḡ that counts as exact.
        group, adaptive: as for the optimizer.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        rho: float,
        tolerance: float = TOLERANCE,
        group: int = 1,
        adaptive: bool = False,
    ) -> None:
        self._all = list(parameters)
        self._rho, self._tolerance = rho, tolerance
        self._group, self._adaptive = group, adaptive
        self._unperturbed: set[int] = set()
        self._seen: list[Tensor] = []
        self.optimizer = DeltaSAM(
            self._all, torch.optim.SGD, rho=rho, perturbation="instance", group=group, adaptive=adaptive, lr=1.0
        )
        self.optimizer.register_step_pre_hook(self._look)

    def step(self, losses: Losses, seed: int = 0) -> Verdict:
        """One update. It draws its random numbers from `seed`."""
        parameters = [p for p in self._all if p.requires_grad]
        expected = self._oracle(losses, seed)
        before = [p.detach().clone() for p in parameters]
        seed_all(seed)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                value = self.optimizer.step(losses)
        except Exception as error:
            if not all(torch.equal(p, b) for p, b in zip(parameters, before)):
                return Verdict("silent", f"refused, and left other weights behind: {error}")
            explicit = isinstance(error, RuntimeError | ValueError) and REMEDY.search(str(error))
            return Verdict("refused" if explicit else "crashed", f"{type(error).__name__}: {error}")
        named = {int(i) for warning in said for i in re.findall(r"parameter (\d+)", str(warning.message))}
        self._unperturbed |= {id(parameters[i]) for i in named}
        if self._unperturbed:
            after = [p.detach().clone() for p in parameters]
            _set(parameters, before)
            expected = self._oracle(losses, seed)
            _set(parameters, after)
        return self._judge(parameters, *expected, value)

    def _oracle(self, losses: Losses, seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        parameters = [p for p in self._all if p.requires_grad]
        return oracle(losses, parameters, self._rho, seed, self._unperturbed, self._group, self._adaptive)

    def _judge(
        self, parameters: list[Tensor], base: list[Tensor], perturbed: list[Tensor], expected: Tensor, value: Tensor
    ) -> Verdict:
        error = _norm([f - p for f, p in zip(self._seen, perturbed)])
        correction = _norm([p - b for p, b in zip(perturbed, base)])
        floor = max(correction, ROUNDING * _norm(base), torch.finfo(torch.float64).tiny)
        share = sum(p.numel() for p in parameters if id(p) in self._unperturbed) / sum(p.numel() for p in parameters)
        if not error <= self._tolerance * floor:
            return Verdict("silent", f"error of the correction {error / floor:.1e}, {share:.1%} named as unperturbed")
        if not torch.allclose(value, expected, rtol=1e-9, atol=0):
            return Verdict("silent", f"loss {float(value)}, expected {float(expected)}")
        if share > TOLERATED:
            return Verdict("silent", f"a warning only for {share:.1%} of the weights")
        return Verdict("warned" if self._unperturbed else "exact", f"error of the correction {error / floor:.1e}")

    def _look(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for p in self._all if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
        self._seen = [g.clone() for g in gradients]
        length = _norm(gradients)
        for p, g in zip(parameters, gradients):
            p.grad = g * (STEP_LENGTH / length if length else 0.0)


def oracle(
    losses: Losses,
    parameters: list[Tensor],
    rho: float,
    seed: int,
    unperturbed: Iterable[int] = (),
    group: int = 1,
    adaptive: bool = False,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """ḡ, the mean of ∇ℓᵢ(w + ρgᵢ/‖gᵢ‖) and the mean loss, by a loop over the samples or groups of them.

    Args:
        losses: draws its random numbers from torch and Python.
        parameters: trainable.
        rho: radius.
        seed: of the random numbers.
        unperturbed: ids of parameters that stay where they are.
        group: samples in a row that share a perturbation.
        adaptive: whether it is ρT²g/‖Tg‖ with T the norm of a parameter's filters plus 0.01.
    """

    def gradient(part: Tensor) -> list[Tensor]:
        seed_all(seed)
        value = losses()[part].sum()
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters)]

    seed_all(seed)
    values = losses().detach()
    base, perturbed = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    originals = [p.detach().clone() for p in parameters]
    scales = [_filter_norms(o) + 0.01 if adaptive else torch.ones_like(o) for o in originals]
    for part in torch.arange(len(values)).split(group):
        own = gradient(part)
        ascent = [torch.zeros_like(g) if id(p) in unperturbed else t * g for p, t, g in zip(parameters, scales, own)]
        length = _norm(ascent)
        factor = rho / length if length else 0.0
        _set(parameters, [o + factor * t * a for o, t, a in zip(originals, scales, ascent)])
        try:
            moved = gradient(part)
        finally:
            _set(parameters, originals)
        for total, g in zip([*base, *perturbed], [*own, *moved]):
            total += g / len(values)
    return base, perturbed, values.mean()


def seed_all(seed: int) -> None:
    """Seed what models draw from."""
    torch.manual_seed(seed)
    random.seed(seed)


def _filter_norms(value: Tensor) -> Tensor:
    if value.dim() < 2:
        return value.abs()
    return torch.stack([row.norm().expand_as(row) for row in value])


def _set(parameters: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values):
        p.data.copy_(value)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())
