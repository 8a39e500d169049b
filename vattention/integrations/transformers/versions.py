"""What the versions of transformers that are served, 5.17 to 5.24, name or tell differently.

Nothing else in this package asks which version it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import cache_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["CACHE", "CACHE_NAMES", "LayerKind", "cache_parameter", "layer_kinds", "no_cache"]

CACHE_NAMES = ("cache", "past_key_values")
"""What a call may name its cache; the second until 5.23, and for a while after."""

CACHE = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
"""What `generate()` and what a model returns name it."""


@dataclass(frozen=True)
class LayerKind:
    """What a layer keeps, as a config says.

    Attributes:
        layer_type: as in a config's `layer_types`; "dummy" keeps nothing.
        window: tokens that it sees; None: all.
    """

    layer_type: str
    window: int | None


def layer_kinds(config: Any) -> list[LayerKind]:
    """One for each layer of a decoder's config, in their order.

    Layers at the end that read what others keep are left out, or are "dummy" (from 5.23 on).
    """
    layer_types, options = cache_utils.get_layer_types_and_kwargs(config)
    if isinstance(options, Mapping):  # until 5.18: the same for all layers
        windowed = [kind.startswith(("sliding", "chunked")) for kind in layer_types]
        options = [options if is_windowed else {} for is_windowed in windowed]
    return [
        LayerKind(layer_type, of_layer.get("sliding_window"))
        for layer_type, of_layer in zip(layer_types, options, strict=True)
    ]


def cache_parameter(parameters: Iterable[str]) -> str:
    """Which of a forward's parameters is its cache: models of others keep the older name."""
    names = set(parameters)
    return next((name for name in CACHE_NAMES if name in names), CACHE)


def no_cache() -> Any:
    """The layer of a cache for a "dummy": it keeps nothing."""
    return cache_utils.DummyLayer()
