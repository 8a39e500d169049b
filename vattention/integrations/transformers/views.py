"""Which attention the modules of a model are told to take, and nobody else.

A module asks its config. While a model is enabled, the modules inside it hold views of their
configs, which answer as the engine's `Override` says. The model itself holds its config, as its
owner knows it: attention is further inside. Compilers follow a view, and what is written to an
override while they do.

What is always true: a view and its config have one `__dict__`. What is set on the one is set on the
other, and a view adds nothing to it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

__all__ = ["Override", "Replaced", "replace_configs", "restore_configs", "restored"]


@dataclass
class Override:
    """The name of the attention that views tell of; None: what their configs say."""

    name: str | None = None


@dataclass(frozen=True)
class Replaced:
    """An attribute of a module, the config that it was, and the view that it is now."""

    module: torch.nn.Module
    attribute: str
    config: Any
    view: Any

    def exchange(self, old: Any, new: Any) -> None:
        """Makes it another one, unless somebody else has done so since."""
        if vars(self.module).get(self.attribute) is old:
            vars(self.module)[self.attribute] = new


def replace_configs(model: torch.nn.Module, override: Override) -> list[Replaced]:
    """Gives the modules inside a model views; returns them, for `restore_configs`."""
    views: dict[int, Any] = {}
    for module in model.modules():
        config = _config_of(getattr(module, "config", None))
        if isinstance(config, PretrainedConfig) and id(config) not in views:
            views[id(config)] = _view(config, override, views)
    replaced = [
        Replaced(module, attribute, value, views[id(_config_of(value))])
        for module in model.modules()
        if module is not model
        for attribute, value in vars(module).items()
        if id(_config_of(value)) in views
    ]
    for each in replaced:
        each.exchange(each.config, each.view)
    return replaced


def restore_configs(replaced: list[Replaced]) -> None:
    """Gives modules their configs back."""
    for each in replaced:
        each.exchange(each.view, each.config)


@contextmanager
def restored(replaced: list[Replaced]) -> Iterator[None]:
    """The same for a while."""
    restore_configs(replaced)
    try:
        yield
    finally:
        for each in replaced:
            each.exchange(each.config, each.view)


class _View:
    """What a view is beside a config of its config's class."""

    __slots__ = ("_vattention_config", "_vattention_override", "_vattention_views")
    _vattention_config: Any
    _vattention_override: Override
    _vattention_views: dict[int, Any]  # of the model's other configs, by their `id`

    def __init_subclass__(cls) -> None:
        """Nothing: the config's would make another dataclass."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A config: `config.__class__()` is how transformers asks for the defaults."""
        return _config_class(cls)(*args, **kwargs)

    @property
    def _attn_implementation(self) -> Any:
        name = self._vattention_override.name
        return self._attn_implementation_internal if name is None else name  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._vattention_config._attn_implementation = value

    def __eq__(self, other: object) -> bool:
        return bool(self._vattention_config == _config_of(other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the config's."""
        return copy.copy, (self._vattention_config,)


def _config_of(value: Any) -> Any:
    return value._vattention_config if isinstance(value, _View) else value


def _config_class(cls: type) -> Any:
    return next(base for base in cls.__mro__ if not issubclass(base, _View))


def _view(config: Any, override: Override, views: dict[int, Any]) -> Any:
    cls: Any = type(config)
    # A compiler follows no class that gets at attributes in a way of its own. What configs do there
    # is that some attributes have two names, and that some layers have others.
    plain = (
        cls.__getattribute__ is PretrainedConfig.__getattribute__
        and "_heterogeneity_spec" not in vars(config)
    )
    view = object.__new__(_view_class(cls, plain))
    for name, value in (
        ("__dict__", vars(config)),
        ("_vattention_config", config),
        ("_vattention_override", override),
        ("_vattention_views", views),
    ):
        object.__setattr__(view, name, value)
    return view


@functools.cache
def _view_class(cls: Any, plain: bool) -> Any:
    """The class of views of a class of configs; `plain`: attributes are got at as usual."""
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    members |= {name: _part(name) for name in cls.sub_configs}
    if plain:
        members |= {alias: _alias(name) for alias, name in cls.attribute_map.items()}
        members["__getattribute__"] = object.__getattribute__
    return type(cls.__name__, (_View, cls), members)


def _alias(name: str) -> property:
    """Another name of an attribute; writing goes by the config's `__setattr__`, which knows it."""

    def get(view: Any) -> Any:
        return getattr(view, name)

    return property(get)


def _part(name: str) -> property:
    """A config in a config: the view of it, where there is one."""

    def get(view: Any) -> Any:
        part = getattr(view._vattention_config, name)
        return view._vattention_views.get(id(part), part)

    def put(view: Any, part: Any) -> None:
        setattr(view._vattention_config, name, part)

    return property(get, put)
