"""What was given up stays mapped and untouched until the GPU has passed the last use of it.

A busy GPU is one whose fences are held back: none that is recorded passes before they are released.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vattention as va
from vattention import _core

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)

TOKENS_PER_PAGE = 4
DEADLINE_S = 20.0


class Rig:
    """An allocator without a background thread, whose GPU is busy on request."""

    def __init__(
        self,
        device: str,
        *,
        slots: int = 4,
        budget_pages: int = 100,
        slack: int = 0,
        timeout_s: float = 0.05,
        lookahead: int = 0,
        **pool: Any,
    ) -> None:
        inner = _core.host_backend(4096) if device == "cpu" else _core.cuda_backend(0)
        self.backend = _core.FaultyBackend(inner)
        self.page = self.backend.page_bytes
        pool = {"background": False, **pool}
        self.pool = va.Pool(budget_pages * self.page, backend=self.backend, **pool)
        self.layout = va.KVLayout(  # four tokens a page, in each of two regions
            num_layers=1,
            num_kv_heads=1,
            head_dim=self.page // TOKENS_PER_PAGE // 4,
            dtype=torch.float32,
            order="layer",
        )
        self.kv = va.KVAllocator(
            self.layout,
            max_sequences=slots,
            max_seq_len=64,
            pool=self.pool,
            tail_slack_tokens=slack,
            lookahead_tokens=lookahead,
            fence_timeout_s=timeout_s,
        )
        self.device = device

    def another(self, slots: int = 1, **options: Any) -> va.KVAllocator:
        """One more allocator on the same pool."""
        settings = {"max_sequences": slots, "max_seq_len": 64, "pool": self.pool}
        return va.KVAllocator(self.layout, **(settings | options))

    def grown(self, *lengths: int) -> va.Sequence:
        """A sequence that has reached its length in steps: an extent or more for each."""
        sequence = self.kv.allocate(lengths[0])
        for tokens in lengths[1:]:
            self.kv.step({sequence: tokens})
        return sequence

    def tokens(self, sequence: va.Sequence, first: int, last: int) -> torch.Tensor:
        return torch.stack([tensor[sequence.slot, first:last] for tensor in self.kv.layer(0)])

    def fill(self, sequence: va.Sequence, value: float) -> None:
        for tensor in self.kv.layer(0):
            tensor[sequence.slot, : sequence.length] = value

    def mappings(self, slot: int | None = None) -> set[tuple[Any, ...]]:
        return {m for m in self.kv.mappings() if slot is None or m[0] == slot}

    def handles(self, sequence: va.Sequence) -> set[int]:
        return {mapping[4] for mapping in self.mappings(sequence.slot)}

    def given_up(self) -> int:
        """Driver calls so far that take memory away from where it is."""
        calls = self.backend.calls()
        return calls.get("unmap", 0) + calls.get("destroy", 0)

    def release(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.backend.release_fences()


class Call(threading.Thread):
    """A call in a thread of its own, which must be waiting for a fence before the test goes on."""

    def __init__(self, rig: Rig, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        asked = rig.backend.calls().get("query", 0)
        self.start()
        deadline = time.monotonic() + DEADLINE_S
        while self.is_alive() and rig.backend.calls().get("query", 0) < asked + 3:
            assert time.monotonic() < deadline, "nobody asks whether the fence has passed"
            time.sleep(0.0005)
        if not self.is_alive():
            self.finish()
            raise AssertionError(f"it did not wait, but returned {self.result}")

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error

    def finish(self) -> Any:
        self.join(DEADLINE_S)
        assert not self.is_alive(), "it waits for ever"
        if self.error is not None:
            raise self.error
        return self.result


@on_every_device
def test_freed_memory_is_not_touched_before_its_fence_has_passed(device: str) -> None:
    rig = Rig(device)
    old = rig.kv.allocate(8)
    rig.backend.hold_fences()
    mapped, handles, given_up = rig.mappings(), rig.handles(old), rig.given_up()
    old.free()
    stats = rig.kv.stats()
    assert (stats.retired_bytes, stats.cached_bytes) == (4 * rig.page, 0)

    assert rig.pool.reclaim() == 0  # waits, and goes without
    rig.pool.set_watermarks(0, rig.page)
    new = rig.kv.allocate(8)  # takes another slot
    assert new.slot != old.slot
    assert rig.handles(new).isdisjoint(handles)
    assert rig.given_up() == given_up
    assert mapped <= rig.mappings()
    rig.kv.check()

    rig.release()
    assert rig.pool.reclaim() == 4 * rig.page
    assert rig.mappings() == rig.mappings(new.slot)
    rig.kv.check()


@on_every_device
def test_allocation_waits_for_the_fence_of_the_only_slot(device: str) -> None:
    rig = Rig(device, slots=1, timeout_s=DEADLINE_S)
    old = rig.kv.allocate(8)
    rig.fill(old, 7.0)
    rig.backend.hold_fences()
    mapped = rig.mappings()
    old.free()
    call = Call(rig, lambda: rig.kv.allocate(6))
    assert rig.kv.stats().live_sequences == 0
    rig.release()
    new = call.finish()
    assert rig.mappings(new.slot) == mapped
    assert bool((rig.tokens(new, 0, 6) == 0).all())
    rig.kv.check()


@on_every_device
def test_allocation_says_that_the_gpu_is_late_when_the_only_slot_stays_busy(device: str) -> None:
    rig = Rig(device, slots=1)
    old = rig.kv.allocate(8)
    rig.backend.hold_fences()
    old.free()
    before, mapped = rig.kv.stats(), rig.mappings()
    with pytest.raises(va.OutOfSlots, match="the GPU did not finish with .* in time"):
        rig.kv.allocate(8)
    assert (rig.kv.stats(), rig.mappings()) == (before, mapped)
    rig.kv.check()
    rig.release()
    assert rig.kv.allocate(8).length == 8


@on_every_device
def test_step_waits_for_the_fence_of_memory_that_was_freed(device: str) -> None:
    rig = Rig(device, budget_pages=8, timeout_s=DEADLINE_S)
    sequence, old = rig.kv.allocate(8), rig.kv.allocate(8)
    rig.fill(sequence, 5.0)
    rig.backend.hold_fences()
    given_up = rig.given_up()
    old.free()
    call = Call(rig, lambda: rig.kv.step({sequence: 16}))
    assert rig.given_up() == given_up
    assert sequence.length == 8
    rig.release()
    call.finish()
    assert sequence.length == 16
    assert rig.mappings() == rig.mappings(sequence.slot)
    assert bool((rig.tokens(sequence, 0, 8) == 5).all())
    assert bool((rig.tokens(sequence, 8, 16) == 0).all())
    rig.kv.check()


@on_every_device
def test_growth_says_that_the_gpu_is_late_when_freed_memory_stays_busy(device: str) -> None:
    rig = Rig(device, budget_pages=8)
    sequence, old = rig.kv.allocate(8), rig.kv.allocate(8)
    rig.backend.hold_fences()
    old.free()
    before, mapped = rig.kv.stats(), rig.mappings()
    with pytest.raises(va.OutOfPages, match="the GPU did not finish with .* in time") as raised:
        rig.kv.allocate(8)
    error = raised.value
    assert (error.needed, error.free) == (4 * rig.page, 0)
    assert (error.reclaimable, error.budget) == (4 * rig.page, 8 * rig.page)
    assert (rig.kv.stats(), rig.mappings()) == (before, mapped)
    with pytest.raises(va.OutOfPages, match="the GPU did not finish in time"):
        rig.pool.set_budget(4 * rig.page)
    assert (rig.kv.stats(), rig.mappings()) == (before, mapped)
    rig.kv.check()
    rig.release()
    rig.pool.set_budget(4 * rig.page)
    assert rig.mappings() == rig.mappings(sequence.slot)


@on_every_device
def test_trimmed_memory_is_not_touched_before_its_fence_has_passed(device: str) -> None:
    rig = Rig(device)
    sequence = rig.grown(4, 12, 30)
    rig.fill(sequence, 3.0)
    rig.backend.hold_fences()
    mapped, given_up = rig.mappings(), rig.given_up()
    sequence.trim(4)
    assert rig.kv.stats().retired_bytes == (16 - 2) * rig.page
    other = rig.kv.allocate(20)
    assert rig.handles(other).isdisjoint({mapping[4] for mapping in mapped})
    assert rig.pool.reclaim() == 0
    assert rig.given_up() == given_up
    assert rig.mappings(sequence.slot) == mapped
    rig.kv.check()

    rig.release()
    assert rig.pool.reclaim() == (16 - 2) * rig.page
    assert sum(mapping[3] for mapping in rig.mappings(sequence.slot)) == 2 * rig.page
    assert bool((rig.tokens(sequence, 0, 4) == 3).all())
    rig.kv.check()


@on_every_device
def test_growth_takes_a_trimmed_tail_back_without_mapping_anything(device: str) -> None:
    rig = Rig(device)
    sequence = rig.grown(4, 12, 30)
    rig.fill(sequence, 3.0)
    rig.backend.hold_fences()
    mapped = rig.mappings()
    for tokens in (13, 5):
        sequence.trim(tokens)
    before = Counter(rig.backend.calls())
    rig.kv.step({sequence: 30})
    made = Counter(rig.backend.calls()) - before
    assert made.keys().isdisjoint({"create", "map", "set_access", "unmap", "destroy"})
    assert rig.mappings() == mapped
    assert rig.kv.stats().retired_bytes == 0
    assert bool((rig.tokens(sequence, 0, 5) == 3).all())
    # What was in the part of a page that it kept is the sequence's own; the rest is as if new.
    assert bool((rig.tokens(sequence, 12, 30) == 0).all())
    rig.kv.check()
    rig.release()
    assert rig.pool.reclaim() == 0  # nothing is retired any more
    assert rig.mappings() == mapped


def test_tails_are_unmapped_in_the_order_they_were_trimmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On the host a stream is but a number, and passes its fences when it is waited for.
    rig = Rig("cpu")
    sequence = rig.grown(4, 12, 30)
    rig.fill(sequence, 3.0)
    rig.backend.hold_fences()
    given_up = rig.given_up()
    streams = [11, 12]
    for stream, tokens in zip(streams, (12, 4), strict=True):
        monkeypatch.setattr(rig.kv, "_stream", lambda stream=stream: stream)
        sequence.trim(tokens)

    rig.backend.synchronize(streams[1])  # the inner tail's fence passes before the outer's
    sequence.trim(4)
    assert rig.given_up() == given_up
    assert rig.kv.stats().retired_bytes == 14 * rig.page

    rig.backend.synchronize(streams[0])
    sequence.trim(4)
    assert rig.given_up() == given_up + 4  # two tails in two regions
    assert rig.kv.stats().retired_bytes == 0
    rig.kv.check()


def test_growth_maps_what_is_gone_behind_a_tail_that_it_takes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig("cpu")
    sequence = rig.grown(4, 12, 30)
    rig.fill(sequence, 3.0)
    rig.backend.hold_fences()
    for stream, tokens in [(11, 12), (12, 4)]:
        monkeypatch.setattr(rig.kv, "_stream", lambda stream=stream: stream)
        sequence.trim(tokens)
    rig.backend.synchronize(11)
    sequence.trim(4)  # the outer tail goes, the inner one is still in use
    inner = rig.mappings()
    assert sum(mapping[3] for mapping in inner) == 6 * rig.page
    rig.kv.step({sequence: 30})
    assert inner <= rig.mappings()
    assert sum(mapping[3] for mapping in rig.mappings()) == 16 * rig.page
    rig.fill(sequence, 4.0)
    assert bool((rig.tokens(sequence, 0, 30) == 4).all())
    rig.kv.check()


@on_every_device
def test_memory_below_a_window_is_not_touched_before_its_fence_has_passed(device: str) -> None:
    rig = Rig(device)
    sequence = rig.grown(4, 12, 30)
    rig.fill(sequence, 3.0)
    rig.backend.hold_fences()
    mapped, given_up = rig.mappings(), rig.given_up()
    sequence.trim_front(14)  # the first three pages of each region
    assert rig.kv.stats().retired_bytes == 6 * rig.page
    rig.kv.step({sequence: 40})  # does not wait for them
    assert rig.given_up() == given_up
    assert mapped <= rig.mappings()
    assert bool((rig.tokens(sequence, 0, 30) == 3).all())
    rig.kv.check()

    rig.release()
    mapped = rig.mappings()
    starts = [tensor[sequence.slot].data_ptr() for tensor in rig.kv.layer(0)]
    below = {m for m in mapped if m[2] < starts[m[1]] + 3 * rig.page}
    assert rig.pool.reclaim() == 6 * rig.page
    assert rig.mappings() == mapped - below
    assert bool((rig.tokens(sequence, 14, 30) == 3).all())
    rig.kv.check()


@on_every_device
def test_step_waits_for_the_fence_of_memory_below_its_own_window(device: str) -> None:
    rig = Rig(device, budget_pages=16, timeout_s=DEADLINE_S)
    sequence = rig.grown(4, 12, 32)
    rig.backend.hold_fences()
    sequence.trim_front(16)
    call = Call(rig, lambda: rig.kv.step({sequence: 40}))
    rig.release()
    call.finish()
    assert sequence.length == 40
    rig.kv.check()


@on_every_device
def test_memory_of_an_emptied_sequence_is_not_handed_on_before_its_fence_has_passed(
    device: str,
) -> None:
    rig = Rig(device, slots=2)
    old = rig.kv.allocate(8)
    handles = rig.handles(old)
    rig.backend.hold_fences()
    old.trim(0)
    old.free()
    given_up = rig.given_up()
    new = rig.kv.allocate(8)
    assert rig.handles(new).isdisjoint(handles)
    assert new.slot != old.slot
    with pytest.raises(va.OutOfSlots, match="in time"):
        rig.kv.allocate(8)
    assert rig.given_up() == given_up
    rig.kv.check()
    rig.release()
    assert rig.kv.allocate(8).slot == old.slot
    rig.kv.check()


@on_every_device
def test_slot_is_not_handed_on_before_what_was_below_its_window_is_unmapped(device: str) -> None:
    rig = Rig(device, slots=2)
    old = rig.kv.allocate(8)
    rig.backend.hold_fences()
    old.trim_front(8)
    old.free()
    new = rig.kv.allocate(8)
    assert new.slot != old.slot
    rig.kv.check()
    rig.release()
    assert rig.kv.allocate(8).slot == old.slot
    rig.kv.check()


@on_every_device
def test_slot_is_good_for_another_when_its_window_has_left_the_guard_only(device: str) -> None:
    rig = Rig(device, slots=1, slack=6, timeout_s=DEADLINE_S)
    old = rig.kv.allocate(4)
    rig.kv.step({old: 8})  # two pages, and the guard behind them
    assert {mapping[5] for mapping in rig.mappings()} == {"read", "read_write"}
    old.trim_front(8)
    old.free()
    rig.kv.check()
    new = rig.kv.allocate(20)
    rig.fill(new, 5.0)
    rig.kv.check()
    new.free()
    rig.pool.reclaim()
    assert rig.mappings() == set()
    assert rig.kv.stats().held_bytes == rig.kv.stats().guard_bytes


@on_every_device
def test_tail_and_run_stay_together_when_surplus_is_taken_while_the_tail_is_retired(
    device: str,
) -> None:
    rig = Rig(device, budget_pages=20)
    # What a trim leaves mapped is 8 tokens.
    longer = rig.another(lookahead_tokens=8, fence_timeout_s=0.05)
    sequence = longer.allocate(4)
    for tokens in (8, 12, 28):
        longer.step({sequence: tokens})
    keys = longer.layer(0)[0][sequence.slot]
    keys[:28] = 3.0
    rig.backend.hold_fences()
    sequence.trim(4)
    assert longer.stats().surplus_bytes == 4 * rig.page
    assert longer.stats().retired_bytes == 8 * rig.page
    # Six of twenty pages are free, and the fence is late: the surplus is what could be had.
    with contextlib.suppress(va.OutOfPages):
        rig.kv.allocate(20)
    rig.kv.check()
    longer.step({sequence: 8})
    assert bool((keys[:4] == 3).all())
    keys[:8] = 4.0
    rig.kv.check()


@on_every_device
def test_nothing_is_unmapped_when_an_allocator_goes_and_the_gpu_cannot_be_waited_for(
    device: str,
) -> None:
    for sticky in (False, True):
        rig = Rig(device)
        rig.grown(4, 12).trim(4)
        rig.kv.allocate(8).free()
        rig.kv.allocate(8)
        rig.backend.hold_fences()
        given_up = rig.given_up()
        if sticky:
            rig.backend.arm("synchronize_device", sticky=True)
        rig.kv.close()
        rig.kv = None
        assert (rig.given_up() == given_up) == sticky
        rig.pool.check()


def test_every_stream_that_clears_is_waited_for_by_the_next_that_uses_the_slot() -> None:
    rig = Rig("cpu", slots=1)
    core = rig.kv._core
    assert core is not None

    lengths = array.array("q", [8])
    seen = 0

    def waits() -> bool:
        """Whether a stream has been made to wait since this was asked last."""
        nonlocal seen
        before, seen = seen, rig.backend.calls().get("wait", 0)
        return seen > before

    ((slot, generation),) = core.allocate(1, 32, 0)
    core.free(slot, generation, 0)  # dirty memory stays mapped
    assert not waits()
    rig.backend.hold_fences()
    ((slot, generation),) = core.allocate(1, 8, 1)  # cleared on stream 1, which is busy
    assert not core.try_step_lengths(lengths)  # though nothing is to be mapped
    assert core.stats()["waited_steps"] == 0
    core.step_lengths(lengths, 2)
    assert waits()
    assert core.stats()["waited_steps"] == 1
    core.step_sequences([(slot, generation, 16)], 3)  # clears more, on stream 3
    assert waits()
    core.step_sequences([(slot, generation, 16)], 1)
    assert waits()
    core.step_sequences([(slot, generation, 16)], 3)  # which may be another one by that name
    assert waits()
    core.free(slot, generation, 2)  # its fence stands for what other streams clear, too
    assert waits()
    rig.backend.release_fences()

    rig.backend.hold_fences()
    ((slot, generation),) = core.allocate(1, 8, 1)
    assert not core.try_step_lengths(lengths)
    rig.backend.release_fences()
    core.step_lengths(lengths, 2)  # the clearing is done
    assert core.try_step_lengths(lengths)
    core.free(slot, generation, 3)
    assert not waits()


def test_a_stream_of_the_same_name_in_another_thread_is_another_stream() -> None:
    """As the default stream of each thread is."""
    rig = Rig("cpu")
    core = rig.kv._core
    assert core is not None
    rig.grown(4, 8, 12).trim(0)  # leaves single pages, not clear
    ready, growing = core.allocate(2, 0, 3)
    core.step_sequences([(*ready, 4), (*growing, 4)], 3)
    rig.backend.block("create")
    thread = threading.Thread(
        target=lambda: core.step_sequences([(*ready, 4), (*growing, 12)], 3), daemon=True
    )
    thread.start()
    assert rig.backend.wait_blocked("create")
    rig.backend.hold_fences()
    core.step_sequences([(*ready, 8)], 3)  # clears, while the other waits for the driver
    waits = rig.backend.calls().get("wait", 0)
    rig.backend.unblock("create")
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert rig.backend.calls().get("wait", 0) > waits
    rig.release()


# ---- waits ----


def test_two_that_wait_for_a_slot_get_one_each() -> None:
    for _ in range(10):
        rig = Rig("cpu", slots=2, timeout_s=DEADLINE_S)
        freed = [rig.kv.allocate(4), rig.kv.allocate(4)]
        rig.backend.hold_fences()
        for sequence in freed:
            sequence.free()
        waiting = [Call(rig, lambda rig=rig: rig.kv.allocate(4)) for _ in freed]
        rig.release()
        assert {call.finish().slot for call in waiting} == {0, 1}


def test_who_waits_for_memory_gets_what_the_background_thread_has_collected() -> None:
    for _ in range(20):
        rig = Rig("cpu", budget_pages=8, timeout_s=DEADLINE_S, background=True)
        old = rig.kv.allocate(16)  # all there is
        rig.backend.hold_fences()
        old.trim(0)
        waiting = Call(rig, lambda rig=rig: rig.kv.allocate(16))
        rig.release()
        assert waiting.finish().length == 16


def test_reclaim_gives_back_what_the_background_thread_has_collected() -> None:
    for _ in range(20):
        rig = Rig("cpu", timeout_s=DEADLINE_S, background=True)
        old = rig.kv.allocate(16)
        rig.backend.hold_fences()
        old.trim(0)
        waiting = Call(rig, rig.pool.reclaim)
        rig.release()
        waiting.finish()
        assert rig.pool.stats().held_bytes == 0


def test_reclaim_waits_for_all_allocators_also_when_one_goes_meanwhile() -> None:
    rig = Rig("cpu", timeout_s=DEADLINE_S)
    others = [rig.another(2, fence_timeout_s=DEADLINE_S) for _ in range(2)]
    sequences = [kv.allocate(8) for kv in others]
    rig.backend.hold_fences()
    for stream, (kv, sequence) in enumerate(zip(others, sequences, strict=True), start=1):
        kv._core.free(sequence._slot, sequence._generation, stream)
    waiting = Call(rig, rig.pool.reclaim)
    rig.kv.close()
    rig.kv = None
    rig.backend.synchronize(1)
    while rig.pool.stats().held_bytes > 4 * rig.page:  # the first one's goes
        assert waiting.is_alive()
    assert waiting.is_alive()
    rig.backend.synchronize(2)
    waiting.finish()
    assert rig.pool.stats().held_bytes == 0


@pytest.mark.parametrize("wanted", ["memory", "slot"])
def test_who_waits_is_woken_by_an_operation_that_fails(wanted: str) -> None:
    rig = Rig("cpu", slots=4 if wanted == "memory" else 2, budget_pages=10, timeout_s=DEADLINE_S)
    old = rig.kv.allocate(8)
    rig.backend.hold_fences()
    old.free()  # never passes
    rig.backend.block("create")
    errors: list[BaseException] = []

    def fail() -> None:
        try:
            rig.kv.allocate(12)
        except va.BackendError as error:
            errors.append(error)

    failing = threading.Thread(target=fail, daemon=True)
    failing.start()
    assert rig.backend.wait_blocked("create")
    waiting = Call(rig, lambda: rig.kv.allocate(8 if wanted == "memory" else 0))
    rig.backend.arm("create", 1, "failed")
    rig.backend.unblock("create")
    failing.join(DEADLINE_S)
    assert len(errors) == 1
    start = time.monotonic()
    assert waiting.finish().alive
    assert time.monotonic() - start < 0.5 * DEADLINE_S
    rig.release()


def test_a_wait_ends_in_time_whatever_others_do() -> None:
    rig = Rig("cpu", timeout_s=0.3)
    for sequence in [rig.kv.allocate(4) for _ in range(4)][:1]:
        rig.backend.hold_fences()
        sequence.free()  # never passes; the other slots are live
    other = rig.another()
    waiting = Call(rig, lambda: rig.kv.allocate_batch(2, 4))
    start = time.monotonic()
    while waiting.is_alive():
        other.allocate(0).free()
        time.sleep(0.005)
        assert time.monotonic() - start < 5.0
    with pytest.raises(va.OutOfSlots, match="did not finish with 1 freed ones in time"):
        waiting.finish()


def test_a_tail_that_comes_back_to_a_pool_that_is_not_cleared_is_left_alone() -> None:
    rig = Rig("cpu", lookahead=8, zero=False, background=True)
    sequence = rig.kv.allocate(60)
    rig.fill(sequence, 7.0)
    rig.backend.hold_fences()  # kernels from before the trim run on
    sequence.trim(4)
    before = rig.backend.calls()
    rig.kv.step({sequence: 40})
    assert bool((rig.tokens(sequence, 0, 60) == 7.0).all())
    while rig.kv.stats().ahead_mappings == 0 and rig.kv.stats().ahead_failures == 0:
        rig.kv.step({sequence: min(64, sequence.length + 1)})  # until the thread has been there
        if sequence.length == 64:
            break
    after = rig.backend.calls()
    for call in ("zero", "record", "synchronize"):
        assert after.get(call, 0) == before.get(call, 0)
    rig.release()


def test_what_cannot_be_torn_down_now_goes_when_memory_is_wanted() -> None:
    for wanted in ("reclaim", "allocate", "end"):
        rig = Rig("cpu", budget_pages=8)
        rig.kv.allocate(16)
        rig.backend.arm("synchronize_device")
        rig.kv.close()
        rig.kv = None
        rig.pool.check()
        assert rig.pool.stats().held_bytes == 8 * rig.page
        if wanted == "reclaim":
            assert rig.pool.reclaim() == 8 * rig.page
            assert rig.pool.stats().held_bytes == 0
        elif wanted == "allocate":
            with rig.another() as kv:
                assert kv.allocate(16).length == 16
            del kv
        rig.pool.check()
        rig.pool = None
        calls = rig.backend.calls()
        assert calls["create"] == calls["destroy"]
        assert calls["reserve"] == calls["unreserve"]


@pytest.mark.parametrize("occasion", ["pool", "allocator", "full_device"])
def test_what_cannot_be_torn_down_outlives_its_pool_no_longer_than_it_must(occasion: str) -> None:
    other = Rig("cpu") if occasion != "pool" else None
    rig = Rig("cpu", background=True)
    rig.kv.allocate(16)
    rig.kv.allocate(8).trim(0)
    backend = rig.backend
    backend.arm("synchronize_device", sticky=True)
    tensors = rig.kv.layer(0)
    tensors[0][0, :16] = 3.0
    rig.kv.close()
    tensor = tensors[0][0, :16]
    address = tensor.data_ptr()
    rig.kv = rig.pool = None
    del tensors, tensor
    calls = backend.calls()
    assert calls["create"] - calls["destroy"] == 2  # what is free goes, what is mapped stays
    assert ctypes.c_float.from_address(address).value == 3.0
    backend.disarm()
    if occasion == "pool":
        Rig("cpu")
    elif occasion == "allocator":
        other.kv.close()
        other.kv = None
    else:
        other.backend.arm("create", 1, "out_of_memory")
        assert other.kv.allocate(8).length == 8
    calls = backend.calls()
    assert calls["create"] == calls["destroy"]
    assert calls["reserve"] == calls["unreserve"]
    assert calls["create_fence"] == calls.get("destroy_fence", 0)


def test_an_allocator_whose_sequences_have_ended_goes_without_waiting_for_the_device() -> None:
    rig = Rig("cpu", slack=8)
    rig.kv.allocate(8).free()
    rig.grown(4, 12).trim(0)
    rig.kv.close()
    rig.kv = None
    assert rig.pool.stats().held_bytes == rig.pool.stats().free_bytes
    assert "synchronize_device" not in rig.backend.calls()


def test_a_tail_that_comes_back_uncleared_is_ready() -> None:
    rig = Rig("cpu", zero=False)
    sequence = rig.grown(4, 32)
    rig.backend.hold_fences()
    sequence.trim(8)
    rig.kv.step({sequence: 24})
    rig.kv.check()
    waited = rig.kv.stats().waited_steps
    for length in range(25, 33):
        rig.kv.step({sequence: length})
    assert rig.kv.stats().waited_steps == waited


def test_memory_that_the_driver_will_not_unmap_is_not_tried_without_pause() -> None:
    rig = Rig("cpu", slots=2, timeout_s=0.3)
    trimmed = rig.grown(4, 12)
    rig.kv.allocate(4)
    rig.backend.hold_fences()
    trimmed.trim(4)
    rig.backend.arm("unmap", sticky=True)
    rig.backend.release_fences()
    with pytest.raises(va.OutOfSlots):  # no freed slot is waited for
        rig.kv.allocate(4)
    before = rig.backend.calls()["unmap"]
    start = time.monotonic()
    rig.pool.reclaim()
    assert time.monotonic() - start < 5
    # A sleep of 20 us between two tries.
    assert rig.backend.calls()["unmap"] - before < 0.3 / 20e-6


def test_a_wait_goes_on_when_what_it_began_with_is_taken_back() -> None:
    rig = Rig("cpu", budget_pages=16, timeout_s=DEADLINE_S, zero=False)
    second, third = (
        rig.another(2, lookahead_tokens=0, fence_timeout_s=DEADLINE_S) for _ in range(2)
    )
    trimmed = rig.grown(4, 8)
    other = third.allocate(4)
    third.step({other: 12})
    rig.kv.allocate(12)
    rig.backend.hold_fences()
    trimmed.trim(4)
    other.free()
    waiting = Call(rig, lambda: second.allocate(8))
    rig.kv.step({trimmed: 8})
    time.sleep(0.01)
    assert waiting.is_alive()
    rig.backend.release_fences()
    assert waiting.finish().length == 8


def test_memory_is_wanted_where_the_device_is_full_too() -> None:
    rig = Rig("cpu")
    rig.kv.allocate(16)
    rig.backend.arm("synchronize_device")
    rig.kv.close()
    rig.kv = None
    with rig.another() as kv:
        rig.backend.arm("create", 1, "out_of_memory")
        assert kv.allocate(16).length == 16
    rig.pool.check()


def test_the_device_is_waited_for_where_tensors_were_read_after_close() -> None:
    for outlive in (False, True):
        rig = Rig("cpu")
        tensors = rig.kv.layer(0)
        rig.grown(4, 12).free()
        if not outlive:
            del tensors
        rig.kv.close()
        rig.kv = None
        if outlive:
            del tensors
        assert rig.pool.stats().mappings == 0
        assert ("synchronize_device" in rig.backend.calls()) is outlive


def test_threads_run_while_the_last_pool_waits_for_the_device() -> None:
    rig = Rig("cpu")
    rig.kv.allocate(16)
    rig.backend.arm("synchronize_device")
    rig.kv.close()
    rig.kv = None
    rig.backend.block("synchronize_device")

    def let_go() -> None:
        assert rig.backend.wait_blocked("synchronize_device")
        rig.backend.unblock("synchronize_device")

    thread = threading.Thread(target=let_go)
    thread.start()
    rig.pool = None
    thread.join(DEADLINE_S)
    calls = rig.backend.calls()
    assert calls["create"] == calls["destroy"]


# ---- a device that has less than the budget ----


def test_a_full_device_waits_for_what_others_give_back() -> None:
    rig = Rig("cpu", timeout_s=DEADLINE_S)
    rig.kv.allocate(16).free()
    rig.backend.block("destroy")
    reclaim = threading.Thread(target=rig.pool.reclaim, daemon=True)
    reclaim.start()
    assert rig.backend.wait_blocked("destroy")
    rig.backend.arm("create", 1, "out_of_memory")  # as long as those pages are not destroyed
    made: list[va.Sequence] = []
    errors: list[va.OutOfPages] = []

    def allocate() -> None:
        try:
            made.append(rig.kv.allocate(8))
        except va.OutOfPages as error:
            errors.append(error)

    thread = threading.Thread(target=allocate, daemon=True)
    thread.start()
    thread.join(0.05)
    rig.backend.unblock("destroy")
    for waiting in (thread, reclaim):
        waiting.join(DEADLINE_S)
        assert not waiting.is_alive()
    assert (len(made), errors) == (1, [])
    rig.kv.check()


def test_a_full_device_is_tried_again_when_others_have_given_back_meanwhile() -> None:
    rig = Rig("cpu", timeout_s=DEADLINE_S)
    rig.kv.allocate(16).free()
    rig.backend.block("create")
    made: list[va.Sequence] = []
    thread = threading.Thread(target=lambda: made.append(rig.another().allocate(8)), daemon=True)
    thread.start()
    assert rig.backend.wait_blocked("create")
    # All that there is goes back while the driver is about to say that it is full.
    rig.pool.set_budget(4 * rig.page)
    rig.backend.arm("create", 1, "out_of_memory")
    rig.backend.unblock("create")
    thread.join(DEADLINE_S)
    assert len(made) == 1
    rig.pool.check()


def test_threads_run_while_a_call_waits_for_one_that_puts_a_fence_into_a_stream() -> None:
    # In a process of its own: where a call waits with the GIL held, nobody opens the gate again.
    script = """
import array, threading
import torch
import vattention as va
from vattention import _core

backend = _core.FaultyBackend(_core.host_backend(4096))
pool = va.Pool(100 * 4096, backend=backend, background=False)
layout = va.KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, dtype=torch.float32)
kv = va.KVAllocator(layout, max_sequences=8, max_seq_len=64, pool=pool)
kv.allocate(8)
lengths = torch.zeros(8, dtype=torch.int64)
lengths[0] = 8
outlived = va.KVAllocator(layout, max_sequences=1, max_seq_len=64, pool=pool)
tensors = [outlived.layer(0)]
outlived.close()
for call in (
    lambda: kv.step(array.array("q", lengths.tolist())),
    lambda: kv.step(lengths),
    kv.stats,
    kv.mappings,
    pool.stats,
    tensors.clear,
):
    sequence = kv.allocate(8)
    backend.block("record")
    freeing = threading.Thread(target=sequence.free, daemon=True)
    freeing.start()
    assert backend.wait_blocked("record")
    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(0.05)
    assert calling.is_alive()
    backend.unblock("record")
    freeing.join()
    calling.join()
print(kv.stats().steps, kv.stats().waited_steps)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 0\n", "")
