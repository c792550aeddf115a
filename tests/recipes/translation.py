"""fairseq's recipes for translation, summarization and stories."""

from __future__ import annotations

from tests.recipes.recipe import TRAINS, Recipe, transformer

SIZES = transformer("encoder", "decoder")
PAIR = " --source-lang src --target-lang tgt"
CONVOLUTIONS = "--encoder-embed-dim 16 --encoder-layers '[(16, 3)] * 2' --decoder-embed-dim 16 --decoder-layers "
CONVOLUTIONS += "'[(16, 3)] * 2' --decoder-out-embed-dim 16"
KERNELS = " --encoder-kernel-size-list '[3, 5]' --decoder-kernel-size-list '[3, 5]'"
GENERATE = "generate --gen-subset valid --beam 2 --max-len-b 12 --batch-size 24"
EXPERTS = " --task translation_moe --method hMoElp --mean-pool-gating-network --num-experts 3 --gen-expert 0"
UNCOVERED = "does not cover .* of the weights"
REWRITTEN = (
    r"Invalid quant_noise_pq=0\.\d+ \(--quant-noise-pq\) with --sam-perturbation instance: the forward pass rewrites"
)
AVERAGED = "Criterion 'nat_loss' with a model that returns 'word_crf' already averaged over the batch .* Use another"
LATENT = (
    "multilingual_translation_latent_depth.*it adds loss terms outside the criterion, where δ-SAM does not see them"
)
STEP = r"Task 'translation_moe' takes an optimizer step without a sharpness-aware gradient: .* train without δ-SAM"

TRANSLATION = [
    Recipe(
        "Transformer, IWSLT'14, BLEU",
        "examples/translation/README.md",
        "aligned",
        SIZES + " --eval-bleu-detok space",
        "--arch transformer_iwslt_de_en",
        then=GENERATE,
    ),
    Recipe(
        "Transformer, WMT'16, half precision",
        "examples/scaling_nmt/README.md",
        "aligned",
        SIZES + " --fp16-no-flatten-grads --fp16-init-scale 4",
        then=GENERATE,
        without=(),
        resumes=False,
    ),
    Recipe(
        "fconv, WMT'17",
        "examples/translation/README.md",
        "aligned",
        CONVOLUTIONS,
        "--arch fconv_wmt_en_de",
        instance=UNCOVERED,
        then=GENERATE,
    ),
    Recipe(
        "LightConv, IWSLT'14",
        "examples/pay_less_attention_paper/README.md",
        "aligned",
        SIZES + PAIR + KERNELS + " --encoder-conv-type lightweight --decoder-conv-type lightweight",
        "-a lightconv_iwslt_de_en",
        then=GENERATE,
    ),
    Recipe(
        "DynamicConv, WMT'16",
        "examples/pay_less_attention_paper/README.md",
        "aligned",
        SIZES + KERNELS,
        "lightconv_wmt_en_de_big",
        then=GENERATE,
    ),
    Recipe(
        "multilingual Transformer, IWSLT'17",
        "examples/translation/README.md",
        "languages",
        SIZES,
        "multilingual_transformer",
        then=GENERATE + " --task multilingual_translation --lang-pairs de-en,fr-en --source-lang de --target-lang en",
    ),
    Recipe(
        "multilingual Transformer, sampled languages",
        "examples/multilingual/README.md",
        "languages",
        SIZES + " --lang-pairs de-en,fr-en --lang-dict {data}/languages.txt",
        then=GENERATE + " --task translation_multi_simple_epoch --lang-pairs de-en,fr-en --source-lang de "
        "--target-lang en --encoder-langtok src --decoder-langtok --lang-dict {data}/languages.txt",
    ),
    Recipe(
        "latent depth",
        "examples/latent_depth/README.md",
        "languages",
        SIZES + " --lang-pairs en-de,en-fr --arch latent_multilingual_transformer",
        batch=LATENT,
    ),
    Recipe(
        "joint alignment, WMT'18",
        "examples/joint_alignment_translation/README.md",
        "aligned",
        SIZES + " --alignment-layer 1",
        then=GENERATE + " --print-alignment",
    ),
    Recipe(
        "mixture of experts",
        "examples/translation_moe/README.md",
        "aligned",
        SIZES,
        batch=STEP,
        then=GENERATE + EXPERTS,
    ),
    Recipe(
        "back-translation, WMT'18",
        "examples/backtranslation/README.md",
        "aligned",
        SIZES + PAIR + " --upsample-primary 2",
        "--upsample-primary",
        then=GENERATE,
        slow=True,
    ),
    Recipe(
        "mBART, finetuning",
        "examples/mbart/README.md",
        "aligned",
        SIZES + PAIR + " --task translation",  # translation_from_pretrained_bart does not run in fairseq 0.12
        then=GENERATE,
        without=("--langs",),
        slow=True,
    ),
    Recipe("BART, summarization", "examples/bart/README.summarization.md", "aligned", SIZES + PAIR, then=GENERATE),
    Recipe(
        "pointer-generator, XSum",
        "examples/pointer_generator/README.xsum.md",
        "aligned",
        SIZES + " --alignment-layer -1 --source-position-markers 0",
        then=GENERATE,
    ),
    Recipe(
        "fconv with self-attention, stories",
        "examples/stories/README.md",
        "aligned",
        CONVOLUTIONS + PAIR + " --self-attention '[True, False]' --gated-attention True",
        instance=UNCOVERED,
        then=GENERATE,
    ),
    *(
        Recipe(
            f"non-autoregressive, {name}",
            "examples/nonautoregressive_translation/scripts.md",
            "aligned",
            SIZES + (" --crf-lowrank-approx 8 --crf-beam-approx 8" if arch == "nacrf_transformer" else ""),
            f"--arch {arch}",
            batch=AVERAGED if arch == "nacrf_transformer" else TRAINS,
            then="generate --gen-subset valid --task translation_lev --iter-decode-max-iter 2 --beam 1 --batch-size 24",
            slow=name in ("iterative", "CMLM"),
        )
        for name, arch in {
            "NAT": "nonautoregressive_transformer",
            "NAT with CRF": "nacrf_transformer",
            "iterative": "iterative_nonautoregressive_transformer",
            "insertion": "insertion_transformer",
            "CMLM": "cmlm_transformer",
            "Levenshtein": "levenshtein_transformer",
        }.items()
    ),
]
