"""Code of ours in the place of a module's own `forward`, and gone again.

What is always true: only what was put here is taken off. Where somebody has put theirs over it
since, theirs stays, and what they call must go on to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["has_own", "put", "put_for_a_while", "take_off"]


def has_own(module: torch.nn.Module) -> bool:
    """Whether it has another `forward` than its class says."""
    return "forward" in vars(module)


def put(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Makes it the module's `forward`."""
    module.forward = forward


def take_off(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Takes it off, unless another has been put in its place."""
    if vars(module).get("forward") == forward:  # bound methods are equal, not the same
        del module.forward


@contextmanager
def put_for_a_while(
    modules: Iterable[torch.nn.Module],
    make: Callable[[Any], Callable[..., Any]],
) -> Iterator[None]:
    """What `make` returns for a module becomes its `forward`; those that have their own keep it."""
    changed = [(module, make(module)) for module in modules if not has_own(module)]
    for module, forward in changed:
        put(module, forward)
    try:
        yield
    finally:
        for module, forward in changed:
            take_off(module, forward)
