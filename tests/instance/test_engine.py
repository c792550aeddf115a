"""The per-instance engine on small plain modules: against the per-sample loop, and what it promises and refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deltasam_plugin.instance import InstanceEngine
from tests.helpers.instance_oracle import correction_error, engine_gradients, gradients, loop, norm, trainable

RHO, TOLERANCE, VOCABULARY, WIDTH = 0.4, 1e-9, 7, 6


class Sequences(nn.Module):
    """Tied embeddings, a layer used twice, attention with packed projections, convolution, (T, B, C) inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.first = nn.MultiheadAttention(WIDTH, 2)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.bottleneck = nn.Linear(WIDTH, 2, bias=False)
        self.widen = nn.Linear(2, WIDTH)
        self.output_bias = nn.Parameter(torch.zeros(VOCABULARY))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(self.embedding(tokens)).transpose(0, 1)
        x = self.norm(x + self.first(x, x[:1], x[:1])[0])
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.convolution(x.permute(1, 2, 0)).permute(2, 0, 1)
        x = self.twice(torch.tanh(x)) + self.widen(self.bottleneck(x))
        logits = F.linear(self.norm(x).transpose(0, 1), self.embedding.weight, self.output_bias)
        return logits + x.mean(0).unsqueeze(1).mean(2, True)


def sequence_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Summed over each sequence, (B,)."""
    return F.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none").sum(1)


def sequences() -> Sequences:
    """Without its uncovered parameter."""
    model = Sequences()
    del model.scale
    return model


tokens = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
    ).map(torch.tensor)
)
MODEL = sequences()
ENGINE = InstanceEngine(MODEL, RHO)


@given(tokens)
@settings(max_examples=40)
def test_equals_the_loop_over_samples(batch: Tensor) -> None:
    assert correction_error(ENGINE, lambda: sequence_losses(MODEL, batch), trainable(MODEL)) <= TOLERANCE


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (1, 5), (5, 1), (2, 40)])
def test_equals_the_loop_from_the_first_batch_on(size: tuple[int, int]) -> None:
    """With an engine that has seen nothing: T = B, B = 1, T = 1, and lengths where gradients are formed."""
    model = sequences()
    batch = torch.randint(1, VOCABULARY, size, generator=torch.Generator().manual_seed(1))
    engine = InstanceEngine(model, RHO)
    assert correction_error(engine, lambda: sequence_losses(model, batch), trainable(model)) <= TOLERANCE


def test_a_layout_learned_from_one_sample_holds_for_more() -> None:
    model = sequences()
    engine = InstanceEngine(model, RHO)
    for size in [(1, 3), (3, 3), (2, 5), (4, 4)]:
        batch = torch.randint(1, VOCABULARY, size, generator=torch.Generator().manual_seed(2))
        assert correction_error(engine, lambda: sequence_losses(model, batch), trainable(model)) <= TOLERANCE  # noqa: B023


class Classifier(nn.Module):
    """(B, C) rows, inputs without a table."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def classified(model: nn.Module, count: int = 4) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 5, generator=generator, dtype=next(model.parameters()).dtype)
    y = torch.randint(0, 3, (count,), generator=generator)
    return lambda: F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("middle", [(), (nn.LayerNorm(8),), (nn.LayerNorm(8, bias=False),), (nn.Linear(8, 8, False),)])
def test_equals_the_loop_on_a_classifier(middle: tuple[nn.Module, ...]) -> None:
    model = Classifier(*middle)
    assert correction_error(InstanceEngine(model, RHO), classified(model), trainable(model)) <= TOLERANCE


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_frozen_parameters_stay(frozen: str) -> None:
    model = Classifier()
    model.layers.get_parameter(frozen).requires_grad_(False)
    assert correction_error(InstanceEngine(model, RHO), classified(model), trainable(model)) <= TOLERANCE


