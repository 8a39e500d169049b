"""A step that maps by itself: so many sequences reach a new page at once, and the floor of that."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    synchronize_stream,
    trim_all,
)
from .busy import Busy, named, warn_if_idle


def run_crossing(context: Context, busy: Busy | None, driver: dict[str, Any]) -> dict[str, Any]:
    layout, page_bytes = layout_for(context), backend_for(context).page_bytes
    tokens = 16 * layout.tokens_per_page(page_bytes)
    kv = new_allocator(
        context,
        max_seq_len=2 * tokens,
        memory=SEQUENCES * layout.mapped_bytes(2 * tokens, page_bytes),
        lookahead_tokens=0,
        background=False,
    )
    sequences = kv.allocate_batch(SEQUENCES, tokens)
    pages = layout.num_regions  # of one sequence that reaches a new page

    def run_once(count: int, busy: Busy | None) -> dict[str, float]:
        lengths = np.zeros(SEQUENCES, np.int64)
        lengths[:count] = tokens + 1
        times: dict[str, float] = {}
        for state in ("cold", "warm"):
            before = kv.stats()
            context.synchronize()
            if busy is not None:
                busy.start(10e3 + 300 * count)
            started = clock_us()
            kv.step(lengths)
            times[f"{state}_call_us"] = clock_us() - started
            synchronize_stream(context)
            times[f"{state}_ready_us"] = clock_us() - started
            if busy is not None:
                times[f"{state}_still_busy"] = float(busy.running())
                busy.wait()
            after = kv.stats()
            assert after.pool.maps - before.pool.maps == count * pages
            created = after.pool.creates - before.pool.creates
            assert created == (count * pages if state == "cold" else 0)
            trim_all(context, kv, sequences, tokens)
        kv.reclaim()
        assert kv.stats().free_bytes == 0
        return times

    counts = (1, 16, 64, SEQUENCES)
    variants = {
        named(f"{count} of {SEQUENCES}", mode): (
            lambda count=count, mode=mode: run_once(count, mode)
        )
        for count in counts
        for mode in ((None,) if busy is None else (None, busy))
    }
    samples = alternate(variants, repetitions=context.pick(7, 5, 3))
    close_allocator(kv)

    floors = {}
    for count in counts:
        for name, costs in driver.items():
            create, mapping, access = (
                costs[f"{call}_us"]["median"] for call in ("create", "map", "access")
            )
            floors[named(f"{count} of {SEQUENCES}", busy if name == "busy" else None)] = {
                "cold_us": count * pages * (create + mapping + access),
                "warm_us": count * pages * (mapping + access),
            }
    heading(context, "step: so many sequences reach a new page at once, nothing mapped ahead")
    print_table(
        ("", "cold: call", "ready", "floor", "warm: call", "ready", "floor"),
        [
            (
                name,
                *(
                    show_us(us)
                    for state in ("cold", "warm")
                    for us in (
                        quantile(metrics[f"{state}_call_us"], 0.5),
                        quantile(metrics[f"{state}_ready_us"], 0.5),
                        floors[name][f"{state}_us"],
                    )
                ),
            )
            for name, metrics in samples.items()
        ],
    )
    warn_if_idle(samples)
    return {
        "tokens_before": tokens,
        "pages_of_a_sequence": pages,
        "floors": floors,
        "times": summarize_all(samples),
    }
