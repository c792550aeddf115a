"""Every per-sample loss function against its criterion: the sum over the samples, and each sample alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.registry import REGISTRIES
from hypothesis import given
from hypothesis import strategies as st

from deltasam_plugin.batch.measures import logit_change
from deltasam_plugin.fairseq.criterions.registry import (
    CALLS,
    LOGITS,
    PER_SAMPLE_LOSSES,
    REFUSED,
    check,
    logits_of,
    objective_of,
    per_sample_losses,
    per_sample_losses_of,
    recorded_outputs,
)
from deltasam_plugin.fairseq.criterions.tokens import positions
from deltasam_plugin.loss import Logits
from tests.helpers.corpora import CORPORA, RECIPES, W2V, Recipe, corpus
from tests.helpers.registries import BUILT_IN_LOSSES
from tests.helpers.runs import SMOOTHED, TRANSLATION, base

ORACLES: dict[str, Recipe] = {
    **{name: recipe for name, recipe in RECIPES.items() if name != "batch norm"},  # which mixes samples
    "prefix": Recipe(
        SMOOTHED,
        "aligned",
        [*TRANSLATION, "--label-smoothing", 0.1, "--ignore-prefix-size", 1, "--report-accuracy"],
    ),
    "wav2vec balanced": Recipe("wav2vec", "audio", [*W2V, "--balanced-classes", "--prediction-steps", 12]),
}
# In a batch of its own a sample has other negatives, no padding, or a whole mean to itself.
COMPANY = ("nat_loss", "with_ctc", "ctc", "wav2vec", "hubert")
INDEPENDENT = [name for name in ORACLES if not name.startswith(COMPANY)]


@pytest.fixture(autouse=True)
def _reproducible_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq's audio models draw their masks from generators without a seed."""
    fresh = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: fresh(7 if seed is None else seed))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Criterion, model and task of a recipe, by name."""
    built: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in built:
            recipe = ORACLES[name]
            data = corpus(recipe.corpus, tmp_path_factory.getbasetemp())
            command = [data, *recipe.command(data), *base(recipe.criterion), "--cpu"]
            arguments = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in command])
            cfg = convert_namespace_to_omegaconf(arguments)
            torch.manual_seed(1)
            task = tasks.setup_task(cfg.task)
            model = task.build_model(cfg.model)
            criterion = task.build_criterion(cfg.criterion)
            with torch.no_grad():  # fresh biases are zero, and fresh heads say the same of all samples
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            task.load_dataset("train")
            built[name] = criterion, model, task
        return built[name]

    return build


def batch_of(task: Any, count: int) -> Any:
    """The first `count` samples as a batch, with what the task adds to a batch."""
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[index] for index in range(count)])
    if hasattr(task, "inject_noise"):
        torch.manual_seed(3)
        sample["prev_target"] = task.inject_noise(sample["target"])
    return sample


def losses_of(name: str, criterion: Any, model: Any, sample: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The criterion's own loss, the per-sample losses, and the shared part."""
    sample = copy.deepcopy(sample)  # some criterions write to it
    torch.manual_seed(5)
    np.random.seed(5)
    with recorded_outputs(model, name) as outputs:
        loss, _, _ = criterion(model, sample)
    state = torch.get_rng_state()
    objective = objective_of(loss, per_sample_losses_of(name)(criterion, model, sample, *outputs))
    assert torch.equal(state, torch.get_rng_state())  # per-sample loss functions draw no random numbers
    return objective.loss, objective.losses, objective.shared


def disturbed(sample: Any, index: int) -> Any:
    """The batch with another input in one sample, of the same shape."""
    sample = copy.deepcopy(sample)
    for key in ("net_input", "net_input1"):
        for name in ("source", "src_tokens"):
            tensor = sample.get(key, {}).get(name)
            if tensor is None:
                continue
            row = tensor[index]
            tensor[index] = row.flip(0) * 0.5 if row.is_floating_point() else torch.where(row > 5, 5, row)
    return sample


