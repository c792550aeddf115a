"""Exact per-instance perturbation at the price of SAM: every sample at its own worst-case weights, in two passes."""

from deltasam_plugin.instance.engine import InstanceEngine
from deltasam_plugin.instance.gradients import PerSamplePerturbation
from deltasam_plugin.instance.perturbation import InstancePerturbation
from deltasam_plugin.instance.recording import Tape

__all__ = ["InstanceEngine", "InstancePerturbation", "PerSamplePerturbation", "Tape"]
