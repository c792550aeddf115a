"""DeltaSAM on a device that is not the CPU, and what it launches there. CUDA is rehearsed: tests/helpers/rehearsal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.launches import METHODS, in_python, tasks
from deltasam_plugin import DeltaSAM
from deltasam_plugin.batch import norms
from deltasam_plugin.batch.displacement import ascended
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.modes import Perturbations
from deltasam_plugin.randomness import RandomState
from tests.helpers import corpora
from tests.helpers.rehearsal import BLOCKS, CHUNK, OnDevice, Rehearsal, foreach_launches, moved, plain
from tests.helpers.rehearsed_runs import steady

MODES: dict[str, dict[str, Any]] = {
    "uniform": {"weighting": "uniform"},
    "curvature": {"weighting": "curvature"},
    "instance": {"perturbation": "instance"},
}


class Net(nn.Module):
    """A small Transformer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.table(x)).mean(1))


def updates(mode: str | None, rehearsal: Rehearsal | None = None, count: int = 4) -> Iterator[Any]:
    """Train, and yield the model and what δ-SAM keeps after each update; by the base optimizer if no mode is given."""
    torch.manual_seed(0)
    model, x, y = Net(), torch.randint(50, (count, 4, 7)), torch.randint(5, (count, 4))
    torch.manual_seed(7)
    if rehearsal is not None:
        model, x, y = moved(model), moved(x), moved(y)
        torch.manual_seed(8)  # nothing may come from the CPU's generator
        rehearsal.manual_seed(7)
    options: dict[str, Any] = {"lr": 1e-2, "foreach": True}
    if mode is None:
        base = torch.optim.AdamW(model.parameters(), **options)
        for inputs, labels in zip(x, y):
            base.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            base.step()
            yield model, None
        return
    optimizer = DeltaSAM(model.parameters(), torch.optim.AdamW, **MODES[mode], **options)
    for inputs, labels in zip(x, y):
        optimizer.step(lambda: F.cross_entropy(model(inputs), labels, reduction="none"))  # noqa: B023
        yield model, optimizer._perturbations


def weights(steps: Iterator[Any]) -> list[torch.Tensor]:
    for model, _ in steps:
        trained = model
    return [plain(parameter.detach()).clone() for parameter in trained.parameters()]


@pytest.mark.parametrize("mode", MODES)
def test_same_weights_as_on_the_cpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomState, "seed", lambda self: 1234)  # of the probes: it depends on the device's generator
    monkeypatch.setattr(norms, "_unscaled_norm", lambda value: torch.tensor(math.nan))  # only a CPU takes it
    on_cpu = weights(updates(mode))
    rehearsal = Rehearsal()
    with rehearsal.active():
        on_device = weights(updates(mode, rehearsal))
    assert rehearsal.launches.total() > 0
    assert all(torch.equal(one, other) for one, other in zip(on_cpu, on_device, strict=True))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_zero_or_non_finite_gradient_moves_nothing(value: float) -> None:
    with Rehearsal().active():
        weight = moved(torch.tensor([-0.0, 1.0, 3.0]))
        with ascended([PerturbedParameter(weight)], [moved(torch.tensor([0.0, value, 0.0]))], 0.05) as ascent:
            there, skipped = plain(weight).clone(), plain(ascent.skipped).item()
    assert skipped == 1
    assert torch.equal(there.view(torch.int32), torch.tensor([-0.0, 1.0, 3.0]).view(torch.int32))


LAUNCHES = {"uniform": 2.6, "curvature": 3.7, "instance": 3.7}  # of the base optimizer's; see benchmarks/launches.py


@pytest.mark.parametrize("mode", MODES)
def test_a_steady_update_does_not_wait_and_launches_few_kernels(mode: str) -> None:
    def kept(steps: Iterator[Any]) -> Iterator[Perturbations | None]:
        return (perturbations for _, perturbations in steps)

    counts = []
    for chosen in (None, mode):
        rehearsal = Rehearsal()
        with rehearsal.active():
            counts.append(steady(rehearsal, kept(updates(chosen, rehearsal))))
    base, own = counts
    assert base.waits == []
    assert own.waits == []
    assert own.launches <= LAUNCHES[mode] * base.launches


