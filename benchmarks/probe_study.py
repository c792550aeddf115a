"""How long should a curvature probe be? Signal, rounding noise and bias of the second difference over the probe scale.

    python benchmarks/probe_study.py CHECKPOINT [--data DIR] [--subset valid] [--batch-size 32] [--probes 8]

For one batch of a trained model, every sample's second difference D is computed along the same directions in fp32 and
in double precision, which counts as the truth. The columns are medians over samples and directions:
  signal            |D| in double precision
  noise             |D(fp32) - D(double)|
  noise/eps|l|      the noise in units of fp32's eps times the sample's loss, which weighting.ROUNDING_FACTOR must cover
  95 %              the 95th percentile of noise/eps|l|
  lost              share of the samples whose |D| is below the floor that weighting.rounding_floor estimates
  bias              |D(s)/s² - D(s₀)/s₀²| relative to the latter, with s₀ the smallest scale: what is not curvature at w
  ess               effective sample size of the weights that one probe gives
  rank correlation  of these weights with those that all probes at s₀ give in double precision

    python benchmarks/probe_study.py CHECKPOINT --half

Correlation of the weights of one batch, every weighting, in half precision with those in double precision: medians over
directions, along the same displacement, and with the displacement of the default scale in double precision; and the
share of samples that are under the rounding floor. Half precision is a model of that type with fp32 masters, and
autocast.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch
from fairseq import checkpoint_utils
from fairseq.criterions import CRITERION_REGISTRY
from torch import Tensor
from torch.overrides import TorchFunctionMode

import deltasam_plugin  # noqa: F401  (registers, and lets torch load fairseq's checkpoints)
from deltasam_plugin.batch.displacement import Drawn, displace
from deltasam_plugin.batch.measures import rounding_floor
from deltasam_plugin.batch.norms import global_norm
from deltasam_plugin.batch.probing import probe, standard_normal
from deltasam_plugin.batch.restoration import PerturbedParameter, restored
from deltasam_plugin.batch.weighting import WEIGHTINGS, effective_sample_size, root_mean_square, sample_weights
from deltasam_plugin.fairseq.base_options import NAME
from deltasam_plugin.fairseq.criterion import OPTIONS
from deltasam_plugin.fairseq.criterions.registry import (
    LOGITS,
    logits_of,
    objective_of,
    per_sample_losses_of,
    recorded_outputs,
)
from deltasam_plugin.loss import Objective
from deltasam_plugin.precision import Rounding
from deltasam_plugin.settings import Settings


class InDouble(TorchFunctionMode):
    """Keeps double precision where fairseq casts to fp32, before every softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **kwargs)


