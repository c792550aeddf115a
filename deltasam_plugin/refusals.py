"""What an optimizer may be given that would train something else. It is refused."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from deltasam_plugin.errors import Refused


def refuse_ignored(base: Optimizer) -> None:
    """Refuse options of parameter groups that mean nothing here.

    Raises:
        ValueError: names value, rule and remedy.
    """
    for group in base.param_groups:
        if "rho" in group and "rho" not in getattr(base, "defaults", {}):
            raise ValueError(
                f"Invalid rho={group['rho']!r} of a parameter group: all groups share one perturbation. Choose what is "
                "perturbed by parameters=, a regular expression."
            )
        if group.get("maximize"):
            raise ValueError("Invalid maximize=True: the perturbation ascends the losses. Negate the losses instead.")


def refuse_sharded(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters of which each process has a part.

    Raises:
        Refused: there are some.
    """
    for parameter in parameters:
        # FullyShardedDataParallel marks its parameters; fully_shard and tensor parallelism make a DTensor of each.
        if getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "DTensor":
            raise Refused(
                "The parameters are sharded: each process would normalize its own part of the perturbation. δ-SAM "
                "needs every parameter whole in each process. Use DistributedDataParallel."
            )
