"""Random small models with batches of changing shape: one integer makes one, and can tell what it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltasam_plugin.instance import engine, planning
from deltasam_plugin.instance.layers.base import Form
from tests.helpers.random_blocks import BLOCKS, Block, Pool
from tests.helpers.random_rows import CLASSES, FEATURES, VOCABULARY, Batch, Draw
from tests.helpers.verdict import Comparison, Verdict


class Source(nn.Module):
    """Inputs of a batch to hidden states (R, T, C)."""

    def __init__(self, draw: Draw, width: int, pool: Pool) -> None:
        super().__init__()
        self.draw, self.table = draw, pool["table"]
        kinds = ["tokens"] * 4 + ["tokens, time first", "packed tokens", "adaptive tokens", "bags", "features"]
        self.kind = draw.option("kind", [*kinds, "patches", "wave"])
        if self.kind == "adaptive tokens":
            self.small, self.up = nn.Embedding(VOCABULARY - 4, 2), nn.Linear(2, width, bias=False)
        elif self.kind == "features":
            self.up = nn.Linear(FEATURES, width)
        elif self.kind == "patches":
            self.up = nn.Conv2d(1, width, (FEATURES, 2), stride=(FEATURES, 1), padding=(0, 1))
        elif self.kind == "wave":
            self.up = nn.Conv1d(FEATURES, width, 3, padding=1)

    def forward(self, batch: Batch) -> Tensor:
        tokens, length = batch.tokens, batch.tokens.shape[1]
        if self.kind == "tokens, time first":
            return self.table(tokens.t()).transpose(0, 1)
        if self.kind == "packed tokens":
            rows = self.table(tokens[batch.mask])
            return rows.new_zeros(*tokens.shape, rows.shape[1]).masked_scatter(batch.mask.unsqueeze(2), rows)
        if self.kind == "adaptive tokens":
            x = self.table.weight.new_zeros(*tokens.shape, self.up.out_features)
            for chosen, rows in [(tokens < 4, self.table), (tokens >= 4, lambda t: self.up(self.small(t - 4)))]:
                if chosen.any():
                    x = x.masked_scatter(chosen.unsqueeze(2), rows(tokens[chosen]))
            return x
        if self.kind == "bags":
            return self.table(torch.stack([tokens, tokens.flip(1)], 2)).sum(2)
        if self.kind == "features":
            return self.up(batch.features)
        if self.kind == "patches":
            return self.up(batch.features.transpose(1, 2).unsqueeze(1)).squeeze(2).transpose(1, 2)[:, :length]
        if self.kind == "wave":
            return self.up(batch.features.transpose(1, 2)).transpose(1, 2)
        return self.table(tokens)


class Head(nn.Module):
    """Hidden states to one loss a row, (R,)."""

    def __init__(self, draw: Draw, width: int, pool: Pool) -> None:
        super().__init__()
        self.draw, self.table, self.shared = draw, pool["table"], pool["linear"]
        kinds = ["classes"] * 3 + ["tokens"] * 3 + ["tied tokens"] * 3 + ["selected tokens"] * 3
        kinds += (
            ["selected, tied"] * 3 + ["regression"] * 2 + ["self-distillation", "two dropouts", "contrastive, later"]
        )
        self.kind = draw.option("kind", kinds)
        self.pooling = draw.option("pooling", ["mean", "first", "last", "max"])
        self.out = nn.Linear(width, CLASSES if self.kind in self.SENTENCES else VOCABULARY)
        self.norm = nn.LayerNorm(width) if "selected" in self.kind else nn.Identity()

    SENTENCES = ("classes", "self-distillation", "two dropouts", "contrastive, later")

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if self.kind in self.SENTENCES:
            return self._sentences(self._pooled(x, batch), batch)
        if self.kind == "regression":
            return (self.out(x) - 1).square().sum((1, 2))
        chosen = batch.selected if "selected" in self.kind else batch.mask
        if "selected" in self.kind:
            logits = self._logits(self.norm(torch.tanh(self.shared(x[chosen]))))
            lost = F.cross_entropy(logits, batch.tokens[chosen], reduction="none")
            return x.new_zeros(len(x)).index_add(0, chosen.nonzero()[:, 0], lost)
        lost = F.cross_entropy(self._logits(x).transpose(1, 2), batch.tokens, reduction="none")
        return (lost * chosen).sum(1)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table.weight) if "tied" in self.kind else self.out(x)

    def _pooled(self, x: Tensor, batch: Batch) -> Tensor:
        if self.pooling == "mean":
            return (x * batch.mask.unsqueeze(2)).sum(1) / batch.lengths.unsqueeze(1)
        if self.pooling == "max":
            return x.max(1)[0]
        return x[:, 0] if self.pooling == "first" else x[torch.arange(len(x)), batch.lengths - 1]

    def _sentences(self, z: Tensor, batch: Batch) -> Tensor:
        lost = F.cross_entropy(self.out(z), batch.classes, reduction="none")
        if self.kind == "self-distillation":
            target = self.out(self.shared(z)).detach().softmax(1)
            lost = lost + F.cross_entropy(self.out(z), target, reduction="none")
        elif self.kind == "two dropouts":
            one, two = (self.out(F.dropout(z, 0.3)) for _ in range(2))
            lost = lost + (one - two).square().sum(1)
        elif self.kind == "contrastive, later":
            similar = F.cross_entropy(z @ self.shared(z).t(), torch.arange(len(z)), reduction="none")
            lost = lost + max(0, batch.step - 1) * similar
        return lost


class Model(nn.Module):
    """A source, blocks, and one or two heads; losses of B samples.

    Args:
        plan: which blocks, each with a seed of its own: to leave one out changes no other.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(plan.seed)
        made: Pool = {"table": nn.Embedding(VOCABULARY, plan.width), "linear": nn.Linear(plan.width, plan.width)}
        self.parts = nn.ModuleList()
        for kind, seed in plan.parts:
            torch.manual_seed(seed)
            self.parts.append(kind(Draw(seed), plan.width, made))
        draw = Draw(plan.seed)
        self.double().train(draw.random() > 0.15)
        everything = list(self.parameters())
        self.frozen = draw.choice(["nothing"] * 5 + ["some", "some", "some, until step 2", "some are another's"])
        chosen = [p for p in everything[1:] if draw.random() < 0.25] if self.frozen != "nothing" else []
        self.optimized = [p for p in everything if "another" not in self.frozen or all(p is not c for c in chosen)]
        self.thawing = chosen if "until" in self.frozen else []
        for p in chosen if "another" not in self.frozen else []:
            p.requires_grad_(False)

    def thaw(self) -> None:
        """Unfreeze what is to be frozen for the first batches only."""
        for p in self.thawing:
            p.requires_grad_(True)

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor | None = None
        rows = torch.zeros(len(batch.tokens), dtype=torch.float64)
        for part in self.parts:
            if isinstance(part, Source):
                x = part(batch)
            elif isinstance(part, Head):
                rows = rows + part(x, batch)
            else:
                x = part(x, batch)
        rows = rows * batch.factors
        if torch.equal(batch.samples, torch.arange(len(rows))):
            return rows
        return rows.new_zeros(batch.count).index_add(0, batch.samples, rows)


