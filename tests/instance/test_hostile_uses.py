"""Uses of samples and parameters that only a comparison shows: exact, or refused in the batch in which they begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltasam_plugin import DeltaSAM
from deltasam_plugin.errors import Refused
from deltasam_plugin.instance.engine import ALWAYS_CHECKED
from deltasam_plugin.instance.layers import linear
from tests.helpers.tagger import WIDTH, WORDS, Tagger, check, run
from tests.helpers.verdict import Comparison

LATER = ALWAYS_CHECKED + 3  # number of a batch that nothing checks but what is new in it
ONE_SHAPE = [(4, 3)] * (LATER + 2)


@pytest.mark.parametrize("distance", [1, 2])
def test_a_partner_behind_detach(distance: int) -> None:
    """Two views of every sample in one batch, each the target of the other."""
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.layers(model.words(tokens)).mean(1)
        return -F.cosine_similarity(model.again(x), x.roll(distance, 0).detach(), dim=1)

    check(run(model, losses, ONE_SHAPE), "refused")


@pytest.mark.parametrize("language", [False, True])
def test_a_shared_row_that_is_also_used_behind_detach(language: bool) -> None:
    """Positions or languages are added to samples, as if each had rows of its own. The gate takes them as they are."""
    model = Tagger()
    model.shared = nn.Embedding(5, WIDTH)

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        if language:
            x, shared = model.words(tokens.t()), model.shared(tokens[:, 0] % 5)
        else:
            x, shared = model.words(tokens), model.shared(torch.arange(tokens.shape[1]))
        x = (x + shared) * torch.sigmoid(shared.detach())
        return model.classified(torch.tanh(model.hidden(x)).sum(0 if language else 1), tokens)

    check(run(model, losses), "exact", "refused")


@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("largest", [1.0, 1000.0])
def test_a_little_mixing_in_single_precision(batch: int, largest: float) -> None:
    """One sample with a huge loss does not hide what happens to the others."""
    torch.manual_seed(0)
    model, hidden = nn.Linear(10, 16), nn.Linear(16, 5)
    x, y, factors = torch.randn(batch, 10), torch.randint(5, (batch,)), torch.ones(batch)
    factors[0] = largest

    def losses() -> Tensor:
        h = torch.tanh(model(x))
        return factors * F.cross_entropy(hidden(h - h.detach().mean(0)), y, reduction="none")

    parameters = [*model.parameters(), *hidden.parameters()]
    optimizer = DeltaSAM(parameters, torch.optim.SGD, rho=0.01, perturbation="instance", lr=0.1)
    with pytest.raises(Refused, match="changes with the perturbation of another"):
        optimizer.step(losses)


WRITES: dict[str, Callable[[Tagger], object]] = {
    "projected": lambda m: m.hidden.weight.clamp_(-0.2, 0.2),
    "pruned": lambda m: m.hidden.weight.mul_(torch.arange(WIDTH) % 2),
    "pruned by torch": lambda m: torch.mul(m.hidden.weight, torch.arange(WIDTH) % 2, out=m.hidden.weight),
    "normalized rows": lambda m: nn.init.normal_(m.hidden.weight[:2]),
}


@pytest.mark.parametrize("kind", WRITES)
def test_writing_to_a_weight_in_the_forward_pass(kind: str) -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        with torch.no_grad():
            WRITES[kind](model)
        return model.classified(model.layers(model.words(tokens)).sum(1), tokens)

    check(run(model, losses), "refused")


def test_comparing_with_a_parameter() -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.hidden(model.words(tokens))
        return model.classified((x * (x > model.hidden.bias)).sum(1), tokens)

    check(run(model, losses, rho=1.5), "refused")


def test_an_earlier_use_of_a_layer_is_left_out_later() -> None:
    """Then its second use, of rows in another order, is the first one (stochastic depth with shared layers)."""
    model = Tagger()
    model.first = nn.Linear(WIDTH, WIDTH)

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = torch.tanh(model.first(model.words(tokens).view(batch * length, WIDTH)))
        if number % (LATER + 1) < LATER:
            by_time = x.view(batch, length, WIDTH).transpose(0, 1).reshape(-1, WIDTH)
            by_time = torch.tanh(model.hidden(by_time))
            x = torch.tanh(by_time.view(length, batch, WIDTH).transpose(0, 1).reshape(-1, WIDTH))
        x = torch.tanh(model.hidden(x)).view(batch, length, WIDTH)
        return model.classified(x.sum(1), tokens)

    verdicts = run(model, losses, [(2 + n % 3, 3 + n % 4) for n in range(LATER + 4)])
    assert len(verdicts) == LATER + 4
    check(verdicts, "exact")


class Scripted(nn.Module):
    """A layer that can be compiled by torch.jit.script, where instance mode does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def test_a_layer_that_is_scripted_later() -> None:
    model, layer = Tagger(), Scripted()
    scripted = torch.jit.script(layer.double())
    model.own = layer

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.words(tokens)
        x = scripted(x) if number >= LATER else torch.tanh(F.linear(x, layer.layer.weight, layer.layer.bias))
        return model.classified(x.sum(1), tokens)

    verdicts = run(model, losses, ONE_SHAPE)
    check(verdicts[:-1], "exact")
    check(verdicts[-1:], "refused")
    assert len(verdicts) == LATER + 1


