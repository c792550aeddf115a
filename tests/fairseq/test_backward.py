"""Gradients that do not come from the sharpness-aware loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.fairseq.announcements import TrainedBy
from deltasam_plugin.fairseq.backward import BackwardPasses
from deltasam_plugin.loss import Objective, sharpness_aware_loss
from deltasam_plugin.modes import Perturbations
from deltasam_plugin.settings import Settings


@pytest.mark.parametrize("fails", [False, True])
def test_a_term_beside_the_loss_is_noticed_after_a_backward_pass_that_failed_too(fails: bool) -> None:
    """fairseq goes on when a batch runs out of memory."""
    weight = nn.Parameter(torch.ones(3))
    passes = BackwardPasses(TrainedBy("task", "criterion", "adam"))
    perturbations = Perturbations({"weight": PerturbedParameter(weight)}, Settings(weighting="uniform"))

    def forward() -> Objective:
        losses = weight.square()
        return Objective(losses.sum(), losses)

    def loss_of(fail: bool) -> Tensor:
        def second() -> Tensor:
            if fail:
                raise torch.OutOfMemoryError("out of memory")
            return forward().loss

        loss, _ = sharpness_aware_loss(forward, second, perturbations.of_batch(), {weight.device})
        passes.follow(loss, lambda: [("weight", weight)])
        return loss

    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(fail=True).backward()
    (loss_of(fail=False) + weight.sum()).backward()
    with pytest.raises(RuntimeError, match=r"Task 'task' adds loss terms outside .* to 1 parameters \(weight\)"):
        passes.check_step()
