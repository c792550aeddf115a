"""examples/finetune: BERT's weights become fairseq's, number by number, and fairseq-train fine-tunes them.

The model and the sentences are the real ones. They are fetched into the example's work folder, and stay there.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, MODEL_REGISTRY
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask
from transformers import BertConfig, BertModel, BertTokenizer

from examples.common import reviews
from examples.common.evaluation import accuracy_and_loss, load
from examples.finetune import convert, prepare
from examples.finetune.recipe import EXPERIMENT, USER_DIR, WORK
from tests.helpers.runs import fairseq_train

SENTENCES = [
    "bad",
    "A warm , funny and engaging film .",
    "It's -- without any doubt -- the worst film I've seen: unwatchably pretentious, and 2 hours too long!",
    "Amélie, zażółć \N{EM DASH} 電影 \N{GRINNING FACE} of [UNK] ﬁlms",
]
RESET = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's data with fewer sentences."""
    WORK.mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("finetune") / "data-bin"
    prepare.write_data(folder, count=16)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model."""
    file = tmp_path_factory.mktemp("pretrained") / "minilm.pt"
    prepare.write_model(file)
    return file


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    """The tokenizer of transformers that is written in Python."""
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_bytes(prepare.member("vocab.txt"))
    return BertTokenizer(str(vocabulary))


def test_hidden_states_are_those_of_transformers(data: Path, pretrained: Path, bert_tokenizer: BertTokenizer) -> None:
    """Sentences of different lengths in one batch, padded."""
    dictionary = Dictionary.load(str(data / "input0" / "dict.txt"))
    dictionary.add_symbol("<mask>")
    utils.import_user_module(Namespace(user_dir=str(USER_DIR)))
    options = Namespace(max_positions=512)
    ARCH_CONFIG_REGISTRY["minilm"](options)
    model = MODEL_REGISTRY["minilm"].build_model(options, Namespace(source_dictionary=dictionary)).eval()
    model.load_state_dict(torch.load(pretrained)["model"], strict=True)

    bert = BertModel(BertConfig(**json.loads(prepare.member("config.json")))).eval()
    loaded = bert.load_state_dict(safetensors.torch.load(prepare.member("model.safetensors")), strict=False)
    assert not loaded.missing_keys

    batch = bert_tokenizer(SENTENCES, padding=True, return_tensors="pt")
    pieces = [bert_tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"]]
    tokens = torch.tensor([[dictionary.index(convert.SPECIAL.get(piece, piece)) for piece in row] for row in pieces])
    with torch.no_grad():
        expected = bert(**batch, output_hidden_states=True).hidden_states
        _, extra = model(tokens, features_only=True, return_all_hiddens=True)
    states = [state.transpose(0, 1) for state in extra["inner_states"]]
    assert len(states) == len(expected) == 7
    words = batch["attention_mask"].bool()
    assert not words.all()
    for state, other in zip(states, expected):
        torch.testing.assert_close(state[words], other[words], atol=1e-5, rtol=0)


def sentence_prediction(data: Path) -> SentencePredictionTask:
    own = {"init_token": 0, "separator_token": 2, "num_classes": 2, "regression_target": False, "seed": 1}
    return SentencePredictionTask.setup_task(SentencePredictionConfig(data=str(data), **own))


def test_binary_data_are_the_ids_of_transformers(data: Path, bert_tokenizer: BertTokenizer) -> None:
    vocabulary = bert_tokenizer.get_vocab()
    ids = torch.tensor([vocabulary[piece] for piece in convert.ordered(vocabulary)])  # BERT's, by fairseq's
    assert sorted(ids.tolist()) == list(range(len(ids)))
    task = sentence_prediction(data)
    task.load_dataset("valid")
    found = {tuple(ids[task.dataset("valid")[i]["net_input.src_tokens"]].tolist()) for i in range(300)}
    sentences = [sentence for sentence, _ in reviews.parts(WORK)["valid"]]
    expected = {tuple(bert_tokenizer(sentence, truncation=True, max_length=64)["input_ids"]) for sentence in sentences}
    assert found <= expected
    assert len(found) > 290


def test_pieces_are_those_of_transformers(bert_tokenizer: BertTokenizer) -> None:
    own = prepare.tokenizer()
    sentences = [sentence for sentence, _ in reviews.parts(WORK)["test"]] + SENTENCES
    assert max(len(own.encode(sentence).tokens) for sentence in sentences) > prepare.PIECES + 2
    for sentence in sentences:
        expected = [convert.SPECIAL.get(piece, piece) for piece in bert_tokenizer.tokenize(sentence)]
        assert prepare.pieces(own, sentence) == expected[: prepare.PIECES]


@pytest.mark.parametrize("run", ["delta_sam", "instance"])
def test_fine_tuning_learns(data: Path, pretrained: Path, tmp_path: Path, run: str) -> None:
    """A few updates by fairseq-train from the pretrained model; then it classifies their sentences."""
    _, *options = EXPERIMENT.commands[run]
    options[options.index("--finetune-from-model") + 1] = pretrained
    if run == "instance":  # the options that README calls the same
        options[options.index("--finetune-from-model")] = "--restore-file"
        options += RESET
    short = ["--max-update", 6, "--total-num-update", 12, "--warmup-updates", 1, "--lr", 3e-4, "--disable-validation"]
    config = fairseq_train(data, tmp_path, *options, *short, "--no-save-optimizer-state")["cfg"]
    assert config["optimizer"]["sam_perturbation"] == ("instance" if run == "instance" else "batch")
    model, task = load(tmp_path / "checkpoint_last.pt", data)
    task.load_dataset("train")
    accuracy, loss = accuracy_and_loss(model, task.dataset("train"))
    assert accuracy > 85
    assert loss < 0.7  # it begins at 1
