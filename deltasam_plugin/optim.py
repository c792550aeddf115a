"""δ-SAM around any torch optimizer, for training loops without fairseq."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltasam_plugin import schedule
from deltasam_plugin.batch.momentum import check_momentum, momentum_of
from deltasam_plugin.batch.restoration import PerturbedParameter
from deltasam_plugin.checks import Checks
from deltasam_plugin.closures import checked
from deltasam_plugin.interrupts import closing_contexts
from deltasam_plugin.loss import Statistics
from deltasam_plugin.modes import Perturbations, chosen_parameters
from deltasam_plugin.refusals import refuse_ignored, refuse_sharded
from deltasam_plugin.replay import ThreadState
from deltasam_plugin.settings import Settings

STEP = "delta_sam_step"  # in the first parameter group


class DeltaSAM(Optimizer):
    r"""Sharpness-aware minimization with dynamic reweighting around a base optimizer.

    .. math:: w \leftarrow \mathrm{base}\Bigl(w,\ \tfrac1B \sum_i \nabla\ell_i(w + \epsilon)\Bigr),\qquad
              \epsilon = \rho\,\frac{\sum_i v_i g_i}{\|\sum_i v_i g_i\|}

    ``param_groups``, ``state`` and ``state_dict`` are the base optimizer's own: learning-rate schedulers and
    checkpoints see the base optimizer. The first parameter group also keeps the number of steps taken.

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        base_optimizer: class of the base optimizer, e.g. ``torch.optim.AdamW``.
        rho: radius, L2 norm of the perturbation in parameter space; by default 0.05, in instance mode 0.01.
        weighting: weights of the samples in the ascent: ``curvature``, ``kl``, ``gradient_norm``, ``normalized``,
            ``uniform`` (plain SAM), or one registered with ``deltasam_plugin.weighting``.
        probes: number of probes per step. Each is two forward passes for ``curvature``, one for the others, none for
            ``uniform``. In half precision and TF32 one more pass per step measures rounding, except for ``kl``.
        probe_scale: length of a probe's displacement as a fraction of the parameters' L2 norm. In half precision it is
            longer, where a shorter one would see nothing but rounding.
        perturbation: ``batch``, one perturbation for the whole batch; ``instance``, one for each sample, exactly.
        parameters: regular expression; only parameters in whose name it is found are perturbed. Needs named parameters:
            ``DeltaSAM(model.named_parameters(), ...)``, with torch 2.6 and newer.
        loss_budget: by how much the loss of a sample may rise, in nats; shortens the radius.
        group: in instance mode, so many samples in a row of the batch share a perturbation.
        adaptive: filters, such as the rows of a matrix, are perturbed in proportion to their norms (ASAM).
        ascent: along the ``gradient``; along its ``noise``, the part orthogonal to the base optimizer's momentum; or
            against the ``momentum``, with no pass of its own. The loss is then the one at the perturbed parameters.
        descent: along the ``perturbed`` gradient; ``weighted`` with the one at w (WSAM); or without what widens the
            ``surrogate_gap`` (GSAM).
        descent_weight: of the latter two, by default 9 and 0.4.
        interval: every N-th step is sharpness-aware, and the others are the base optimizer's own.
        warmup_updates: the radius grows linearly over so many steps.
        rho_schedule: ``constant``; or ``lr``, proportional to the learning rate of the first group after the warm-up,
            and ρ where that is greatest.
        **base_options: options of the base optimizer, by their own names.

    Raises:
        ValueError: an option is out of range; the message names value, rule and remedy.

    Example:
        >>> optimizer = DeltaSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> loss = optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))

    Reference: Zhou, Liu, Zhang, Chen. δ-SAM: Sharpness-Aware Minimization with Dynamic Reweighting. Findings of
    EMNLP 2022.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float | None = None,
        weighting: str = Settings.weighting,
        probes: int = Settings.probes,
        probe_scale: float = Settings.probe_scale,
        perturbation: str = Settings.perturbation,
        parameters: str | None = None,
        loss_budget: float | None = None,
        group: int = Settings.group,
        adaptive: bool = Settings.adaptive,
        ascent: str = Settings.ascent,
        descent: str = Settings.descent,
        descent_weight: float | None = None,
        interval: int = Settings.interval,
        warmup_updates: int = Settings.warmup_updates,
        rho_schedule: str = Settings.rho_schedule,
        **base_options: Any,
    ) -> None:
        # Deliberately without super().__init__(): the only state is the base optimizer's.
        self.settings = Settings(
            rho,
            weighting,
            probes,
            probe_scale,
            perturbation,
            parameters=parameters,
            loss_budget=loss_budget,
            group=group,
            adaptive=adaptive,
            ascent=ascent,
            descent=descent,
            descent_weight=descent_weight,
            interval=interval,
            warmup_updates=warmup_updates,
            rho_schedule=rho_schedule,
        )
        if not callable(base_optimizer):
            raise ValueError(f"Invalid base_optimizer={base_optimizer!r}. Must be a class, e.g. torch.optim.AdamW.")
        if isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.LBFGS):
            raise ValueError("Invalid base_optimizer LBFGS: it evaluates the loss itself. Use one that takes one step.")
        self.base_optimizer = base_optimizer(params, **base_options)
        refuse_ignored(self.base_optimizer)
        self.statistics: Statistics | None = None
        self._begin_run()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings}, {self.base_optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Not all attributes: a learning-rate scheduler adds a step that is bound to this object.
        return {name: self.__dict__[name] for name in ("settings", "base_optimizer", "statistics")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_run()

    def _begin_run(self) -> None:
        self._checks = Checks()
        self._perturbations: Perturbations | None = None
        self._momentum_checked = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base optimizer, whether it trained under δ-SAM or alone."""
        self.base_optimizer.load_state_dict(state_dict)
        refuse_ignored(self.base_optimizer)
        self._momentum_checked = False  # its options come with it

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)
        refuse_ignored(self.base_optimizer)

    def __getattr__(self, name: str) -> Any:
        # Hooks on steps and state dicts: torch's own methods register them in the base optimizer's tables.
        if name.startswith("_optimizer_"):
            return getattr(self.base_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base_optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One update: the gradient at the perturbed weights, then the base optimizer's step from the original ones.

        Gradients are cleared first. To change them before the base optimizer uses them (clipping), register a hook with
        :meth:`register_step_pre_hook`.

        Args:
            closure: forward pass without backward; returns the per-sample losses, shape (B,). For the weighting ``kl``
                it returns ``(losses, logits)`` with logits of shape (B, …, V), or ``(losses, logits, counted)`` where
                only some predictions enter the loss: counted is boolean, (B, …), and False for padding. It is run once
                for the ascent, once at the perturbed weights, and for the probes, with the same random numbers each
                time.

        Returns:
            The mean of the losses at w, detached. ``self.statistics`` holds what else was measured; it is None after a
            step that was not sharpness-aware.

        Raises:
            ValueError: there is no closure, it did not return one loss per sample, the weighting needs logits that it
                did not return, or no parameter is trainable.
            Refused: the model or the parameters cannot be trained so; the message says why.
            Whatever the closure raises comes through, with the weights as they were.
        """
        if closure is None:
            raise ValueError(
                "DeltaSAM.step() without a closure: it runs the forward pass several times. Pass a function that "
                "returns the per-sample losses, e.g. lambda: F.cross_entropy(model(x), y, reduction='none')."
            )

        group = self.param_groups[0]
        step = group.get(STEP, 0)
        self.zero_grad()
        every = [p for each in self.param_groups for p in each["params"]]
        forward = checked(closure, every, instance=self.settings.perturbation == "instance")
        with closing_contexts(), torch.enable_grad():
            perturbations = self._current_perturbations()
            rho = schedule.radius(self.settings, step, schedule.relative_lr(self.settings, group))
            if schedule.perturbs(self.settings, step):
                loss, self.statistics = perturbations.loss(forward, lambda: forward().loss, step, rho)
            else:
                loss, self.statistics = forward().loss, None
            with ThreadState.capture(perturbations.devices).without_autocast().replayed():  # it is for forward passes
                loss.backward()
        self.base_optimizer.step()
        if self.settings.ascent != "gradient" and not self._momentum_checked:
            check_momentum((self.state.get(p, {}) for p in every if p.grad is not None), self.settings.ascent)
            self._momentum_checked = True
        group[STEP] = step + 1
        return loss.detach()

    def _current_perturbations(self) -> Perturbations:
        """Those of the parameters that are trained now, by the settings of now."""
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not trained:
            raise ValueError("DeltaSAM.step() without a trainable parameter: all are frozen. Unfreeze some before it.")
        if self._perturbations is None or not self._perturbations.fit(trained, self.settings):
            refuse_sharded(trained)
            named = {name: PerturbedParameter(parameter) for name, parameter in self._names().items()}
            chosen, base = chosen_parameters(named, self.settings), self.base_optimizer
            self._perturbations = Perturbations(
                chosen,
                self.settings,
                held=trained,
                checks=self._checks,
                momentum=lambda item: momentum_of(base.state.get(item.parameter, {})),
            )
        return self._perturbations

    def _names(self) -> dict[str, Tensor]:
        """The trained parameters by name: their own, numbered where modules have the same ones, or numbers."""
        named: dict[str, Tensor] = {}
        for group in self.param_groups:
            names = group.get("param_names")
            if names is None and self.settings.parameters is not None:
                raise ValueError(
                    f"parameters={self.settings.parameters!r} without names to look at. Pass named parameters: "
                    "DeltaSAM(model.named_parameters(), ...), with torch 2.6 or newer."
                )
            for i, parameter in enumerate(group["params"]):
                if parameter.requires_grad:
                    name = f"parameter {len(named)}" if names is None else names[i]
                    named[name if name not in named else f"{name} ({len(named)})"] = parameter
        return named
