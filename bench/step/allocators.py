"""The allocators that are measured: what they are made of, and the waits until one is at rest."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import vattention as va
from vattention import _core

from ..common import Context, llama3_8b, small

SEQUENCES = 256
HOST_PAGE_BYTES = 8 << 10  # 16 tokens of the small shape: as many as a page holds on the GPU


def layout_for(context: Context) -> va.KVLayout:
    return llama3_8b() if context.cuda else small()


def backend_for(context: Context) -> _core.Backend:
    if context.cuda:
        return _core.cuda_backend(context.device.index)
    return _core.host_backend(HOST_PAGE_BYTES)


def new_allocator(
    context: Context,
    *,
    max_seq_len: int,
    memory: int,
    lookahead_tokens: int = 16,
    background: bool = True,
    backend: _core.Backend | None = None,
) -> va.KVAllocator:
    pool = va.Pool(
        memory,
        context.device,
        background=background,
        backend=backend_for(context) if backend is None else backend,
    )
    return va.KVAllocator(
        layout_for(context),
        max_sequences=SEQUENCES,
        max_seq_len=max_seq_len,
        pool=pool,
        lookahead_tokens=lookahead_tokens,
    )


def close_allocator(kv: va.KVAllocator) -> None:
    """Ends it and gives its memory back to the driver."""
    pool = kv.pool
    kv.close()
    pool.reclaim()
    assert pool.stats().held_bytes == 0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited 30 s in vain until {what}")
        time.sleep(0.0005)


def settle(kv: va.KVAllocator) -> None:
    """Until the background thread has had nothing to do for 20 ms."""
    seen, since = None, time.monotonic()
    while time.monotonic() - since < 0.02:
        stats = kv.stats()
        now = (stats.ahead_mappings, stats.ahead_failures, stats.pool.maps, stats.retired_bytes)
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.0005)


def trim_all(
    context: Context, kv: va.KVAllocator, sequences: list[va.Sequence], tokens: int
) -> None:
    """Trims them, and does not return before the pool has what they gave up."""
    for sequence in sequences:
        sequence.trim(tokens)
    context.synchronize()

    def unmapped() -> bool:
        sequences[0].trim(tokens)  # looks at the fences, where no thread does
        return kv.stats().retired_bytes == 0

    wait_until(unmapped, "what was trimmed is unmapped")


def synchronize_stream(context: Context) -> None:
    if context.cuda:
        torch.cuda.current_stream(context.device).synchronize()
