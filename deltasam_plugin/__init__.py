"""Sharpness-aware minimization with dynamic reweighting (δ-SAM) for fairseq and for plain PyTorch."""

from importlib.util import find_spec

from deltasam_plugin.batch.weighting import weighting
from deltasam_plugin.fairseq import register
from deltasam_plugin.fairseq.criterions.registry import per_sample_losses
from deltasam_plugin.loss import Logits
from deltasam_plugin.optim import DeltaSAM
from deltasam_plugin.settings import Settings

if find_spec("fairseq") is not None:
    register()  # fairseq's --user-dir imports this file and nothing else

__all__ = ["DeltaSAM", "Logits", "Settings", "per_sample_losses", "weighting"]
__version__ = "0.1.0"
