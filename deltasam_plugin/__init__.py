"""Sharpness-aware minimization with dynamic reweighting (δ-SAM) for fairseq and for plain PyTorch."""

from importlib.util import find_spec

from deltasam_plugin.optim import DeltaSAM
from deltasam_plugin.per_sample import per_sample_losses
from deltasam_plugin.settings import Settings

if find_spec("fairseq") is not None:
    # fairseq's --user-dir imports this file and nothing else: name every component here.
    from deltasam_plugin import adaptors, fairseq_criterion, fairseq_names, fairseq_optimizer  # noqa: F401
    from deltasam_plugin.checkpoints import allow_fairseq_checkpoints

    allow_fairseq_checkpoints()

__all__ = ["DeltaSAM", "Settings", "per_sample_losses"]
__version__ = "0.1.0"
