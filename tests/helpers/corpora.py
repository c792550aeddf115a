"""Small real data, from text to audio, and a training command for each criterion."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
from fairseq.criterions import CRITERION_REGISTRY
from fairseq_cli import preprocess

from tests.helpers.runs import (
    ADAM,
    SENTENCES,
    SMOOTHED,
    TRANSLATION,
    WORDS,
    base,
    fairseq_train,
    run,
    write_labels,
    write_translation,
)

RATE, FRAME = 16000, 320  # of the audio: samples per second, samples per frame label


def corpus(name: str, root: Path) -> Path:
    """The data folder of a corpus, made on first use.

    Args:
        name: one of CORPORA.
        root: where the corpora of this session are.
    """
    folder = root / f"corpus-{name}"
    if not folder.exists():
        folder.mkdir()
        CORPORA[name](folder)
    return folder / "data"


def aligned(folder: Path) -> None:
    """A toy translation corpus, with the alignment of its words."""
    for split, count, seed in (("train", 160, 0), ("valid", 24, 1)):
        write_translation(folder / split, count, seed)
        lines = (folder / f"{split}.src").read_text().splitlines()
        links = [" ".join(f"{i}-{i}" for i in range(len(line.split()))) for line in lines]
        (folder / f"{split}.align").write_text("\n".join(links) + "\n")
    prefixes = ["--trainpref", folder / "train", "--validpref", folder / "valid", "--align-suffix", "align"]
    languages = ["--source-lang", "src", "--target-lang", "tgt", "--joined-dictionary"]
    run(preprocess.cli_main, *languages, *prefixes, "--destdir", folder / "data")


def text(folder: Path) -> None:
    """Sentences alone, for masked language models."""
    for split, count, seed in (("train", 120, 2), ("valid", 24, 3)):
        write_labels(folder / split, count, seed)
    _binarize(folder, "txt", folder / "data")


def sentences(folder: Path) -> None:
    """Sentences with a class."""
    for split, count, seed in (("train", 120, 2), ("valid", 24, 3)):
        write_labels(folder / split, count, seed)
    _binarize(folder, "txt", folder / "data" / "input0")
    _binarize(folder, "class", folder / "data" / "label")


def scores(folder: Path) -> None:
    """Sentences with three numbers each."""
    for split, count, seed in (("train", 120, 2), ("valid", 24, 3)):
        write_labels(folder / split, count, seed)
        (folder / "data" / "label").mkdir(parents=True, exist_ok=True)
        numbers = map(float, (folder / f"{split}.score").read_text().split())
        lines = [f"{number} {1 - number} {number**2}\n" for number in numbers]
        (folder / "data" / "label" / f"{split}.label").write_text("".join(lines))
    _binarize(folder, "txt", folder / "data" / "input0")


def ranked(folder: Path) -> None:
    """Questions with one right and one wrong answer."""
    for split, count, seed in (("train", 96, 4), ("valid", 16, 5)):
        draw = random.Random(seed)
        rows = [[draw.choices(WORDS, k=draw.randint(3, 9)) for _ in range(3)] for _ in range(count)]
        for part in range(3):
            lines = [" ".join(row[part]) for row in rows]
            (folder / f"{split}.input{part}").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.label").write_text("".join(f"{int(len(a) > len(b))}\n" for _, a, b in rows))
    (folder / "data" / "label").mkdir(parents=True)
    dictionary: list[object] = []
    for part in ("input0", "input1", "input2"):
        _binarize(folder, part, folder / "data" / part, *dictionary)
        dictionary = ["--srcdict", folder / "data" / "input0" / "dict.txt"]
    for split in ("train", "valid"):
        (folder / "data" / "label" / f"{split}.label").write_text((folder / f"{split}.label").read_text())


def _binarize(folder: Path, suffix: str, destination: Path, *options: object) -> None:
    for split in ("train", "valid"):
        (folder / f"{suffix}.{split}").write_text((folder / f"{split}.{suffix}").read_text())
    prefixes = ["--trainpref", folder / f"{suffix}.train", "--validpref", folder / f"{suffix}.valid"]
    run(preprocess.cli_main, "--only-source", *prefixes, "--destdir", destination, *options)


def _letters(draw: random.Random) -> str:
    return " ".join(" ".join(word) + " |" for word in draw.choices(WORDS, k=draw.randint(1, 2)))


def _write_letters(path: Path) -> None:
    path.write_text("".join(f"{letter} 1\n" for letter in "|abcdefghijklmnopqrstuvwxyz"))


def features(folder: Path) -> None:
    """Filter-bank features of eight channels, with transcripts by letters."""
    data = folder / "data"
    data.mkdir()
    (data / "config.yaml").write_text("vocab_filename: dict.txt\ninput_feat_per_channel: 8\ninput_channels: 1\n")
    _write_letters(data / "dict.txt")
    for split, count, seed in (("train", 48, 6), ("valid", 8, 7)):
        draw, noise = random.Random(seed), np.random.RandomState(seed)
        rows = ["id\taudio\tn_frames\ttgt_text\tspeaker"]
        for index in range(count):
            frames = draw.randint(80, 120)
            path = folder / f"{split}{index}.npy"
            np.save(path, noise.randn(frames, 8).astype(np.float32))
            rows.append(f"{split}{index}\t{path}\t{frames}\t{_letters(draw)}\tnobody")
        (data / f"{split}.tsv").write_text("\n".join(rows) + "\n")


def audio(folder: Path) -> None:
    """Tones in noise as wav files, with transcripts by letters and one unit for every 20 milliseconds."""
    data = folder / "data"
    data.mkdir()
    _write_letters(data / "dict.ltr.txt")
    (data / "dict.km.txt").write_text("".join(f"{unit} 1\n" for unit in range(6)))
    for split, count, seed in (("train", 48, 8), ("valid", 8, 9)):
        draw, noise = random.Random(seed), np.random.RandomState(seed)
        rows, letters, units = [str(folder)], [], []
        for index in range(count):
            size = FRAME * draw.randint(32, 44)
            wave = 0.1 * noise.randn(size) + np.sin(np.arange(size) * draw.uniform(0.05, 0.5))
            soundfile.write(folder / f"{split}{index}.wav", (0.5 * wave).astype(np.float32), RATE)
            rows.append(f"{split}{index}.wav\t{size}")
            letters.append(_letters(draw))
            units.append(" ".join(str(draw.randrange(6)) for _ in range(size // FRAME)))
        for suffix, lines in (("tsv", rows), ("ltr", letters), ("km", units)):
            (data / f"{split}.{suffix}").write_text("\n".join(lines) + "\n")
    fairseq_train(data, folder / "pretrained", *W2V2, *ADAM, *base("wav2vec"), updates=1)
    shutil.copy(folder / "pretrained" / "checkpoint_last.pt", data / "wav2vec2.pt")


CORPORA: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (aligned, text, sentences, scores, ranked, features, audio)
}


@dataclass(frozen=True)
class Recipe:
    """A training command for one criterion.

    Attributes:
        criterion: name in fairseq.
        corpus: name of its data.
        options: the command line. Paths are relative to the data folder.
    """

    criterion: str
    corpus: str
    options: Sequence[object]

    def command(self, data: Path, optimizer: Sequence[object] = ADAM) -> list[object]:
        """The options, for this data folder, and those of the optimizer."""
        return [data / option if isinstance(option, Path) else option for option in [*self.options, *optimizer]]


def small(*sides: str, layers: int = 1) -> list[object]:
    """Options for a tiny Transformer."""
    options: list[object] = []
    for side in sides:
        options += [f"--{side}-layers", layers, f"--{side}-embed-dim", 32, f"--{side}-ffn-embed-dim", 32]
        options += [f"--{side}-attention-heads", 2]
    return options


ADAPTIVE: list[object] = ["--adaptive-softmax-cutoff", "8,14", "--ddp-backend", "legacy_ddp"]
LSTM: list[object] = ["--task", "translation", "--arch", "lstm", "--dropout", 0.2]
LSTM += [f"--{part}" for side in ("encoder", "decoder") for part in (f"{side}-embed-dim=16", f"{side}-hidden-size=16")]
LSTM += ["--decoder-out-embed-dim", 16]
ALIGN: list[object] = ["--task", "translation", "--arch", "transformer_align", "--load-alignments", "--dropout", 0.2]
ALIGN += [*small("encoder", "decoder", layers=2), "--alignment-layer", 1, "--alignment-lambda", 0.5]
NAT: list[object] = [
    "--task",
    "translation_lev",
    "--dropout",
    0.2,
    *small("encoder", "decoder"),
    "--label-smoothing",
    0.1,
]
MASKED: list[object] = ["--task", "masked_lm", "--arch", "roberta", *small("encoder", layers=2), "--max-positions", 32]
MASKED += ["--tokens-per-sample", 24, "--sample-break-mode", "eos", "--mask-prob", 0.3]
HEAD: list[object] = ["--max-positions", 40, "--init-token", 0, "--separator-token", 2, "--num-classes", 2]
ADAPTERS: list[object] = ["--task", "sentence_prediction_adapters", "--arch", "xmod_base_13", *small("encoder"), *HEAD]
RANKING: list[object] = ["--task", "sentence_ranking", "--arch", "roberta", *small("encoder"), *HEAD]
S2T: list[object] = ["--task", "speech_to_text", "--arch", "s2t_transformer_xs", *small("encoder", "decoder")]
S2T += ["--conv-channels", 32, "--max-tokens", 1000, "--ctc-weight", 0.5, "--label-smoothing", 0.1]

CONFORMER: list[object] = ["--task", "speech_to_text", "--arch", "s2t_conformer", *small("encoder", "decoder")]
CONFORMER += ["--input-feat-per-channel", 8, "--conv-channels", 32]
CONFORMER += ["--max-tokens", 1000, "--dropout", 0.2]

CONVOLUTIONS = "[(16, 10, 5), (16, 8, 4), (16, 4, 4), (16, 4, 4)]"  # one frame for every 320 samples
AUDIO: list[object] = ["--sample-rate", RATE, "--max-tokens", 8 * 44 * FRAME, "--min-sample-size", 100]
MASKS: list[object] = [
    "--mask-length",
    3,
    "--mask-prob",
    0.5,
    "--final-dim",
    16,
    "--conv-pos",
    8,
    "--conv-pos-groups",
    2,
]
MASKS += [*small("encoder"), "--conv-feature-layers", CONVOLUTIONS]
W2V2: list[object] = ["--task", "audio_pretraining", "--arch", "wav2vec2", *AUDIO, *MASKS, "--enable-padding"]
W2V2 += ["--num-negatives", 4, "--quantize-targets", "--latent-vars", 8, "--infonce"]
W2V: list[object] = ["--task", "audio_pretraining", "--arch", "wav2vec", *AUDIO, "--num-negatives", 3]
W2V += ["--conv-feature-layers", CONVOLUTIONS, "--conv-aggregator-layers", "[(16, 2, 1), (16, 3, 1)]"]
W2V += ["--prediction-steps", 3, "--dropout", 0.2]
VQ: list[object] = ["--vq-type", "gumbel", "--vq-vars", 8, "--combine-groups", "--loss-weights", "[0.5]"]
HUBERT: list[object] = ["--task", "hubert_pretraining", "--arch", "hubert", *AUDIO, *MASKS, "--pad-audio"]
HUBERT += ["--labels", '["km"]', "--label-rate", RATE // FRAME, "--pred-nomask-weight", 0.5]
CTC: list[object] = ["--task", "audio_finetuning", "--arch", "wav2vec_ctc", "--labels", "ltr", *AUDIO]
CTC += ["--w2v-path", Path("wav2vec2.pt"), "--apply-mask", "--mask-prob", 0.4, "--mask-length", 2, "--zero-infinity"]

REGRESSION: list[object] = ["--regression-target", "--classification-head-name", "animals"]
RDROP = "label_smoothed_cross_entropy_with_rdrop"
RECIPES: dict[str, Recipe] = {
    "cross_entropy": Recipe("cross_entropy", "aligned", TRANSLATION),
    SMOOTHED: Recipe(SMOOTHED, "aligned", [*TRANSLATION, "--label-smoothing", 0.1]),
    "batch norm": Recipe(SMOOTHED, "features", CONFORMER),
    "adaptive_loss": Recipe("adaptive_loss", "aligned", [*TRANSLATION, *ADAPTIVE, "--adaptive-softmax-dropout", 0.3]),
    "adaptive_loss lstm": Recipe("adaptive_loss", "aligned", [*LSTM, *ADAPTIVE]),
    "masked_lm": Recipe("masked_lm", "text", MASKED),
    "alignment": Recipe("label_smoothed_cross_entropy_with_alignment", "aligned", [*ALIGN, "--label-smoothing", 0.1]),
    "rdrop": Recipe(RDROP, "aligned", [*TRANSLATION, "--label-smoothing", 0.1, "--rdrop-alpha", 3]),
    "rdrop zero": Recipe(RDROP, "aligned", [*TRANSLATION, "--ignore-prefix-size", 1, "--report-accuracy"]),
    "nat_loss": Recipe(
        "nat_loss",
        "aligned",
        [*NAT, "--arch", "nonautoregressive_transformer", "--length-loss-factor", 0.1, "--noise", "full_mask"],
    ),
    "nat_loss iterative": Recipe(
        "nat_loss",
        "aligned",
        [*NAT, "--arch", "iterative_nonautoregressive_transformer", "--train-step", 2, "--noise", "full_mask"],
    ),
    "nat_loss insertion": Recipe(
        "nat_loss", "aligned", [*NAT, "--arch", "insertion_transformer", "--noise", "random_delete"]
    ),
    "sentence_prediction": Recipe("sentence_prediction", "sentences", [*SENTENCES, "--num-classes", 2]),
    "regression": Recipe("sentence_prediction", "scores", [*SENTENCES, "--num-classes", 3, *REGRESSION]),
    "sentence_prediction_adapters": Recipe("sentence_prediction_adapters", "sentences", ADAPTERS),
    "regularized": Recipe(
        "sentence_prediction",
        "sentences",
        [*SENTENCES, "--num-classes", 2, "--mha-reg-scale-factor", 1e-3, "--ffn-reg-scale-factor", 2e-3],
    ),
    "sentence_ranking": Recipe("sentence_ranking", "ranked", RANKING),
    "with_ctc": Recipe("label_smoothed_cross_entropy_with_ctc", "features", S2T),
    "ctc": Recipe("ctc", "audio", CTC),
    "wav2vec 2.0": Recipe(
        "wav2vec", "audio", [*W2V2, "--loss-weights", "[0.1, 10.0]", "--log-keys", '["prob_perplexity"]']
    ),
    "wav2vec": Recipe("wav2vec", "audio", W2V),
    "wav2vec infonce": Recipe("wav2vec", "audio", [*W2V, "--infonce", *VQ]),
    "hubert": Recipe("hubert", "audio", [*HUBERT, "--loss-weights", "[10.0]"]),
}
if RDROP not in CRITERION_REGISTRY:  # fairseq 0.12.2
    del RECIPES["rdrop"], RECIPES["rdrop zero"]
if find_spec("fairseq.libnat") is None:  # a compiled part that not every distribution has
    del RECIPES["nat_loss insertion"]
