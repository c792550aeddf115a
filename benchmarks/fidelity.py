r"""How near does one perturbation for the whole batch come to one for each sample?

    python -m benchmarks.fidelity DATA NAME=CHECKPOINT… [--batch-size 16] [--rho 0.05] [--batches 8]   # measures
    python -m benchmarks.fidelity --report                                                              # prints tables

A method is measured by its correction C of the gradient. The exact one is that of every sample on its own,
:math:`C^* = \sum_i g_i(w + \rho\,g_i/\|g_i\|) - g_i(w)`. The error is :math:`\|C - C^*\| / \|C^*\|`, and the cosine
is that between the two. Batches are drawn at random from the training part, the same for every checkpoint. Models run
without dropout.

================  ==================================================================================================
``uniform`` etc.  the weightings of the plugin, with its default probes: one perturbation for the batch
``ideal``         weights :math:`a_i/\|g_i\|`, with :math:`a_i = \|g_i(w+\epsilon_i) - g_i(w)\|/\rho`
``best``          the best non-negative weights that were found: see :func:`best_weights`
``groups of M``   one perturbation for every M samples (m-sharpness)
================  ==================================================================================================

Every batch that was measured is kept in fidelity.csv. What is there already is not measured again.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy
import torch
from fairseq import utils
from scipy import optimize, stats
from torch import Tensor

from benchmarks.study import ALPHA, append, holm, interval
from deltasam_plugin.batch.displacement import ascended
from deltasam_plugin.batch.probing import probe
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.weighting import WEIGHTINGS, sample_weights, uniform_weights
from deltasam_plugin.fairseq.criterions.registry import LOGITS
from deltasam_plugin.loss import Objective
from deltasam_plugin.settings import Settings
from deltasam_plugin.tools.checkpoints import Checkpoint, load
from examples.common.experiment import table

RESULTS = Path(__file__).with_name("fidelity.csv")
GROUPS = (8, 4, 2)
SEED = 1  # of the choice of batches, and of the first probe


class Row(NamedTuple):
    """How good one method is on one batch."""

    checkpoint: str
    batch_size: int
    rho: float
    batch: int
    method: str
    error: float
    cosine: float


class Neighbourhood:
    """Gradients of one batch near w, as vectors of all P parameters.

    Attributes:
        own: the gradients of its B samples at w, (B, P).
        whole: the gradient of the batch at w, (P,).
    """

    def __init__(self, checkpoint: Checkpoint, dataset: Any, indices: Sequence[int]) -> None:
        self._checkpoint = checkpoint
        self._batch = checkpoint.sample(dataset, indices)
        indices = self._batch["id"].tolist()  # a dataset may sort
        self._samples = [checkpoint.sample(dataset, [index]) for index in indices]
        self._groups = {
            size: [checkpoint.sample(dataset, indices[i : i + size]) for i in range(0, len(indices), size)]
            for size in GROUPS
            if size < len(indices)
        }
        self._parameters = list(checkpoint.parameters.values())
        self.own = torch.stack([self._gradient(sample) for sample in self._samples])
        self.whole = self._gradient(self._batch)

    def _gradient(self, sample: Any, direction: Tensor | None = None, rho: float = 0.0) -> Tensor:
        """The gradient of the loss of these samples at distance ρ in this direction, (P,)."""
        near = nullcontext() if direction is None else ascended(self._perturbed, self._as_parameters(direction), rho)
        with near:
            loss = self._checkpoint.forward(sample)[0].loss
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    @property
    def _perturbed(self) -> list[PerturbedParameter]:
        return [PerturbedParameter(parameter) for parameter in self._parameters]

    def _as_parameters(self, vector: Tensor) -> list[Tensor | None]:
        parts = vector.split([parameter.numel() for parameter in self._parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    def each(self, rho: float) -> Tensor:
        """The corrections of the samples, each at its own worst point, (B, P). Their sum is the exact one."""
        found = [self._gradient(s, g, rho) - g for s, g in zip(self._samples, self.own, strict=True)]
        return torch.stack(found)

    def along(self, direction: Tensor, rho: float) -> Tensor:
        """The correction of the batch in one direction, (P,)."""
        return self._gradient(self._batch, direction, rho) - self.whole

    def grouped(self, size: int, rho: float) -> Tensor:
        """The correction with one perturbation for each group of so many samples, (P,)."""
        directions = [part.sum(0) for part in self.own.split(size)]
        groups = zip(self._groups[size], directions, strict=True)
        return torch.stack([self._gradient(samples, g, rho) - g for samples, g in groups]).sum(0)

    @property
    def group_sizes(self) -> Iterable[int]:
        """M of every group that is smaller than the batch."""
        return self._groups

    def weights(self, name: str, seed: int) -> Tensor:
        """v of a weighting of the plugin, (B,)."""
        weighting = WEIGHTINGS[name]
        if weighting.measure is None:
            return uniform_weights(len(self.own), self.own.device)

        @torch.no_grad()
        def forward() -> Objective:
            return self._checkpoint.forward(self._batch, with_logits=weighting.by_logits)[0]

        scale = Settings.probe_scale
        found = probe(forward, forward(), self._perturbed, weighting.measure, Settings.probes, scale, seed)
        return sample_weights(weighting, *found)


def best_weights(moved: Tensor, units: Tensor, exact: Tensor, starts: Sequence[Tensor]) -> Tensor:
    r"""The non-negative weights c of unit directions whose correction is nearest to the exact one, to first order.

    .. math:: \min_{c \ge 0} \Bigl\| \frac{\sum_j c_j s_j}{\|\sum_j c_j e_j\|} - C^* \Bigr\|

    To first order the correction is linear in the perturbation; sⱼ is what it is along eⱼ alone, at the same radius.

    Args:
        moved: s, (B, P).
        units: e, the samples' gradients with norm 1, (B, P).
        exact: C*, (P,).
        starts: c of (B,) each, from which a quasi-Newton method starts.

    Returns:
        c, (B,).
    """
    moved, units, exact = moved.double(), units.double(), exact.double()
    bends, gram, inner = (product.numpy() for product in (moved @ moved.T, units @ units.T, moved @ exact))
    size = float(exact.square().sum()) or 1.0

    def objective(c: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        """The square of the above less a constant, relative to C*, and its gradient."""
        length = max(float(c @ gram @ c), 1e-30) ** 0.5
        square, product = float(c @ bends @ c) / length**2, float(inner @ c) / length
        of_square = 2 * (bends @ c - square * (gram @ c)) / length**2
        of_product = inner / length - product * (gram @ c) / length**2
        return (square - 2 * product) / size, (of_square - 2 * of_product) / size

    scaled = [(start / start.amax()).double().numpy() for start in starts]
    bounds = [(0, None)] * len(inner)
    found = [optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds) for start in scaled]
    return torch.from_numpy(min(found, key=lambda result: result.fun).x)


def compared(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Error and cosine of a correction."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm()), float(torch.cosine_similarity(found, exact, dim=0))


def measure(near: Neighbourhood, rho: float, seed: int, by_logits: bool) -> dict[str, tuple[float, float]]:
    """Error and cosine of every method on one batch."""
    own, each = near.own, near.each(rho)
    exact, norms = each.sum(0), own.norm(dim=1).clamp(min=1e-12)
    names = [name for name, weighting in WEIGHTINGS.items() if by_logits or not weighting.by_logits]
    weights = {name: near.weights(name, seed).to(own) for name in names}
    weights["ideal"] = each.norm(dim=1) / norms
    found = {name: compared(near.along(v @ own, rho), exact) for name, v in weights.items()}
    moved = torch.stack([near.along(g, rho) for g in own])
    best = best_weights(moved, own / norms[:, None], exact, [v * norms for v in weights.values()])
    found["best"] = compared(near.along((best.to(own) / norms) @ own, rho), exact)
    found["best"] = min(found.values())  # what is best to first order need not be best
    return found | {f"groups of {size}": compared(near.grouped(size, rho), exact) for size in near.group_sizes}


def batches(dataset: Any, possible: Sequence[Sequence[int]], size: int, number: int) -> Iterator[list[int]]:
    """So many batches of different samples, drawn at random."""
    indices = sorted(index for batch in possible for index in batch)
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(SEED)).tolist()
    for start in range(0, min(number * size, len(indices) - size + 1), size):
        yield [indices[i] for i in order[start : start + size]]


def rows() -> list[Row]:
    """The results so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [
            Row(r["checkpoint"], int(r["batch_size"]), float(r["rho"]), int(r["batch"]), r["method"],
                float(r["error"]), float(r["cosine"]))
            for r in csv.DictReader(file)
        ]  # fmt: skip


