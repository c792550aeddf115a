"""One of two processes that train under torch's DistributedDataParallel: ``python ddp_worker.py RANK ADDRESS MODE``.

Prints a digest of the weights after 50 updates. MODE is ``loss`` (sharpness_aware_loss: the ascent through the module
inside, the second pass through the wrapper, accumulation under no_sync) or ``step`` (DeltaSAM with a closure over the
wrapper, whose own exchange makes the perturbation common).
"""

from __future__ import annotations

import hashlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from deltasam_plugin import DeltaSAM, Settings
from deltasam_plugin.batch.displacement import PerturbedParameter
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.loss import Objective, sharpness_aware_loss


class Net(nn.Module):
    """With a layer that every third batch leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.optional, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(self.dropout(torch.tanh(self.optional(hidden)) if use else hidden))


def main(rank: int, address: str, mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    torch.manual_seed(100 + rank)  # from here on the workers see different data and masks
    settings = Settings(0.05)
    parameters = list(model.parameters())
    perturbed = [PerturbedParameter(parameter) for parameter in parameters]
    base = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    optimizer = DeltaSAM(parameters, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    for update in range(50):
        x, use = torch.randn(8, 6), update % 3 != 0
        y = (x[:, :3].sum(dim=1) > 0).long()

        def losses(network: nn.Module, x: torch.Tensor = x, y: torch.Tensor = y, use: bool = use) -> torch.Tensor:
            return F.cross_entropy(network(x, use), y, reduction="none")

        if mode == "step":
            optimizer.step(lambda losses=losses: losses(wrapped))
            continue
        base.zero_grad()
        for synchronise in (False, True):

            def first(losses=losses) -> Objective:
                values = losses(model)
                return Objective(values.sum(), values)

            perturbation = BatchPerturbation(perturbed, parameters, settings)
            loss, _ = sharpness_aware_loss(
                first, lambda losses=losses: losses(wrapped).sum(), perturbation, {torch.device("cpu")}
            )
            if synchronise:
                loss.backward()
            else:
                with wrapped.no_sync():
                    loss.backward()
        base.step()
    digest = hashlib.sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in parameters)).hexdigest()
    print(digest, float(sum(parameter.detach().abs().sum() for parameter in parameters)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
