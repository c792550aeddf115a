"""fairseq's recipes for speech."""

from __future__ import annotations

from tests.recipes.language import REFUSED
from tests.recipes.recipe import Recipe, transformer
from tests.recipes.translation import UNCOVERED

SIZES = transformer("encoder", "decoder") + " --config-yaml config.yaml --train-subset train --valid-subset valid"
S2T = SIZES + " --conv-channels 32"
GENERATE = "generate --config-yaml config.yaml --gen-subset valid --task speech_to_text --beam 2 --max-len-b 12 "
GENERATE += "--max-tokens 50000"
SHARED = "Instance mode with a loss of which a part belongs to the batch and to no sample"
MIXED = "several samples' losses depend on the same rows"
LAYERS = "[(16, 10, 5), (16, 8, 4), (16, 4, 4), (16, 4, 4)]"  # one frame for every 320 samples
V1 = f"--conv-feature-layers '{LAYERS}' --conv-aggregator-layers '[(16, 2, 1), (16, 3, 1)]' --prediction-steps 3 "
V1 += "--num-negatives 3 --vq-vars 8"
LOGGED = """ --log-keys '["prob_perplexity","code_perplexity","temp"]'"""  # README quotes them in a way no shell reads
V2 = (
    f"'model.conv_feature_layers=\"{LAYERS}\"' model.encoder_layers=2 model.encoder_embed_dim=32 model.final_dim=16 "
    "model.encoder_ffn_embed_dim=64 model.encoder_attention_heads=2 model.conv_pos=8 model.conv_pos_groups=2 "
    "task.min_sample_size=100 "
)

SPEECH = [
    Recipe(
        "speech to text, MuST-C",
        "examples/speech_to_text/docs/mustc_example.md",
        "features",
        S2T,
        "config_asr.yaml",
        then=GENERATE,
    ),
    Recipe(
        "speech to text, LibriSpeech",
        "examples/speech_to_text/docs/librispeech_example.md",
        "features",
        S2T,
        then=GENERATE,
        slow=True,
    ),
    Recipe(
        "speech to text, CoVoST, frozen encoder",
        "examples/speech_to_text/docs/covost_example.md",
        "features",
        S2T,
        "--encoder-freezing-updates",
        then=GENERATE,
        without=("--fp16", "--attn-type", "--pos-enc-type", "--load-pretrained-encoder-from"),
    ),
    Recipe(
        "Conformer, CoVoST",
        "examples/speech_to_text/docs/covost_example.md",
        "features",
        S2T + " --arch s2t_conformer --pos-enc-type abs --input-feat-per-channel 8",
        "config_asr_en.yaml",
        instance=MIXED,
        then=GENERATE,
    ),
    Recipe(
        "speech to units",
        "examples/speech_to_speech/docs/direct_s2st_discrete_units.md",
        "features",
        SIZES,
        batch=REFUSED.format("speech_to_unit"),
        without=("--fp16", "--multitask-config-yaml"),
    ),
    Recipe(
        "wav2vec",
        "examples/wav2vec/README.md",
        "audio",
        V1.replace(" --vq-vars 8", ""),
        "--arch wav2vec --task",
        then="validate --batch-size 8 --task audio_pretraining",
        instance=UNCOVERED,
        resumes=False,
    ),
    Recipe(
        "vq-wav2vec",
        "examples/wav2vec/README.md",
        "audio",
        V1 + LOGGED,
        "--vq-type",
        then="validate --batch-size 8 --task audio_pretraining",
        instance=UNCOVERED,
        resumes=False,
        without=("--fp16", "--log-keys"),
    ),
    Recipe(
        "wav2vec 2.0, pretraining",
        "examples/wav2vec/config/pretraining/wav2vec2_base_librispeech.yaml",
        "audio",
        V2 + "model.mask_length=3 model.mask_prob=0.5 model.num_negatives=4 model.latent_vars=8",
        then="validate --batch-size 8 --task audio_pretraining",
        instance=SHARED,
        resumes=False,
    ),
    Recipe(
        "wav2vec 2.0, CTC",
        "examples/wav2vec/config/finetuning/base_100h.yaml",
        "audio",
        "model.w2v_path={data}/wav2vec2.pt model.mask_length=3 dataset.valid_subset=valid "
        "dataset.disable_validation=true model.mask_channel_length=8",
        instance=UNCOVERED,
        then="",
    ),
    Recipe(
        "HuBERT, pretraining",
        "examples/hubert/config/pretrain/hubert_base_librispeech.yaml",
        "audio",
        V2 + "task.label_dir={data} task.labels='[km]' model.label_rate=50 model.mask_length=3 "
        "hydra.sweep.dir=sweep distributed_training.distributed_world_size=1",
        then="validate --batch-size 8 --task hubert_pretraining --labels '[\"km\"]'",
        instance=SHARED,
        resumes=False,
    ),
]
