"""The runs of the example: their paths, the options they share and the options in which they differ."""

from pathlib import Path

from ..common.experiment import Experiment, delta_sam

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parents[1] / "deltasam_plugin"  # what --user-dir names
WORK = HERE / "work"
DATA = WORK / "data-bin"

UPDATES = 6000

OPTIONS = f"""
    --cpu --seed 1 --num-workers 0
    --task translation --source-lang source --target-lang target
    --arch transformer --encoder-layers 3 --decoder-layers 3 --share-all-embeddings
    --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 --encoder-attention-heads 4
    --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 --decoder-attention-heads 4
    --encoder-normalize-before --decoder-normalize-before
    --dropout 0.1 --label-smoothing 0.1 --adam-betas (0.9,0.98) --clip-norm 1.0 --max-tokens 512
    --lr 2e-3 --lr-scheduler polynomial_decay --warmup-updates 500 --total-num-update {UPDATES} --max-update {UPDATES}
    --save-interval-updates 1000 --keep-interval-updates 1 --no-epoch-checkpoints --log-format simple --log-interval 50
"""

BASE = "label_smoothed_cross_entropy"
DELTA_SAM = delta_sam(BASE)

OPTIMIZERS = {
    "adam": f"--optimizer adam --criterion {BASE}",
    "sam": f"{DELTA_SAM} --sam-weighting uniform",
    "delta_sam": f"{DELTA_SAM} --sam-weighting curvature",
}

SHARED = ["--user-dir", str(PLUGIN), *OPTIONS.split()]
EXPERIMENT = Experiment(WORK, {run: [str(DATA), *SHARED, *own.split()] for run, own in OPTIMIZERS.items()})
