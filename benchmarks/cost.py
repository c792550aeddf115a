"""What an update costs: seconds and peak memory of every method, as ratios to SAM.

    python benchmarks/cost.py [--rounds 7] [--figure cost.png | --only WIDTH,TOKENS,BATCH]

A small fairseq Transformer (3 + 3 layers, 8000 words, fp32, dropout) is trained on random sentences. One of width,
tokens a sentence and batch size varies at a time. Within a round every method does one update, so that whatever else
the machine does meets all of them; a cell is the median over rounds of the ratio to the same round's SAM, with the
least and the greatest. Seconds are CPU seconds of one thread. Memory is weights, optimizer state and the most that one
update allocates beside them.

  adam      the base optimizer alone
  sam       DeltaSAM with uniform weights: the unit
  peer      SAM of the package pytorch_optimizer
  delta-sam DeltaSAM with curvature weights, one probe
  instance  DeltaSAM with exact per-instance perturbation
  loop      the same gradient by a loop over the samples, 2B backward passes
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import base_architecture
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deltasam_plugin import DeltaSAM

LAYERS, WORDS, RHO = 3, 8000, 0.05
UNIT = "sam"


class Case(NamedTuple):
    """Sizes of one measurement."""

    width: int
    tokens: int
    batch: int


CENTRE = Case(width=256, tokens=32, batch=16)
VARIED = {"width": (64, 128, 256, 512, 1024), "tokens": (16, 32, 64, 128), "batch": (8, 16, 32, 64)}

Losses = Callable[[slice], Tensor]  # of these samples, (B,)


def transformer(width: int) -> nn.Module:
    """An encoder-decoder in training mode."""
    words = Dictionary()
    for index in range(WORDS - len(words)):
        words.add_symbol(str(index))
    sides = {"embed_dim": width, "ffn_embed_dim": 4 * width, "attention_heads": max(1, width // 64), "layers": LAYERS}
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    arguments = Namespace(**options, dropout=0.1, share_decoder_input_output_embed=True)
    arguments.max_source_positions = arguments.max_target_positions = 256
    base_architecture(arguments)
    torch.manual_seed(0)
    return TransformerModel.build_model(arguments, SimpleNamespace(source_dictionary=words, target_dictionary=words))


def random_losses(model: nn.Module, case: Case) -> Losses:
    """Cross entropy summed over each sentence's tokens."""
    generator = torch.Generator().manual_seed(1)
    source, target = torch.randint(4, WORDS, (2, case.batch, case.tokens), generator=generator)
    previous = torch.cat([torch.full((case.batch, 1), 2), target[:, :-1]], 1)

    def losses(samples: slice) -> Tensor:
        lengths = torch.full((len(source[samples]),), case.tokens)
        logits, _ = model(source[samples], lengths, previous[samples])
        lost = F.cross_entropy(logits.flatten(0, 1), target[samples].flatten(), reduction="none")
        return lost.view(-1, case.tokens).sum(1)

    return losses


def methods(case: Case) -> dict[str, tuple[Callable[[], None], torch.optim.Optimizer]]:
    """One update by each method, with the optimizer that holds its state; each has a model of its own."""
    everyone = slice(None)
    options = {"lr": 1e-5, "betas": (0.9, 0.98)}
    found: dict[str, tuple[Callable[[], None], torch.optim.Optimizer]] = {}

    def model_and_losses() -> tuple[list[nn.Parameter], Losses]:
        model = transformer(case.width).train()
        return list(model.parameters()), random_losses(model, case)

    def adam() -> None:
        parameters, losses = model_and_losses()
        optimizer = torch.optim.Adam(parameters, **options)

        def update() -> None:
            optimizer.zero_grad()
            losses(everyone).mean().backward()
            optimizer.step()

        found["adam"] = update, optimizer

    def peer() -> None:
        parameters, losses = model_and_losses()
        optimizer = SAM(parameters, torch.optim.Adam, rho=RHO, **options)

        def update() -> None:
            losses(everyone).mean().backward()
            optimizer.first_step(zero_grad=True)
            losses(everyone).mean().backward()
            optimizer.second_step(zero_grad=True)

        found["peer"] = update, optimizer

    def ours(name: str, **settings: str) -> None:
        parameters, losses = model_and_losses()
        optimizer = DeltaSAM(parameters, torch.optim.Adam, rho=RHO, **settings, **options)
        found[name] = lambda: void(optimizer.step(lambda: losses(everyone))), optimizer

    def loop() -> None:
        parameters, losses = model_and_losses()
        optimizer = torch.optim.Adam(parameters, **options)
        found["loop"] = lambda: update_by_loop(losses, parameters, optimizer, case.batch), optimizer

    adam()
    ours("sam", weighting="uniform")
    peer()
    ours("delta-sam", weighting="curvature")
    ours("instance", perturbation="instance")
    loop()
    return found


def void(_: object) -> None:
    """Nothing."""


