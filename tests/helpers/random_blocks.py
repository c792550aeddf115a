"""Blocks of random models: everyday layers, in every order of rows that models use, and hostile ones.

A block maps hidden states (R, T, C) to hidden states, R rows of the batch. It draws its options when it is made.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.random_rows import LAYOUTS, Batch, Draw


class Hidden(torch.autograd.Function):
    """A linear layer that no interception sees, as a kernel in C++ is not seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C.DisableTorchFunction():
            return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "relu in place": torch.relu_, "gelu": F.gelu}
Pool = dict[str, nn.Module]  # modules that several blocks may use


class Block(nn.Module):
    """Base class: R rows of T positions in, the same out."""

    def __init__(self, draw: Draw, width: int, pool: Pool) -> None:
        super().__init__()
        self.draw, self.width = draw, width
        self.build(pool)

    def build(self, pool: Pool) -> None:
        """Draw options, make layers."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError


class Rowwise(Block):
    """A layer that treats rows alike, in some layout."""

    def build(self, pool: Pool) -> None:
        kind = self.draw.option("kind", ["linear", "shared linear", "layer norm", "feed forward", "bottleneck"])
        self.layout = self.draw.option("layout", [*list(LAYOUTS), *list(LAYOUTS)[:4] * 3])
        c, bias = self.width, self.draw.option("bias", [True, True, False])
        self.activation = ACTIVATIONS[self.draw.option("activation", list(ACTIVATIONS))]
        self.residual = self.draw.option("residual", [True, False])
        self.dropout = self.draw.option("dropout", [0.0, 0.0, 0.3])
        self.first = pool["linear"] if kind == "shared linear" else nn.Linear(c, c, bias=bias)
        self.second: nn.Module | None = None
        if kind == "layer norm":
            self.first = nn.LayerNorm(c, elementwise_affine=self.draw.random() > 0.1)
        elif kind == "feed forward":
            self.first, self.second = nn.Linear(c, 2 * c, bias=bias), nn.Linear(2 * c, c, bias=bias)
        elif kind == "bottleneck":
            self.first, self.second = nn.Linear(c, 2, bias=False), nn.Linear(2, c, bias=bias)

    def rows(self, x: Tensor) -> Tensor:
        y = F.dropout(self.activation(self.first(x)), self.dropout)
        return y if self.second is None else self.second(y)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        y = LAYOUTS[self.layout](self.rows, x, batch)
        return x + y if self.residual else y


class Attention(Block):
    """nn.MultiheadAttention with its packed projections, or a whole encoder layer."""

    def build(self, pool: Pool) -> None:
        first, c = self.draw.option("batch first", [True, False]), self.width
        self.kind = self.draw.option("kind", ["self", "one query", "keys of another width", "encoder layer"])
        self.weights = self.draw.option("need weights", [True, False])
        self.batch_first = first
        if self.kind == "encoder layer":
            norm_first = self.draw.option("norm first", [True, False])
            self.layer = nn.TransformerEncoderLayer(c, 2, 2 * c, 0.1, batch_first=first, norm_first=norm_first)
        else:
            widths = {"kdim": 2, "vdim": 2} if self.kind == "keys of another width" else {}
            self.layer = nn.MultiheadAttention(c, 2, batch_first=first, **widths)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        h, padding = x if self.batch_first else x.transpose(0, 1), ~batch.mask
        if self.kind == "encoder layer":
            h = self.layer(h, src_key_padding_mask=padding)
            return h if self.batch_first else h.transpose(0, 1)
        memory = h[..., :2] if self.kind == "keys of another width" else h
        query = h.narrow(1 if self.batch_first else 0, 0, 1) if self.kind == "one query" else h
        h = self.layer(query, memory, memory, key_padding_mask=padding, need_weights=self.weights)[0]
        return x + (h if self.batch_first else h.transpose(0, 1))


class Convolution(Block):
    """Over time, one filter bank for all samples."""

    def build(self, pool: Pool) -> None:
        groups, c = self.draw.option("groups", [1, 2, self.width]), self.width
        self.two = self.draw.option("2d", [False, False, True])
        dilation = self.draw.option("dilation", [1, 2])
        if self.two:
            self.layer = nn.Conv2d(1, 2, (3, c), padding=(1, 0))
            self.back = nn.Linear(2, c)
        else:
            padding = self.draw.option("padding", [dilation, dilation, "same"])
            self.layer = nn.Conv1d(c, c, 3, padding=padding, dilation=dilation, groups=groups)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if self.two:
            return x + self.back(torch.tanh(self.layer(x.unsqueeze(1)).squeeze(3).transpose(1, 2)))
        return x + torch.tanh(self.layer(x.transpose(1, 2)).transpose(1, 2))


class Recurrent(Block):
    """An RNN cell: its layers run once for each time step."""

    def build(self, pool: Pool) -> None:
        self.layers = nn.ModuleList([nn.Linear(self.width, self.width, bias=i == 0) for i in range(2)])
        self.until = self.draw.option("until", ["the end", "the longest row's end"])

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        steps = x.shape[1] if self.until == "the end" else int(batch.lengths.max())
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(steps):
            h = torch.tanh(self.layers[0](x[:, t]) + self.layers[1](h))
            states.append(h)
        return torch.cat([torch.stack(states, 1), x[:, steps:]], 1)


class Detached(Block):
    """Branches that no gradient flows through, although the weights act there."""

    def build(self, pool: Pool) -> None:
        self.layer = pool["linear"] if self.draw.option("shared", [True, False]) else nn.Linear(self.width, self.width)
        self.kind = self.draw.option(
            "kind",
            ["input", "gate", "gate under no_grad", "straight-through", "argmax", "weight", "target"],
        )
        self.again = nn.Embedding(self.width, self.width) if self.kind == "argmax" else None
        self.loss: Tensor | None = None

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = x + torch.tanh(self.layer(x))  # with a gradient: only so is the layer perturbed
        if self.kind == "input":
            return x + self.layer(x.detach())
        if self.kind == "gate":
            return x * torch.sigmoid(self.layer(x)).detach() + self.layer(x)
        if self.kind == "gate under no_grad":
            with torch.no_grad():
                gate = torch.sigmoid(self.layer(x))
            return x * gate
        if self.kind == "weight":
            return x + F.linear(x, self.layer.weight.detach(), self.layer.bias)
        y = self.layer(x)
        if self.kind == "straight-through":
            soft = y.softmax(2)
            return x + F.one_hot(soft.argmax(2), self.width).to(x.dtype) + soft - soft.detach()
        if self.again is not None:
            return x + self.again(y.argmax(2))
        return x + (y - self.layer(y).detach()).square()


class Adapter(Block):
    """Starts at zero, in plain layers or out of sight."""

    def build(self, pool: Pool) -> None:
        self.kind = self.draw.option(
            "kind", ["plain", "plain", "plain", "hidden", "hidden, later", "hidden, sometimes"]
        )
        self.down, self.up = (nn.Linear(*size, bias=False) for size in [(self.width, 2), (2, self.width)])
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        h = torch.tanh(self.down(x))
        if self.kind == "plain" or (self.kind == "hidden, sometimes" and x.shape[1] < 4):
            return x + self.up(h)
        return x + float(self.kind != "hidden, later" or batch.step > 2) * Hidden.apply(h, self.up.weight)


class Experts(Block):
    """Rows go to the layer that their own content chooses."""

    def build(self, pool: Pool) -> None:
        self.router = nn.Linear(self.width, 2, bias=False)
        self.experts = nn.ModuleList([nn.Linear(self.width, self.width) for _ in range(2)])

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        scores = self.router(x).softmax(2)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = scores.argmax(2) == index
            y = y.masked_scatter(chosen.unsqueeze(2), expert(x[chosen]) * scores[chosen][:, index, None])
        return x + y


class Sometimes(Block):
    """A layer that runs or not, by chance, by the batch's length or from some step on."""

    def build(self, pool: Pool) -> None:
        self.layer = pool["linear"] if self.draw.option("shared", [True, False]) else nn.Linear(self.width, self.width)
        self.when = self.draw.option("when", ["by chance", "T > 3", "later", "a class is 1"])

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        runs = {
            "by chance": random.random() < 0.5,
            "T > 3": x.shape[1] > 3,
            "later": batch.step > 1,
            "a class is 1": bool((batch.classes == 1).any()),
        }
        return x + torch.tanh(self.layer(x)) if runs[self.when] else x


