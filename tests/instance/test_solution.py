"""The second pass: on each sample's own weights, as a repetition of the first, and what it keeps alive."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from deltasam_plugin.instance import InstanceEngine, Solution
from deltasam_plugin.instance.solution import Comparison
from tests.instance.test_engine import MODEL, RHO, Classifier, classified, sequence_losses


def test_a_second_pass_that_is_no_repetition_is_refused() -> None:
    engine = InstanceEngine(MODEL, RHO)

    def solution() -> Solution:
        with engine.recording() as tape:
            losses = sequence_losses(MODEL, torch.tensor([[1, 2, 3], [4, 5, 6]]))
        return engine.solve(tape, losses)

    with (
        pytest.raises(RuntimeError, match=r"calls embedding\(embedding.weight\) with leading sizes \(2, 2\) where the"),
        solution().perturbed(),
    ):
        sequence_losses(MODEL, torch.tensor([[1, 2], [4, 5]]))
    ended = "second pass ends where the first had linear"
    with pytest.raises(RuntimeError, match=ended), solution().perturbed():
        MODEL.embedding(torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_the_graph_of_the_second_pass_is_all_that_holds_the_perturbation() -> None:
    """The backward pass then frees it layer by layer."""
    model = Classifier()
    losses = classified(model)
    engine = InstanceEngine(model, RHO)
    with engine.recording() as tape:
        first = losses()
    solution = engine.solve(tape, first)
    kept = [weakref.ref(factor.left) for part in parts(solution) for factor in solution.perturbation.factors(part)]
    assert kept
    del tape, first
    with solution.perturbed():
        second = losses().sum()
    assert all(reference() is not None for reference in kept)
    second.backward()
    del second
    assert not any(reference() is not None for reference in kept)


def parts(solution: Solution) -> list:
    return [call.weight for call in solution.calls]


def test_embeddings_are_perturbed_in_single_precision_under_autocast() -> None:
    """Without a product the loss is linear in the table: it rises by ρ‖gᵢ‖ exactly."""
    torch.manual_seed(0)
    table, tokens, c = nn.Embedding(9, 32), torch.randint(9, (4, 7)), torch.randn(4, 7, 32)
    engine = InstanceEngine(table, RHO)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (table(tokens) * c).sum((1, 2))

    with engine.recording() as tape:
        first = losses()
    solution = engine.solve(tape, first)
    with solution.perturbed():
        rise = losses() - first
    torch.testing.assert_close(rise, RHO * solution.perturbation.norms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "group"), [(5, 2), (7, 3), (4, 8), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_that_do_not_mix_are_not_refused(batch: int, group: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3).to(dtype)
    comparison = _compared(layer, torch.randn(batch, 4, dtype=dtype), group, mix=False)
    assert comparison is not None


@pytest.mark.parametrize(("batch", "group"), [(5, 2), (7, 3), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_that_mix_behind_detach_are_refused(batch: int, group: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3).to(dtype)
    with pytest.raises(RuntimeError, match="changes with the perturbation of another"):
        _compared(layer, torch.randn(batch, 4, dtype=dtype), group, mix=True)


def _compared(layer: nn.Linear, x: Tensor, group: int, mix: bool) -> Comparison | None:
    engine = InstanceEngine(layer, RHO, group=group)

    def losses() -> Tensor:
        found = layer(x).square().sum(1)
        return found * found.detach().mean() if mix else found

    with engine.recording() as tape:
        first = losses()
    at_w, solution = first.detach(), engine.solve(tape, first)
    solution.refuse_mixed_values(at_w, losses)
    return solution.comparison
