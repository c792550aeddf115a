"""The random numbers of a forward pass: the state of all generators, and those that it makes itself."""

from __future__ import annotations

import copy
import itertools
import random
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltasam_plugin.interrupts import closing_contexts


@dataclass(frozen=True)
class RandomState:
    """The state of every random number generator that a model draws from: torch, CUDA, numpy, Python."""

    cpu: Tensor
    cuda: dict[int, Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, devices: set[torch.device]) -> RandomState:
        """Record all generators; of CUDA only those of `devices`."""
        indices = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        return cls(
            cpu=torch.get_rng_state(),
            cuda={index: torch.cuda.get_rng_state(index) for index in indices},
            numpy=np.random.get_state(),
            python=random.getstate(),
        )

    def restore(self) -> None:
        """Set all generators back to this state."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def seed(self) -> int:
        """A seed that this state determines, drawn without advancing any generator.

        fairseq seeds torch for every update. There it is a function of seed and update, and of the position within the
        update once anything was drawn: a resumed run gets the same seeds.
        """
        generator = torch.Generator("cpu")
        generator.set_state(self.cpu)
        drawn = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        for state in self.cuda.values():
            drawn ^= zlib.crc32(state.numpy().tobytes())
        return drawn


class UnseededGenerators:
    """The generators that a forward pass makes with ``numpy.random.default_rng()``, without a seed.

    They start from the operating system's entropy, which no state captures (fairseq draws the masks of wav2vec 2.0 and
    HuBERT from them). Each is remembered as it was made; the n-th of a later pass starts as the n-th of the first.
    """

    def __init__(self) -> None:
        self._default_rng = np.random.default_rng
        self._made: list[np.random.Generator] = []

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """One pass of this thread: remember the generators that it makes, or return those remembered."""
        thread, count, before = threading.get_ident(), itertools.count(), np.random.default_rng

        def default_rng(seed: Any = None) -> np.random.Generator:
            if seed is not None or threading.get_ident() != thread:
                return self._default_rng(seed)
            index = next(count)
            if index == len(self._made):
                self._made.append(self._default_rng())
            return copy.deepcopy(self._made[index])

        np.random.default_rng = default_rng
        try:
            with closing_contexts():  # those within may be of this kind, and must end before this one
                yield
        finally:
            np.random.default_rng = before