def keep(found: Sequence[Row]) -> None:
    """Add the rows of one batch to the results, all at once."""
    append(RESULTS, Row._fields, [(*row[:-2], f"{row.error:.4f}", f"{row.cosine:.4f}") for row in found])


def report(found: Sequence[Row]) -> str:
    """Means and 95 % intervals over batches: of the errors, of how much they exceed SAM's, and of the cosines.

    The last table counts the cases in which a method is nearer or farther than uniform weights.
    """
    names = list(dict.fromkeys(row.checkpoint for row in found))
    found = sorted(found, key=lambda row: (names.index(row.checkpoint), row.batch_size, row.rho, row.batch))
    values = {row[:5]: row for row in found}
    methods = list(dict.fromkeys(row.method for row in sorted(found, key=_rank)))

    def beyond(row: Row) -> float:
        return row.error - values[(*row[:4], "uniform")].error

    measures: dict[str, Callable[[Row], float]] = {
        "Error": lambda row: row.error,
        "Error less that of uniform on the same batch": beyond,
        "Cosine": lambda row: row.cosine,
    }
    parts = []
    for title, measured in measures.items():
        lines = [("checkpoint", "batch", "ρ", "batches", *methods)]
        for case in dict.fromkeys(row[:3] for row in found):
            own = {name: [measured(r) for r in found if r[:3] == case and r.method == name] for name in methods}
            cells = ["{:.2f} ± {:.2f}".format(*interval(own[name])) if len(own[name]) > 1 else "" for name in methods]
            lines.append((case[0], str(case[1]), f"{case[2]:g}", str(len(own["uniform"])), *cells))
        parts.append(f"{title}:\n\n{table(lines)}")
    excess = {case: [beyond(row) for row in rows] for case, rows in _by_case(found).items()}
    return "\n\n".join([*parts, f"Nearer or farther than uniform, paired t-tests over batches:\n\n{_counts(excess)}"])


