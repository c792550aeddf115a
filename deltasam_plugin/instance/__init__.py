"""Exact per-instance perturbation at the price of SAM: every sample at its own worst-case weights, in two passes."""

from deltasam_plugin.instance.ascent import InstanceAscent
from deltasam_plugin.instance.engine import InstancePerturbation
from deltasam_plugin.instance.ledger import Correction
from deltasam_plugin.instance.tape import Tape

__all__ = ["Correction", "InstanceAscent", "InstancePerturbation", "Tape"]