@pytest.mark.parametrize("prepare", [lambda x: x, lambda x: 2 * x, nn.Linear(5, 5).double()])
def test_inputs_that_want_a_gradient_of_their_own(prepare: Callable[[Tensor], Tensor]) -> None:
    """Leaves, or computed from leaves that the engine does not know: another optimizer's weights, say."""
    model = Classifier()
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def losses() -> Tensor:
        return (model(prepare(x)) * model(x.detach())).square().sum(1)

    assert correction_error(InstanceEngine(model, RHO), losses, trainable(model)) <= TOLERANCE


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_tables_that_change_with_the_batch_are_refused(option: dict) -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH, **option), nn.Linear(WIDTH, 1)).double()
    batch = torch.tensor([[1, 2], [1, 1]])
    with pytest.raises(RuntimeError, match=r"does not cover .*0.weight \((used|written to) by embedding\(\)\)"):
        recorded(model, lambda: model(batch).square().sum((1, 2)))


def test_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3)).double()
    x, y = torch.randn(3, 2, 5, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    engine = InstanceEngine(model, RHO)
    error = correction_error(engine, lambda: F.cross_entropy(model(x), y, reduction="none"), trainable(model))
    assert error <= TOLERANCE


def test_a_radius_of_zero_gives_the_base_gradient() -> None:
    batch = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found, _ = engine_gradients(InstanceEngine(MODEL, 0.0), lambda: sequence_losses(MODEL, batch), trainable(MODEL))
    base = gradients(sequence_losses(MODEL, batch).sum(), trainable(MODEL))
    assert norm([f - b for f, b in zip(found, base)]) <= 1e-12 * norm(base)


@pytest.mark.parametrize("copies", [1, 3])
def test_copies_of_one_sample_get_sam(copies: int) -> None:
    batch = torch.tensor([[1, 2, 2, 5]]).repeat(copies, 1)
    found, _ = engine_gradients(ENGINE, lambda: sequence_losses(MODEL, batch), trainable(MODEL))
    parameters = trainable(MODEL)
    ascent = gradients(sequence_losses(MODEL, batch).sum(), parameters)
    kept = [p.detach().clone() for p in parameters]
    for p, g in zip(parameters, ascent):
        p.data.add_(RHO / norm(ascent) * g)
    sam = gradients(sequence_losses(MODEL, batch).sum(), parameters)
    for p, k in zip(parameters, kept):
        p.data.copy_(k)
    assert norm([f - s for f, s in zip(found, sam)]) <= 1e-11 * norm(sam)


@given(st.floats(1e-6, 1e6), tokens)
@settings(max_examples=10)
def test_a_loss_scale_changes_nothing(scale: float, batch: Tensor) -> None:
    def losses() -> Tensor:
        return sequence_losses(MODEL, batch)

    plain, one = engine_gradients(ENGINE, losses, trainable(MODEL))
    scaled, other = engine_gradients(ENGINE, losses, trainable(MODEL), scale)
    assert norm([p - s for p, s in zip(plain, scaled)]) <= 1e-9 * norm(plain)
    torch.testing.assert_close(one.norms * scale, other.norms, rtol=1e-9, atol=0)


def test_permuting_the_samples_permutes_the_norms() -> None:
    batch = torch.tensor([[1, 2, 3], [4, 5, 6], [2, 2, 0]])
    order = torch.tensor([2, 0, 1])
    one, first = engine_gradients(ENGINE, lambda: sequence_losses(MODEL, batch), trainable(MODEL))
    two, second = engine_gradients(ENGINE, lambda: sequence_losses(MODEL, batch[order]), trainable(MODEL))
    torch.testing.assert_close(first.norms[order], second.norms)
    assert norm([a - b for a, b in zip(one, two)]) <= 1e-11 * norm(one)


def test_a_sample_without_gradient_is_left_where_it_is() -> None:
    model = Classifier()
    losses = classified(model)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    engine = InstanceEngine(model, RHO)
    engine_gradients(engine, losses, trainable(model))
    found, correction = engine_gradients(engine, lambda: losses() * mask, trainable(model))
    assert correction.steps.tolist()[1] == 0 and correction.norms.tolist()[1] == 0
    _, expected, _ = loop(lambda: losses() * mask, trainable(model), RHO)
    assert norm([f - e for f, e in zip(found, expected)]) <= TOLERANCE * norm(expected)


@pytest.mark.parametrize("scale", [float("inf"), 0.0])
def test_an_overflow_at_the_start_teaches_nothing_wrong(scale: float) -> None:
    """As with the first loss scales in half precision, and with a dummy batch: no refusal, and all is well later."""
    model = Classifier(nn.LayerNorm(8))
    losses = classified(model)
    engine = InstanceEngine(model, RHO)
    _, correction = engine_gradients(engine, losses, trainable(model), scale)
    assert not correction.steps.any()
    assert correction_error(engine, losses, trainable(model)) <= TOLERANCE


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 0.0])
def test_a_gradient_that_is_not_finite_perturbs_nothing(scale: float) -> None:
    model = Classifier(nn.LayerNorm(8))
    losses = classified(model)
    engine = InstanceEngine(model, RHO)
    engine_gradients(engine, losses, trainable(model))
    found, correction = engine_gradients(engine, losses, trainable(model), scale)
    assert not correction.steps.any()
    base = gradients(losses().sum(), trainable(model))
    assert norm([f - b for f, b in zip(found, base)]) <= 1e-12 * norm(base)


