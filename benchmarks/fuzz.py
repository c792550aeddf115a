"""Run the fuzzer of instance mode on many seeds: python -m benchmarks.fuzz --seeds 0 2000.

Prints how many models were exact, refused (by message), warned, silently wrong or crashed; of the last two, the seeds.
With --show SEED it describes one model, its verdict at every step, and the smallest part of it that fails alike.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter, defaultdict

import torch

from tests.helpers.random_models import Plan


def count(seeds: range) -> None:
    """Verdicts over these seeds."""
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    reasons: Counter[tuple[str, str]] = Counter()
    steps: Counter[str] = Counter()
    for seed in seeds:
        verdicts = Plan.drawn(seed).run()
        kinds[verdicts[-1].kind].append(seed)
        steps.update(verdict.kind for verdict in verdicts)
        if verdicts[-1].kind in ("refused", "crashed"):
            reasons[verdicts[-1].kind, verdicts[-1].reason] += 1
        if not verdicts[-1].allowed:
            print(f"{verdicts[-1].kind}, seed {seed}, step {len(verdicts) - 1}: {verdicts[-1].detail}", flush=True)
    print(f"\n{len(seeds)} models, seeds {seeds.start} to {seeds.stop - 1}")
    for kind in ("exact", "warned", "refused", "silent", "crashed"):
        found = kinds[kind]
        listed = f", seeds {found}" if kind in ("silent", "crashed") and found else ""
        print(f"{kind:8} {len(found):5} models, {steps[kind]:6} steps{listed}")
    for (kind, reason), number in reasons.most_common():
        print(f"  {number:5} {kind}: {reason}")


def show(seed: int) -> None:
    """One model, and the least of it that fails alike."""
    for plan in (Plan.drawn(seed), Plan.drawn(seed).smallest()):
        print(plan.describe())
        for step, verdict in enumerate(plan.run()):
            print(f"  step {step}: {verdict.kind}: {verdict.detail}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 2000), metavar=("FIRST", "END"))
    parser.add_argument("--show", type=int, nargs="*", default=[], metavar="SEED")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for chosen in options.show:
        show(chosen)
    if not options.show:
        count(range(*options.seeds))
