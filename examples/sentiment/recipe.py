"""The runs of the example: their paths, and the options that they share."""

from pathlib import Path

from ..common.classification import OPTIMIZERS
from ..common.experiment import Experiment

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parents[1] / "deltasam_plugin"  # what --user-dir names
WORK = HERE / "work"
DATA = WORK / "data-bin"

OPTIONS = """
    --cpu --seed 1 --num-workers 0
    --task sentence_prediction --num-classes 2 --classification-head-name sentiment
    --init-token 0 --separator-token 2 --max-positions 128
    --arch roberta --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 --encoder-attention-heads 4
    --dropout 0.3 --attention-dropout 0.1 --pooler-dropout 0.3
    --adam-betas (0.9,0.98) --weight-decay 0.01 --clip-norm 1.0 --batch-size 32
    --lr 5e-4 --lr-scheduler polynomial_decay --warmup-updates 100 --total-num-update 1060 --max-update 1060
    --no-epoch-checkpoints --log-format simple --log-interval 20
"""

SHARED = ["--user-dir", str(PLUGIN), *OPTIONS.split()]
EXPERIMENT = Experiment(WORK, {run: [str(DATA), *SHARED, *own.split()] for run, own in OPTIMIZERS.items()})
