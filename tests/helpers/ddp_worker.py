"""One of two processes that train under torch's DistributedDataParallel: ``python ddp_worker.py RANK ADDRESS MODE``.

Prints a digest of the parameters after 50 updates. MODE is one of

loss      sharpness_aware_loss: the ascent through the module inside, the second pass through the wrapper, accumulation
          under no_sync
sync      the same with workers that share one perturbation, of which one leaves a layer out; the digest covers the
          parameters of every forward pass
step      DeltaSAM with a closure over the wrapper, whose own exchange makes the perturbation common
momentum, noise, weighted, surrogate_gap   DeltaSAM with an ascent or a descent of this name
static, instance, static-instance   DeltaSAM where the wrapper has a static graph, in instance mode, and both
"""

from __future__ import annotations

import gc
import hashlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.batch.descent import DESCENTS
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.batch.workers import NO_SYNC, Workers
from deltasam_plugin.loss import Objective, sharpness_aware_loss
from deltasam_plugin.settings import ASCENTS


class Net(nn.Module):
    """With a layer that every third batch leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.optional, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(self.dropout(torch.tanh(self.optional(hidden)) if use else hidden))


def values(parameters: list[nn.Parameter]) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in parameters)


def train(rank: int, mode: str) -> str:
    """The digest; when it returns, nothing holds the process group any more."""
    torch.manual_seed(0)
    model = Net()
    static = mode.startswith("static")
    wrapped = DistributedDataParallel(model, find_unused_parameters=not static, static_graph=static)
    torch.manual_seed(100 + rank)  # from here on the workers see different data and masks
    settings = Settings(0.05)
    parameters = list(model.parameters())
    perturbed = [PerturbedParameter(parameter) for parameter in parameters]
    base = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    perturbation = "instance" if mode.endswith("instance") else "batch"
    named = (
        {"ascent": mode} if mode in ASCENTS else {"descent": mode, "weighting": "uniform"} if mode in DESCENTS else {}
    )
    optimizer = DeltaSAM(parameters, torch.optim.SGD, 0.05, perturbation=perturbation, lr=0.1, momentum=0.9, **named)
    workers = Workers(dist.group.WORLD) if mode == "sync" else NO_SYNC
    seen = hashlib.sha256()
    if mode == "sync":
        model.first.register_forward_pre_hook(lambda *_: seen.update(values(parameters)))
    for update in range(50):
        x, use = torch.randn(8, 6), static or (update + (rank if mode == "sync" else 0)) % 3 != 0
        y = (x[:, :3].sum(dim=1) > 0).long()

        def losses(network: nn.Module, x: torch.Tensor = x, y: torch.Tensor = y, use: bool = use) -> torch.Tensor:
            return F.cross_entropy(network(x, use), y, reduction="none")

        if mode not in ("loss", "sync"):
            optimizer.step(lambda losses=losses: losses(wrapped))
            continue
        base.zero_grad()
        for synchronise in (False, True):

            def first(losses=losses) -> Objective:
                values = losses(model)
                return Objective(values.sum(), values)

            of_batch = BatchPerturbation(perturbed, parameters, settings, workers=workers)
            loss, _ = sharpness_aware_loss(
                first, lambda losses=losses: losses(wrapped).sum(), of_batch, {torch.device("cpu")}
            )
            if synchronise:
                loss.backward()
            else:
                with wrapped.no_sync():
                    loss.backward()
        base.step()
    seen.update(values(parameters))
    return f"{seen.hexdigest()} {float(sum(parameter.detach().abs().sum() for parameter in parameters))}"


def main(rank: int, address: str, mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    print(train(rank, mode), flush=True)
    gc.collect()  # threads of a process group that something still holds outlive it, and abort at the interpreter's end
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