def test_one_overflowing_sample_does_not_reach_the_others() -> None:
    model = Classifier(nn.LayerNorm(8))
    losses = classified(model)
    engine = InstanceEngine(model, RHO)
    engine_gradients(engine, losses, trainable(model))
    with engine.recording() as tape:
        first = losses()
    overflowing = torch.tensor([1.0, float("inf"), 1.0, 1.0], dtype=torch.float64)
    solution = engine.solve(tape, first * overflowing)
    with solution.perturbed():
        second = losses()
    kept = torch.tensor([0, 2, 3])
    found = gradients(second[kept].sum(), trainable(model))
    _, expected, _ = loop(lambda: losses()[kept], trainable(model), RHO)
    assert norm([f - e for f, e in zip(found, expected)]) <= TOLERANCE * norm(expected)
    assert solution.perturbation.steps[1] == 0


def test_solving_reaches_no_weight_and_no_gradient() -> None:
    model = sequences()
    batch = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = {name: (p.detach().clone(), p._version) for name, p in model.named_parameters()}
    engine = InstanceEngine(model, RHO)
    with engine.recording() as tape:
        losses = sequence_losses(model, batch)
    engine.solve(tape, losses)
    for name, parameter in model.named_parameters():
        weight, version = before[name]
        assert torch.equal(parameter, weight) and parameter._version == version
        assert parameter.grad is not None and bool((parameter.grad == 3).all())


class Fault(Exception):
    """Raised where a test wants it."""


