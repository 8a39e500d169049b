"""What an engine has made of a model's modules, and whether they still are what they were.

An owner may do anything to a model while it is enabled: load or move weights, put adapters on,
register hooks, train. Merged matrices, compiled layers and captured graphs hold what the modules
were when they were made. So the engine looks, before every prompt and wherever a cache has changed,
and makes them anew where something is another.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from vattention.errors import ConfigError
from vattention.integrations.transformers.fuse import (
    Merged,
    compilable,
    merge_linears,
    plain_linears,
)
from vattention.integrations.transformers.views import Override

__all__ = ["Parts", "Places"]

# What adapters (PEFT) say of themselves.
_SAID = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class Parts:
    """Of a model, as it is now.

    Attributes:
        merged: linears that are computed as one.
        linears: others that may be computed in a way of ours.
        compiled: modules to be compiled for graphs.
        has_hooks: whether somebody's hooks run inside the model, which may do on the host what they
            like: then there can be no graph.

    Args:
        model: its owner's.
        override: of the engine: what is merged is computed so only while that has a name.
        merge: whether to merge.
        compile: whether to find what can be compiled.
        graphs: whether graphs are captured, which hold buffers too.
    """

    def __init__(
        self, model: Any, override: Override, *, merge: bool, compile: bool, graphs: bool
    ) -> None:
        """Merges; what it raises leaves the model as it was."""
        self._model = model
        self._graphs = graphs
        self.merged: list[Merged] = merge_linears(model, override) if merge else []
        self.linears = plain_linears(model)
        self.compiled = compilable(model) if compile else []
        self.has_hooks = any(_hooks_of(module) for module in model.modules() if module is not model)
        self._state: list[object] | None = _state(model, graphs)

    def is_current(self) -> bool:
        """Whether the model is what it was."""
        return self._state is not None and _state(self._model, self._graphs) == self._state

    def end(self, *, own_weights: bool) -> None:
        """Takes everything off the modules again; once is enough.

        Args:
            own_weights: whether linears get matrices of their own, or keep what they have now.
        """
        self._state = None
        while self.merged:
            self.merged.pop().end(own_weights=own_weights)  # there may be no room for all at once


class Places:
    """Where a model's attention modules are: those that the engine knows."""

    def __init__(self, model: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> None:
        known = {id(module) for module in modules}
        self._by_name = {
            name: module for name, module in model.named_modules() if id(module) in known
        }

    def check(self, model: torch.nn.Module) -> None:
        """Raises a `ConfigError` where another module has taken the place of one of them."""
        now = dict(model.named_modules())
        known, there = ({id(module) for module in each.values()} for each in (self._by_name, now))
        for name, module in self._by_name.items():
            # One may be gone, and others may have moved up.
            if id(module) not in there and name in now and id(now[name]) not in known:
                raise ConfigError(
                    f"{name} is another module than when the model was enabled: disable(model) and "
                    "enable() it again"
                )


def _hooks_of(module: torch.nn.Module) -> list[int]:
    """By number. Not transformers' own: those that collect outputs do nothing meanwhile."""
    parts = vars(module)
    return [
        number
        for hooks in (parts["_forward_hooks"], parts["_forward_pre_hooks"])
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", None)).startswith("transformers.")
    ]


def _state(model: torch.nn.Module, graphs: bool) -> list[object]:
    """Of each module: which it is, its code, its tensors' addresses, its hooks, how it is set."""
    state: list[object] = []
    for module in model.modules():
        parts = vars(module)
        state += (
            weakref.ref(module),
            type(module),
            None if module is model else parts.get("forward"),  # the model's own is the engine's
            parts["training"],
            *_hooks_of(module),
            *[_address(value) for value in parts["_parameters"].values()],
            *[repr(parts[name]) for name in _SAID if name in parts],
        )
        if graphs:
            state += [_address(value) for value in parts["_buffers"].values()]
    return state


def _address(value: torch.Tensor | None) -> object:
    """Where a tensor is; which it is, where it has no memory of its own."""
    return None if value is None else value.data_ptr() or id(value)
