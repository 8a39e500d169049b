"""The driver's own time for a page: the floor of a step that maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from .allocators import backend_for
from .busy import Busy, warn_if_idle


def driver_costs(context: Context, busy: Busy | None) -> dict[str, Any]:
    """The driver's time for one page: calls from Python, less what a call that does little takes.

    No two pages are neighbours, so that none shares a call, as it is with pages of different
    sequences.
    """
    backend = backend_for(context)
    page_bytes = backend.page_bytes
    count = 256
    base = backend.reserve(2 * count * page_bytes)
    addresses = [base + 2 * i * page_bytes for i in range(count)]
    handles: list[int] = []
    fence = backend.create_fence()

    def timed(work: Callable[[int], object]) -> float:
        started = clock_us()
        for i in range(count):
            work(i)
        return (clock_us() - started) / count

    def measure(busy: Busy | None) -> dict[str, float]:
        handles.clear()
        context.synchronize()
        if busy is not None:
            busy.start(150e3)
        overhead = timed(lambda _: backend.query(fence))
        times = {
            "create_us": timed(lambda _: handles.append(backend.create(page_bytes))),
            "map_us": timed(lambda i: backend.map(addresses[i], page_bytes, handles[i])),
            "access_us": timed(
                lambda i: backend.set_access(addresses[i], page_bytes, "read_write")
            ),
        }
        still_busy = busy is not None and busy.running()
        context.synchronize()
        undone = {
            "unmap_us": timed(lambda i: backend.unmap(addresses[i], page_bytes)),
            "destroy_us": timed(lambda i: backend.destroy(handles[i])),
        }
        if busy is None:
            times |= undone
        times = {name: max(0.0, us - overhead) for name, us in times.items()}
        times["call_overhead_us"] = overhead
        if busy is not None:
            times["still_busy"] = float(still_busy)
        return times

    variants = {"alone": lambda: measure(None)}
    if busy is not None:
        variants["busy"] = lambda: measure(busy)
    samples = alternate(variants, repetitions=context.pick(5, 3, 3))
    backend.destroy_fence(fence)
    backend.unreserve(base, 2 * count * page_bytes)

    heading(context, "step: the driver's time for one page")
    metrics = ("create_us", "map_us", "access_us", "unmap_us", "destroy_us")
    print_table(
        ("", *(metric.removesuffix("_us") for metric in metrics)),
        [
            (
                name,
                *(
                    show_us(quantile(measured[metric], 0.5)) if metric in measured else ""
                    for metric in metrics
                ),
            )
            for name, measured in samples.items()
        ],
    )
    warn_if_idle(samples)
    return summarize_all(samples)
