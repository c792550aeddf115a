"""Every criterion through the real fairseq-train: radius zero is the base run, every radius restores the weights."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.models.hubert import HubertModel
from fairseq.models.wav2vec import Wav2Vec2Model
from fairseq.trainer import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deltasam_plugin.loss import Statistics
from tests.end_to_end.test_invariants import logged
from tests.helpers.corpora import RECIPES, corpus
from tests.helpers.runs import (
    ADAM,
    INSTANCE,
    SMOOTHED,
    assert_batches_of_one_are_sam,
    assert_same_model,
    base,
    delta,
    distance,
    fairseq_train,
)

UNSEEDED = np.random.default_rng
SCALARS = {f"sam_{item.name}" for item in fields(Statistics)} - {"sam_ascent_gnorm_std"}
# ctc's validation needs the package editdistance.
QUICK: list[object] = ["--disable-validation", "--update-freq", 2, "--batch-size", 8]


pytestmark = pytest.mark.usefixtures("reproducible_masks")


@pytest.fixture
def train(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Train by a recipe, with further options, two updates of two batches."""

    def train(name: str, folder: str, *options: object, optimizer: Sequence[object] = ADAM) -> dict[str, Any]:
        recipe = RECIPES[name]
        data = corpus(recipe.corpus, tmp_path_factory.getbasetemp())
        return fairseq_train(data, tmp_path / folder, *QUICK, *recipe.command(data, optimizer), *options, updates=2)

    return train


@pytest.mark.parametrize("name", RECIPES)
def test_radius_zero_is_the_base_run(train: Callable[..., dict[str, Any]], name: str) -> None:
    """Bit for bit: weights, optimizer state and log, with dropout, accumulation and curvature probes."""
    one = train(name, "base", *base(RECIPES[name].criterion))
    other = train(name, "delta", *delta(RECIPES[name].criterion, rho=0))
    assert_same_model(one, other)
    assert logged(one) == logged(other)
    assert {"loss", "gnorm"} <= logged(one).keys()


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_restored(
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """With a learning rate of zero only the perturbation changes weights. All are restored, bit for bit."""
    corpus(RECIPES[name].corpus, tmp_path_factory.getbasetemp())  # some are made by training
    seen: list[dict[str, torch.Tensor]] = []
    train_step = Trainer.train_step

    def watched(trainer: Trainer, samples: Any, raise_oom: bool = False) -> Any:
        seen.append({key: p.detach().clone() for key, p in trainer.model.named_parameters()})
        return train_step(trainer, samples, raise_oom)

    monkeypatch.setattr(Trainer, "train_step", watched)
    options = ["--lr", 0, "--tensorboard-logdir", tmp_path / "logs"]
    final = train(name, "delta", *delta(RECIPES[name].criterion), *options)["model"]
    assert len(seen) == 2
    for key, weight in seen[0].items():
        assert torch.equal(weight, seen[1][key]), key
        assert torch.equal(weight, final[key]), key

    events = EventAccumulator(str(tmp_path / "logs" / "train_inner"))
    events.Reload()
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("sam_")} == SCALARS
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in SCALARS}
    assert values["sam_eps_norm"] == pytest.approx([0.05, 0.05], rel=1e-3)
    assert values["sam_skipped"] == [0, 0]
    assert all(0 < share <= 1 for share in values["sam_ess"])


SHARED = "Instance mode with a loss of which a part belongs to the batch and to no sample"
REFUSED_PER_INSTANCE = {
    "adaptive_loss lstm": "does not cover .* of the weights",
    "batch norm": "several samples' losses depend on the same rows",
    "ctc": "does not cover .* of the weights",
    "wav2vec": "does not cover .* of the weights",
    **dict.fromkeys(["regularized", "wav2vec 2.0", "wav2vec infonce", "hubert"], SHARED),
}


