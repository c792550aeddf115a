"""Numbers come to the host without a wait for the device, as far as the device has come so far."""

from __future__ import annotations

import pytest
import torch

from deltasam_plugin.instance.arrival import arriving
from tests.helpers.rehearsal import CLOSE, Rehearsal, moved


def test_a_number_on_the_host_is_there() -> None:
    assert arriving(torch.tensor(3))() == 3


@pytest.mark.parametrize("launched", [0, CLOSE + 10])
def test_a_number_on_the_device_arrives(launched: int) -> None:
    """The host waits only if the device had much to do before it came to the number."""
    rehearsal = Rehearsal()
    with rehearsal.active():
        value = moved(torch.tensor(3))
        for _ in range(launched):
            value = value + 0
        number = arriving(value)
        assert rehearsal.waits == []
        assert number() == number() == 3
    assert bool(rehearsal.waits) == bool(launched)
