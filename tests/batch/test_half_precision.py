"""In half precision the weights of a trained model's samples are those of double precision, or uniform."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltasam_plugin.batch.measures import MEASURES
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.probing import probe
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.weighting import WEIGHTINGS, Weighting, effective_sample_size, sample_weights
from deltasam_plugin.loss import Logits, Objective, sharpness_aware_loss
from deltasam_plugin.precision import TF32, Rounding
from deltasam_plugin.settings import Settings

WORDS, LENGTH, BATCH = 12, 7, 32
PROBING = ["curvature", "kl", "gradient_norm", "normalized"]


class Tagger(nn.Module):
    """A Transformer that names, at each position, the word at the mirrored one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, 32), nn.Embedding(LENGTH, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder, self.leave = nn.TransformerEncoder(layer, 2), nn.Linear(32, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.leave(self.encoder(self.words(tokens) + self.places.weight))


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    """Sentences and their tags, some of which are wrong."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (BATCH, LENGTH), generator=generator)
    wrong = torch.rand(BATCH, LENGTH, generator=generator) < 0.1
    return tokens, torch.where(wrong, torch.randint(WORDS, wrong.shape, generator=generator), tokens.flip(1))


def objective_of(model: nn.Module, tokens: Tensor, tags: Tensor) -> Objective:
    logits = model(tokens)
    values = logits if logits.dtype == torch.double else logits.float()
    losses = F.cross_entropy(values.transpose(1, 2), tags, reduction="none").sum(1)
    return Objective(losses.sum(), losses, logits=Logits.by_sample(logits))


@pytest.fixture(scope="module")
def trained() -> Tagger:
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(300):
        optimizer.zero_grad()
        (objective_of(model, *batch_of(step)).loss / BATCH).backward()
        optimizer.step()
    model.eval()
    assert objective_of(model, *batch_of(1000)).loss / BATCH / LENGTH < 1.2
    return model


Precision = tuple[torch.dtype, bool]
PRECISIONS: dict[str, Precision] = {
    f"{name} {kind}": (dtype, kind == "autocast")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
    for kind in ("masters", "autocast")
}


def weights_in(model: nn.Module, weighting: str, dtype: torch.dtype, autocast: bool = False, **options: Any) -> Tensor:
    """The weights of one batch, as its samples weigh in this precision."""
    network = copy.deepcopy(model) if autocast or dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    masters = [None if autocast else p.detach().clone() for p in model.parameters()]
    parameters = [*map(PerturbedParameter, network.parameters(), masters)]
    return weights_of(network, parameters, weighting, Rounding.of({dtype}, network.parameters()), autocast, **options)


def weights_of(
    network: nn.Module,
    parameters: list[PerturbedParameter],
    weighting: str,
    rounding: Rounding,
    autocast: bool = False,
    seed: int = 0,
    scale: float = 0.01,
) -> Tensor:
    tokens, tags = batch_of(2000 + seed)

    def forward() -> Objective:
        with torch.autocast("cpu", dtype=rounding.dtype) if autocast else nullcontext():
            return objective_of(network, tokens, tags)

    measure = WEIGHTINGS[weighting].measure
    assert measure is not None
    measured, floor = probe(forward, forward(), parameters, measure, 1, scale, seed, rounding=rounding)
    return sample_weights(WEIGHTINGS[weighting], measured, floor)


def in_double(model: nn.Module, weighting: str, seed: int, scale: float) -> Tensor:
    """The weights along the same direction. Masters in single precision have it drawn in single precision."""
    network = copy.deepcopy(model).double()
    masters = [p.detach().clone() for p in model.parameters()]
    parameters = [*map(PerturbedParameter, network.parameters(), masters)]
    return weights_of(network, parameters, weighting, Rounding(torch.double, 2.0**-52), seed=seed, scale=scale)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weighting", PROBING)
def test_weights_are_those_of_double_precision(trained: Tagger, weighting: str, precision: str) -> None:
    """Along the same displacement; it is longer than 0.01 where a measure needs that in this precision."""
    dtype, autocast = PRECISIONS[precision]
    measure = WEIGHTINGS[weighting].measure
    assert measure is not None
    scale = max(0.01, measure.least_scale.get(dtype, 0))
    found = [
        correlation(
            weights_in(trained, weighting, dtype, autocast, seed=seed), in_double(trained, weighting, seed, scale)
        )
        for seed in range(8)
    ]
    assert torch.tensor(found).median() >= 0.9, found


@pytest.mark.parametrize("weighting", ["kl", "gradient_norm", "normalized"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_subtracts_no_more_than_two_losses_sees_the_neighbourhood_of_single_precision(
    trained: Tagger, weighting: str, precision: str
) -> None:
    found = [
        correlation(
            weights_in(trained, weighting, *PRECISIONS[precision], seed=seed), in_double(trained, weighting, seed, 0.01)
        )
        for seed in range(8)
    ]
    assert torch.tensor(found).median() >= 0.9, found


def test_a_short_probe_of_the_curvature_would_see_rounding(trained: Tagger) -> None:
    """What the least scales are for; and what is seen then gives nearly uniform weights."""
    short = Rounding(torch.float32, torch.finfo(torch.bfloat16).eps)  # no least scale, but numbers that are as coarse
    found, shares = [], []
    for seed in range(8):
        network = copy.deepcopy(trained).bfloat16()
        masters = [p.detach().clone() for p in trained.parameters()]
        parameters = [*map(PerturbedParameter, network.parameters(), masters)]
        weights = weights_of(network, parameters, "curvature", short, seed=seed)
        found.append(correlation(weights, in_double(trained, "curvature", seed, 0.01)))
        shares.append(float(effective_sample_size(weights)))
    assert not torch.tensor(found).median() >= 0.5
    assert min(shares) > 0.8


def weights_of_rounding(weighting: str, precision: str, seed: int) -> Tensor:
    """Of samples that have no curvature: losses are linear in the weight, and predictions do not depend on it."""
    torch.manual_seed(seed)
    dtype, autocast = PRECISIONS[precision]
    inputs, master, shift = torch.randn(64, 200), torch.randn(1, 200), torch.ones(1)
    weight, same = (nn.Parameter(value if autocast else value.to(dtype)) for value in (master, shift))
    scores = 3 * torch.randn(64, 20)

    def forward() -> Objective:
        losses = F.linear(inputs.to(dtype), weight.to(dtype))[:, 0].float()
        logits = (scores.to(dtype) + same.to(dtype)).float()
        return Objective(losses.sum(), losses, logits=Logits.by_sample(logits))

    measure = WEIGHTINGS[weighting].measure
    assert measure is not None
    parameters = [PerturbedParameter(weight, None if autocast else master)]
    parameters += [PerturbedParameter(same, None if autocast else shift)]
    rounding = Rounding(dtype, torch.finfo(dtype).eps)
    return sample_weights(
        WEIGHTINGS[weighting], *probe(forward, forward(), parameters, measure, 1, 0.01, seed, rounding=rounding)
    )


@pytest.mark.parametrize("weighting", ["curvature", "kl"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_does_not_pose_as_curvature(weighting: str, precision: str) -> None:
    shares = [float(effective_sample_size(weights_of_rounding(weighting, precision, seed))) for seed in range(20)]
    assert min(shares) > 0.9


def test_tf32_is_coarse_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are read where the parameters are on CUDA: for products, and for convolutions by themselves."""
    matrix, kernel = (SimpleNamespace(device=torch.device("cuda"), dim=lambda n=n: n) for n in (2, 3))
    here = SimpleNamespace(device=torch.device("cpu"), dim=lambda: 3)
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    try:
        torch.set_float32_matmul_precision("highest")
        assert Rounding.of({torch.float32}, [matrix]) == Rounding()
        assert Rounding.of({torch.float32}, [matrix, kernel]) == Rounding(torch.float32, TF32)
        assert Rounding.of({torch.float32}, [here]) == Rounding()
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert Rounding.of({torch.float32}, [matrix, kernel]) == Rounding()
        torch.set_float32_matmul_precision("high")
        assert Rounding.of({torch.float32}, [matrix]) == Rounding(torch.float32, TF32)
        assert Rounding.of({torch.float32}, [matrix]).coarse
        assert Rounding.of({torch.float32}, [here]) == Rounding()
        assert Rounding.of({torch.float64, torch.bfloat16}, [matrix]) == Rounding(torch.bfloat16, 2.0**-7)
        assert not Rounding.of({torch.float64}, [matrix]).coarse
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_step_of_half_precision_losses_is_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 holds no number above 65504. The norm of the scaled gradient is larger."""
    shares = torch.tensor([0.3, 1.0])
    weighting = Weighting("shares", MEASURES["first_difference"], lambda magnitudes, probes: shares)
    monkeypatch.setitem(WEIGHTINGS, "shares", weighting)
    model = nn.Linear(64, 1, bias=False)
    model.weight.data.zero_()
    x = torch.stack([torch.full((64,), 3.0), torch.linspace(-2, 2, 64)])
    seen = []

    def forward() -> Objective:
        seen.append(model.weight.detach().clone())
        losses = model(x).squeeze(1).half()
        return Objective(losses.sum(), losses)

    perturbation = BatchPerturbation([PerturbedParameter(model.weight)], None, Settings(0.5, "shares"))
    loss, statistics = sharpness_aware_loss(forward, lambda: forward().loss, perturbation, {torch.device("cpu")})
    loss.backward(torch.tensor(8192.0).half())
    direction = (shares.double() @ x.double()).unsqueeze(0)
    torch.testing.assert_close(seen[-1].double(), 0.5 * direction / direction.norm(), rtol=1e-5, atol=1e-7)
    weighted = 2 * direction.norm() / shares.double().sum()  # weights of mean one
    assert 8192 * weighted > 65504
    assert statistics.ascent_gnorm.item() == pytest.approx(weighted.item() / 2, rel=1e-3)  # fp16 rounds what enters it
    assert statistics.eps_norm.item() == pytest.approx(0.5, rel=1e-5)
