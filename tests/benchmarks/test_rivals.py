"""Label smoothing and R-Drop for classification."""

from __future__ import annotations

import importlib
from argparse import Namespace

import pytest
import torch
from fairseq import utils
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from benchmarks import accuracy
from benchmarks.accuracy import Slice
from benchmarks.tasks import TASKS, Task

utils.import_user_module(Namespace(user_dir="benchmarks/rivals"))
divergence = importlib.import_module("rivals").divergence

LOGITS = st.lists(st.tuples(*[st.floats(-30, 30, width=32)] * 6), min_size=1, max_size=5)


@given(LOGITS)
def test_the_divergence_is_the_mean_of_both_directions(rows: list[tuple[float, ...]]) -> None:
    first, second = torch.tensor(rows, dtype=torch.float64).split(3, dim=1)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    one, other = (F.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((q, p), (p, q)))
    assert divergence(first, second) == pytest.approx((one + other) / 2)
    assert divergence(first, second) >= 0
    assert divergence(first, first) == 0


def test_without_its_options_it_is_the_criterion_of_fairseq(monkeypatch: pytest.MonkeyPatch, toy_task: Task) -> None:
    monkeypatch.setitem(TASKS, "sentiment", toy_task)
    adam, none, smoothed, r_drop = (
        accuracy.run(Slice("sentiment", 0.3, *chosen, 2)).test_loss_last
        for chosen in (
            ("adam", None),
            ("adam, label smoothing", 0.0),
            ("adam, label smoothing", 0.5),
            ("adam, r-drop", 1),
        )
    )
    assert none == adam
    assert len({adam, smoothed, r_drop}) == 3