class Positions(Block):
    """Embedded for every row, or once for all."""

    def build(self, pool: Pool) -> None:
        self.table = nn.Embedding(8, self.width)
        self.shape = self.draw.option("rows", ["(T,)", "(1, T)", "(T, 1)", "(B, T)", "(B, T) expanded"])

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        positions = torch.arange(x.shape[1])
        if self.shape == "(T, 1)":
            return (x.transpose(0, 1) + self.table(positions.unsqueeze(1))).transpose(0, 1)
        if self.shape.startswith("(B"):
            positions = positions.expand(len(x), -1) if "expanded" in self.shape else positions.repeat(len(x), 1)
        return x + self.table(positions.unsqueeze(0) if self.shape == "(1, T)" else positions)


class Slices(Block):
    """Parts of weights, and weights put together."""

    def build(self, pool: Pool) -> None:
        c = self.width
        self.layer, self.other = nn.Linear(8, c), nn.Linear(c, c, bias=False)
        self.kind = self.draw.option("kind", ["columns", "rows", "chunks", "cat", "transposed", "over time"])

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        c, weight = self.width, self.other.weight
        if self.kind == "columns":
            return x + F.linear(x, self.layer.weight[:, :c], self.layer.bias)
        if self.kind == "over time":  # as Linformer compresses keys: (T, ...) to (C, ...)
            h = F.linear(x.transpose(1, 2), self.layer.weight[:, : x.shape[1]])
            return x + h.mean(2).unsqueeze(1)
        if self.kind == "rows":
            return x + F.pad(F.linear(x, weight[: c // 2]), (0, c - c // 2))
        if self.kind == "chunks":
            one, two = weight.chunk(2)
            return x + torch.cat([F.linear(x, two), F.linear(x, one)], 2)
        if self.kind == "cat":
            return x + F.linear(x, torch.cat([weight, self.layer.weight]))[..., :c] if c == 8 else x + self.other(x)
        return x + F.linear(x, weight.t())


class Constants(Block):
    """A layer applied to rows that no sample owns: prompts, or embeddings of all labels."""

    def build(self, pool: Pool) -> None:
        self.layer = nn.Linear(self.width, self.width)
        self.register_buffer("rows", torch.randn(2, self.width, dtype=torch.float64))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        labels = torch.tanh(self.layer(self.rows))
        return x + (x @ labels.T).softmax(2) @ labels


class Plain(Block):
    """Parameters in plain arithmetic: a gain of few weights, or a whole matrix."""

    def build(self, pool: Pool) -> None:
        self.kind = self.draw.option("kind", ["gain", "gain", "matrix", "einsum", "batch vector"])
        size = {"gain": (1,), "batch vector": (self.width,)}.get(self.kind, (self.width, self.width))
        self.weight = nn.Parameter(torch.randn(size) / 2)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if self.kind == "matrix":
            return x + x @ self.weight
        if self.kind == "einsum":
            return x + torch.einsum("btc,cd->btd", x, self.weight)
        return x * self.weight


class Mixed(Block):
    """Samples that see each other: from the first batch on, from later on, or without a gradient."""

    def build(self, pool: Pool) -> None:
        self.layer = nn.Linear(self.width, self.width)
        self.kind = self.draw.option("kind", ["mean", "later", "detached", "batch norm"])
        self.norm = nn.BatchNorm1d(self.width) if self.kind == "batch norm" else None

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        y = self.layer(x)
        if self.norm is not None and x[..., 0].numel() > 1:
            return x + self.norm(y.transpose(1, 2)).transpose(1, 2)
        mean = y.mean(0, True)
        if self.kind == "detached":
            return x + torch.tanh(y - mean.detach())
        return x + torch.tanh(y) * (1 + (float(batch.step > 1) if self.kind == "later" else 1.0) * mean)


BLOCKS: dict[type[Block], int] = {  # and how often each is drawn
    Rowwise: 30,
    Attention: 8,
    Convolution: 5,
    Recurrent: 4,
    Detached: 5,
    Adapter: 5,
    Experts: 3,
    Sometimes: 4,
    Positions: 5,
    Slices: 4,
    Constants: 1,
    Plain: 2,
    Mixed: 2,
}