def _by_case(found: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each method in each case, without uniform, with which they are compared.

    Nor is "best" there: it is the nearest of several on each batch, uniform weights among them, and cannot be farther.
    """
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        if row.method not in ("uniform", "best"):
            cases.setdefault((row.method, *row[:3]), []).append(row)
    return {case: rows for case, rows in cases.items() if len(rows) > 1}


def _counts(excess: dict[tuple[Any, ...], list[float]]) -> str:
    p_values = [float(stats.ttest_1samp(values, 0).pvalue) for values in excess.values()]
    lines = [("weights or groups", "cases", "nearer on average", "nearer, p < 0.05", "farther, p < 0.05",
              "nearer, corrected", "farther, corrected")]  # fmt: skip
    tests = list(zip(excess, (mean(values) for values in excess.values()), p_values, holm(p_values)))
    for method in dict.fromkeys(case[0] for case in excess):
        own = [(centre, p, corrected) for case, centre, p, corrected in tests if case[0] == method]
        counts = [len(own), sum(centre < 0 for centre, _, _ in own)]
        for column in (1, 2):
            significant = [test[0] for test in own if test[column] < ALPHA]
            counts += [sum(centre < 0 for centre in significant), sum(centre > 0 for centre in significant)]
        lines.append((method, *map(str, counts)))
    return table(lines)


def _rank(row: Row) -> tuple[int, int]:
    names = ["uniform", *(name for name in WEIGHTINGS if name != "uniform"), "ideal", "best"]
    return (names.index(row.method), 0) if row.method in names else (len(names), -int(row.method.split()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="binarized data")
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=CHECKPOINT")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16])
    parser.add_argument("--rho", type=float, nargs="+", default=[Settings().radius])
    parser.add_argument("--batches", type=int, default=8, help="for each case")
    parser.add_argument("--user-dir", help="your own fairseq components, if the checkpoints need them")
    parser.add_argument("--report", action="store_true", help="print the tables of what was measured")
    given = parser.parse_args()
    utils.import_user_module(given)
    for named in given.checkpoints:
        name, _, path = named.partition("=")
        checkpoint = load(Path(path), given.data, cpu=True)
        for size in given.batch_size:
            dataset, possible = checkpoint.batches("train", None, size)
            for number, indices in enumerate(batches(dataset, possible, size, given.batches)):
                known = {row[:4] for row in rows()}
                radii = [rho for rho in given.rho if (name, size, rho, number) not in known]
                near = Neighbourhood(checkpoint, dataset, indices) if radii else None
                for rho in radii:
                    found = measure(near, rho, SEED + number, checkpoint.criterion_name in LOGITS)
                    keep([Row(name, size, rho, number, method, *values) for method, values in found.items()])
                    print(f"{name}, batch size {size}, ρ {rho:g}: batch {number + 1} / {given.batches}", flush=True)
    if given.report:
        print(report(rows()))


if __name__ == "__main__":
    main()