@pytest.mark.parametrize("name", RECIPES)
def test_instances_of_every_criterion(train: Callable[..., dict[str, Any]], name: str) -> None:
    """In instance mode a batch of one is SAM; or the criterion is refused with the reason."""
    options = [*delta(RECIPES[name].criterion, optimizer="sgd"), "--lr", 0.02]
    if name in REFUSED_PER_INSTANCE:
        with pytest.raises((RuntimeError, ValueError), match=REFUSED_PER_INSTANCE[name]):
            train(name, "instance", *options, *INSTANCE, optimizer=[])
        return
    options += ["--batch-size", 1, "--required-batch-size-multiple", 1]
    assert_batches_of_one_are_sam(lambda folder, *own: train(name, folder, *options, *own, optimizer=[]))


@pytest.mark.parametrize("name", [SMOOTHED, "masked_lm", "sentence_ranking", "alignment"])
def test_instances_of_a_batch_are_those_of_batches_of_one(train: Callable[..., dict[str, Any]], name: str) -> None:
    """Also in layers that see masked positions only."""
    options = [*delta(RECIPES[name].criterion, optimizer="sgd"), "--lr", 0.02, "--dropout", 0]
    options += ["--required-batch-size-multiple", 1, "--attention-dropout", 0]
    whole = {"--batch-size": 200, "--update-freq": 1}, {"--batch-size": 1, "--update-freq": 200}
    together, apart = (
        train(name, f"{i}", *options, *INSTANCE, *itertools.chain(*sizes.items()), optimizer=[])
        for i, sizes in enumerate(whole)
    )
    sam = train(name, "sam", *options, *itertools.chain(*whole[0].items()), optimizer=[])
    assert 100 * distance(together, apart) < distance(together, sam)


