"""Prompts that arrive beside live sequences: on created, pooled and adopted pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import vattention as va

from ..common import (
    Context,
    alternate,
    clock_us,
    heading,
    print_table,
    quantile,
    show_us,
    summarize_all,
)
from .allocators import (
    SEQUENCES,
    backend_for,
    close_allocator,
    layout_for,
    new_allocator,
    settle,
    synchronize_stream,
    trim_all,
)
from .busy import Busy, named, warn_if_idle

PROMPTS = 32


def run_arrivals(context: Context, busy: Busy | None) -> dict[str, Any]:
    layout, page_bytes = layout_for(context), backend_for(context).page_bytes
    live_tokens = 256
    prompts = np.geomspace(64, 8192, PROMPTS).astype(int).tolist()
    needed = sum(layout.mapped_bytes(n, page_bytes) for n in prompts)
    kv = new_allocator(
        context,
        max_seq_len=2 * max(prompts),
        memory=2 * needed + 2 * SEQUENCES * layout.mapped_bytes(live_tokens, page_bytes),
    )
    for _ in range(SEQUENCES - PROMPTS):
        kv.allocate(live_tokens)
    settle(kv)
    order = np.random.default_rng(0)
    by_prompt: dict[str, dict[int, list[float]]] = {}
    made: dict[str, list[dict[str, int]]] = {}

    def allocate(state: str, times: dict[str, float], busy: Busy | None) -> list[va.Sequence]:
        name = named(state, busy)
        arriving = order.permutation(prompts).tolist()
        before = kv.stats()
        context.synchronize()
        if busy is not None:
            busy.start(120e3 if state == "cold" else 60e3)
        sequences, calls = [], []
        began = clock_us()
        for tokens in arriving:
            started = clock_us()
            sequences.append(kv.allocate(tokens))
            calls.append(clock_us() - started)
        times[f"{state}_call_us"] = clock_us() - began
        synchronize_stream(context)
        times[f"{state}_ready_us"] = clock_us() - began
        times[f"{state}_longest_call_us"] = max(calls)
        if busy is not None:
            times[f"{state}_still_busy"] = float(busy.running())
            busy.wait()
        settle(kv)
        after = kv.stats()
        for tokens, us in zip(arriving, calls, strict=True):
            by_prompt.setdefault(name, {}).setdefault(tokens, []).append(us)
        made.setdefault(name, []).append(
            {
                "creates": after.pool.creates - before.pool.creates,
                "maps": after.pool.maps - before.pool.maps,
                "adoptions": after.adoptions - before.adoptions,
            }
        )
        return sequences

    def run_once(busy: Busy | None) -> dict[str, float]:
        times: dict[str, float] = {}
        sequences = allocate("cold", times, busy)
        adopted = kv.stats().adoptions
        for sequence in sequences:
            sequence.free()
        sequences = allocate("adopt", times, busy)
        assert kv.stats().adoptions == adopted + PROMPTS
        trim_all(context, kv, sequences, 0)
        for sequence in sequences:
            sequence.free()
        sequences = allocate("warm", times, busy)
        for sequence in sequences:
            sequence.free()
        context.synchronize()
        kv.reclaim()
        stats = kv.stats()
        assert stats.free_bytes == stats.cached_bytes == 0
        return times

    variants: dict[str, Callable[[], Mapping[str, float]]] = {"alone": lambda: run_once(None)}
    if busy is not None:
        variants["busy"] = lambda: run_once(busy)
    run_once(None)  # to warm up
    by_prompt.clear()
    made.clear()
    samples = alternate(variants, repetitions=context.pick(7, 5, 3), warmup=0)
    close_allocator(kv)
    heading(
        context,
        f"step: {PROMPTS} prompts of {min(prompts):,} to {max(prompts):,} tokens arrive "
        f"beside {SEQUENCES - PROMPTS} sequences",
    )
    print_table(
        ("", "all calls", "all ready", "longest call", "created", "mapped"),
        [
            (
                f"{state}{'' if name == 'alone' else ', busy'}",
                *(
                    show_us(quantile(metrics[f"{state}_{metric}_us"], 0.5))
                    for metric in ("call", "ready", "longest_call")
                ),
                *(
                    f"{quantile([one[what] for one in runs], 0.5):g}"
                    for what in ("creates", "maps")
                    for runs in (made[state if name == "alone" else f"{state}, busy"],)
                ),
            )
            for name, metrics in samples.items()
            for state in ("cold", "warm", "adopt")
        ],
    )
    warn_if_idle(samples)
    return {
        "prompts": prompts,
        "prompts_bytes": needed,
        "live_sequences": SEQUENCES - PROMPTS,
        "live_tokens_each": live_tokens,
        "times": summarize_all(samples),
        "made": made,
        "call_us_by_prompt": {
            name: [
                {"tokens": tokens, "median": quantile(us, 0.5), "max": max(us)}
                for tokens, us in sorted(prompt.items())
            ]
            for name, prompt in by_prompt.items()
        },
    }
