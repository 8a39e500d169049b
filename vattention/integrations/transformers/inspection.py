"""What a model's attention does, found out by running it once.

Two tokens go through the model with an attention that notes what it is given; modules are told of
it as they are of ours later. A model is supported if every layer hands what the cache's `update`
returned straight to its attention, once: then its K and V can stay where they were written. Its
masks are replaced by lengths and windows, so what its config says of masks must be what its
attention was told of windows.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from vattention.attention import Options
from vattention.errors import ConfigError
from vattention.integrations.transformers.versions import (
    LayerKind,
    cache_parameter,
    layer_kinds,
)
from vattention.integrations.transformers.views import Override, replace_configs, restore_configs

__all__ = [
    "LayerSpec",
    "inspect_model",
    "reads_positions",
]

_INSPECTION = "vattention_inspection"


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One attention layer.

    Attributes:
        module: it.
        num_kv_heads: heads of K and V.
        head_dim: of K and the queries.
        v_head_dim: of V.
        dtype: of K and V.
        device: where they are.
        options: what its attention computes.
    """

    module: torch.nn.Module
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    options: Options


class _Notes(Cache):
    """A cache that keeps nothing, and notes what it returned."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.returned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.specs: dict[int, LayerSpec] = {}
        self.problems: list[str] = []

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self.returned:
            self.problems.append(f"layer {layer_idx} updates the cache twice")
        self.returned[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **about: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = next(
            (
                index
                for index, (keys, values) in self.returned.items()
                if keys is key and values is value
            ),
            None,
        )
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        if layer is None:
            self.problems.append("K and V are changed after the cache has returned them")
            return output, None
        if layer in self.specs:
            self.problems.append(f"the K and V of layer {layer} are used twice")
        if any(spec.module is module for spec in self.specs.values()):
            self.problems.append("one attention module serves several layers")
        if attention_mask is not None:
            self.problems.append("it makes a mask of its own")
        if not about.get("is_causal", getattr(module, "is_causal", True)):
            self.problems.append("its attention is not causal")
        if about.get("position_bias") is not None:
            self.problems.append("its attention adds a bias to the scores")
        sinks = about.get("s_aux")
        self.specs[layer] = LayerSpec(
            module=module,
            num_kv_heads=key.shape[1],
            head_dim=key.shape[3],
            v_head_dim=value.shape[3],
            dtype=key.dtype,
            device=key.device,
            options=Options(
                num_heads=query.shape[1],
                window=about.get("sliding_window"),
                softcap=about.get("softcap") or 0.0,
                sinks=sinks is not None,
                scale=about.get("scaling"),
            ),
        )
        return output, None


def _inspect(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **about: Any,
) -> tuple[torch.Tensor, None]:
    assert _notes is not None
    return _notes.attention(module, query, key, value, attention_mask, **about)


_notes: _Notes | None = None
_inspecting = threading.Lock()  # of one model at a time: `_notes` is everyone's
AttentionInterface.register(_INSPECTION, _inspect)


def inspect_model(model: Any) -> list[LayerSpec]:
    """What each attention layer of a causal model does, in the cache's numbering.

    Raises:
        ConfigError: the model cannot be served; the message says why. It is as it was.
    """
    with _inspecting:
        return _inspect_model(model)


def _inspect_model(model: Any) -> list[LayerSpec]:
    global _notes
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise ConfigError(f"enable() serves transformers' causal models; {name} is none")
    if config.is_encoder_decoder:
        raise ConfigError(f"enable() serves decoder-only models; {name} has an encoder")
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"enable() needs a model whose attention can be replaced; {name}'s cannot"
        )
    device = model.device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    replaced = replace_configs(model, Override(_INSPECTION))
    notes = _notes = _Notes()
    try:
        with torch.no_grad():
            model(
                input_ids=tokens,
                position_ids=torch.arange(2, device=device)[None],
                use_cache=True,
                **{cache_parameter(inspect.signature(model.forward).parameters): notes},
            )
    except Exception as error:
        raise ConfigError(f"enable() cannot serve {name}: it fails with {error!r}") from error
    finally:
        restore_configs(replaced)
        _notes = None
    notes.problems += _unmasked(model, notes.specs)
    missing = set(notes.returned) - set(notes.specs)
    if missing:
        notes.problems.append(f"layers {sorted(missing)} do not attend by the attention interface")
    if sorted(notes.specs) != list(range(len(notes.specs))) or not notes.specs:
        notes.problems.append(f"its layers are numbered {sorted(notes.specs)}")
    devices = {spec.device for spec in notes.specs.values()}
    if len(devices) > 1:
        notes.problems.append("its layers are on several devices")
    if notes.problems:
        why = "; ".join(dict.fromkeys(notes.problems))
        raise ConfigError(f"enable() cannot serve {name}: {why}. It works as before without it")
    return [notes.specs[layer] for layer in range(len(notes.specs))]


def _unmasked(model: Any, specs: dict[int, LayerSpec]) -> list[str]:
    """What the model would do by a mask and its attention was not told of."""
    config = model.config.get_text_config(decoder=True)
    problems = []
    if getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        problems.append("its attention looks ahead")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        problems.append("it is spread over several devices")
    try:
        kinds = layer_kinds(config)
    except Exception as error:
        return [*problems, f"its kinds of layers are not known: {error}"]
    for layer, spec in specs.items():
        kind = kinds[layer] if layer < len(kinds) else LayerKind("unknown", None)
        if kind.layer_type not in ("full_attention", "sliding_attention"):
            problems.append(f"it has {kind.layer_type} layers")
        elif spec.options.window != kind.window:
            problems.append(f"the window of its {kind.layer_type} layers is known to its mask only")
    return problems


def reads_positions(model: Any) -> bool:
    """Whether its rotary embedding looks at positions on the host, which a CUDA graph cannot do."""
    kinds = {
        kind
        for module in model.modules()
        for kind in _rope_types(getattr(module, "rope_type", None))
    }
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def _rope_types(rope_type: Any) -> list[str]:
    if isinstance(rope_type, str):
        return [rope_type]
    return [str(kind) for kind in rope_type.values()] if isinstance(rope_type, dict) else []