@pytest.mark.parametrize("name", ORACLES)
def test_losses_sum_to_the_criterions(build: Callable[[str], Any], name: str) -> None:
    """In training, with dropout; and the gradient of the sum is the gradient of the criterion."""
    criterion, model, task = build(name)
    model.train(), criterion.train()
    for count in (1, 6):
        sample = batch_of(task, count)
        loss, losses, shared = losses_of(ORACLES[name].criterion, criterion, model, sample)
        assert losses.shape == (count,)
        total = losses.sum() if shared is None else losses.sum() + shared
        torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
        parameters = [p for p in model.parameters() if p.requires_grad]
        ours = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert [p is None for p in ours] == [p is None for p in theirs]
        for one, other in zip(ours, theirs):
            if one is not None and other is not None:
                scale = max(1.0, other.abs().max().item())
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ORACLES)
def test_losses_depend_on_their_own_sample(build: Callable[[str], Any], name: str) -> None:
    """Under the same random numbers, another input in one sample changes the loss of that sample only."""
    criterion, model, task = build(name)
    model.train(), criterion.train()
    sample = batch_of(task, 6)
    _, before, _ = losses_of(ORACLES[name].criterion, criterion, model, sample)
    for index in (0, 3, 5):
        _, after, _ = losses_of(ORACLES[name].criterion, criterion, model, disturbed(sample, index))
        changed = ~torch.isclose(before, after, rtol=1e-5, atol=1e-6)
        assert changed.nonzero().flatten().tolist() == [index]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_losses_are_those_of_the_samples_alone(build: Callable[[str], Any], name: str) -> None:
    """Without dropout, the loss of a sample is the criterion's loss of a batch of one."""
    criterion, model, task = build(name)
    model.eval(), criterion.eval()
    _, losses, _ = losses_of(ORACLES[name].criterion, criterion, model, batch_of(task, 9))
    dataset = task.dataset("train")
    alone = []
    for index in range(9):
        loss, _, shared = losses_of(ORACLES[name].criterion, criterion, model, dataset.collater([dataset[index]]))
        alone.append(loss.detach() if shared is None else (loss - shared).detach())
    # The collater of a full batch may sort by length.
    torch.testing.assert_close(losses.sort().values, torch.stack(alone).sort().values, rtol=1e-4, atol=1e-5)


def logits_in(name: str, criterion: Any, model: Any, sample: Any) -> Logits:
    """The logits of a batch, of the batch's own size."""
    sample = copy.deepcopy(sample)
    with recorded_outputs(model, name) as outputs:
        criterion(model, sample)
    return logits_of(name, criterion, model, sample, *outputs)


def changes(name: str, criterion: Any, models: tuple[Any, Any], sample: Any) -> torch.Tensor:
    """How far the predictions of each sample are apart in two models."""
    center, moved = (logits_in(name, criterion, model, sample) for model in models)
    assert not center.values.requires_grad
    change, _ = logit_change(moved.values, center, sample["id"].numel())
    return change


