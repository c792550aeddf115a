"""A BERT encoder as a fairseq RoBERTa: the same numbers under other names.

Three things differ. fairseq has its own special symbols, and they come first in its dictionary. It numbers positions
from padding_idx + 1. It has no embedding of the token type: that of type 0 is added to every position.
"""

from typing import Any

import torch
from torch import Tensor

SPECIAL = {"[CLS]": "<s>", "[PAD]": "<pad>", "[SEP]": "</s>", "[UNK]": "<unk>", "[MASK]": "<mask>"}
FIRST = ("[CLS]", "[PAD]", "[SEP]", "[UNK]")  # in the order of fairseq's dictionary; the task adds <mask> at the end
PADDING = FIRST.index("[PAD]")

# in a layer of BERT, and in a layer of fairseq
LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}


def ordered(vocabulary: dict[str, int]) -> list[str]:
    """Return BERT's pieces in the order of fairseq's dictionary.

    Args:
        vocabulary: the pieces with BERT's ids.
    """
    others = [piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if piece not in SPECIAL]
    return [*FIRST, *others, "[MASK]"]


def dictionary(vocabulary: dict[str, int]) -> str:
    """Return the text of fairseq's dict.txt. It lists all pieces but the special ones, which fairseq adds."""
    return "".join(f"{piece} 1\n" for piece in ordered(vocabulary) if piece not in SPECIAL)


def weights(bert: dict[str, Tensor], vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """Return the weights of fairseq's model.

    The pooler is left out: fairseq's classification head is new. The head that predicts masked words is not in BERT's
    encoder, and classification does not use it. fairseq expects its weights all the same; here they are zero.

    Args:
        bert: the weights of BERT's encoder under their names in Hugging Face's BertModel.
        vocabulary: the pieces with BERT's ids.
    """
    words = bert["embeddings.word_embeddings.weight"][[vocabulary[piece] for piece in ordered(vocabulary)]]
    positions = bert["embeddings.position_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
    width = words.size(1)
    converted = {
        "encoder.sentence_encoder.version": torch.tensor([3.0]),
        "encoder.sentence_encoder.embed_tokens.weight": words,
        "encoder.sentence_encoder.embed_positions.weight": torch.cat([torch.zeros(PADDING + 1, width), positions]),
        "encoder.lm_head.weight": words,  # fairseq shares it
        "encoder.lm_head.bias": torch.zeros(len(words)),
        "encoder.lm_head.dense.weight": torch.zeros(width, width),
        "encoder.lm_head.dense.bias": torch.zeros(width),
        "encoder.lm_head.layer_norm.weight": torch.zeros(width),
        "encoder.lm_head.layer_norm.bias": torch.zeros(width),
    }
    names = {"embeddings.LayerNorm": "layernorm_embedding"}
    for layer in range(sum(name.endswith("intermediate.dense.bias") for name in bert)):
        names |= {f"encoder.layer.{layer}.{old}": f"layers.{layer}.{new}" for old, new in LAYER.items()}
    for old, new in names.items():
        for kind in ("weight", "bias"):
            converted[f"encoder.sentence_encoder.{new}.{kind}"] = bert[f"{old}.{kind}"]
    return converted


def checkpoint(model: dict[str, Tensor]) -> dict[str, Any]:
    """Return weights as a checkpoint that fairseq-train takes as --restore-file. It holds no state of training."""
    return {
        "model": model,
        "args": None,
        "cfg": None,
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0},
        ],
        "last_optimizer_state": None,
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
