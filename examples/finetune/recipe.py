"""The runs of the example: their paths, and the options that they share."""

from pathlib import Path

from ..common.classification import OPTIMIZERS
from ..common.experiment import Experiment

HERE = Path(__file__).resolve().parent
USER_DIR = HERE / "minilm"  # the plugin, and the architecture
WORK = HERE / "work"
DATA = WORK / "data-bin"
MODEL = WORK / "minilm.pt"  # the pretrained model

OPTIONS = """
    --cpu --seed 1 --num-workers 0
    --task sentence_prediction --num-classes 2 --classification-head-name sentiment
    --init-token 0 --separator-token 2
    --arch minilm
    --dropout 0.1 --attention-dropout 0.1 --pooler-dropout 0.1
    --adam-betas (0.9,0.98) --weight-decay 0.01 --clip-norm 1.0 --batch-size 16
    --lr 1e-4 --lr-scheduler polynomial_decay --warmup-updates 31 --total-num-update 155 --max-update 155
    --validate-interval 5
    --no-epoch-checkpoints --log-format simple --log-interval 8
"""

SHARED = ["--user-dir", str(USER_DIR), "--finetune-from-model", str(MODEL), *OPTIONS.split()]
COMMANDS = {run: [str(DATA), *SHARED, *own.split()] for run, own in OPTIMIZERS.items()}
EXPERIMENT = Experiment(WORK, COMMANDS, timing_rounds=3)