WITH_LOGITS = [name for name in INDEPENDENT if ORACLES[name].criterion in LOGITS and "regression" not in name]


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_logits_are_those_of_the_samples_alone(build: Callable[[str], Any], name: str) -> None:
    """How far a sample's predictions move does not depend on padding, nor on the other samples."""
    criterion, model, task = build(name)
    if getattr(criterion, "regression_target", False):
        pytest.skip("predicts numbers")
    model.eval(), criterion.eval()
    moved = copy.deepcopy(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    together = changes(ORACLES[name].criterion, criterion, (model, moved), batch_of(task, 9))
    dataset = task.dataset("train")
    alone = [
        changes(ORACLES[name].criterion, criterion, (model, moved), dataset.collater([dataset[index]]))
        for index in range(9)
    ]
    assert (together > 0).all()
    # The collater of a full batch may sort by length.
    torch.testing.assert_close(together.sort().values, torch.cat(alone).sort().values, rtol=1e-3, atol=1e-6)


def test_every_criterion_with_logits_is_tested_with_them() -> None:
    tested = {ORACLES[name].criterion for name in WITH_LOGITS}
    assert {name for name in LOGITS if "rdrop" not in name and name in PER_SAMPLE_LOSSES} <= tested | {"cross_entropy"}


def test_a_prefix_that_is_ignored_has_no_logits(build: Callable[[str], Any]) -> None:
    criterion, model, task = build("prefix")
    model.eval(), criterion.eval()
    sample = batch_of(task, 6)
    counted = logits_in(SMOOTHED, criterion, model, sample).counted
    assert counted is not None
    expected = sample["target"].ne(criterion.padding_idx)
    expected[:, 0] = False
    assert torch.equal(counted.view_as(expected), expected)


@pytest.mark.parametrize("name", [name for name in ORACLES if "rdrop" in name])
def test_both_dropout_masks_of_a_sample_count(build: Callable[[str], Any], name: str) -> None:
    criterion, model, task = build(name)
    model.train(), criterion.train()
    sample = batch_of(task, 6)
    logits = logits_in(ORACLES[name].criterion, criterion, model, sample)
    lengths = sample["target"].ne(criterion.padding_idx).sum(1) - criterion.ignore_prefix_size
    assert logits.counted is not None
    passes = 2 if criterion.rdrop_alpha > 0 else 1
    assert torch.equal(torch.bincount(logits.samples[logits.counted]), passes * lengths)


@pytest.mark.parametrize(
    ("name", "condition"), [("ctc", ""), ("mine", ""), ("sentence_prediction", ", as it is set up,")]
)
def test_what_gives_no_logits_is_refused_for_weightings_that_compare_them(name: str, condition: str) -> None:
    message = f"Criterion {name!r} (--base-criterion){condition} gives no logits, and the weighting"
    with pytest.raises(ValueError, match=re.escape(message)):
        logits_of(name, SimpleNamespace(regression_target=True), None, {}, None)


def test_sample_without_masked_tokens(build: Callable[[str], Any]) -> None:
    """Its loss is zero. If no sample has masked tokens, the model predicts all tokens, and every loss is zero."""
    criterion, model, task = build("masked_lm")
    sample = batch_of(task, 4)
    sample["target"][1] = task.source_dictionary.pad()
    loss, losses, _ = losses_of("masked_lm", criterion, model, sample)
    assert losses[1] == 0
    assert (losses[[0, 2, 3]] > 0).all()
    torch.testing.assert_close(losses.sum(), loss)
    sample["target"][:] = task.source_dictionary.pad()
    loss, losses, _ = losses_of("masked_lm", criterion, model, sample)
    assert losses.tolist() == [0, 0, 0, 0]
    assert loss == 0


def test_batch_without_alignments(build: Callable[[str], Any]) -> None:
    criterion, model, task = build("alignment")
    sample = batch_of(task, 4)
    del sample["alignments"]
    loss, losses, _ = losses_of("label_smoothed_cross_entropy_with_alignment", criterion, model, sample)
    torch.testing.assert_close(losses.sum(), loss)


def test_masks_of_unequal_size(build: Callable[[str], Any]) -> None:
    """wav2vec 2.0 reshapes its masked frames to (B, M), so a row may hold frames of two samples."""
    criterion, model, task = build("wav2vec 2.0")
    model.train()
    sample = batch_of(task, 3)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, 2:6] = mask[1, 3:13] = mask[2, 5:9] = True
    frames = model(**sample["net_input"], mask=False, features_only=True)["x"].size(1)
    sample["net_input"]["mask_indices"] = torch.nn.functional.pad(mask, (0, frames - 20))
    losses = losses_of("wav2vec", criterion, model, sample)[1]
    assert losses[1] > 1.5 * losses[0]
    assert losses[1] > 1.5 * losses[2]


class Frames(torch.nn.Module):
    """A CTC model that is given its predictions."""

    def forward(self, lprobs: torch.Tensor, padding_mask: torch.Tensor | None, **lengths: torch.Tensor) -> Any:
        return {"lprobs": lprobs, "padding_mask": padding_mask}

    def get_normalized_probs(self, net_output: Any, log_probs: bool) -> torch.Tensor:
        return net_output["lprobs"]


@pytest.mark.parametrize("given", ["src_lengths", "padding_mask", "nothing"])
def test_ctc_reads_the_lengths_where_the_criterion_does(build: Callable[[str], Any], given: str) -> None:
    criterion, _, _ = build("ctc")
    lengths = torch.tensor([9, 12, 7])
    net_input = {"lprobs": torch.randn(12, 3, len(criterion.task.target_dictionary)).log_softmax(-1)}
    net_input["padding_mask"] = torch.arange(12) >= lengths[:, None] if given == "padding_mask" else None
    if given == "src_lengths":
        net_input["src_lengths"] = lengths
    sample = {"net_input": net_input, "target": torch.tensor([[5, 6, 7], [8, 9, 1], [5, 1, 1]]), "id": torch.arange(3)}
    loss, losses, _ = losses_of("ctc", criterion, Frames(), sample)
    torch.testing.assert_close(losses.sum(), loss)
    if given != "nothing":
        sample["net_input"]["lprobs"][9:, 0] = -50.0  # beyond its length, which no loss may see
        torch.testing.assert_close(losses_of("ctc", criterion, Frames(), sample)[1], losses)


