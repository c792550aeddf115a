"""Layers that are out of sight, unusual or failing: instance mode is exact, or refuses, and leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from deltasam_plugin import DeltaSAM
from tests.helpers import apex_like
from tests.helpers.random_blocks import Hidden
from tests.helpers.tagger import SIZES, WIDTH, WORDS, Tagger, check, run

# A6: only a gradient that is not zero verifies


class Adapted(Tagger):
    """With an adapter that starts at zero, in its output or as a whole."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.down, self.up = (nn.Linear(*size, bias=False) for size in [(WIDTH, inner), (inner, WIDTH)])
        nn.init.zeros_(self.up.weight)
        self.wide = nn.Linear(WIDTH, 300)

    def losses(self, factor: float, tokens: Tensor, linear: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = self.words(tokens)
        x = x + factor * linear(torch.tanh(linear(x, self.down.weight)), self.up.weight)
        return self.classified(x.sum(1), tokens) + self.wide(x).square().mean((1, 2))


class Seen(torch.autograd.Function):
    """A linear layer as a Python user would write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return gradient.matmul(weight), gradient.flatten(0, -2).t().matmul(x.flatten(0, -2))


@pytest.mark.parametrize("function", [Hidden, Seen])
@pytest.mark.parametrize("inner", [1, 4])
@pytest.mark.parametrize("waiting", [0, 3, 6])
def test_an_adapter_behind_a_function_after_batches_without_gradient(
    function: type[torch.autograd.Function], inner: int, waiting: int
) -> None:
    """Of less than 1 % of the weights, and of more."""
    model = Adapted(inner)

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return model.losses(float(number >= waiting), tokens, function.apply)

    check(run(model, losses, [*SIZES, *SIZES]), "exact", "warned", "refused")


def test_an_adapter_in_plain_layers_after_batches_without_gradient() -> None:
    model = Adapted(2)
    check(run(model, lambda number, tokens, _: model.losses(float(number > 2), tokens, F.linear)), "exact")


@pytest.mark.parametrize("when", ["later", "long batches"])
def test_a_layer_that_is_also_used_behind_a_function(when: str) -> None:
    """Its coverage was verified before that."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.words(tokens))
        if number > 2 if when == "later" else tokens.shape[1] > 4:
            x = x + Hidden.apply(x, model.hidden.weight)
        return model.classified(x.sum(1), tokens)

    check(run(model, losses, [(3, 4), (2, 4), (3, 2), (4, 5), (2, 5)]), "exact", "refused")


# B1: nothing is left behind


class Payload:
    """Lives as long as the graph that holds it."""


class Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, payload: Payload) -> Tensor:
        ctx.payload = payload
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("failing", ["first pass", "second pass", "refused", "nothing fails"])
def test_no_graph_is_left_behind(failing: str) -> None:
    model = Tagger().double()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.3, perturbation="instance", lr=0.0)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    payloads: list[weakref.ref[Payload]] = []

    def step() -> None:
        calls = iter(range(100))

        def losses() -> Tensor:
            payload, number = Payload(), next(calls)
            payloads.append(weakref.ref(payload))
            x = Holding.apply(model.layers(model.words(tokens)), payload)
            y = torch.tanh(model.hidden(x))
            if failing == "first pass" or (failing == "second pass" and number > 0):
                raise KeyError("a fault")
            return (y - y.mean(0) if failing == "refused" else y).square().sum((1, 2))

        try:
            optimizer.step(losses)
        except (KeyError, RuntimeError):
            assert failing != "nothing fails"
        else:
            assert failing == "nothing fails"

    for _ in range(3):  # the first of all statistics among them
        step()
    before = live_tensors()
    for _ in range(3):
        step()
    assert live_tensors() <= before
    assert payloads
    assert [payload() for payload in payloads] == [None] * len(payloads)


# C3: layers that pipelines have


class Variant(Tagger):
    """With another layer after the embeddings."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize("padding", [None, 1])
def test_embeddings_with_an_infinite_max_norm(padding: int | None) -> None:
    model = Variant(nn.Embedding(WORDS, WIDTH, padding_idx=padding, max_norm=float("inf")))
    check(run(model, lambda n, tokens, _: model.classified(model.layers(model.layer(tokens)).sum(1), tokens)), "exact")


def test_a_finite_max_norm_is_refused() -> None:
    model = Variant(nn.Embedding(WORDS, WIDTH, max_norm=0.5))
    check(
        run(model, lambda n, tokens, _: model.classified(model.layers(model.layer(tokens)).sum(1), tokens)), "refused"
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_without_inputs(bias: bool) -> None:
    model = Variant(nn.Linear(0, WIDTH, bias=bias))

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        nothing = torch.zeros(*tokens.shape, 0, dtype=torch.float64)
        return model.classified(model.layers(model.words(tokens) + model.layer(nothing)).sum(1), tokens)

    check(run(model, losses), "exact")


@pytest.mark.parametrize("name", ["FusedLayerNorm", "FusedRMSNorm"])
@pytest.mark.parametrize("time_first", [False, True])
def test_the_norms_of_apex(name: str, time_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Variant(getattr(apex_like.install(monkeypatch), name)(WIDTH))

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.hidden(model.words(tokens))
        x = model.layer(x.transpose(0, 1)).transpose(0, 1) if time_first else model.layer(x)
        return model.classified(torch.tanh(model.again(x)).sum(1), tokens)

    check(run(model, losses), "exact")


def test_sparse_embeddings() -> None:
    model = Variant(nn.Embedding(WORDS, WIDTH, sparse=True))
    check(run(model, lambda n, tokens, _: model.classified(model.layers(model.layer(tokens)).sum(1), tokens)), "exact")


@pytest.mark.parametrize("whole", [False, True])
def test_slices_of_a_weight(whole: bool) -> None:
    """As Linformer compresses keys over time; refused where the whole weight is used elsewhere."""
    model = Variant(nn.Linear(8, 3, bias=False))

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.words(tokens))
        short = F.linear(x.permute(0, 2, 1), model.layer.weight[:, 0 : tokens.shape[1]]).tanh().permute(0, 2, 1)
        lost = model.classified(model.layers(short).sum(1), tokens)
        return lost + model.layer(F.pad(x, (0, 2))).square().sum((1, 2)) if whole else lost

    check(run(model, losses), "refused" if whole else "exact")


@pytest.mark.parametrize("early", [False, True])
def test_activation_checkpointing(early: bool) -> None:
    """Exact or refused in words; with torch's early stop, as it is by default, or without."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        with set_checkpoint_early_stop(early):
            x = checkpoint(model.layers, model.words(tokens), use_reentrant=False)
        return model.classified(torch.tanh(x).sum(1), tokens)

    check(run(model, losses), "exact", "refused")


def test_convolutions_over_one_position() -> None:
    model = Variant(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layer(model.words(tokens).transpose(1, 2)).transpose(1, 2)
        return model.classified(model.layers(x).sum(1), tokens)

    check(run(model, losses, [(3, 2), (2, 1), (1, 1)]), "exact")
