"""fairseq's recipes for language models, and for sentences."""

from __future__ import annotations

from tests.recipes.recipe import TRAINS, Recipe, transformer
from tests.recipes.translation import REWRITTEN, UNCOVERED

DECODER = transformer("decoder") + " --tokens-per-sample 16"
ENCODER = transformer("encoder")
ADAPTIVE = DECODER + " --decoder-input-dim 32 --decoder-output-dim 32 --adaptive-input-cutoff 8,14"
ADAPTIVE += " --adaptive-softmax-cutoff 8,14"
MASKED = ENCODER + " --tokens-per-sample 24 --max-positions 32"
PERPLEXITY = "eval_lm --gen-subset valid --batch-size 8"
PRETRAINED = " --restore-file {data}/../roberta.pt"
HALF = " --fp16-no-flatten-grads"
VALIDATE = "validate --batch-size 8 --task {} --criterion {}"
SPAN = "--n-layer 2 --d-model 32 --n-head 2 --d-inner 64 --attn-span 32 --tokens-per-sample 16"
BYTES = " --bpe gpt2 --gpt2-encoder-json {data}/encoder.json --gpt2-vocab-bpe {data}/vocab.bpe"
REFUSED = r"Criterion '{}' \(--base-criterion\) gives no per-sample losses"
MEMORY = "The forward pass cannot be replayed: .* memory between forward passes .* train this model without δ-SAM"

LANGUAGE = [
    Recipe(
        "Transformer language model", "examples/language_model/README.md", "text", DECODER, "--arch", then=PERPLEXITY
    ),
    Recipe(
        "adaptive inputs, WikiText-103",
        "examples/language_model/README.adaptive_inputs.md",
        "text",
        ADAPTIVE,
        then=PERPLEXITY,
    ),
    Recipe(
        "gated convolutions, WikiText-103",
        "examples/language_model/README.conv.md",
        "text",
        "--decoder-embed-dim 16 --decoder-layers '[(16, 3)] * 2' --adaptive-softmax-cutoff 8,14 --tokens-per-sample 16",
        instance=UNCOVERED,
        then=PERPLEXITY,
    ),
    Recipe(
        "quantization noise, language model",
        "examples/quant_noise/README.md",
        "text",
        ADAPTIVE + " --adaptive-input-factor 2 --adaptive-softmax-factor 2",
        "--quant-noise-pq 0.05",
        instance=REWRITTEN,
        then=PERPLEXITY,
    ),
    Recipe(
        "speech units, GSLM", "examples/textless_nlp/gslm/ulm/README.md", "text", DECODER, then=PERPLEXITY, slow=True
    ),
    Recipe(
        "adaptive span, enwik8",
        "examples/adaptive_span/README.md",
        "text",
        SPAN,
        "adaptive_span_loss",
        batch=REFUSED.format("adaptive_span_loss"),
    ),
    Recipe(
        "adaptive span, cross entropy",
        "examples/adaptive_span/README.md",
        "text",
        SPAN + " --criterion cross_entropy",
        "adaptive_span_loss",
        batch=MEMORY,
        without=("--fp16", "--aux-loss-scaler", "--criterion"),
    ),
    Recipe(
        "RoBERTa, pretraining",
        "examples/roberta/config/pretraining/base.yaml",
        "text",
        "model.encoder_layers=2 model.encoder_embed_dim=32 model.encoder_ffn_embed_dim=64 "
        "model.encoder_attention_heads=2 model.max_positions=32 task.tokens_per_sample=24",
        then="validate --batch-size 8 --task masked_lm",
    ),
    Recipe(
        "RoBERTa, pretraining with LayerDrop and quantization noise",
        "examples/quant_noise/README.md",
        "text",
        MASKED,
        "--arch roberta_base",
        instance=REWRITTEN,
        then="validate --batch-size 8 --task masked_lm",
    ),
    Recipe(
        "Linformer, pretraining",
        "examples/quant_noise/README.md",
        "text",
        MASKED + " --arch linformer_roberta_base --user-dir examples/linformer/linformer_src",
        "--arch roberta_base",
        without=("--fp16", "--quant-noise-pq", "--quant-noise-pq-block-size"),
        then="validate --batch-size 8 --task masked_lm",
    ),
]
SENTENCES = [
    Recipe(
        "RoBERTa, GLUE RTE, half precision",
        "examples/roberta/config/finetuning/rte.yaml",
        "sentences",
        "model.encoder_layers=2 model.encoder_embed_dim=32 model.encoder_ffn_embed_dim=64 "
        "model.encoder_attention_heads=2 common.fp16=true common.fp16_no_flatten_grads=true "
        "checkpoint.restore_file={data}/../roberta.pt",
        resumes=False,
        then=VALIDATE.format("sentence_prediction", "sentence_prediction"),
    ),
    Recipe(
        "RoBERTa, GLUE STS-B",
        "examples/roberta/config/finetuning/sts_b.yaml",
        "scores",
        "model.encoder_layers=2 model.encoder_embed_dim=32 model.encoder_ffn_embed_dim=64 "
        "model.encoder_attention_heads=2 checkpoint.restore_file={data}/../roberta.pt",
        then=VALIDATE.format("sentence_prediction", "sentence_prediction"),
    ),
    Recipe(
        "RoBERTa, IMDB, half precision",
        "examples/roberta/README.custom_classification.md",
        "sentences",
        ENCODER + HALF + PRETRAINED,
        without=(),
        resumes=False,
        then=VALIDATE.format("sentence_prediction", "sentence_prediction"),
    ),
    Recipe(
        "RoBERTa, RTE with quantization noise",
        "examples/quant_noise/README.md",
        "sentences",
        ENCODER,
        "--restore-file",
        instance=REWRITTEN,
        then=VALIDATE.format("sentence_prediction", "sentence_prediction"),
        slow=True,
    ),
    Recipe(
        "RoBERTa, RACE",
        "examples/roberta/README.race.md",
        "ranked",
        ENCODER + PRETRAINED + " --num-classes 2",
        then=VALIDATE.format("sentence_ranking", "sentence_ranking"),
    ),
    Recipe(
        "RoBERTa, CommonsenseQA",
        "examples/roberta/commonsense_qa/README.md",
        "commonsense",
        ENCODER + BYTES,
        without=("--fp16", "--no-last-checkpoints", "--no-save-optimizer-state"),
        then=VALIDATE.format("commonsense_qa", "sentence_ranking") + BYTES,
    ),
    Recipe(
        "RoBERTa, R3F",
        "examples/rxf/README.md",
        "sentences",
        ENCODER + PRETRAINED,
        batch=REFUSED.format("sentence_prediction_r3f"),
    ),
    Recipe(
        "X-MOD, NLI",
        "examples/xmod/README.md",
        "sentences",
        ENCODER + " --num-classes 2 --arch xmod_base_13",
        then=VALIDATE.format("sentence_prediction_adapters", "sentence_prediction_adapters"),
    ),
    Recipe(
        "BART, GLUE RTE",
        "examples/bart/README.glue.md",
        "sentences",
        transformer("encoder", "decoder"),
        batch=TRAINS,
        then=VALIDATE.format("sentence_prediction", "sentence_prediction"),
    ),
]