REFUSALS: dict[str, tuple[str, Any, str]] = {
    "predictions": (
        "sentence_ranking",
        (SimpleNamespace(prediction_h=SimpleNamespace(name="out.txt")), None, {}, None),
        "Invalid save_predictions='out.txt' (--save-predictions): in training every pass",
    ),
    "averaged": (
        "nat_loss",
        (None, SimpleNamespace(), {"target": torch.ones(2, 3)}, {"word_crf": {"loss": torch.ones(())}}),
        "Criterion 'nat_loss' with a model that returns 'word_crf' already averaged over the batch",
    ),
    "resolutions": (
        "hubert",
        (None, SimpleNamespace(downsample_modules=[]), {}, (None, torch.ones(2, 3)), {"padding_mask": None}),
        "Criterion 'hubert' with the model SimpleNamespace: it masks every resolution in another way",
    ),
    "unknown model": (
        "wav2vec",
        (
            None,
            SimpleNamespace(get_logits=lambda output: torch.ones(3), get_targets=lambda sample, output: None),
            {"net_input": {}},
            {"encoder_out": None},
        ),
        "Criterion 'wav2vec' with the model SimpleNamespace: its predictions cannot be assigned to samples",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_losses_that_cannot_be_split_into_samples_are_refused(case: str) -> None:
    name, arguments, message = REFUSALS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        per_sample_losses_of(name)(*arguments)


def test_every_criterion_has_per_sample_losses_or_a_reason() -> None:
    registry = REGISTRIES["criterion"]["registry"]
    registered = {name for name, criterion in registry.items() if criterion.__module__.startswith("fairseq.")}
    ours = BUILT_IN_LOSSES.keys()
    assert registered <= ours | REFUSED.keys()
    assert not ours & REFUSED.keys()
    if "label_smoothed_cross_entropy_with_rdrop" in registered:  # fairseq 0.12.2 has fewer
        assert registered == ours | REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"gives no per-sample losses: {REFUSED[name]}. Choose one of: ")):
        per_sample_losses_of(name)
    with pytest.raises(ValueError, match=re.escape(f"with @deltasam_plugin.per_sample_losses({name!r}).")):
        per_sample_losses_of(name)


def test_the_refusal_of_an_unknown_criterion_has_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"^Criterion 'mine' \(--base-criterion\) gives no per-sample losses\. Choose"):
        per_sample_losses_of("mine")


class Parts(torch.nn.Module):
    """A model with a part and a method that a criterion calls directly."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Identity()

    def forward(self, x: int) -> int:
        return x

    def probabilities(self, x: int) -> int:
        return 10 * x


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a criterion whose per-sample losses need more than the model's output."""
    for registry in (PER_SAMPLE_LOSSES, CALLS):
        monkeypatch.setitem(registry, "parts", None)
        del registry["parts"]
    per_sample_losses("parts", calls=["head", "probabilities", "decoder.softmax", "unused"])(lambda: None)
    return "parts"


def test_recording_in_the_order_of_the_calls(recording: str) -> None:
    model = Parts()
    with recorded_outputs(model, recording) as outputs:
        assert isinstance(model.head, torch.nn.Identity)
        model(1), model.head(2), model.probabilities(3), model(4)
    model(5), model.head(6), model.probabilities(7)
    assert outputs == [1, 2, 30, 4]


def test_recording_leaves_nothing_behind(recording: str) -> None:
    model = Parts()
    attributes = set(vars(model))
    with pytest.raises(KeyboardInterrupt), recorded_outputs(model, recording):
        raise KeyboardInterrupt
    assert not model._forward_hooks
    assert not model.head._forward_hooks
    assert set(vars(model)) == attributes


def test_recording_keeps_what_the_user_set(recording: str) -> None:
    model = Parts()
    model.probabilities = mine = lambda x: -x
    with recorded_outputs(model, recording) as outputs:
        model.probabilities(3)
    assert outputs == [-3]
    assert model.probabilities is mine


def test_check_sees_the_shared_part() -> None:
    loss, losses, shared = torch.tensor(9.0), torch.tensor([2.0, 3.0]), torch.tensor(4.0)
    check("mine", objective_of(loss, (losses, shared)), {})
    check("mine", objective_of(loss.view(1), (losses, shared)), {})
    with pytest.raises(
        RuntimeError, match="per-sample losses of criterion 'mine' sum to 5, but the criterion's own loss is 9"
    ):
        check("mine", objective_of(loss, losses), {})


def test_corpora_are_named_after_their_makers() -> None:
    assert {recipe.corpus for recipe in ORACLES.values()} == CORPORA.keys()


@given(st.lists(st.booleans(), max_size=12), st.sampled_from([(-1,), (-1, 1), (1, -1)]))
def test_positions_are_those_of_nonzero(values: list[bool], shape: tuple[int, ...]) -> None:
    mask = torch.tensor(values, dtype=torch.bool).view(shape if values else -1)
    assert torch.equal(positions(mask, int(mask.sum())), mask.flatten().nonzero().flatten())
