"""One padded batch through `generate()`, timed and measured; imported by generate.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from vattention.integrations.transformers import VAttentionCache
from vattention.integrations.transformers.versions import CACHE


@dataclass(frozen=True)
class Batch:
    """Prompts, left-padded for `generate()`: both tensors are [prompts, longest]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, prompts: list[list[int]], pad_token: int, device: torch.device) -> Batch:
        longest = max(map(len, prompts))
        ids = [[pad_token] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        return cls(torch.tensor(ids, device=device), torch.tensor(mask, device=device))

    def last(self, width: int) -> Batch:
        """The last `width` columns."""
        return Batch(self.input_ids[:, -width:], self.attention_mask[:, -width:])

    @property
    def num_tokens(self) -> int:
        """Tokens, padding left out."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Run:
    """One call of `generate()`: seconds of the prompt and of each step after it; the new tokens."""

    prefill_s: float
    steps_s: list[float]
    tokens: torch.Tensor


class _Stopwatch(LogitsProcessor):
    """Notes the time after each step of `generate()`; changes no scores."""

    def __init__(self, device: torch.device, tell: Callable[[int], None]) -> None:
        self._device = device
        self._tell = tell
        self.times = [self._now()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(self._now())
        self._tell(len(self.times) - 1)
        return scores

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def generate_batch(
    model: Any, batch: Batch, cache: Any, new_tokens: int, tell: Callable[[int], None]
) -> Run:
    """Greedy `generate()` of exactly `new_tokens`; `tell` gets the number of each step.

    A cache of None: the model makes one.
    """
    watch = _Stopwatch(model.device, tell)
    output = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([watch]),
        **{CACHE: cache},
    )
    seconds = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    return Run(seconds[0], seconds[1:], output[:, batch.input_ids.shape[1] :].cpu())


@dataclass(frozen=True)
class StockSize:
    """What the stock caches take, in bytes."""

    token: int
    """One token, all layers."""
    held: int
    """DynamicCache at the end of a run: its peak but for the moment of a concatenation."""
    largest_tensor: int
    """What a concatenation holds in addition: the old tensor beside the new one."""
    static_row: int
    """One sequence in a StaticCache of the model's full length."""

    @classmethod
    def of(cls, cache: DynamicCache, batch_size: int, max_seq_len: int) -> StockSize:
        token = held = largest = static_row = 0
        for layer in cache.layers:
            tensors = [layer.keys, layer.values]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            token_bytes = sum(sizes) // (batch_size * layer.keys.shape[2])
            window = getattr(layer, "sliding_window", None) or max_seq_len
            token += token_bytes
            held += sum(sizes)
            largest = max(largest, *sizes)
            static_row += token_bytes * min(window, max_seq_len)
        return cls(token, held, largest, static_row)


@dataclass(frozen=True)
class OurSize:
    """What a VAttentionCache took, in bytes."""

    reserved: int
    """Addresses, which cost no memory."""
    peak: int
    """Physical memory."""

    @classmethod
    def of(cls, cache: VAttentionCache) -> OurSize:
        stats = cache.stats()
        # All layer types draw on one pool.
        peak = max(kv.peak_held_bytes for kv in stats.layer_types.values())
        return cls(stats.reserved_bytes, peak)