TARGETS = {"uniform": 2.3, "curvature": 3.2, "instance": 3.3}


@pytest.mark.slow
def test_launches_of_a_transformer(tmp_path: Path) -> None:
    """Six and six layers, torch's Adam: the row "Python" of benchmarks/launches.py."""
    corpus, criterion, options = tasks(6)["translation"]
    counts = in_python(corpora.corpus(corpus, tmp_path), criterion, options)
    for mode, most in TARGETS.items():
        assert counts[mode].launches <= most * counts["Adam"].launches, mode
        assert counts[mode].added_waits(counts["Adam"], METHODS[mode].forwards, METHODS[mode].backwards) == 0


# --- the rehearsal itself


def test_several_devices_are_refused_as_on_cuda() -> None:
    with Rehearsal().active():
        there, here = moved(torch.ones(3)), torch.ones(3)
        message = "Expected all tensors to be on the same device"
        for mixed in (
            lambda: there + here,
            lambda: here.add_(there),
            lambda: torch.cat([there, here]),
            lambda: torch._foreach_add([there], [here]),
            lambda: here[there.long()],
        ):
            with pytest.raises(RuntimeError, match=message):
                mixed()
        assert isinstance(there * torch.tensor(2.0), OnDevice)  # a number from the host
        assert there.new_zeros(2).device == torch.zeros(2, device="cuda").device == there.device
        with pytest.raises(TypeError):
            there.numpy()


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "int": lambda x: int(x.sum()),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assigned mask": lambda x: x.clone().__setitem__(x > 0, 2.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index from the host": lambda x: x[torch.tensor([0, 1])],
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x.clone()),
    "tensor": lambda x: torch.tensor(1.0, device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0], device="cuda"),
    "new_tensor": lambda x: x.new_tensor(1.0),
    "copy to other memory": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}
NO_WAITS = {
    "arithmetic": lambda x: (x * 2 + 1).sum().sqrt(),
    "index": lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")],
    "where": lambda x: torch.where(x > 0, x, 0),
    "full": lambda x: torch.full((2,), 3.0, device="cuda"),
    "later": lambda x: torch.ones(2).to("cuda", non_blocking=True),
    "sort": lambda x: x.sort(),
    "copy to pinned memory": lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
}


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_waits_are_seen(name: str) -> None:
    rehearsal = Rehearsal()
    with rehearsal.active():
        x = moved(torch.ones(3))
        rehearsal.clear()
        (WAITS | NO_WAITS)[name](x)
    assert len(rehearsal.waits) == (name in WAITS), rehearsal.waits


def test_launches_are_those_of_torch() -> None:
    rehearsal = Rehearsal()
    with rehearsal.active():
        x = moved(torch.ones(4, 3))
        rehearsal.clear()
        x.t().reshape(12)[2:].view(2, 5).detach()
        assert rehearsal.launches.total() == 1  # the copy of what is not contiguous
        torch._foreach_add_([x.clone() for _ in range(100)], 1.0)
        assert rehearsal.launches["aten::_foreach_add_"] == 1
        torch.cat([x] * 129)
        assert rehearsal.launches["aten::cat"] == 2
    assert foreach_launches([10] * 110, 1) == 1
    assert foreach_launches([10] * 111, 1) == 2
    assert foreach_launches([10] * 65, 2) == 2
    assert foreach_launches([CHUNK * BLOCKS + 1], 1) == 2
    assert foreach_launches([0, 0], 1) == 0


def test_random_numbers_are_the_device_s_own() -> None:
    rehearsal = Rehearsal()
    with rehearsal.active():
        rehearsal.manual_seed(3)
        before = torch.get_rng_state()
        drawn = torch.rand(5, device="cuda")
        assert torch.equal(torch.get_rng_state(), before)
        torch.cuda.manual_seed(3)
        assert torch.equal(torch.rand(5, device="cuda").cpu(), drawn.cpu())
    assert torch.equal(plain(drawn), torch.rand(5, generator=torch.Generator().manual_seed(3)))
