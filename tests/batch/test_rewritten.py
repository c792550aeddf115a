"""Parameters that the forward pass itself replaces, as fairseq's quantization noise does."""

from __future__ import annotations

import pytest
import torch
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor, nn
from torch.nn import functional as F

from deltasam_plugin import Settings
from deltasam_plugin.batch.perturbation import BatchPerturbation
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.checks import Checks
from deltasam_plugin.loss import Objective, sharpness_aware_loss


def gradients(weighting: str, checks: Checks | None) -> list[Tensor]:
    """Of one batch, at the perturbed weights."""
    torch.manual_seed(0)
    table, linear = quant_noise(nn.Embedding(11, 8), 0.4, 8), quant_noise(nn.Linear(8, 8), 0.4, 8)
    parameters = [table.weight, linear.weight, linear.bias]
    tokens = torch.randint(0, 11, (4, 5))

    def losses() -> Tensor:
        logits = linear(F.dropout(table(tokens), 0.1)) @ table.weight.t()
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").sum(1)

    def first() -> Objective:
        found = losses()
        return Objective(found.sum(), found)

    perturbed = [PerturbedParameter(p, rewritten=p is not linear.bias) for p in parameters]
    perturbation = BatchPerturbation(perturbed, parameters, Settings(weighting=weighting), checks=checks)
    loss, _ = sharpness_aware_loss(first, lambda: losses().sum(), perturbation, {torch.device("cpu")})
    loss.backward()
    return [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize("weighting", ["uniform", "curvature"])
def test_the_graph_of_the_ascent_reads_what_its_forward_pass_read(weighting: str) -> None:
    """Although a check, or probes, run the forward pass again while it is alive."""
    checks = Checks()
    checks.next_batch()
    checked, plain = gradients(weighting, checks), gradients(weighting, None)
    assert len(plain) == 3
    assert all(torch.equal(one, other) for one, other in zip(checked, plain, strict=True))
