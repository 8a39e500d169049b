"""Backing one prompt: one page at a time, as the first vAttention did it, against extents.

One page at a time is measured in three ways, all of which make the same driver calls for each page:

- `page_calls`: create, map and set access for each page in C++, none of them shared between pages.
  This is the baseline of the ratios. It is our own core, given an address for each page such that
  no two pages that follow each other are neighbours, so that it cannot set access for both at once.
- `page_pool`: `Pool(max_extent=one page)`: create and map for each page, access for all at once.
- `page_python`: the backend's calls from Python, page after page. The time of as many calls that do
  nothing is measured beside it; the driver's part lies between the time with it and without it.

The floor of ours is the driver's time for the same extents, called from Python, that overhead taken
off; and, where memory is cleared, its bytes over the speed at which the device clears memory.

cold: every extent is created. warm: all come from the pool's free list. adopt: they are still
mapped in the slot of a sequence that was freed. call: until the function returns; ready: until the
device could run a kernel on what was mapped, synchronization included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

import vattention as va
from vattention import _core
from vattention.pool import MAX_EXTENT_BYTES

from .common import (
    Context,
    Samples,
    alternate,
    clock_us,
    describe_layout,
    heading,
    llama3_8b,
    measure_bandwidth,
    paired_ratio,
    print_table,
    show_bytes,
    show_spread,
    show_us,
    small,
    summarize,
    summarize_all,
)


def run(context: Context) -> dict[str, object]:
    bandwidth = measure_bandwidth(context)
    page_bytes = va.Pool(1 << 30, context.device).page_bytes
    results = []
    for tokens in context.pick([131_072, 8_192, 512], [16_384, 2_048, 256]):
        results.append(_run_size(context, tokens, page_bytes, bandwidth["clear_bytes_per_s"]))
    return {
        "page_bytes": page_bytes,
        **bandwidth,
        "layouts": {o: describe_layout(_layout(context, o)) for o in ("token", "layer")},
        "variants": __doc__,
        "sizes": results,
    }


def _layout(context: Context, order: str) -> va.KVLayout:
    return llama3_8b(order) if context.cuda else small(order)


def _run_size(
    context: Context, tokens: int, page_bytes: int, clear_bytes_per_s: float
) -> dict[str, object]:
    token_bytes = _layout(context, "token").token_bytes
    nbytes = -(-tokens * token_bytes // page_bytes) * page_bytes
    large = nbytes > (4 << 30)
    repetitions = context.pick(7 if large else 15, 7, 3)

    pages = _PageCalls(context, nbytes // page_bytes)
    ours = {
        f"{order}, {'cleared' if zero else 'not cleared'}": _Ours(
            context, _layout(context, order), tokens, zero=zero
        )
        for order in ("token", "layer")
        for zero in (False, True)
    }
    page_pool = _Ours(context, _layout(context, "token"), tokens, zero=False, max_extent=page_bytes)
    backend = _backend(context)
    extents = _extents(nbytes, page_bytes)
    variants: dict[str, Callable[[], Mapping[str, float]]] = {
        "page_calls": pages.run,
        "page_pool": page_pool.run,
        "page_python": lambda: _python_loop(
            context, backend, [page_bytes] * (nbytes // page_bytes)
        ),
        "driver_floor": lambda: _python_loop(context, backend, extents),
        **{name: variant.run for name, variant in ours.items()},
    }
    try:
        samples = alternate(variants, repetitions=repetitions)
    finally:
        pages.close()
        page_pool.close()
        for variant in ours.values():
            variant.close()

    floor_us = summarize(samples["driver_floor"]["cold_net_us"])["median"]
    clear_us = nbytes / clear_bytes_per_s * 1e6
    ratios = {
        name: {
            f"page_calls_over_ours_{metric}": paired_ratio(
                samples["page_calls"][metric], samples[name][metric]
            )
            for metric in ("cold_call_us", "cold_ready_us", "warm_call_us", "warm_ready_us")
        }
        for name in ours
    }
    result = {
        "tokens": tokens,
        "bytes": nbytes,
        "mapped_bytes": {name: variant.mapped_bytes for name, variant in ours.items()},
        "mappings": {
            "page_calls": nbytes // page_bytes,
            **{name: variant.mappings for name, variant in ours.items()},
        },
        "floor_driver_us": floor_us,
        "floor_clear_us": clear_us,
        "floor_extents_bytes": extents,
        "times": summarize_all(samples),
        "ratios": ratios,
    }
    _show(context, result, samples, ours)
    return result


def _show(context: Context, result: dict, samples: Samples, ours: Mapping[str, _Ours]) -> None:
    heading(context, f"map: {result['tokens']:,} tokens, {show_bytes(result['bytes'])}")
    ratios = result["ratios"]
    rows = []
    for state in ("cold", "warm", "adopt"):
        for name, metrics in samples.items():
            if f"{state}_ready_us" not in metrics:
                continue
            ready = summarize(metrics[f"{state}_ready_us"])
            floor = 0.0
            if name in ours:
                floor = result["floor_driver_us"] if state == "cold" else 0.0
                # A cold extent is cleared too where the backend does not promise zeros.
                if "not cleared" not in name and (context.cuda or state != "cold"):
                    floor += result["floor_clear_us"]
            ratio = ratios.get(name, {}).get(f"page_calls_over_ours_{state}_ready_us")
            rows.append(
                (
                    f"{state}: {name}",
                    show_us(summarize(metrics[f"{state}_call_us"])["median"]),
                    show_us(ready["median"]),
                    show_spread(ready),
                    show_us(floor) if floor else "",
                    f"{ratio['median']:.1f}x" if ratio else "",
                )
            )
    print_table(("", "call", "ready", "p10 - p90", "floor", "page_calls / ours"), rows)
    python = {k: summarize(v)["median"] for k, v in samples["page_python"].items()}
    floor = {k: summarize(v)["median"] for k, v in samples["driver_floor"].items()}
    print(
        f"page_python: {show_us(python['cold_call_us'])}, of which the calls themselves "
        f"{show_us(python['python_overhead_us'])}; giving it back {show_us(python['release_us'])}\n"
        f"driver_floor, the same in {len(result['floor_extents_bytes'])} extents: "
        f"{show_us(floor['cold_net_us'])}; giving it back {show_us(floor['release_us'])}"
    )
    rows = [
        (
            name,
            show_us(summarize(samples[name]["free_us"])["median"]),
            show_us(summarize(samples[name]["unmap_us"])["median"]),
            show_us(summarize(samples[name]["release_us"])["median"]),
        )
        for name in (*ours, "page_pool")
    ]
    print_table(("", "free (stays mapped)", "unmap (to the pool)", "reclaim (to the driver)"), rows)


def _extents(nbytes: int, page_bytes: int) -> list[int]:
    """The sizes a pool takes with its defaults: powers of two, up to the largest."""
    sizes = []
    while nbytes > 0:
        size = page_bytes
        while size * 2 <= min(nbytes, MAX_EXTENT_BYTES):
            size *= 2
        sizes.append(size)
        nbytes -= size
    return sizes


def _backend(context: Context) -> _core.Backend:
    if context.cuda:
        return _core.cuda_backend(context.device.index)
    return _core.host_backend(64 << 10)


def _python_loop(context: Context, backend: _core.Backend, sizes: list[int]) -> dict[str, float]:
    """Create, map and set access, one extent after the other, from Python."""
    total = sum(sizes)
    base = backend.reserve(total)
    handles = []
    context.synchronize()
    started = clock_us()
    address = base
    for size in sizes:
        handle = backend.create(size)
        backend.map(address, size, handle)
        backend.set_access(address, size, "read_write")
        handles.append(handle)
        address += size
    called = clock_us()
    context.synchronize()
    ready = clock_us()

    # The same loop around calls that do next to nothing. A query releases the GIL and makes the
    # context current, as the three do, so it takes off rather more than Python's own share.
    fence = backend.create_fence()
    overhead_started = clock_us()
    address = base
    for size in sizes:
        backend.query(fence)
        backend.query(fence)
        backend.query(fence)
        address += size
    overhead = clock_us() - overhead_started
    page_bytes_started = clock_us()
    for _ in sizes:
        _ = backend.page_bytes
        _ = backend.page_bytes
        _ = backend.page_bytes
    least_overhead = clock_us() - page_bytes_started
    backend.destroy_fence(fence)

    release_started = clock_us()
    address = base
    for size, handle in zip(sizes, handles, strict=True):
        backend.unmap(address, size)
        backend.destroy(handle)
        address += size
    context.synchronize()
    released = clock_us()
    backend.unreserve(base, total)
    return {
        "cold_call_us": called - started,
        "cold_ready_us": ready - started,
        "cold_net_us": called - started - overhead,
        "python_overhead_us": overhead,
        "python_least_overhead_us": least_overhead,
        "release_us": released - release_started,
    }


class _PageCalls:
    """One page at a time in C++: an allocator in which no two pages can share a driver call.

    Every slot has two regions of one page each, and the second region's page lies before the
    first's. So a batch of slots covers its addresses without a gap, in the order 1, 0, 3, 2, ...
    """

    def __init__(self, context: Context, pages: int) -> None:
        self.context = context
        pool = va.Pool(
            (pages + 2) * _page_bytes(context),
            context.device,
            max_extent=_page_bytes(context),
            zero=False,
            background=False,
        )
        page = pool.page_bytes
        self.slots = max(1, pages // 2)
        self.pool: va.Pool | None = pool
        self.core: _core.Allocator | None = _core.Allocator(
            pool=pool._core,
            regions=[(page, 2 * page, page), (0, 2 * page, page)],
            reserved_bytes=2 * self.slots * page,
            max_extent_bytes=page,
            max_sequences=self.slots,
            max_seq_len=1,
            tail_slack_tokens=0,
            guard_pages=0,
            lookahead_tokens=0,
            fence_timeout_ms=30_000,
        )

    def run(self) -> dict[str, float]:
        assert self.core is not None and self.pool is not None
        core, pool, synchronize = self.core, self.pool, self.context.synchronize
        stream = 0
        if self.context.cuda:
            stream = torch.cuda.current_stream(self.context.device).cuda_stream
        times: dict[str, float] = {}

        def allocate(state: str) -> list[tuple[int, int]]:
            synchronize()
            started = clock_us()
            ids = core.allocate(self.slots, 1, stream)
            called = clock_us()
            synchronize()
            times[f"{state}_call_us"] = called - started
            times[f"{state}_ready_us"] = clock_us() - started
            return ids

        before = pool.stats()
        ids = allocate("cold")
        after = pool.stats()
        assert after.creates - before.creates == after.maps - before.maps == 2 * self.slots
        while pool.stats().free_bytes < pool.stats().held_bytes:
            for slot, generation in ids:
                core.trim(slot, generation, 0, stream)
            synchronize()
        for slot, generation in ids:
            core.free(slot, generation, stream)
        ids = allocate("warm")
        assert pool.stats().creates == after.creates
        for slot, generation in ids:
            core.free(slot, generation, stream)
        synchronize()
        pool.reclaim()
        assert pool.stats().held_bytes == 0
        return times

    def close(self) -> None:
        if self.core is not None:
            self.core.close()
        self.core = self.pool = None


def _page_bytes(context: Context) -> int:
    return _backend(context).page_bytes


class _Ours:
    """An allocator with room for one prompt."""

    def __init__(
        self,
        context: Context,
        layout: va.KVLayout,
        tokens: int,
        *,
        zero: bool,
        max_extent: int | None = None,
    ) -> None:
        self.context = context
        self.tokens = tokens
        page_bytes = _page_bytes(context)
        self.mapped_bytes = layout.mapped_bytes(tokens, page_bytes)
        self.mappings = 0
        self.kv: va.KVAllocator | None = va.KVAllocator(
            layout,
            max_sequences=1,
            max_seq_len=tokens,
            memory=self.mapped_bytes,
            device=context.device,
            lookahead_tokens=0,  # so that trim(0) leaves nothing mapped
            zero=zero,
            background=False,
            max_extent=max_extent,
        )

    def run(self) -> dict[str, float]:
        assert self.kv is not None
        kv, synchronize = self.kv, self.context.synchronize
        times: dict[str, float] = {}

        def allocate(state: str) -> va.Sequence:
            synchronize()
            started = clock_us()
            sequence = kv.allocate(self.tokens)
            called = clock_us()
            synchronize()
            times[f"{state}_call_us"] = called - started
            times[f"{state}_ready_us"] = clock_us() - started
            return sequence

        assert kv.stats().held_bytes == 0
        sequence = allocate("cold")
        cold = kv.stats()
        assert cold.held_bytes == self.mapped_bytes
        self.mappings = cold.pool.mappings
        started = clock_us()
        sequence.free()
        times["free_us"] = clock_us() - started
        sequence = allocate("adopt")
        adopted = kv.stats()
        assert adopted.adoptions == cold.adoptions + 1 and adopted.pool.maps == cold.pool.maps

        # Where the fence has not passed yet when trim looks, the next trim unmaps.
        started = clock_us()
        sequence.trim(0)
        while kv.stats().free_bytes < self.mapped_bytes:
            synchronize()
            sequence.trim(0)
        times["unmap_us"] = clock_us() - started
        sequence.free()
        sequence = allocate("warm")
        assert kv.stats().pool.creates == cold.pool.creates
        sequence.free()
        synchronize()
        started = clock_us()
        kv.reclaim()
        synchronize()
        times["release_us"] = clock_us() - started
        assert kv.stats().held_bytes == 0
        return times

    def close(self) -> None:
        if self.kv is not None:
            self.kv.close()
        self.kv = None
