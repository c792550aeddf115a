"""What an update costs: seconds and peak memory of every method, as ratios to SAM.

    python -m benchmarks.cost [--rounds 3] [--only WIDTH,TOKENS,BATCH ...] [--padded] [--precision bf16]
        [--methods NAME ...]

A small fairseq Transformer (3 + 3 layers, 8000 words, dropout) is trained on random sentences. Width, sentence
length and batch size vary one at a time. With --padded the lengths of the sentences are drawn evenly from a quarter of
the longest up to it, as in batches of real text. With --precision the forward passes run under autocast; a type that
the CPU does not compute in is slow. In every round each method does one update, so other jobs on the
machine slow all methods alike. A cell shows the ratio to the same round's SAM: the median over the rounds, the least
and the greatest in parentheses, then the ratio of the peak memory. Seconds are CPU seconds of one thread. Memory is
parameters, optimizer state and the most that one update allocates beside them.

  Adam                      the base optimizer alone
  SAM                       DeltaSAM with uniform weights; all ratios are to this one
  SAM of pytorch_optimizer  SAM by another package
  δ-SAM                     DeltaSAM with curvature weights, one probe
  δ-SAM, kl                 DeltaSAM with weights by the divergence of predictions, one probe
  instance                  DeltaSAM with perturbation="instance": exact, one perturbation for each sample
  loop                      the same update as instance, one sample at a time; only if asked for

Further choices, each by one option more than SAM or instance have (--methods choices; one case, one line for each):

  RW-SAM, ASAM, SAM-ON, budget, Momentum-SAM, noise, WSAM, GSAM
  instance, adaptive; instance, SAM-ON; instance, budget; instance, group 4

The table is kept in benchmarks/README.md; `python benchmarks/figures.py` draws the figures from it.
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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import base_architecture
from pytorch_optimizer import SAM as PeerSAM
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deltasam_plugin import DeltaSAM
from tests.helpers.rehearsed_runs import skip_checks

LAYERS, WORDS, PAD, RHO = 3, 8000, 1, 0.05
METHODS = ADAM, SAM, PEER, CURVATURE, KL, INSTANCE, LOOP = (
    "Adam", "SAM", "SAM of pytorch_optimizer", "δ-SAM", "δ-SAM, kl", "instance", "loop",
)  # fmt: skip
NORMS = "layer_norm"  # SAM-ON perturbs normalization layers only
CHOICES: dict[str, dict[str, Any]] = {
    "RW-SAM": {"weighting": "gradient_norm"},
    "ASAM": {"weighting": "uniform", "adaptive": True},
    "SAM-ON": {"weighting": "uniform", "parameters": NORMS},
    "budget": {"weighting": "uniform", "loss_budget": 0.1},
    "Momentum-SAM": {"ascent": "momentum"},
    "noise": {"weighting": "uniform", "ascent": "noise"},
    "WSAM": {"weighting": "uniform", "descent": "weighted", "descent_weight": 2.0},
    "GSAM": {"weighting": "uniform", "descent": "surrogate_gap"},
    "instance, adaptive": {"perturbation": "instance", "adaptive": True},
    "instance, SAM-ON": {"perturbation": "instance", "parameters": NORMS},
    "instance, budget": {"perturbation": "instance", "loss_budget": 0.1},
    "instance, group 4": {"perturbation": "instance", "group": 4},
}


class Case(NamedTuple):
    """Sizes of one measurement."""

    width: int
    tokens: int
    batch: int


CENTRE = Case(width=256, tokens=32, batch=16)
VARIED = {"width": (64, 128, 256, 512, 1024), "tokens": (16, 32, 64, 128), "batch": (8, 16, 32, 64)}
LONG = [Case(256, 256, 8), Case(256, 512, 2), Case(256, 1024, 2), Case(512, 128, 8), Case(512, 512, 2)]
EVERYONE, TWO = slice(None), slice(0, 2)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Losses = Callable[[slice], tuple[Tensor, Tensor]]  # samples in, their losses (B,) and logits (B, T, V) out
Updates = tuple[Callable[[slice], None], torch.optim.Optimizer]  # an update on some samples; what holds its state


def transformer(width: int) -> nn.Module:
    """Return an encoder-decoder."""
    words = Dictionary()
    for index in range(WORDS - len(words)):
        words.add_symbol(str(index))
    sides = {"embed_dim": width, "ffn_embed_dim": 4 * width, "attention_heads": max(1, width // 64), "layers": LAYERS}
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    arguments = Namespace(**options, dropout=0.1, share_decoder_input_output_embed=True)
    arguments.max_source_positions = arguments.max_target_positions = 1024
    base_architecture(arguments)
    torch.manual_seed(0)
    return TransformerModel.build_model(arguments, SimpleNamespace(source_dictionary=words, target_dictionary=words))


def random_losses(model: nn.Module, case: Case, padded: bool, dtype: torch.dtype = torch.float32) -> Losses:
    """Return a function that gives the cross-entropy of each sentence, summed over its tokens, and the logits."""
    generator = torch.Generator().manual_seed(1)
    source, target = torch.randint(4, WORDS, (2, case.batch, case.tokens), generator=generator)
    lengths = torch.full((case.batch,), case.tokens)
    if padded:
        lengths = torch.linspace(case.tokens / 4, case.tokens, case.batch).round().long()
        empty = torch.arange(case.tokens) >= lengths.unsqueeze(1)
        source, target = (tokens.masked_fill(empty, PAD) for tokens in (source, target))
    previous = torch.cat([torch.full((case.batch, 1), 2), target[:, :-1]], 1)

    def losses(samples: slice) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, _ = model(source[samples], lengths[samples], previous[samples])
        lost = F.cross_entropy(
            logits.float().flatten(0, 1), target[samples].flatten(), ignore_index=PAD, reduction="none"
        )
        return lost.view(-1, case.tokens).sum(1), logits

    return losses


def methods(case: Case, padded: bool, wanted: Sequence[str], dtype: torch.dtype = torch.float32) -> dict[str, Updates]:
    """Return an update by each method and the optimizer that holds its state. Each method has a model of its own."""
    options = {"lr": 1e-5, "betas": (0.9, 0.98)}
    found: dict[str, Updates] = {}

    def model_and_losses() -> tuple[nn.Module, Losses]:
        model = transformer(case.width).train()
        return model, random_losses(model, case, padded, dtype)

    def adam() -> None:
        model, losses = model_and_losses()
        optimizer = torch.optim.Adam(model.parameters(), **options)

        def update(samples: slice) -> None:
            optimizer.zero_grad()
            losses(samples)[0].mean().backward()
            optimizer.step()

        found[ADAM] = update, optimizer

    def peer() -> None:
        model, losses = model_and_losses()
        optimizer = PeerSAM(list(model.parameters()), torch.optim.Adam, rho=RHO, **options)

        def update(samples: slice) -> None:
            losses(samples)[0].mean().backward()
            optimizer.first_step(zero_grad=True)
            losses(samples)[0].mean().backward()
            optimizer.second_step(zero_grad=True)

        found[PEER] = update, optimizer

    def ours(name: str, **settings: Any) -> None:
        model, losses = model_and_losses()
        optimizer = DeltaSAM(model.named_parameters(), torch.optim.Adam, rho=RHO, **settings, **options)

        def update(samples: slice) -> None:
            optimizer.step(lambda: losses(samples) if name == KL else losses(samples)[0])

        found[name] = update, optimizer

    def loop() -> None:
        model, losses = model_and_losses()
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, **options)
        found[LOOP] = partial(update_by_loop, losses, parameters, optimizer, case.batch), optimizer

    made: dict[str, Callable[[], None]] = {
        ADAM: adam,
        SAM: partial(ours, SAM, weighting="uniform"),
        PEER: peer,
        CURVATURE: partial(ours, CURVATURE, weighting="curvature"),
        KL: partial(ours, KL, weighting="kl"),
        INSTANCE: partial(ours, INSTANCE, perturbation="instance"),
        LOOP: loop,
        **{name: partial(ours, name, **settings) for name, settings in CHOICES.items()},
    }
    for name in wanted:
        made[name]()
        update, optimizer = found[name]
        update(TWO)  # which makes the state
        if isinstance(optimizer, DeltaSAM):
            update(TWO)
            assert optimizer._perturbations is not None
            skip_checks(optimizer._perturbations)
    return found


def update_by_loop(
    losses: Losses, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, batch: int, samples: slice
) -> None:
    """Do one update, one sample at a time: ascend along its gradient, add its gradient there, restore."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    kept = [parameter.detach().clone() for parameter in parameters]
    chosen = range(batch)[samples]
    for i in chosen:
        gradients = torch.autograd.grad(losses(slice(i, i + 1))[0].sum(), parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            torch._foreach_add_(parameters, torch._foreach_mul(gradients, float(RHO / norm)))
        del gradients
        torch._foreach_add_(total, torch.autograd.grad(losses(slice(i, i + 1))[0].sum(), parameters))
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient.div_(len(chosen))
    optimizer.step()


def peak_bytes(update: Callable[[slice], None], optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of parameters and optimizer state plus the most that an update allocates beside them."""
    optimizer.zero_grad(set_to_none=True)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    held |= {value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update(EVERYONE)
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
    """What was measured in one case: for each method the seconds of every round, and the peak bytes."""

    case: Case
    seconds: dict[str, list[float]]
    memory: dict[str, int]

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Return the least, the median and the greatest ratio of a method's seconds to SAM's."""
        ratios = [own / unit for own, unit in zip(self.seconds[name], self.seconds[SAM], strict=True)]
        return min(ratios), statistics.median(ratios), max(ratios)

    def memory_ratio(self, name: str) -> float:
        """Return the ratio of a method's peak memory to SAM's."""
        return self.memory[name] / self.memory[SAM]

    def cells(self) -> list[str]:
        """Return the cells of its row of the table."""
        cells = [*map(str, self.case), f"{statistics.median(self.seconds[SAM]):.2f}"]
        for name in others(self.seconds):
            least, median, greatest = self.ratio(name)
            cells.append(f"{median:.2f} ({least:.2f}–{greatest:.2f}), {self.memory_ratio(name):.2f}")
        if {LOOP, INSTANCE} <= self.seconds.keys():
            pairs = zip(self.seconds[LOOP], self.seconds[INSTANCE], strict=True)
            cells.append(f"{statistics.median(loop / instance for loop, instance in pairs):.1f}×")
        return cells


def others(methods: Iterable[str] = METHODS) -> list[str]:
    """Return the methods that are compared with SAM."""
    return [name for name in methods if name != SAM]


def measure(
    case: Case,
    rounds: int,
    padded: bool = False,
    wanted: Sequence[str] = METHODS,
    dtype: torch.dtype = torch.float32,
) -> Row:
    """Measure all methods in turn. The memory is that of each one's first update on the whole batch."""
    updates = methods(case, padded, wanted, dtype)
    memory = {name: peak_bytes(*pair) for name, pair in updates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(rounds):
        for name, (update, _) in updates.items():
            start = time.process_time()
            update(EVERYONE)
            seconds[name].append(time.process_time() - start)
    return Row(case, seconds, memory)


def cases() -> list[Case]:
    """Return the centre, all cases that differ from it in one size, and some with long sentences."""
    found = [CENTRE._replace(**{field: size}) for field, sizes in VARIED.items() for size in sizes]
    return list(dict.fromkeys([*found, *LONG]))


def print_choices(row: Row) -> None:
    """Print one line for each choice, of one case."""
    print("| choice | seconds, memory |\n|---|---|")
    for name, cell in zip(others(row.seconds), row.cells()[len(Case._fields) + 1 :], strict=True):
        print(f"| {name} | {cell} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="these cases, WIDTH,TOKENS,BATCH each, instead of all")
    parser.add_argument("--padded", action="store_true", help="sentences of different lengths")
    every = [*METHODS, *CHOICES, "choices"]
    parser.add_argument("--methods", nargs="+", choices=every, default=METHODS[:-1], help="these, and SAM")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the forward passes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    chosen = [Case(*map(int, case.split(","))) for case in arguments.only] if arguments.only else cases()
    named = [*arguments.methods, *([ADAM, INSTANCE, *CHOICES] if "choices" in arguments.methods else [])]
    wanted = [name for name in (*METHODS, *CHOICES) if name == SAM or name in named]
    dtype = PRECISIONS[arguments.precision]
    if "choices" in arguments.methods:
        print_choices(measure(chosen[0], arguments.rounds, arguments.padded, wanted, dtype))
        return
    header = [*Case._fields, f"{SAM}, s", *others(wanted)]
    header += [f"{LOOP} : {INSTANCE}"] if {LOOP, INSTANCE} <= set(wanted) else []
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for case in chosen:
        row = measure(case, arguments.rounds, arguments.padded, wanted, dtype)
        print("| " + " | ".join(row.cells()) + " |", flush=True)


if __name__ == "__main__":
    main()
