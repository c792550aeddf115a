"""The first pass of instance mode: from a recorded forward pass to the perturbation of every sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn

from deltasam_plugin.adaptive import filter_scale
from deltasam_plugin.checks import is_power_of_two
from deltasam_plugin.instance.coverage import Coverage
from deltasam_plugin.instance.entanglement import entangled, half_in_turn
from deltasam_plugin.instance.familiarity import Familiarity
from deltasam_plugin.instance.gradients import PerSampleGradients
from deltasam_plugin.instance.layers.base import PlannedCall
from deltasam_plugin.instance.layout import Listed, merged
from deltasam_plugin.instance.ownership import Ownership
from deltasam_plugin.instance.passes import MarkedPass, Passes, output_gradients
from deltasam_plugin.instance.planning import plan_calls
from deltasam_plugin.instance.recording import RecordedCall, Tape, detached_uses
from deltasam_plugin.instance.slices import ParameterSlice
from deltasam_plugin.instance.solution import Comparison, Solution
from deltasam_plugin.loss import check_losses
from deltasam_plugin.precision import at_least_float32

ALWAYS_CHECKED = 16  # batches; later the powers of two
CHECK_INTERVAL = 1000  # and the multiples of this


class InstanceEngine:
    r"""Exact perturbation of every sample: :math:`G^* = \sum_i \nabla\ell_i(w + \rho\, g_i / \|g_i\|)`.

    The perturbation of sample i is a multiple of its own gradient, of rank at most T in a layer that is applied to T
    rows. The perturbed layer's output therefore follows from the inputs and output gradients of a first pass, in matrix
    products that are batched over the samples. Neither per-sample weights nor a change of the weights is needed.

    Args:
        parameters: a module, or its parameters by name. Those that require a gradient are perturbed.
        rho: radius, L2 norm in parameter space.
        loss_budget: C; shortens the radius to :math:`\min(\rho, C/\|g_i\|)`.
        group: M samples in a row share a perturbation, that of their summed loss, as if they were one sample.
        adaptive: whether filters are perturbed in proportion to their size, see
            :func:`~deltasam_plugin.adaptive.filter_scale`.

    Example:
        >>> engine = InstanceEngine(model, rho=0.05)
        >>> with engine.recording() as tape:
        ...     losses = F.cross_entropy(model(x), y, reduction="none")
        >>> solution = engine.solve(tape, losses)
        >>> with solution.perturbed():
        ...     F.cross_entropy(model(x), y, reduction="sum").backward()  # the caller replays random numbers
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        rho: float,
        loss_budget: float | None = None,
        group: int = 1,
        adaptive: bool = False,
    ) -> None:
        if not (math.isfinite(rho) and rho >= 0):
            raise ValueError(f"Invalid rho={rho}. Must be finite and >= 0.")
        named = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
        if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
            raise ValueError(f"Several parameters of the same name: {', '.join(twice)}. Must be unique: add a prefix.")
        self.rho, self.loss_budget, self.group, self.adaptive = rho, loss_budget, group, adaptive
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._coverage = Coverage(self._parameters)
        self._ownership = Ownership()
        self._familiarity = Familiarity()
        self._entangled = False
        self._batches = self._comparisons = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is to be perturbed, covered or not."""
        return list(self._parameters.values())

    @property
    def uncovered(self) -> list[Tensor]:
        """The parameters that stay unperturbed."""
        return self._coverage.uncovered

    @contextmanager
    def recording(self, rows: Sequence[Tensor] = ()) -> Iterator[Tape]:
        """Record a forward pass.

        Args:
            rows: for layers that see a selection of all positions (masked tokens): the sample of each selected row,
                integer (N,). Several lists if there are several selections. Without it, rows are looked up by a further
                backward pass in every batch.
        """
        tape = Tape(self._parameters, rows)
        with tape.running():
            yield tape

    def solve(self, tape: Tape, losses: Tensor, scale: Tensor | float = 1.0, rho: float | None = None) -> Solution:
        r"""Find every sample's perturbation in one backward pass, which reaches no parameter and no ``.grad``.

        First batches, a few later ones and those unlike all before take more: see ``ownership``, ``coverage``,
        ``familiarity`` and ``entanglement``.

        Args:
            tape: of the pass that computed the losses. It is spent, and so is the losses' graph.
            losses: per-sample losses with graph, (B,).
            scale: factor on the losses during this pass, against underflow in half precision. The perturbation does
                not depend on it; ``norms`` are those of the scaled losses.
            rho: radius of this batch, by default the engine's.

        Raises:
            ValueError: losses are not of shape (B,).
            Refused: more than 1 % of the weights are used in ways that are not covered, or samples are mixed.
        """
        check_losses(losses)
        losses = at_least_float32(losses)
        with torch.autocast(losses.device.type, enabled=False):
            seed = torch.as_tensor(scale, dtype=losses.dtype, device=losses.device).detach().expand_as(losses)
            self._coverage.exclude(tape.misused())
            calls, rows = list(tape.calls), [Listed(owners, losses.numel()) for owners in tape.rows]
            tape.calls.clear()
            passes = self._passes(losses, calls, rows, seed, tape.written)
            groupings, reasons = self._ownership.groupings(calls, passes.gradients, passes.scaled, losses.numel(), rows)
            self._coverage.exclude({**detached_uses(calls, passes.gradients, tape.superseded), **reasons})
            if passes.marked is not None:
                self._entangled = entangled(calls, groupings, passes.gradients, passes.marked, self._coverage)
            # Rows that a model routes by what it computes may take another way at the perturbed weights.
            routed = tape.decides and any(isinstance(found, Listed) and found not in rows for found in groupings)
            groupings = [None if grouping is None else merged(grouping, self.group) for grouping in groupings]
            planned = plan_calls(calls, groupings, self._coverage, not self.adaptive)
            if passes.of_parameters and self._coverage.exclude(self._differences(calls, planned, passes)):
                planned = plan_calls(calls, groupings, self._coverage, not self.adaptive)
            comparison = None
            if passes.scaled:
                dtypes = {call.dtype for call in calls} or {losses.dtype}
                comparison = Comparison(self._comparisons, routed or self._familiarity.rearranged, dtypes)
            work = list(zip(calls, planned, passes.gradients))
            del calls, passes
            per_sample = _accumulated(work)
            self._coverage.warn()
            sizes = torch.ones_like(losses).split(self.group)
            sizes = torch.stack([size.sum() for size in sizes])
            rise = None if self.loss_budget is None else seed.abs()[:1] * self.loss_budget * sizes
            scale_of = cache(self._scale_of) if self.adaptive else None
            perturbation = per_sample.perturbation(sizes, self.rho if rho is None else rho, rise, scale_of)
            return Solution(self._parameters, perturbation, planned, sizes, comparison)

    def _passes(
        self,
        losses: Tensor,
        calls: list[RecordedCall],
        rows: list[Listed],
        seed: Tensor,
        written: Sequence[tuple[Tensor, int]],
    ) -> Passes:
        """One backward pass; in a batch that is to be compared, others before it."""
        batch, check = losses.numel(), self._is_to_be_checked()
        strange = self._familiarity.strange(calls, losses, written) if batch > 1 else False
        untrusted = check or strange or self._entangled or self._familiarity.lost
        backward = partial(output_gradients, losses, calls)
        scaled, marked = [], None
        if batch > 1 and (untrusted or self._ownership.leaves_open(calls, losses, rows)):
            self._comparisons += 1
            factors = self._ownership.factors(calls, losses)
            scaled = [backward(seed * factor, retain_graph=True) for factor in factors]
            self._familiarity.learn()
            if (check or strange) and not self._entangled and not torch.is_anomaly_enabled():
                marks = half_in_turn(batch, self._comparisons, losses.device)
                marked = MarkedPass(marks, backward(torch.where(marks, torch.nan, 0 * seed), retain_graph=True))
        names = self._coverage.names() if check or strange else self._coverage.unverified()
        found = backward(seed, [self._parameters[name] for name in names])
        of_parameters = {name: g for name, g in zip(names, found[len(calls) :]) if g is not None}
        return Passes(found[: len(calls)], scaled, marked, of_parameters)

    def _differences(self, calls: list[RecordedCall], planned: list[PlannedCall], passes: Passes) -> dict[str, str]:
        """Parameters whose per-sample gradients do not add up to autograd's, with the reason."""
        shapes = {call.weight.upright: call.weight_shape for call in planned if call.weight is not None}
        eps = max((torch.finfo(g.dtype).eps for g in passes.gradients if g is not None), default=0.0)
        totals = _accumulated(list(zip(calls, planned, passes.gradients))).totals(shapes)
        return self._coverage.verify(passes.of_parameters, totals, eps)

    def _scale_of(self, part: ParameterSlice) -> Tensor:
        scale = filter_scale(self._parameters[part.name])
        return scale[part.start : part.stop] if scale.dim() else scale

    def _is_to_be_checked(self) -> bool:
        """Whether rows and coverage are compared with autograd in this batch, though nothing new was seen."""
        self._batches += 1
        scheduled = self._batches <= ALWAYS_CHECKED or self._batches % CHECK_INTERVAL == 0
        return scheduled or is_power_of_two(self._batches)


def _accumulated(work: list[tuple[RecordedCall, PlannedCall, Tensor | None]]) -> PerSampleGradients:
    """Per-sample gradients from output gradients. Empties the list, to free inputs and gradients that were used."""
    found = PerSampleGradients()
    while work:
        call, plan, gradient = work.pop()
        if gradient is not None and plan.perturbed:
            plan.layer.accumulate(plan, call.x, gradient.detach(), found)
    return found