@pytest.mark.parametrize("affine", [False, True])
def test_batch_normalization_that_is_trained_later(affine: bool) -> None:
    model, norm = Tagger(), nn.BatchNorm1d(WIDTH, affine=affine).double()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        norm.train(number >= LATER)
        return model.classified(norm(model.hidden(model.words(tokens)).sum(1)), tokens)

    verdicts = run(model, losses, ONE_SHAPE)
    check(verdicts[:-1], "exact")
    check(verdicts[-1:], "refused")
    assert len(verdicts) == LATER + 1


@pytest.mark.parametrize("cast", [lambda x, weight: x.type_as(weight), lambda x, weight: x.to(weight)])
def test_rows_cast_to_the_type_of_a_weight(cast: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = 1.5 * cast(model.words(tokens), model.hidden.weight)
        return model.classified(torch.tanh(model.hidden(x)).sum(1), tokens)

    check(run(model, losses), "exact")


def test_samples_by_vmap() -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return model.classified(torch.func.vmap(model.layers)(model.words(tokens)).sum(1), tokens)

    check(run(model, losses), "refused")


def test_checkpointing_that_runs_a_backward_pass_of_its_own() -> None:
    model, tokens = Tagger(), torch.tensor([[1, 2, 3], [4, 5, 6]])

    def losses() -> Tensor:
        x = checkpoint(model.layers, model.words(tokens), use_reentrant=True)
        return model.classified(x.sum(1), tokens)

    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.3, perturbation="instance", lr=0.1)
    with pytest.raises(Refused, match="activation checkpointing"):
        optimizer.step(losses)


def test_a_compiled_module_runs_as_it_is_written() -> None:
    model = Tagger()
    compiled = torch.compile(model.again, backend="eager")

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return model.classified(torch.tanh(compiled(torch.tanh(model.hidden(model.words(tokens))))).sum(1), tokens)

    check(run(model, losses), "exact")


def test_losses_stacked_in_changing_numbers_stay_familiar() -> None:
    """However their kinds are mixed: else every batch would be compared."""
    model = Tagger().double()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.3, perturbation="instance", lr=0.1)
    steps: list[int] = []  # forward passes of each

    def losses() -> Tensor:
        steps[-1] += 1
        generator = torch.Generator().manual_seed(len(steps))
        kinds = torch.randint(2, (8,), generator=generator).tolist()
        x = torch.tanh(model.hidden(model.words(torch.arange(8).view(8, 1)))).sum(1)
        own = model.out(x)
        return torch.stack([own[i].logsumexp(0) if kind else own[i].square().sum() for i, kind in enumerate(kinds)])

    for _ in range(2 * LATER):
        steps.append(0)
        optimizer.step(losses)
    assert steps[ALWAYS_CHECKED : 2 * ALWAYS_CHECKED - 1] == [2] * (ALWAYS_CHECKED - 1)


LOOKS: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda shared: shared.shape[0] == 1,
    "size": lambda shared: shared.size(),
    "strides": lambda shared: shared.stride(),
    "broadcast": lambda shared: torch.broadcast_shapes(shared.shape, (4, 1, 1)),
    "device": lambda shared: shared.to(shared.device),
}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_at_a_shared_row_is_no_use_of_it(look: str) -> None:
    model = Tagger()
    model.shared = nn.Embedding(5, WIDTH)

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        shared = model.shared(torch.arange(tokens.shape[1]).unsqueeze(0))
        LOOKS[look](shared)
        return model.classified(torch.tanh(model.hidden(model.words(tokens) + shared)).sum(1), tokens)

    check(run(model, losses), "exact")


