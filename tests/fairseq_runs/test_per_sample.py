"""Every adaptor against its criterion: the sum over the samples, and each sample against a batch of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, criterions
from omegaconf import OmegaConf, open_dict
from runs import ADAM, SENTENCES, TRANSLATION, base, fairseq_train

from deltasam_plugin.per_sample import adaptor_of, recorded_outputs

VARIANTS: dict[str, list[object]] = {
    "cross_entropy": [],
    "label_smoothed_cross_entropy": ["--label-smoothing", 0.1],
    "label_smoothed_cross_entropy prefix": ["--label-smoothing", 0.1, "--ignore-prefix-size", 1, "--report-accuracy"],
    "sentence_prediction class": ["--num-classes", 2],
    "sentence_prediction score": ["--num-classes", 1, "--regression-target"],
}


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request: Any, tmp_path_factory: Any, translation_data: Path, sentence_data: dict[str, Path]) -> Any:
    """Name, criterion, model and task of a short ordinary run."""
    name, _, kind = request.param.partition(" ")
    sentences = name == "sentence_prediction"
    data, options = (sentence_data[kind], SENTENCES) if sentences else (translation_data, TRANSLATION)
    folder = tmp_path_factory.mktemp("run")
    fairseq_train(data, folder, *options, *ADAM, *base(name), *VARIANTS[request.param], updates=3)
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(folder / "checkpoint_last.pt")])
    with open_dict(cfg):
        criterion = criterions.build_criterion(OmegaConf.create(cfg.criterion), task)
    task.load_dataset("valid")
    return name, criterion, model.eval(), task


def losses_of(name: str, criterion: Any, model: Any, sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The criterion's own loss and the adaptor's per-sample losses."""
    with recorded_outputs(model) as outputs:
        loss, _, _ = criterion(model, sample)
    return loss, adaptor_of(name)(criterion, model, sample, *outputs)


@pytest.mark.parametrize("batch", [1, 9])
def test_losses_are_those_of_the_samples(trained: Any, batch: int) -> None:
    name, criterion, model, task = trained
    dataset = task.dataset("valid")
    items = [dataset[index] for index in range(batch)]
    loss, losses = losses_of(name, criterion, model, dataset.collater(items))
    assert losses.shape == (batch,)
    torch.testing.assert_close(losses.sum(), loss, rtol=1e-5, atol=1e-6)
    alone = torch.stack(losses_in_order(name, criterion, model, dataset, items))
    torch.testing.assert_close(losses.sort().values, alone.sort().values, rtol=1e-4, atol=1e-6)


def losses_in_order(name: str, criterion: Any, model: Any, dataset: Any, items: list[Any]) -> list[torch.Tensor]:
    """The loss of every item in a batch of its own (the collater of a full batch may sort by length)."""
    return [losses_of(name, criterion, model, dataset.collater([item]))[0].detach() for item in items]


def test_recording_leaves_nothing_behind(trained: Any) -> None:
    _, _, model, _ = trained
    with pytest.raises(KeyboardInterrupt), recorded_outputs(model):
        raise KeyboardInterrupt
    assert not model._forward_hooks
