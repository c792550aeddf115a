"""Ctrl-C at any moment leaves the weights as they were."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad_mode

import deltasam_plugin
from deltasam_plugin import DeltaSAM
from deltasam_plugin.hooks import _callbacks

PACKAGE = Path(deltasam_plugin.__file__).parent
OWN = "loss.py", "replay.py", "batch/displacement.py", "batch/restoration.py", "batch/norms.py", "batch/perturbation.py"
FILES = {contextlib.__file__, grad_mode.__file__, *(str(PACKAGE / name) for name in OWN)}


class Interrupt:
    """Raises KeyboardInterrupt where Python looks for signals: after a call of C, and at the beginning of a function.

    Only in the files that move and restore, the `number`-th time.
    """

    def __init__(self, number):
        self.left, self.where = number, None

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        if event in ("call", "c_return") and name in FILES:
            self.left -= 1
            if self.left == 0:
                self.where = f"{name}:{frame.f_lineno} ({event})"
                sys.setprofile(None)
                raise KeyboardInterrupt


def interrupted_step(number):
    """A step that is interrupted, and what it leaves behind that it should not; None where it ends before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    optimizer._checks.next_batch()
    optimizer._checks.next_batch()  # not a batch that is checked
    base_steps = []
    optimizer.register_step_pre_hook(lambda *_: base_steps.append(None))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    installed, interrupt = np.random.default_rng, Interrupt(number)
    with torch.no_grad():
        sys.setprofile(interrupt)
        try:
            optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
        except KeyboardInterrupt as error:  # kept alive, as in a notebook
            sys.setprofile(None)
            left = []
            if not base_steps and not all(map(torch.equal, model.parameters(), before)):
                left.append("moved weights")
            if _callbacks.active:
                left.append("callbacks")
            if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled():
                left.append("modes")
                torch.set_autocast_cache_enabled(True)
            if np.random.default_rng is not installed:
                left.append("default_rng")
            return left and [interrupt.where, *left, error]
        finally:
            sys.setprofile(None)
    return None


def test_an_interrupt_at_any_moment_leaves_nothing_behind():
    number, failures = 1, []
    while (left := interrupted_step(number)) is not None:
        failures += [left] if left else []
        number += 1
    assert number > 300
    assert failures == []