class FrozenBatchNorm(torch.autograd.Function):
    """An operation whose name is that of batch normalization, and which does not say whether it trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_a_function_that_is_named_like_batch_normalization() -> None:
    model = Tagger()

    def losses(number: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return model.classified(FrozenBatchNorm.apply(model.layers(model.words(tokens))).sum(1), tokens)

    check(run(model, losses), "exact")


def test_new_numbers_of_uses_take_one_more_comparison_and_not_all() -> None:
    """A layer that is run step by step, on sequences of a length that no batch before had."""
    model = Tagger().double()
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.3, perturbation="instance", lr=0.1)
    forwards: list[int] = []

    def losses() -> Tensor:
        forwards[-1] += 1
        x = model.words(torch.arange(8) % WORDS)
        for _ in range(len(forwards)):
            x = torch.tanh(model.hidden(x))
        return model.out(x).logsumexp(1)

    for _ in range(ALWAYS_CHECKED + 4):
        forwards.append(0)
        optimizer.step(losses)
    assert forwards[ALWAYS_CHECKED:] == [4] * 4


def test_losses_that_are_differences_of_large_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They round more than others of their size, where batched products add in another order than plain ones."""
    products = linear._products

    def in_another_order(rows: Tensor, *others: Any) -> Tensor:
        doubled = [value.double() if isinstance(value, Tensor) else value for value in (rows, *others)]
        return products(*doubled).to(rows.dtype)

    monkeypatch.setattr(linear, "_products", in_another_order)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(8, 100, 64)
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.01, perturbation="instance", lr=0.1)
    for _ in range(3):
        optimizer.step(lambda: (1000 * model(x)).sum((1, 2)) - (990 * model(x)).sum((1, 2)))


def test_mixing_in_a_batch_with_a_loss_that_is_not_a_number() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(4, 4)
    factors = torch.tensor([1.0, 1.0, 1.0, math.nan])

    def losses() -> Tensor:
        h = torch.tanh(model(x))
        return factors * (h - h.detach().mean(0)).square().sum(1)

    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.5, perturbation="instance", lr=0.1)
    with pytest.raises(Refused, match="changes with the perturbation of another"):
        optimizer.step(losses)


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda w: w.max().item(),
    "item, detached": lambda w: w.detach().max().item(),
    "tolist": lambda w: max(w.tolist()),
    "tolist, data": lambda w: max(w.data.tolist()),
    "numpy": lambda w: float(w.detach().numpy().max()),
    "numpy, cpu": lambda w: float(w.detach().cpu().numpy().max()),
    "asarray": lambda w: float(np.asarray(w.detach()).max()),
    "float": lambda w: float(w[0]),
    "integers": lambda w: w.long().sum(),
    "signs": lambda w: torch.signbit(w - 1).sum(),
    "zeros": lambda w: torch.logical_not(w.relu()).sum(),
    "counted": lambda w: torch.count_nonzero(w.clamp(min=1) - 1),
    "bucketize": lambda w: torch.bucketize(1.0, w.detach().sort()[0]),
    "searchsorted": lambda w: torch.searchsorted(w.detach(), torch.ones(1))[0],
    "topk": lambda w: w.detach().topk(2).indices.sum(),
    "another tensor": lambda w: torch.ones(1).new_tensor(w.data).max(),
    "filled": lambda w: torch.ones(1).new_full((2,), w.detach().max()).sum(),
    "branch": lambda w: 2.0 if w[0] > 1 else 1.0,
}