@pytest.mark.parametrize("name", ["wav2vec 2.0", "hubert"])
def test_passes_see_the_same_mask(
    train: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The masks come from generators without a seed. The four passes of a batch see one mask, two batches never do."""
    monkeypatch.setattr(np.random, "default_rng", UNSEEDED)
    model = HubertModel if name == "hubert" else Wav2Vec2Model
    masks: list[torch.Tensor] = []
    apply_mask = model.apply_mask

    def watched(*args: Any, **kwargs: Any) -> Any:
        x, mask = apply_mask(*args, **kwargs)
        masks.append(mask)
        return x, mask

    monkeypatch.setattr(model, "apply_mask", watched)
    train(name, "delta", *delta(RECIPES[name].criterion))
    drawn = iter(masks[-19:])  # before that, the corpus may have trained a model
    batches = [list(itertools.islice(drawn, passes)) for passes in (5, 5, 4, 5)]  # 1, 2 and 4 are checked
    for passes in batches:
        assert all(torch.equal(passes[0], mask) for mask in passes)
    for one, other in itertools.pairwise(batches):
        assert not torch.equal(one[0], other[0])
    assert np.random.default_rng is UNSEEDED


CRITERION = '''
"""A user directory with a criterion of its own."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig


@dataclass
class MyConfig(CrossEntropyCriterionConfig):
    my_temperature: float = field(default=1.0, metadata={"help": "divides the logits"})


@register_criterion("my_criterion", dataclass=MyConfig)
class MyCriterion(FairseqCriterion):
    def __init__(self, task, sentence_avg, my_temperature):
        super().__init__(task)
        self.sentence_avg, self.temperature = sentence_avg, my_temperature

    def token_losses(self, net_output, target):
        logits = net_output[0].transpose(1, 2) / self.temperature
        return F.cross_entropy(logits, target, ignore_index=self.padding_idx, reduction="none")

    def forward(self, model, sample, reduce=True):
        loss = self.token_losses(model(**sample["net_input"]), sample["target"]).sum()
        size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        log = {"loss": loss.data, "ntokens": sample["ntokens"], "nsentences": 1, "sample_size": size}
        return loss, size, log

    reduce_metrics = staticmethod(CrossEntropyCriterion.reduce_metrics)
    logging_outputs_can_be_summed = staticmethod(lambda: True)
'''

LOSSES = """

from deltasam_plugin import per_sample_losses  # after the criterion, whose options it collects


@per_sample_losses("my_criterion")
def my_criterion(criterion, model, sample, net_output):
    return criterion.token_losses(net_output, sample["target"]).sum(dim=1)
"""

TASK = """
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask


@register_task("my_task", dataclass=TranslationConfig)
class MyTask(TranslationTask):
    pass
"""

MODEL = """
from fairseq.models import register_model_architecture
from fairseq.models.transformer import tiny_architecture


@register_model_architecture("transformer", "my_architecture")
def my_architecture(args):
    args.decoder_layers = 1
    tiny_architecture(args)
"""


def user_directory(path: Path, files: dict[str, str]) -> Path:
    """A --user-dir with these files."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


def typed(data: Path, user_dir: Path, save_dir: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """fairseq-train as a user types it."""
    command = [Path(sys.executable).parent / "fairseq-train", data, "--user-dir", user_dir, "--save-dir", save_dir]
    command += ["--max-update", 2, "--batch-size", 16, "--cpu", "--lr", 0.01, "--log-interval", 1, *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PROJECT)}
    words = list(map(str, command))
    return subprocess.run(words, env=environment, cwd=user_dir.parent, capture_output=True, text=True, check=False)


PROJECT = Path(__file__).resolve().parents[2]
TEMPERED = ["--my-temperature", 1.5, "--disable-validation"]


def test_a_criterion_of_the_users_own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It has an option of its own and lives in the user's --user-dir, with a task and a model."""
    data = corpus("aligned", tmp_path_factory.getbasetemp())
    files = {"__init__.py": CRITERION + LOSSES, "tasks/mine.py": TASK, "models/mine.py": MODEL}
    user_dir = user_directory(tmp_path / "mine", files | {"tasks/__init__.py": "", "models/__init__.py": ""})
    options = ["--task", "my_task", "--arch", "my_architecture", *TEMPERED]
    checkpoints = {}
    for name, changed in {"base": base("my_criterion"), "zero": delta("my_criterion", rho=0)}.items():
        trained = typed(data, user_dir, tmp_path / name, *options, *changed)
        assert trained.returncode == 0, trained.stderr
        checkpoints[name] = torch.load(tmp_path / name / "checkpoint_last.pt")
    assert "sam_sharpness=0.0," in trained.stdout + trained.stderr
    assert checkpoints["zero"]["cfg"]["criterion"]["my_temperature"] == 1.5
    assert_same_model(checkpoints["base"], checkpoints["zero"])
    assert not any("decoder.layers.1" in name for name in checkpoints["zero"]["model"])


def test_a_user_directory_that_imports_the_plugin_first(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On the command line the order does not matter: options are collected when it is parsed."""
    data = corpus("aligned", tmp_path_factory.getbasetemp())
    user_dir = user_directory(tmp_path / "mine", {"__init__.py": "import deltasam_plugin\n" + CRITERION + LOSSES})
    options = ["--arch", "transformer_tiny", *TEMPERED, *delta("my_criterion")]
    trained = typed(data, user_dir, tmp_path / "checkpoints", *options)
    assert trained.returncode == 0, trained.stderr
    assert torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt")["cfg"]["criterion"]["my_temperature"] == 1.5


def test_a_criterion_without_per_sample_losses(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = corpus("aligned", tmp_path_factory.getbasetemp())
    user_dir = user_directory(tmp_path / "mine", {"__init__.py": CRITERION + "\nimport deltasam_plugin\n"})
    options = ["--arch", "transformer_tiny", *TEMPERED, *delta("my_criterion")]
    refused = typed(data, user_dir, tmp_path / "checkpoints", *options)
    assert refused.returncode == 1
    *_, message = refused.stderr.splitlines()
    assert message.startswith("deltasam_plugin: error: Criterion 'my_criterion' (--base-criterion) gives no per-sample")
    assert message.endswith("with @deltasam_plugin.per_sample_losses('my_criterion').")
    assert "Traceback" not in refused.stderr


def test_names_of_the_base_in_the_checkpoint(train: Callable[..., dict[str, Any]]) -> None:
    """Tasks and models that read the whole command line find the base there. So does fairseq without the plugin."""
    cfg = train("sentence_ranking", "ranking", *delta("sentence_ranking"))["cfg"]
    for section in ("task", "model"):
        assert (cfg[section].criterion, cfg[section].optimizer) == ("sentence_ranking", "adam")
    assert cfg["criterion"]["_name"] == "delta_sam"