@pytest.mark.parametrize("where", ["first forward", "solve", "second forward", "second backward"])
def test_nothing_stays_intercepted_after_an_exception(where: str) -> None:
    model = sequences()
    batch = torch.tensor([[1, 2, 3], [4, 5, 6]])
    engine = InstanceEngine(model, RHO)
    fault: dict[str, bool] = {}

    def maybe(moment: str) -> None:
        if fault.get("armed") and where == moment:
            raise Fault

    def losses(moment: str) -> Tensor:
        found = sequence_losses(model, batch)
        maybe(moment + " forward")
        if found.requires_grad:
            found.register_hook(lambda _: maybe("solve" if moment == "first" else "second backward"))
        return found

    def step() -> list[Tensor]:
        with engine.recording() as tape:
            first = losses("first")
        solution = engine.solve(tape, first)
        with solution.perturbed():
            return gradients(losses("second").sum(), trainable(model))

    expected = step()
    fault["armed"] = True
    with pytest.raises(Fault):
        step()
    fault.clear()
    assert torch.overrides._get_current_function_mode() is None
    plain = sequence_losses(model, batch)
    assert torch.equal(plain, sequence_losses(sequences(), batch))
    assert all(torch.equal(a, b) for a, b in zip(step(), expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_close(dtype: torch.dtype, autocast: bool) -> None:
    exact, batch = sequences(), torch.tensor([[1, 2, 3, 4], [4, 5, 6, 1]])
    half = sequences().float() if autocast else sequences().to(dtype)

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=autocast):
            logits = half(batch)
        return F.cross_entropy(logits.float().transpose(1, 2), batch, reduction="none").sum(1)

    engine = InstanceEngine(half, RHO)
    found, correction = engine_gradients(engine, losses, trainable(half), 128.0)
    _, expected, norms = loop(lambda: sequence_losses(exact, batch), trainable(exact), RHO)
    coarse = 0.1 if dtype == torch.bfloat16 else 0.02
    torch.testing.assert_close(correction.norms.double() / 128, norms.double(), rtol=coarse, atol=0)
    assert norm([f - e for f, e in zip(found, expected)]) <= coarse * norm(expected)


@pytest.mark.parametrize("scale", [0.01, 1, 128, 2.0**14])
@pytest.mark.parametrize("autocast", [False, True])
def test_small_numbers_of_half_precision_do_not_look_like_mixed_samples(autocast: bool, scale: float) -> None:
    """Under autocast, gradients in fp32 have been through fp16."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0), 4, enable_nested_tensor=False)
    model = nn.Sequential(encoder, nn.Linear(32, 50)).to(torch.float32 if autocast else torch.float16)
    x, target = torch.randn(9, 16, 32).to(model[1].weight.dtype), torch.randint(50, (9, 16))
    engine = InstanceEngine(model, RHO)
    with engine.recording() as tape, torch.autocast("cpu", torch.float16, enabled=autocast):
        logits = model(x).float()
    losses = F.cross_entropy(logits.permute(1, 2, 0), target.t(), reduction="none").sum(1)
    assert engine.solve(tape, losses, scale).perturbation.steps.gt(0).all()
    assert engine.uncovered == []


def test_norms_accumulate_in_single_precision() -> None:
    """4096 products of 1/16 each: fp16 cannot hold the sum of their squares."""
    model = nn.Linear(4096, 1, bias=False).half()
    model.weight.data.zero_()
    x = torch.full((2, 4096), 8.0).half()
    engine = InstanceEngine(model, RHO)
    with engine.recording() as tape:
        losses = model(x).squeeze(1).float()
    assert engine.solve(tape, losses).perturbation.norms.tolist() == [512.0, 512.0]


def test_norms_and_steps_of_half_precision_losses_are_in_single_precision() -> None:
    """fp16 holds no number above 65504, and its steps would be off by 0.1 %."""
    model = nn.Linear(64, 1, bias=False)
    model.weight.data.zero_()
    engine, x = InstanceEngine(model, RHO), torch.full((2, 64), 3.0)
    with engine.recording() as tape:
        losses = model(x).squeeze(1).half()
    found = engine.solve(tape, losses, 8192.0).perturbation
    assert found.norms.tolist() == [8192.0 * 24, 8192.0 * 24]
    torch.testing.assert_close(found.steps, torch.full((2,), RHO / (8192 * 24)), rtol=1e-6, atol=0)


def recorded(model: nn.Module, losses: Callable[[], Tensor]) -> None:
    engine = InstanceEngine(model, RHO)
    with engine.recording() as tape:
        first = losses()
    engine.solve(tape, first)


def test_batch_normalization_is_refused() -> None:
    model = Classifier(nn.BatchNorm1d(8, affine=False))
    with pytest.raises(RuntimeError, match=r"layers.0.weight \(several samples' losses depend on the same rows\)"):
        recorded(model, classified(model))


def test_negatives_from_the_batch_are_refused() -> None:
    model = nn.Linear(5, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def losses() -> Tensor:
        scores = model(x) @ x.T
        return F.cross_entropy(scores.T, torch.arange(4), reduction="none")

    with pytest.raises(
        RuntimeError, match=r"Each row of a layer must belong to one sample.*in-batch.*--sam-perturbation batch"
    ):
        recorded(model, losses)


@pytest.mark.parametrize("listed", [False, True])
def test_selected_rows(listed: bool) -> None:
    """In the first layer all rows, in batch order; in the second those of three samples, one, three and two."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    engine = InstanceEngine(model, RHO)
    for chosen in ([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 0]], [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]):
        selected = torch.tensor(chosen).bool()
        samples = selected.nonzero()[:, 0]

        def losses() -> Tensor:
            found = model[1](model[0](x)[selected]).square().sum(1)  # noqa: B023
            return found.new_zeros(3).index_add(0, samples, found)  # noqa: B023

        rows = [samples] if listed else []
        assert correction_error(engine, losses, trainable(model), rows=rows) <= TOLERANCE