SCALES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", help="binarized data, if the path in the checkpoint is no longer right")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--half", action="store_true", help="compare weights in half precision with double precision")
    args = parser.parse_args()

    overrides = {"data": args.data} if args.data else {}
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([args.checkpoint], arg_overrides=overrides)
    model = models[0].eval()
    if cfg.criterion._name == NAME:
        name, base, base_cfg = OPTIONS.base_config(cfg.criterion)
    else:
        name, base, base_cfg = cfg.criterion._name, CRITERION_REGISTRY[cfg.criterion._name], cfg.criterion
    criterion = base.build_criterion(base_cfg, task)
    task.load_dataset(args.subset)
    batches = task.get_batch_iterator(task.dataset(args.subset), max_sentences=args.batch_size).next_epoch_itr(False)
    sample = next(iter(batches))

    def result_of(network: torch.nn.Module) -> Objective:
        in_double = next(network.parameters()).dtype == torch.double
        with recorded_outputs(network, name) as outputs, InDouble() if in_double else nullcontext():
            loss, _, _ = criterion(network, sample)
            losses = per_sample_losses_of(name)(criterion, network, sample, *outputs)
            logits = logits_of(name, criterion, network, sample, *outputs) if name in LOGITS else None
        return objective_of(loss, losses, logits)

    if args.half:
        compare_with_double(model, result_of, args.probes)
        return

    def losses_of(network: torch.nn.Module) -> Tensor:
        return result_of(network).losses.detach().double()

    single, double = model, copy.deepcopy(model).double()
    parameters = {network: [PerturbedParameter(p) for p in network.parameters()] for network in (single, double)}
    norm = global_norm(p for p in double.parameters())
    count = sum(p.numel() for p in double.parameters())
    eps = torch.finfo(torch.float32).eps
    print(f"{count:,} parameters of norm {norm:.1f}, {sample['nsentences']} samples, criterion {name}")

    @torch.no_grad()
    def differences(network: torch.nn.Module, scale: float, seed: int) -> tuple[Tensor, Tensor]:
        moves = [True] * len(parameters[network])
        sigma = scale * norm / math.sqrt(count)
        center = losses_of(network)
        with restored(parameters[network]) as originals:
            displace(parameters[network], originals, Drawn(moves, standard_normal(seed)), sigma)
            plus = losses_of(network)
            displace(parameters[network], originals, Drawn(moves, standard_normal(seed)), -sigma)
            minus = losses_of(network)
        return plus + minus - 2 * center, rounding_floor([plus, minus], center, eps)

    truth: dict[float, Tensor] = {}
    print("scale      signal     noise      noise/eps|l|  95 %   lost   bias   ess    rank correlation")
    center = losses_of(double)
    for scale in SCALES:
        true = torch.stack([differences(double, scale, seed)[0] for seed in range(args.probes)])
        rounded, floor = map(torch.stack, zip(*[differences(single, scale, seed) for seed in range(args.probes)]))
        truth[scale] = true / scale**2
        noise = (rounded - true).abs()
        in_eps = noise / (eps * center)
        bias = ((truth[scale] - truth[SCALES[0]]).abs() / truth[SCALES[0]].abs()).median()
        reference = truth[SCALES[0]].square().mean(dim=0)
        one = [
            sample_weights(WEIGHTINGS["curvature"], rounded[k : k + 1], floor[k : k + 1]) for k in range(args.probes)
        ]
        ess = torch.stack([effective_sample_size(v) for v in one]).median()
        ranks = torch.stack([rank_correlation(v, reference) for v in one]).median()
        print(
            f"{scale:<8.0e} {true.abs().median():10.2e} {noise.median():10.2e} {in_eps.median():10.2f} "
            f"{in_eps.quantile(0.95):10.2f} {(true.abs() < floor).double().mean():7.2f} {bias:7.2f} {ess:6.2f} "
            f"{ranks:8.2f}"
        )


def compare_with_double(
    model: torch.nn.Module, result_of: Callable[[torch.nn.Module], Objective], directions: int
) -> None:
    """Print, for each weighting and precision, how well its weights agree with those of double precision."""
    masters = [p.detach().clone() for p in model.parameters()]

    def weights(name: str, dtype: torch.dtype, autocast: bool, scale: float, seed: int) -> tuple[Tensor, float]:
        network = copy.deepcopy(model) if autocast else copy.deepcopy(model).to(dtype)
        parameters = [
            PerturbedParameter(p, None if autocast else master)
            for p, master in zip(network.parameters(), masters, strict=True)
        ]

        @torch.no_grad()
        def forward() -> Objective:
            with torch.autocast("cpu", dtype=dtype) if autocast else nullcontext():
                return result_of(network)

        rounding, measure = Rounding(dtype, torch.finfo(dtype).eps), WEIGHTINGS[name].measure
        measured, floor = probe(forward, forward(), parameters, measure, 1, scale, seed, rounding=rounding)
        lost = (root_mean_square(measured) <= floor.amax()).double().mean()
        return sample_weights(WEIGHTINGS[name], measured, floor), float(lost)

    print("weighting       precision       same displacement  default scale  under the floor")
    for name in (name for name, weighting in WEIGHTINGS.items() if weighting.measure is not None):
        for dtype in (torch.float16, torch.bfloat16):
            for autocast in (False, True):
                scale = max(Settings.probe_scale, WEIGHTINGS[name].measure.least_scale.get(dtype, 0))
                found = [weights(name, dtype, autocast, Settings.probe_scale, seed) for seed in range(directions)]
                columns = []
                for length in (scale, Settings.probe_scale):
                    true = [weights(name, torch.double, False, length, seed)[0] for seed in range(directions)]
                    columns.append(
                        median([float(torch.corrcoef(torch.stack([v, t]))[0, 1]) for (v, _), t in zip(found, true)])
                    )
                kind = f"{str(dtype).removeprefix('torch.')} {'autocast' if autocast else 'masters'}"
                lost = median([share for _, share in found])
                print(f"{name:15} {kind:18} {columns[0]:14.3f} {columns[1]:14.3f} {lost:16.2f}")


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return Spearman's coefficient."""
    ranks = torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1]


if __name__ == "__main__":
    main()