@contextmanager
def forms_of_gradients(seed: int) -> Iterator[None]:
    """Each matrix has some form of its per-sample gradients. By cost these small ones would all have factors."""
    cheapest, forms = planning.cheapest_form, list(Form)
    planning.cheapest_form = lambda rows, outputs, inputs, summed: forms[(seed + outputs + 2 * inputs) % 3]
    try:
        yield
    finally:
        planning.cheapest_form = cheapest


@contextmanager
def first_batches_compared(number: int) -> Iterator[None]:
    """So many first batches are compared with gradients; later the powers of two."""
    always, engine.ALWAYS_CHECKED = engine.ALWAYS_CHECKED, number
    try:
        yield
    finally:
        engine.ALWAYS_CHECKED = always


@dataclass(frozen=True)
class Plan:
    """What a seed decides: the parts of a model, and how its rows make samples."""

    seed: int
    width: int
    rho: float
    parts: tuple[tuple[Callable[..., nn.Module], int], ...]
    grouping: str
    factors: str
    group: int
    adaptive: bool
    checked: int

    @classmethod
    def drawn(cls, seed: int) -> Plan:
        """The plan of this seed."""
        draw = random.Random(seed)
        blocks = draw.choices(list(BLOCKS), list(BLOCKS.values()), k=draw.randint(0, 4))
        kinds = [Source, *blocks, *[Head] * draw.choice([1, 1, 1, 2])]
        grouping = ["one row each"] * 14 + ["k rows each", "k rows each, strided", "ragged", "reversed", "shuffled"]
        return cls(
            seed,
            draw.choice([4, 6, 8]),
            draw.choice([0.05, 0.2, 0.5]),
            tuple((kind, draw.randrange(10**6)) for kind in kinds),
            draw.choice(grouping),
            draw.choice(["one"] * 4 + ["some zero", "zero at first", "small", "large"]),
            draw.choice([1, 1, 1, 2, 3, 9]),
            draw.random() < 0.25,
            draw.choice([engine.ALWAYS_CHECKED, 0]),
        )

    def batches(self) -> list[Batch]:
        """Four to six, of changing shapes."""
        draw = random.Random(self.seed + 1)
        return [self._batch(draw, step) for step in range(draw.randint(4, 6))]

    def _batch(self, draw: random.Random, step: int) -> Batch:
        count, length = draw.choice([1, 2, 3, 3, 4, 5]), draw.choice([1, 2, 3, 4, 5, 7])
        index, each = torch.arange(count), draw.choice([1, 2, 3])
        samples = {
            "k rows each": index.repeat_interleave(each),
            "k rows each, strided": index.repeat(each),
            "ragged": torch.cat([index, torch.tensor([draw.randrange(count) for _ in range(each)])]).sort()[0],
            "reversed": index.flip(0),
            "shuffled": torch.tensor(draw.sample(range(count), count)),
        }.get(self.grouping, index)
        rows = len(samples)
        length = rows if draw.random() < 0.25 and rows < 8 else length
        generator = torch.Generator().manual_seed(draw.randrange(10**6))
        factors = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5
        if self.factors == "some zero" or (self.factors == "zero at first" and step < 3):
            factors = factors * torch.randint(0, 2 if self.factors == "some zero" else 1, (rows,), generator=generator)
        factors = factors * {"small": 1e-4, "large": 1e4}.get(self.factors, 1.0)
        return Batch(
            step,
            count,
            samples,
            torch.randint(0, VOCABULARY, (rows, length), generator=generator),
            torch.randint(1, length + 1, (rows,), generator=generator),
            torch.rand(rows, length, generator=generator) < 0.4,
            torch.randint(0, CLASSES, (rows,), generator=generator),
            torch.randn(rows, length, FEATURES, generator=generator, dtype=torch.float64),
            factors if self.factors != "one" else torch.ones(rows, dtype=torch.float64),
        )

    def describe(self) -> str:
        """The model and its batches, a line each."""
        model = Model(self)
        lines = [f"seed {self.seed}: width {self.width}, rho {self.rho}, {self.grouping}, factors {self.factors}"]
        lines += [f"  {self.group} samples a perturbation{', adaptive' if self.adaptive else ''}"]
        lines += [f"  compared: the first {self.checked} batches and 1, 2, 4"]
        lines += [f"  frozen: {model.frozen}{'' if model.training else '; eval()'}"]
        for part in model.parts:
            assert isinstance(part, Source | Head | Block)
            options = ", ".join(f"{name}={value}" for name, value in part.draw.taken.items())
            lines.append(f"  {type(part).__name__}({options})")
        shapes = " ".join(f"{b.count}:{tuple(b.tokens.shape)}" for b in self.batches())
        return "\n".join([*lines, f"  batches, samples:(rows, length): {shapes}"])

    def run(self) -> list[Verdict]:
        """Train, up to the first step that is refused or wrong; one verdict a step."""
        model, verdicts = Model(self), []
        comparison = Comparison(model.optimized, self.rho, group=self.group, adaptive=self.adaptive)
        for batch in self.batches():
            if batch.step == 2:
                model.thaw()
            with forms_of_gradients(self.seed), first_batches_compared(self.checked):
                verdicts.append(comparison.step(lambda: model(batch), seed=batch.step))  # noqa: B023
            if verdicts[-1].kind not in ("exact", "warned"):
                break
        return verdicts

    def smallest(self) -> Plan:
        """The same failure with as few parts as possible: blocks are left out one by one."""
        failure = self.run()[-1].kind
        for i in reversed(range(1, len(self.parts) - 1)):
            shorter = replace(self, parts=self.parts[:i] + self.parts[i + 1 :])
            if shorter.run()[-1].kind == failure:
                return shorter.smallest()
        return self