def update_by_loop(losses: Losses, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, batch: int) -> None:
    """One sample at a time: ascend along its gradient, add its gradient there, return."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    kept = [parameter.detach().clone() for parameter in parameters]
    for i in range(batch):
        gradients = torch.autograd.grad(losses(slice(i, i + 1)).sum(), parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            torch._foreach_add_(parameters, torch._foreach_mul(gradients, float(RHO / norm)))
        del gradients
        torch._foreach_add_(total, torch.autograd.grad(losses(slice(i, i + 1)).sum(), parameters))
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient.div_(batch)
    optimizer.step()


def peak_bytes(update: Callable[[], None], optimizer: torch.optim.Optimizer) -> int:
    """Weights and optimizer state, and the most that is allocated beside them during an update."""
    optimizer.zero_grad(set_to_none=True)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    held |= {value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # torch keeps counting what was allocated in one profile and freed after it: count from where this profile began.
    counts = [
        event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event.get("name") == "[memory]"
    ]
    begin = counts[0]["Total Allocated"] - counts[0]["Bytes"]
    allocated = max(count["Total Allocated"] for count in counts) - begin
    return allocated + sum(tensor.numel() * tensor.element_size() for tensor in held)


class Row(NamedTuple):
    """One case: of each method the seconds by round, and the bytes."""

    case: Case
    seconds: dict[str, list[float]]
    memory: dict[str, int]

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Least, median and greatest ratio of the seconds to SAM's."""
        ratios = [own / unit for own, unit in zip(self.seconds[name], self.seconds[UNIT], strict=True)]
        return min(ratios), statistics.median(ratios), max(ratios)

    def memory_ratio(self, name: str) -> float:
        """Of the peak memory to SAM's."""
        return self.memory[name] / self.memory[UNIT]

    def cells(self) -> list[str]:
        """As a line of the table."""
        cells = [*map(str, self.case), f"{statistics.median(self.seconds[UNIT]):.2f}"]
        for name in self.seconds:
            if name != UNIT:
                least, median, greatest = self.ratio(name)
                cells.append(f"{median:.2f} ({least:.2f}–{greatest:.2f}), {self.memory_ratio(name):.2f}")
        faster = statistics.median(a / b for a, b in zip(self.seconds["loop"], self.seconds["instance"], strict=True))
        return [*cells, f"{faster:.1f}×"]


def measure(case: Case, rounds: int) -> Row:
    """All methods in turn, after one update each that finds layouts and makes optimizer state."""
    updates = methods(case)
    for update, _ in updates.values():
        update()
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(rounds):
        for name, (update, _) in updates.items():
            start = time.process_time()
            update()
            seconds[name].append(time.process_time() - start)
    return Row(case, seconds, {name: peak_bytes(*pair) for name, pair in updates.items()})


def draw(rows: Sequence[Row], path: str) -> None:
    """Ratios over width, tokens and batch: seconds above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq turns everything on
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(VARIED), figsize=(11, 6), sharey="row", squeeze=False)
    for column, field in enumerate(VARIED):
        chosen = [row for row in rows if row.case._replace(**{field: 0}) == CENTRE._replace(**{field: 0})]
        chosen.sort(key=lambda row: getattr(row.case, field))
        sizes = [getattr(row.case, field) for row in chosen]
        for name in rows[0].seconds:
            least, median, greatest = zip(*(row.ratio(name) for row in chosen), strict=True)
            (line,) = axes[0, column].plot(sizes, median, marker="o", label=name)
            axes[0, column].fill_between(sizes, least, greatest, color=line.get_color(), alpha=0.15)
            axes[1, column].plot(sizes, [row.memory_ratio(name) for row in chosen], marker="o")
        fixed = ", ".join(f"{key} {value}" for key, value in CENTRE._asdict().items() if key != field)
        axes[0, column].set_title(fixed, fontsize=9)
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel({"tokens": "tokens a sentence", "batch": "sentences a batch"}.get(field, field))
    axes[0, 0].set_yscale("log", base=2)
    axes[0, 0].set_ylabel("seconds / SAM's")
    axes[1, 0].set_ylabel("peak memory / SAM's")
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cases() -> list[Case]:
    """The centre, and everything that differs from it in one size."""
    found = [CENTRE._replace(**{field: size}) for field, sizes in VARIED.items() for size in sizes]
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--figure", help="where to draw the ratios")
    output.add_argument("--only", help="one case, WIDTH,TOKENS,BATCH, instead of all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    chosen = [Case(*map(int, arguments.only.split(",")))] if arguments.only else cases()
    rows: list[Row] = []
    for case in chosen:
        row = measure(case, arguments.rounds)
        if not rows:
            header = [*Case._fields, f"{UNIT}, s", *(name for name in row.seconds if name != UNIT), "loop / instance"]
            print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
        rows.append(row)
        print("| " + " | ".join(row.cells()) + " |", flush=True)
    print("\nCells: seconds (least–greatest over rounds), peak memory; both as ratios to sam.")
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
