"""`Pool`: the budget, the watermarks, and what allocators that share one take from each other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vattention as va
from vattention import _core

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
HOST_PAGE_BYTES = 4096

# One region, 256 bytes a token: a page of the host holds 16 tokens, one of CUDA 8,192.
ONE = va.KVLayout.latent(num_layers=1, latent_dim=128, dtype=torch.bfloat16)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def page_bytes(device: str) -> int:
    return HOST_PAGE_BYTES if device == "cpu" else _core.cuda_backend(0).page_bytes


def make_pool(
    device: str,
    pages: int,
    *,
    max_extent: int | None = None,
    low: int = 0,
    high: int | None = None,
    background: bool = False,
    backend: _core.Backend | None = None,
) -> va.Pool:
    """A pool whose sizes are given in pages."""
    page = page_bytes(device)
    return va.Pool(
        pages * page,
        device,
        page_bytes=page if device == "cpu" and backend is None else None,
        max_extent=None if max_extent is None else max_extent * page,
        low_watermark=low * page,
        high_watermark=None if high is None else high * page,
        background=background,
        backend=backend,
    )


class Slots:
    """An allocator in which sequences are counted in pages."""

    def __init__(self, pool: va.Pool, *, max_extent: int | None = None, **options: Any) -> None:
        self.page_tokens = ONE.tokens_per_page(pool.page_bytes)
        self.kv = va.KVAllocator(
            ONE,
            pool=pool,
            max_sequences=4,
            max_seq_len=256 * self.page_tokens,
            max_extent=None if max_extent is None else max_extent * pool.page_bytes,
            **({"lookahead_tokens": 0} | options),
        )

    def allocate(self, pages: int) -> va.Sequence:
        return self.kv.allocate(pages * self.page_tokens)

    def grow(self, seq: va.Sequence, pages: int) -> None:
        self.kv.step({seq: pages * self.page_tokens})

    def fill(self, seq: va.Sequence, value: int) -> None:
        self.kv.layer(0)[0][seq.slot, : seq.length] = value

    def holds(self, seq: va.Sequence, value: int) -> bool:
        return bool((self.kv.layer(0)[0][seq.slot, : seq.length] == value).all())

    def extents(self) -> list[int]:
        """The sizes of the mappings, in pages."""
        return sorted(size // self.kv.pool.page_bytes for *_, size, _, _ in self.kv.mappings())


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
        time.sleep(0.001)


def pages(pool: va.Pool, figure: str) -> float:
    return getattr(pool.stats(), figure) / pool.page_bytes


# ---- the budget ----


def test_raising_the_budget_lets_live_sequences_grow(device: str) -> None:
    pool = make_pool(device, 8)
    slots = Slots(pool)
    seq = slots.allocate(6)
    slots.fill(seq, 3)
    with pytest.raises(va.OutOfPages):
        slots.grow(seq, 12)
    pool.set_budget(12 * pool.page_bytes)
    assert pool.budget_bytes == 12 * pool.page_bytes
    slots.grow(seq, 12)
    assert pages(pool, "held_bytes") == 12
    pool.check()


def test_lowering_the_budget_gives_idle_memory_back_at_once(device: str) -> None:
    pool = make_pool(device, 32, max_extent=1)
    slots = Slots(pool)
    live, freed = slots.allocate(4), slots.allocate(8)
    slots.fill(live, 3)
    other = Slots(pool)
    other.allocate(6)
    other.kv.close()
    del other  # its pages are free, those of `freed` are still mapped
    freed.free()
    assert pages(pool, "held_bytes") == 18
    assert pages(pool, "free_bytes") == 6
    pool.set_budget(14 * pool.page_bytes)
    assert pages(pool, "held_bytes") == 14
    pool.set_budget(4 * pool.page_bytes)
    assert pages(pool, "held_bytes") == 4
    assert slots.holds(live, 3)
    with pytest.raises(va.OutOfPages) as caught:
        slots.grow(live, 5)
    assert caught.value.budget == 4 * pool.page_bytes
    pool.check()


def test_lowering_the_budget_breaks_up_extents_that_are_larger_than_the_excess(
    device: str,
) -> None:
    pool = make_pool(device, 16)
    slots = Slots(pool)
    slots.allocate(16).free()
    assert slots.extents() == [16]
    pool.set_budget(15 * pool.page_bytes)
    assert pages(pool, "held_bytes") == 0
    pool.check()


def test_lowering_the_budget_takes_what_live_sequences_do_not_need(device: str) -> None:
    pool = make_pool(device, 16, max_extent=1)
    slots = Slots(pool, lookahead_tokens=4 * ONE.tokens_per_page(pool.page_bytes))
    seq = slots.allocate(9)
    slots.fill(seq, 3)
    seq.trim(3 * slots.page_tokens)
    assert slots.kv.stats().mapped_bytes == 7 * pool.page_bytes
    pool.set_budget(3 * pool.page_bytes)
    assert pages(pool, "held_bytes") == 3
    assert slots.holds(seq, 3)
    slots.kv.check()


def test_lowering_the_budget_below_what_lives_changes_nothing(device: str) -> None:
    pool = make_pool(device, 16)
    slots = Slots(pool)
    seq = slots.allocate(8)
    slots.fill(seq, 3)
    before = pool.stats(), slots.kv.mappings()
    with pytest.raises(va.OutOfPages) as caught:
        pool.set_budget(7 * pool.page_bytes)
    assert caught.value.needed == 8 * pool.page_bytes
    assert caught.value.budget == 16 * pool.page_bytes
    assert (caught.value.free, caught.value.reclaimable) == (0, 0)
    assert (pool.stats(), slots.kv.mappings()) == before
    slots.grow(seq, 16)
    pool.check()


@pytest.mark.parametrize("memory", [0, -1, 1, HOST_PAGE_BYTES - 1, "much", 1.5, None])
def test_a_budget_that_makes_no_sense_is_refused(memory: Any) -> None:
    pool = make_pool("cpu", 8)
    with pytest.raises(va.ConfigError):
        pool.set_budget(memory)
    assert pool.budget_bytes == 8 * HOST_PAGE_BYTES
    if memory is not None:
        with pytest.raises(va.ConfigError):
            va.Pool(memory, "cpu", page_bytes=HOST_PAGE_BYTES)


def test_held_bytes_never_exceed_the_budget(device: str) -> None:
    pool = make_pool(device, 10, max_extent=4)
    slots = Slots(pool)
    seq = slots.allocate(1)
    for size in range(1, 11):
        slots.grow(seq, size)
        assert pages(pool, "held_bytes") == size
    assert pages(pool, "peak_held_bytes") == 10
    seq.free()
    pool.reclaim()
    assert pages(pool, "held_bytes") == 0
    assert pages(pool, "peak_held_bytes") == 10


def test_sizes_may_be_text() -> None:
    pool = va.Pool(
        "1MiB",
        "cpu",
        page_bytes=HOST_PAGE_BYTES,
        max_extent="16KiB",
        low_watermark="8 KiB",
        high_watermark="0.5MiB",
        background=False,
    )
    assert pool.budget_bytes == 1 << 20
    assert pool.max_extent_bytes == 16 << 10
    pool.set_budget("2 MB")
    assert pool.budget_bytes == 2_000_000
    pool.set_watermarks(low="4KiB", high="1MiB")
    pool.set_watermarks(low="0", high="0GiB")
    assert repr(pool) == "Pool(cpu, 0 of 2000000 bytes held)"


def test_the_budget_is_what_is_free_unless_it_is_given(device: str) -> None:
    pool = va.Pool(device=device, background=False)
    assert pool.budget_bytes > 64 << 20
    assert pool.stats().held_bytes == 0


# ---- watermarks ----


@pytest.mark.parametrize("when", ["from-the-start", "set-later"])
def test_the_low_watermark_is_kept_free_in_the_background(device: str, when: str) -> None:
    pool = make_pool(
        device, 32, max_extent=1, low=6 if when == "from-the-start" else 0, background=True
    )
    if when == "set-later":
        pool.set_watermarks(low=6 * pool.page_bytes)
    until(lambda: pages(pool, "free_bytes") == 6)
    slots = Slots(pool)
    seq = slots.allocate(4)  # from what was created before
    until(lambda: pages(pool, "free_bytes") == 6)
    slots.grow(seq, 9)
    until(lambda: pages(pool, "free_bytes") == 6)
    assert pages(pool, "held_bytes") == 15
    pool.check()


def test_the_low_watermark_does_not_exceed_the_budget(device: str) -> None:
    pool = make_pool(device, 8, max_extent=1, background=True)
    slots = Slots(pool)
    seq = slots.allocate(3)
    pool.set_watermarks(low=100 * pool.page_bytes)
    until(lambda: pages(pool, "free_bytes") == 5)
    slots.grow(seq, 8)
    assert pages(pool, "held_bytes") == 8
    pool.check()


@pytest.mark.parametrize("max_extent", [1, 8])
@pytest.mark.parametrize("background", [False, True])
def test_idle_memory_above_the_high_watermark_goes_back(
    device: str, background: bool, max_extent: int
) -> None:
    pool = make_pool(device, 64, max_extent=max_extent, high=5, background=background)
    slots = Slots(pool)
    live = slots.allocate(8)
    slots.fill(live, 3)
    freed = [slots.allocate(8) for _ in range(2)]
    assert pages(pool, "held_bytes") == 24
    for seq in freed:
        seq.free()
    if device == "cuda":
        torch.cuda.synchronize()
        pool.set_watermarks(high=5 * pool.page_bytes)  # another occasion to look
    until(lambda: pages(pool, "held_bytes") <= 8 + 5)
    if max_extent == 1:
        assert pages(pool, "held_bytes") == 8 + 5  # and no more than that
    assert slots.holds(live, 3)
    pool.check()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("operation", ["trim", "trim_front"])
def test_memory_that_a_live_sequence_gives_up_is_idle_too(
    device: str, operation: str, background: bool
) -> None:
    pool = make_pool(device, 64, max_extent=1, high=2, background=background)
    slots = Slots(pool)
    seq = slots.allocate(16)
    if device == "cuda":
        torch.cuda.synchronize()
    if operation == "trim":
        seq.trim(2 * slots.page_tokens)
    else:
        seq.trim_front(14 * slots.page_tokens)
    if device == "cpu" and not background:
        assert pages(pool, "held_bytes") == 4
    if device == "cuda":
        torch.cuda.synchronize()
        seq.trim(seq.length)  # another occasion to look
    until(lambda: pages(pool, "held_bytes") == 4)
    pool.check()


def test_the_high_watermark_is_kept_when_surplus_is_taken_from_a_live_sequence() -> None:
    pool = make_pool("cpu", 20, max_extent=4, background=True)
    slots = Slots(pool)
    slots.allocate(16).free()
    live = slots.allocate(0)  # has adopted it all
    pool.set_watermarks(high=0)
    assert slots.extents() == [4] * 4
    other = slots.allocate(8)
    assert live.alive
    until(lambda: pages(pool, "held_bytes") == 8)
    assert slots.holds(other, 0)
    pool.check()


def test_a_high_watermark_of_zero_keeps_nothing_idle(device: str) -> None:
    pool = make_pool(device, 64)
    slots = Slots(pool)
    slots.allocate(8).free()
    if device == "cuda":
        torch.cuda.synchronize()
    pool.set_watermarks(high=0)
    assert pages(pool, "held_bytes") == 0
    assert slots.kv.mappings() == []
    pool.check()


def test_watermarks_that_cross_are_refused() -> None:
    with pytest.raises(va.ConfigError, match="low watermark is above the high"):
        make_pool("cpu", 8, low=3, high=2)
    pool = make_pool("cpu", 8)
    with pytest.raises(va.ConfigError, match="low watermark is above the high"):
        pool.set_watermarks(low=3, high=2)
    with pytest.raises(va.ConfigError, match="low"):
        pool.set_watermarks(low=-1)


# ---- reclaim ----


def test_reclaim_gives_all_idle_memory_back(device: str) -> None:
    pool = make_pool(device, 64)
    slots = Slots(pool)
    live, freed, trimmed = slots.allocate(3), slots.allocate(8), slots.allocate(9)
    slots.fill(live, 3)
    freed.free()
    trimmed.trim(0)
    assert pool.reclaim() == 17 * pool.page_bytes
    assert pages(pool, "held_bytes") == 3
    assert pages(pool, "free_bytes") == 0
    assert pool.reclaim() == 0
    assert slots.holds(live, 3)
    slots.grow(trimmed, 4)
    pool.check()


def host_pool_with_held_fences(pages: int) -> tuple[_core.FaultyBackend, va.Pool]:
    backend = _core.FaultyBackend(_core.host_backend(HOST_PAGE_BYTES))
    pool = make_pool("cpu", pages, backend=backend)
    backend.hold_fences()
    return backend, pool


def test_reclaim_waits_for_the_gpu() -> None:
    backend, pool = host_pool_with_held_fences(16)
    slots = Slots(pool)
    slots.allocate(8).free()
    gone: list[int] = []
    thread = threading.Thread(target=lambda: gone.append(pool.reclaim()))
    thread.start()
    asked = backend.calls().get("query", 0)
    until(lambda: backend.calls().get("query", 0) > asked + 10)
    assert "unmap" not in backend.calls()
    backend.release_fences()
    thread.join(10)
    assert gone == [8 * HOST_PAGE_BYTES]
    assert pages(pool, "held_bytes") == 0


def test_memory_that_the_gpu_does_not_finish_with_is_out_of_pages_in_time() -> None:
    backend, pool = host_pool_with_held_fences(16)
    slots = Slots(pool, fence_timeout_s=0.02)
    freed, live = slots.allocate(8), slots.allocate(8)
    freed.free()
    with pytest.raises(va.OutOfPages, match="GPU did not finish") as caught:
        slots.grow(live, 12)
    assert caught.value.reclaimable == 8 * HOST_PAGE_BYTES
    assert live.length == 8 * slots.page_tokens
    with pytest.raises(va.OutOfPages, match="GPU did not finish"):
        pool.set_budget(8 * HOST_PAGE_BYTES)
    assert pages(pool, "budget_bytes") == 16
    pool.check()
    backend.release_fences()
    slots.grow(live, 12)
    pool.check()


def test_idle_memory_goes_back_once_the_gpu_has_passed_its_last_use() -> None:
    backend = _core.FaultyBackend(_core.host_backend(HOST_PAGE_BYTES))
    pool = make_pool("cpu", 16, high=2, max_extent=1, background=True, backend=backend)
    slots = Slots(pool)
    backend.hold_fences()
    slots.allocate(8).free()
    asked = backend.calls()["query"]
    pool.set_watermarks(high=2 * HOST_PAGE_BYTES)
    until(lambda: backend.calls()["query"] > asked)  # the thread has looked, in vain
    assert pages(pool, "held_bytes") == 8
    backend.release_fences()
    until(lambda: pages(pool, "held_bytes") == 2)
    pool.check()


def test_reclaim_that_fails_while_it_waits_leaves_the_allocator_to_be_closed() -> None:
    backend, pool = host_pool_with_held_fences(16)
    slots = Slots(pool)
    slots.allocate(8).free()
    errors: list[va.BackendError] = []

    def reclaim() -> None:
        with pytest.raises(va.BackendError) as caught:
            pool.reclaim()
        errors.append(caught.value)

    thread = threading.Thread(target=reclaim, daemon=True)
    thread.start()
    until(lambda: backend.calls().get("query", 0) > 10)
    backend.arm("unmap")
    backend.release_fences()
    thread.join(10)
    assert [error.call for error in errors] == ["unmap"]
    pool.check()
    assert slots.kv.stats().cached_bytes == 8 * HOST_PAGE_BYTES

    owned = [slots]
    del slots
    closing = threading.Thread(target=owned.clear, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert pages(pool, "free_bytes") == 8


def test_a_freed_slot_that_the_driver_will_not_unmap_is_left_for_last() -> None:
    backend = _core.FaultyBackend(_core.host_backend(HOST_PAGE_BYTES))
    pool = make_pool("cpu", 16, max_extent=1, backend=backend)
    slots, other = Slots(pool), Slots(pool)
    first, second, third = (slots.allocate(4) for _ in range(3))
    for seq in (first, second, third):
        seq.free()
    backend.arm("unmap")
    taker = other.allocate(8)  # the first is the oldest, and is refused
    assert {slot for slot, *_ in slots.kv.mappings()} == {first.slot, third.slot}
    backend.arm("unmap", 2)
    other.grow(taker, 12)  # the first would be the second that is tried
    assert {slot for slot, *_ in slots.kv.mappings()} == {first.slot}
    # Where nothing else is left, what the driver says is the answer.
    with pytest.raises(va.BackendError, match="unmap failed"):
        other.grow(taker, 16)
    backend.disarm()
    other.grow(taker, 16)
    assert slots.kv.mappings() == []
    pool.check()


def test_reclaim_gives_back_all_but_what_the_driver_will_not_unmap() -> None:
    backend = _core.FaultyBackend(_core.host_backend(HOST_PAGE_BYTES))
    pool = make_pool("cpu", 64, backend=backend)
    slots = Slots(pool)
    slots.allocate(16).trim(0)
    backend.arm("unmap", 2, sticky=True)
    for seq in [slots.allocate(4), slots.allocate(8)]:
        seq.free()
    with pytest.raises(va.BackendError, match="unmap failed"):
        pool.reclaim()
    assert pages(pool, "held_bytes") == 8
    assert pages(pool, "free_bytes") == 0
    backend.disarm()
    assert pool.reclaim() == 8 * HOST_PAGE_BYTES
    pool.check()


# ---- allocators that share a pool ----


def test_one_allocator_takes_what_the_other_freed(device: str) -> None:
    pool = make_pool(device, 16, max_extent=1)
    first, second = Slots(pool), Slots(pool)
    seq = first.allocate(12)
    first.fill(seq, 3)
    taker = second.allocate(4)
    with pytest.raises(va.OutOfPages) as caught:
        second.grow(taker, 8)
    assert (caught.value.free, caught.value.reclaimable) == (0, 0)
    assert caught.value.needed == 4 * pool.page_bytes

    seq.free()
    with pytest.raises(va.OutOfPages) as caught:
        second.grow(taker, 17)
    assert caught.value.reclaimable == 12 * pool.page_bytes
    stats = first.kv.stats()
    assert stats.cached_bytes + stats.retired_bytes == 12 * pool.page_bytes  # still there

    second.grow(taker, 14)
    assert second.holds(taker, 0)  # nothing of the other's bytes
    assert pages(pool, "held_bytes") <= 16
    assert first.kv.stats().held_bytes == second.kv.stats().held_bytes
    first.kv.check()
    second.kv.check()


def test_closing_one_allocator_leaves_its_memory_to_the_other(device: str) -> None:
    pool = make_pool(device, 8, max_extent=1)
    first, second = Slots(pool), Slots(pool)
    first.fill(first.allocate(8), 3)
    first.kv.close()
    del first
    assert pages(pool, "free_bytes") == 8
    creates = pool.stats().creates
    seq = second.allocate(8)
    assert pool.stats().creates == creates
    assert second.holds(seq, 0)
    pool.check()


def test_large_extents_are_had_where_only_small_ones_are_free(device: str) -> None:
    pool = make_pool(device, 16, max_extent=8)
    small, large = Slots(pool, max_extent=1), Slots(pool)
    live = small.allocate(4)
    small.fill(live, 3)
    freed = small.allocate(12)
    freed.free()
    assert pages(pool, "held_bytes") == 16
    seq = large.allocate(8)
    assert large.extents() == [8]
    assert large.holds(seq, 0)
    assert small.holds(live, 3)
    assert pages(pool, "peak_held_bytes") == 16
    pool.check()


def test_small_extents_are_had_where_only_large_ones_are_free(device: str) -> None:
    pool = make_pool(device, 16, max_extent=8)
    small, large = Slots(pool, max_extent=1), Slots(pool)
    live = large.allocate(8)
    large.fill(live, 3)
    large.allocate(8).free()
    assert pages(pool, "held_bytes") == 16
    seq = small.allocate(5)
    assert small.extents() == [1] * 5
    assert small.holds(seq, 0)
    assert large.holds(live, 3)
    assert pages(pool, "peak_held_bytes") == 16
    pool.check()


def test_sizes_are_not_exchanged_while_the_budget_has_room(device: str) -> None:
    pool = make_pool(device, 16, max_extent=8)
    small, large = Slots(pool, max_extent=1), Slots(pool)
    small.allocate(8).free()
    small.kv.close()
    del small
    large.allocate(8)
    assert pool.stats().destroys == 0
    assert pages(pool, "free_bytes") == 8


def test_calls_are_counted_as_the_driver_sees_them() -> None:
    backend = _core.FaultyBackend(_core.host_backend(HOST_PAGE_BYTES))
    pool = make_pool("cpu", 64, backend=backend)

    def assert_counted() -> None:
        stats, calls = pool.stats(), backend.calls()
        figures = {"create": stats.creates, "map": stats.maps, "unmap": stats.unmaps}
        assert figures == {call: calls.get(call, 0) for call in figures}

    slots = Slots(pool, tail_slack_tokens=64)
    assert_counted()  # its guard has been mapped once, to be cleared
    seq = slots.kv.allocate(1)
    assert any(access == "read" for *_, access in slots.kv.mappings())
    slots.grow(seq, 20)  # the guard makes room
    assert_counted()
    seq.trim(0)
    slots.allocate(3)
    slots.kv.close()
    del slots, seq
    assert_counted()
    assert pool.stats().mappings == 0


# ---- settings ----


@pytest.mark.parametrize(
    "max_extent",
    [0, 1, HOST_PAGE_BYTES // 2, 3 * HOST_PAGE_BYTES, HOST_PAGE_BYTES + 1, 2**45, "big", 1.5],
)
def test_max_extent_must_be_a_power_of_two_times_the_page(max_extent: Any) -> None:
    with pytest.raises(va.ConfigError, match="max_extent"):
        va.Pool("1MiB", "cpu", page_bytes=HOST_PAGE_BYTES, max_extent=max_extent)


def test_max_extent_of_an_allocator_is_at_most_its_pools(device: str) -> None:
    pool = make_pool(device, 64, max_extent=4)
    with pytest.raises(va.ConfigError, match="more than the pool's"):
        Slots(pool, max_extent=8)
    slots = Slots(pool, max_extent=2)
    slots.allocate(7)
    assert slots.extents() == [1, 2, 2, 2]


@pytest.mark.parametrize("page", [0, -4096, 1024, 5000, 4096.0, "1KiB", "a page"])
def test_a_page_that_the_host_cannot_have_is_refused(page: Any) -> None:
    with pytest.raises(va.ConfigError, match="page_bytes"):
        va.Pool("1MiB", "cpu", page_bytes=page)


def test_page_bytes_with_cuda_is_refused() -> None:
    with pytest.raises(va.ConfigError, match="host backend only"):
        va.Pool("1GiB", "cuda", page_bytes=1 << 21)


@pytest.mark.parametrize("name", ["meta", "xpu", "nonsense"])
def test_a_device_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(va.ConfigError, match="device must be"):
        va.Pool("1GiB", name)


@pytest.mark.parametrize("background", [False, True])
def test_background_says_whether_there_is_a_thread(background: bool) -> None:
    before = set(os.listdir("/proc/self/task"))
    pool = make_pool("cpu", 8, background=background)
    assert len(set(os.listdir("/proc/self/task")) - before) == (1 if background else 0)
    del pool
    until(lambda: set(os.listdir("/proc/self/task")) <= before)  # joined, and soon forgotten


def test_without_the_background_memory_is_mapped_in_calls_only(device: str) -> None:
    pool = make_pool(device, 64, max_extent=1, low=4)
    slots = Slots(pool, lookahead_tokens=16)
    seq = slots.allocate(1)
    slots.grow(seq, 2)
    before = pool.stats()
    slots.kv.step({seq: seq.length})  # at the end of what is mapped: the thread would be woken
    assert pool.stats() == before
    assert slots.kv.stats().ahead_mappings == 0
    assert pages(pool, "held_bytes") == 2