@pytest.mark.parametrize("how", NUMBERS)
def test_a_parameter_that_is_also_used_as_a_number(how: str) -> None:
    """No gradient shows it."""
    model, number = Tagger(), NUMBERS[how]

    def losses(step: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.words(tokens) * (1 + number(model.norm.weight))
        return model.classified(model.norm(x).sum(1), tokens)

    check(run(model, losses, rho=1.5), "exact", "warned", "refused")


def test_the_nearest_row_of_a_codebook_by_numpy() -> None:
    model = Tagger()
    model.codes = nn.Embedding(7, WIDTH)

    def losses(step: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x, codes = model.words(tokens), model.codes.weight.detach().numpy()
        nearest = np.square(x.detach().numpy()[..., None, :] - codes).sum(-1).argmin(-1)
        return model.classified(torch.tanh(model.hidden(x + model.codes(torch.from_numpy(nearest)))).sum(1), tokens)

    check(run(model, losses, rho=1.5), "refused")


GLANCES: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda w: (w.shape, w.size(), w.size(0), w.dim(), w.numel(), len(w), w.stride(), w.nelement(), w.ndim),
    "kind": lambda w: (
        w.dtype,
        w.device,
        w.is_cuda,
        w.is_floating_point(),
        w.is_contiguous(),
        w.get_device(),
        w.type(),
    ),
    "graph": lambda w: (w.requires_grad, w.is_leaf, w.grad_fn, w.grad, w._version),
    "memory": lambda w: (w.data_ptr(), w.storage_offset(), w.element_size(), hash(w), id(w)),
    "of detached": lambda w: (w.detach().shape, w.data.dtype, w.detach().numel()),
    "of layout": lambda w: (w._is_view(), w.is_sparse, w.layout, w.is_inference(), not w.is_complex(), dir(w)),
    "none": lambda w: (w is not None, w not in (None, "x")),
    "finite": lambda w: bool(torch.isfinite(w).all()) and not bool(torch.isnan(w.detach()).any()),
    "made alike": lambda w: (
        torch.zeros_like(w, dtype=torch.long),
        w.new_ones(3),
        w.detach().new_zeros(2, dtype=torch.int),
    ),
    "printed": lambda w: (repr(w), str(w), f"{w}"),
}


@pytest.mark.parametrize("how", GLANCES)
def test_a_parameter_that_is_only_looked_at(how: str) -> None:
    model = Tagger()

    def losses(step: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        assert GLANCES[how](model.norm.weight)
        return model.classified(model.norm(model.words(tokens)).sum(1), tokens)

    check(run(model, losses), "exact")


@pytest.mark.parametrize("mode", ["batch", "instance"])
def test_a_pass_that_differentiates_by_torch_func(mode: str) -> None:
    """It refuses hooks on what is saved for a backward pass."""
    model = Tagger().double()
    tokens = torch.randint(1, WORDS, (4, 3), generator=torch.Generator().manual_seed(0))

    def losses() -> Tensor:
        slope = torch.func.grad(lambda x: x.square().sum())(torch.ones(4, WIDTH, dtype=torch.float64))
        return model.classified(model.layers(model.words(tokens)).sum(1) + slope, tokens)

    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, perturbation=mode, lr=0.1)
    assert all(bool(optimizer.step(losses).isfinite()) for _ in range(3))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * torch.ones(3, 1, dtype=x.dtype).expand(size=(len(x), 3, 1)),
        lambda x: torch.add(x, 2, x),
        lambda x: x + _inference_tensor(x),
        lambda x: x + 0 * torch.detach(input=torch.zeros_like(x)),
    ],
)
def test_calls_in_unusual_forms(use: Callable[[Tensor], Tensor]) -> None:
    model = Tagger()

    def losses(step: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return model.classified(use(model.layers(model.words(tokens))).sum(1), tokens)

    check(run(model, losses, ONE_SHAPE[:3]), "exact")


def _inference_tensor(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.ones(x.shape[1:], dtype=x.dtype)


def test_a_parameter_added_to_what_was_made_for_inference() -> None:
    model = Tagger()
    model.position = nn.Parameter(torch.zeros(WIDTH))

    def losses(step: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = model.words(tokens)
        return model.classified(model.layers(x + (_inference_tensor(x) + model.position)).sum(1), tokens)

    check(run(model, losses, ONE_SHAPE[:3]), "exact", "warned", "refused")


def test_nested_tensors() -> None:
    model = Tagger()

    def losses(step: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor(list(tokens), layout=torch.jagged)
        rows = torch.tanh(model.hidden(model.words(nested))).unbind()
        return model.classified(torch.stack([row.sum(0) for row in rows]), tokens)

    verdicts = run(model, losses, ONE_SHAPE[:3])
    assert verdicts[-1].kind == "refused"
    assert "nested" in verdicts[-1].detail


class Experts(nn.Module):
    """Every row goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(262)  # of many tried: in one of its batches two samples exchange a row
        self.inner, self.router = nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = self.inner(x.flatten(0, 1))
        shares = self.router(rows).softmax(1)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = (shares.argmax(1) == number).nonzero().squeeze(1)
            routed = torch.tanh(expert(rows[chosen])) * shares[chosen, number : number + 1]
            total = total.index_add(0, chosen, routed)
        return F.cross_entropy(self.out(total).view(*x.shape[:2], 3).sum(1), y, reduction="none")


def test_rows_that_samples_exchange_at_the_perturbed_weights() -> None:
    """As many rows go to each expert as before, so that sizes tell nothing."""
    model = Experts().double()
    comparison, verdicts = Comparison(model.parameters(), 0.4), []
    for batch in range(6):
        generator = torch.Generator().manual_seed(100 * 262 + batch)
        x, y = torch.randn(4, 6, 8, generator=generator).double(), torch.randint(3, (4,), generator=generator)
        verdicts.append(comparison.step(lambda: model(x, y)))  # noqa: B023
    assert {verdict.kind for verdict in verdicts} == {"exact", "refused"}