def test_a_little_outside_coverage_is_named_once_and_stays_unperturbed() -> None:
    class Scaled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0] = nn.Linear(5, 64).double()
            self.layers[2] = nn.Linear(64, 3).double()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) / self.scale

    model = Scaled()
    losses = classified(model)
    engine = InstanceEngine(model, RHO)
    with pytest.warns(
        UserWarning, match=r"leaves unperturbed 0.52% of the weights: scale \(used by div\(\)\)"
    ) as caught:
        engine_gradients(engine, losses, trainable(model))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = engine_gradients(engine, losses, trainable(model))
    covered = [p for name, p in model.named_parameters() if name != "scale"]
    _, expected, _ = loop(losses, covered, RHO)
    found = [f for f, (name, _) in zip(found, model.named_parameters()) if name != "scale"]
    assert norm([f - e for f, e in zip(found, expected)]) <= TOLERANCE * norm(expected)


def _hidden(x: Tensor, weight: Tensor) -> Tensor:
    """A use of a weight that no interception of calls can see."""
    with torch._C.DisableTorchFunction():
        return x @ weight


class _Branch(nn.Module):
    def __init__(self, use: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.linear, self.use = nn.Linear(8, 8), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.linear)


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda x, linear: x @ linear.weight, r"used by matmul\(\)"),
        (lambda x, linear: linear(x) + (x * linear.weight.sum()), r"used by sum\(\)"),
        (lambda x, linear: _hidden(x, linear.weight), "used outside the covered layers"),
        (lambda x, linear: linear(x) + _hidden(x, linear.weight), "used outside the covered layers"),
        (lambda x, linear: linear(x) + F.linear(x, linear.weight[:1]), "used whole and in parts"),
        (lambda x, linear: linear(x) + F.linear(x, linear.weight[::2]).repeat(1, 2), r"used by __getitem__\(\)"),
        (lambda x, linear: linear(x) + F.linear(x, linear.weight.chunk(2)[0]).repeat(1, 2), "used whole and in parts"),
        (lambda x, linear: linear(x) + F.layer_norm(x, (8, 8)[1:], linear.weight[0]), r"used by __getitem__\(\)"),
        (lambda x, linear: linear(x) + _written(x, linear.bias), r"used by __setitem__\(\)"),
        (lambda x, linear: linear(x) + _normalized(x, linear.weight), "used in layers of different kinds"),
        (lambda x, linear: linear(x) + _without_gradient(x, linear), "used with and without gradient, .* numbers"),
    ],
)
def test_weights_used_otherwise_are_refused(use: Callable[[Tensor, nn.Linear], Tensor], reason: str) -> None:
    model = Classifier(_Branch(use))
    with pytest.raises(RuntimeError, match=rf"does not cover .*layers.1.linear.\w+ \({reason}\).*Must be at most 1%"):
        recorded(model, classified(model))


@pytest.mark.parametrize("first", ["unused", "overflowing"])
def test_weights_that_the_first_batch_says_nothing_about_are_checked_later(first: str) -> None:
    branch = _Branch(lambda x, linear: _hidden(x, linear.weight))
    model = Classifier(branch)
    engine = InstanceEngine(model, RHO)
    use, scale = branch.use, float("inf") if first == "overflowing" else 1.0
    if first == "unused":
        branch.use = lambda x, linear: x
    engine_gradients(engine, classified(model), trainable(model), scale)
    branch.use = use
    with pytest.raises(
        RuntimeError, match=r"does not cover .*layers.1.linear.weight \(used outside the covered layers"
    ):
        engine_gradients(engine, classified(model), trainable(model))


def _written(x: Tensor, bias: Tensor) -> Tensor:
    y = x.clone()
    y[0] = bias
    return y


def _normalized(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x.unsqueeze(1).expand(-1, 8, -1), (8, 8), weight).sum(1)


def _without_gradient(x: Tensor, linear: nn.Linear) -> Tensor:
    with torch.no_grad():
        return linear(x)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_an_invalid_radius_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=rf"Invalid rho={rho}. Must be finite and >= 0."):
        InstanceEngine(MODEL, rho)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_losses_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with ENGINE.recording() as tape:
        losses = torch.zeros(shape, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"Invalid per-sample losses of shape .*Must be \(B,\)"):
        ENGINE.solve(tape, losses)


