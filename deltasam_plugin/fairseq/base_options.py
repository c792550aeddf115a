"""The options of δ-SAM and of the component that it wraps, in one flat section as fairseq users write them.

``--optimizer delta_sam --base-optimizer adam --adam-betas '(0.9, 0.98)'`` must mean to adam what it meant before. So
δ-SAM's configuration has its own fields and the options of every registered component. The default of an option is the
one that all components agree on, else None. A value that differs from it was given by the user and goes to the chosen
base. The base fills in its own defaults. Checkpoints hold plain data, which fairseq reads without the plugin.
"""

from __future__ import annotations

import copy
import dataclasses
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass, merge_with_parent
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

NAME = "delta_sam"


class BaseOptions:
    """The options of all components of one fairseq registry, as fields of δ-SAM's configuration.

    Args:
        registry: ``optimizer`` or ``criterion``.
        own: the dataclass with δ-SAM's own options, including ``base_<registry>``.
        supported: whether δ-SAM can wrap the component of this name. Messages offer no others.
    """

    def __init__(
        self, registry: str, own: type[FairseqDataclass], supported: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.registry = registry
        self.own = own
        self.supported = supported

    @property
    def components(self) -> dict[str, type]:
        """All registered components except δ-SAM itself, by name."""
        return {name: cls for name, cls in REGISTRIES[self.registry]["registry"].items() if name != NAME}

    def dataclass_of(self, name: str) -> type[FairseqDataclass] | None:
        """The configuration dataclass of a component, or None if the component still uses argparse."""
        return REGISTRIES[self.registry]["dataclass_registry"].get(name)

    def options_of(self, name: str) -> dict[str, Any]:
        """A component's options and their defaults: None if it is required or refers to another section."""
        dataclass = self.dataclass_of(name)
        if dataclass is None:
            return {action.dest: action.default for action in _actions(self.components[name])}
        defaults = {option: default for option, (_, default) in _fields(dataclass).items()}
        elsewhere = {option for option, value in defaults.items() if value == MISSING or str(value).startswith("${")}
        return {option: None if option in elsewhere else value for option, value in defaults.items()}

    def defaults(self) -> dict[str, Any]:
        """All options of all components, each with the default that the components agree on, else None.

        None for every option that was not given would be simpler, but other sections may refer to options: the task
        sentence_prediction reads ``criterion.regression_target``.
        """
        agreed: dict[str, Any] = {}
        for component in self.components:
            for name, default in self.options_of(component).items():
                agreed[name] = default if agreed.setdefault(name, default) == default else None
        own = {field.name for field in dataclasses.fields(self.own)}
        return {name: agreed[name] for name in sorted(agreed) if name not in own}

    def config_class(self) -> type[FairseqDataclass]:
        """A dataclass with δ-SAM's own options and every option of every registered component."""
        options = [
            (name, Any, dataclasses.field(default_factory=partial(copy.copy, default)))
            for name, default in self.defaults().items()
        ]
        return dataclasses.make_dataclass(self.own.__name__, options, bases=(self.own,))

    def refresh(self) -> None:
        """Register the configuration again, with the options of the components that are registered now."""
        dataclass = self.config_class()
        REGISTRIES[self.registry]["dataclass_registry"][NAME] = dataclass
        node = dataclass()
        node._name = NAME
        ConfigStore.instance().store(name=NAME, group=self.registry, node=node, provider="fairseq")

    def add_args(self, parser: ArgumentParser) -> None:
        """Add all options to a command line. Without a common default, an option that is not given stays absent."""
        self.refresh()
        defaults = self.defaults()
        gen_parser_from_dataclass(parser, self.own())
        group = parser.add_argument_group(f"options of the base {self.registry}")
        for component in self.components.values():
            for action in _actions(component):
                default = defaults.get(action.dest)
                action.default = SUPPRESS if default is None else default
                action.required = False
                with suppress(ArgumentError):  # an option of another component, the task or the model: they share it
                    group._add_action(action)

    def base_config(self, cfg: DictConfig) -> tuple[str, type, DictConfig | Namespace]:
        """The chosen base, and the configuration that it would have without δ-SAM.

        Args:
            cfg: δ-SAM's section of the configuration, inside the whole configuration if there is one.

        Returns:
            Name, class and configuration of the base. The configuration is a flat namespace if the base still uses
            argparse.

        Raises:
            ValueError: the base does not exist, does not have a given option, or lacks a required one.
        """
        base = cfg[f"base_{self.registry}"]
        if base not in self.components:
            raise ValueError(
                f"Unknown base_{self.registry}={base!r} (--base-{self.registry}). "
                f"Choose one of: {', '.join(sorted(filter(self.supported, self.components)))}."
            )
        content: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        given = {name: content[name] for name, default in self.defaults().items() if content.get(name) != default}
        options = self.options_of(base)
        others = set().union(*(_options_of_section(cfg, name) for name in _root(cfg) if name != self.registry))
        for name in sorted(given.keys() - options.keys() - others):
            owners = sorted(c for c in self.components if self.supported(c) and name in self.options_of(c))
            raise ValueError(
                f"Invalid option {name}={given[name]!r}: the base {self.registry} {base!r} has no such option. Remove "
                + (f"it, or choose a base that has it: {', '.join(owners)}." if owners else "it.")
            )
        given = {name: value for name, value in given.items() if name in options}
        dataclass = self.dataclass_of(base)
        if dataclass is None:
            return base, self.components[base], self._namespace(cfg, base, given)
        section = OmegaConf.create({"_name": base})
        section._set_flag("allow_objects", True)
        fields = _fields(dataclass)
        for name, value in given.items():
            place, _ = fields[name]
            OmegaConf.update(section, ".".join((*place, name)), value)
        section.__dict__["_parent"] = cfg.__dict__["_parent"]
        return base, self.components[base], merge_with_parent(dataclass(), section)

    def _namespace(self, cfg: DictConfig, base: str, given: dict[str, Any]) -> Namespace:
        flat: dict[str, Any] = {}
        for name in _root(cfg):
            flat.update(_section(cfg, name))
        for action in _actions(self.components[base]):
            if action.required and action.dest not in given:
                raise ValueError(
                    f"Missing {'/'.join(action.option_strings)}: the base {self.registry} {base!r} requires it."
                )
            flat[action.dest] = action.default
        return Namespace(**{**flat, **given, self.registry: base, "_name": base})


def _fields(dataclass: type[FairseqDataclass], place: tuple[str, ...] = ()) -> dict[str, tuple[tuple[str, ...], Any]]:
    """The options of a configuration by name: the sections within it that hold them, and their defaults.

    A command line gives the options of inner sections by their own names.
    """
    instance, found = dataclass(), {}
    for name in (field.name for field in dataclasses.fields(dataclass) if not field.name.startswith("_")):
        default = instance._get_default(name)
        if isinstance(default, FairseqDataclass):
            found.update(_fields(type(default), (*place, name)))
        else:
            found[name] = place, default
    return found


def _actions(component: type) -> list[Action]:
    """New copies of a component's command-line options, which belong to no parser in use."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    add_args = getattr(component, "add_args", None)
    dataclass = getattr(component, "__dataclass", None)
    if add_args is not None:
        add_args(parser)
    elif dataclass is not None:
        gen_parser_from_dataclass(parser, dataclass())
    return list(parser._actions)


def _root(cfg: DictConfig) -> DictConfig:
    root = cfg._get_root()
    return root if root is not cfg else OmegaConf.create({})


def _section(cfg: DictConfig, name: str) -> dict[str, Any]:
    section = _root(cfg)._get_node(name)
    value = section._value() if section is not None and not isinstance(section, DictConfig) else section
    if isinstance(value, Namespace):
        return dict(vars(value))
    if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
        content: Any = OmegaConf.to_container(value, resolve=True)
        return dict(content)
    return {}


def _options_of_section(cfg: DictConfig, name: str) -> set[str]:
    """The options of another section. A flat command line gives an option to every section that has it."""
    section = _root(cfg)._get_node(name)
    if isinstance(section, DictConfig):
        return set(_section(cfg, name))
    content = _section(cfg, name)  # a namespace holds the whole command line: only its class knows its own options
    owner = {"task": TASK_REGISTRY, "model": ARCH_MODEL_REGISTRY}.get(name, {}).get(content.get("_name"))
    return {action.dest for action in _actions(owner)} if owner is not None else set()
