"""δ-SAM's own options, with the help texts that ``fairseq-train --help`` shows."""

from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import FairseqDataclass

from deltasam_plugin.batch.descent import DESCENTS
from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.settings import ASCENTS, DEFAULT_RHO, PERTURBATIONS, SCHEDULES, Settings


@dataclass
class DeltaSAMOptimizerConfig(FairseqDataclass):
    base_optimizer: str = field(default="adam", metadata={"help": "optimizer that takes the step, by its fairseq name"})
    sam_rho: Optional[float] = field(  # noqa: UP045  # fairseq does not know float | None
        default=None,
        metadata={
            "help": "radius of the perturbation: L2 norm in parameter space; by default "
            + ", ".join(f"{rho} for {mode}" for mode, rho in DEFAULT_RHO.items())
        },
    )
    sam_weighting: str = field(
        default=Settings.weighting,
        metadata={
            "help": f"weights of the samples in the ascent: {', '.join(WEIGHTINGS)} (plain SAM), or one of your own"
        },
    )
    sam_probes: int = field(
        default=Settings.probes, metadata={"help": "probes per batch, each one forward pass, for curvature two"}
    )
    sam_probe_scale: float = field(
        default=Settings.probe_scale,
        metadata={"help": "length of a probe's displacement as a fraction of the L2 norm of the weights"},
    )
    sam_perturbation: str = field(
        default=Settings.perturbation, metadata={"help": f"what is perturbed: {', '.join(PERTURBATIONS)}"}
    )
    sam_sync: bool = field(
        default=Settings.sync,
        metadata={"help": "one perturbation common to all data-parallel workers, instead of one for each"},
    )
    sam_parameters: Optional[str] = field(  # noqa: UP045  # fairseq does not know str | None
        default=None,
        metadata={"help": "regular expression: only parameters in whose name it is found are perturbed; default: all"},
    )
    sam_loss_budget: Optional[float] = field(  # noqa: UP045  # fairseq does not know float | None
        default=None,
        metadata={"help": "by how much the loss of a sample may rise, in nats: shortens the radius; default: none"},
    )
    sam_group: int = field(
        default=Settings.group, metadata={"help": "with instance: so many samples in a row share a perturbation"}
    )
    sam_adaptive: bool = field(
        default=Settings.adaptive,
        metadata={"help": "perturb each filter, such as a row of a matrix, in proportion to its norm (ASAM)"},
    )
    sam_ascent: str = field(
        default=Settings.ascent,
        metadata={
            "help": f"direction of the ascent: {', '.join(ASCENTS)} (without a pass of its own); the latter two by the "
            "base optimizer's momentum"
        },
    )
    sam_descent: str = field(
        default=Settings.descent,
        metadata={"help": f"gradient that the base optimizer gets: {', '.join(DESCENTS)} (WSAM and GSAM)"},
    )
    sam_descent_weight: Optional[float] = field(  # noqa: UP045  # fairseq does not know float | None
        default=None,
        metadata={
            "help": "weight in it; by default "
            + ", ".join(f"{own.weight:g} for {name}" for name, own in DESCENTS.items() if own.weight is not None)
        },
    )
    sam_interval: int = field(
        default=Settings.interval, metadata={"help": "every N-th update is sharpness-aware, plain ones are between"}
    )
    sam_warmup_updates: int = field(
        default=Settings.warmup_updates, metadata={"help": "the radius grows linearly over so many updates"}
    )
    sam_rho_schedule: str = field(
        default=Settings.rho_schedule,
        metadata={"help": f"{', '.join(SCHEDULES)}: whether the radius follows the learning rate after the warm-up"},
    )


@dataclass
class DeltaSAMCriterionConfig(FairseqDataclass):
    base_criterion: str = field(
        default="cross_entropy", metadata={"help": "criterion whose loss is minimized, by its fairseq name"}
    )