class _Sharing(nn.Module):
    """Two layers of width 8 and what they share, for one row a sample."""

    def __init__(self, use: Callable[[_Sharing, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other, self.use = nn.Linear(8, 8), nn.Linear(8, 8), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


SHARING: dict[str, Callable[[_Sharing, Tensor], Tensor]] = {
    "input, with and without bias": lambda m, x: m.one(x) * F.linear(x, m.other.weight),
    "input, one layer twice": lambda m, x: m.other(x) * m.one(x) + m.one(x.tanh()),
    "weight, not bias": lambda m, x: F.linear(x, m.one.weight, m.one.bias) * F.linear(x, m.one.weight, m.other.bias),
    "weight, one without bias": lambda m, x: m.one(x) * F.linear(x.tanh(), m.one.weight),
    "bias, not weight": lambda m, x: m.one(x) * F.linear(x, m.other.weight, m.one.bias),
    "both, not together": lambda m, x: (
        m.one(x) * F.linear(x.tanh(), m.one.weight) * F.linear(x, m.other.weight, m.one.bias)
    ),
}


@pytest.mark.parametrize("shared", SHARING)
def test_layers_that_share(shared: str) -> None:
    model = Classifier(nn.Tanh(), _Sharing(SHARING[shared]))
    assert correction_error(InstanceEngine(model, RHO), classified(model), trainable(model)) <= TOLERANCE


SAMPLES, ROWS = 3, 15


def baddbmm_flops(y: tuple, left: tuple, right: tuple, **_: object) -> int:
    """Of the operation in place, which torch does not count; from shapes."""
    return 2 * math.prod(left) * right[-1]


def steady_products(*layers: nn.Linear) -> float:
    """Products of a batch, in units of one row: two passes and the weights' gradients, norms and the perturbation."""
    engine, x = InstanceEngine(nn.ModuleList(layers), RHO), torch.randn(SAMPLES, ROWS, layers[0].in_features)

    def losses() -> Tensor:
        return sum((layer(x).square().sum((1, 2)) for layer in layers), torch.zeros(SAMPLES))

    for _ in range(16):  # the first batches are checked
        engine_gradients(engine, losses, trainable(nn.ModuleList(layers)))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm_flops}) as count:
        engine_gradients(engine, losses, trainable(nn.ModuleList(layers)))
    return count.get_total_flops() / (2 * SAMPLES * ROWS)


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 64), (64, 64), (64, 2)])
def test_every_layer_has_the_cheaper_form(inputs: int, outputs: int) -> None:
    """Forming where the matrix is small beside the rows; norm and perturbed output by factors else."""
    formed, factored = inputs * outputs, 2 * ROWS * (inputs + outputs)
    layer = nn.Linear(inputs, outputs, bias=False)
    assert steady_products(layer) == 3 * inputs * outputs + min(formed, factored)


def test_layers_that_share_their_input_share_its_products() -> None:
    """Query, key and value projections: inner products of the inputs once for the norms, once for the second pass."""
    one, three = (steady_products(*(nn.Linear(64, 64) for _ in range(count))) for count in (1, 3))
    assert 3 * one - three == 2 * (ROWS * 64 + ROWS * 64)


def passes_of(engine: InstanceEngine, losses: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """How many backward passes the first pass of a batch takes."""
    count = []
    with engine.recording() as tape:
        first = losses()
    first.register_hook(count.append)
    engine.solve(tape, first)
    return len(count)


def test_one_backward_pass_in_a_steady_batch() -> None:
    """Whose rows are whose costs two more: in the first batches, and then ever more rarely."""
    model = Classifier()
    engine = InstanceEngine(model, RHO)
    passes = [passes_of(engine, classified(model), trainable(model)) for _ in range(70)]
    checked = [batch for batch, count in enumerate(passes, 1) if count == 3]
    assert checked == [*range(1, 17), 32, 64]
    assert set(passes) == {1, 3}


def test_more_samples_than_factors_take_more_passes() -> None:
    model = Classifier()
    engine = InstanceEngine(model, RHO)
    assert passes_of(engine, classified(model, 33), trainable(model)) == 4
    assert correction_error(engine, classified(model, 33), trainable(model)) <= TOLERANCE
