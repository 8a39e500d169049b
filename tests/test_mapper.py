"""The background thread: it maps ahead, takes back what was given up, and gets in nobody's way."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import vattention as va
from vattention import _core

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)

REGIONS = 2
TOKENS_PER_PAGE = 4
LOOKAHEAD = 4  # tokens, and a page: a sequence of 8 that is mapped for 8 is short of a page
DEADLINE_S = 20.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.0002)


@pytest.fixture(autouse=True)
def _leave_no_gate_closed() -> Iterator[None]:
    """A test that has failed must not leave a thread behind that nobody can join."""
    yield
    for backend in Rig.backends:
        backend.release_fences()
        for call in backend.calls():
            backend.unblock(call)
    Rig.backends.clear()


class Rig:
    """An allocator with a background thread, over a backend with gates, faults and held fences."""

    backends: ClassVar[list[_core.FaultyBackend]] = []

    def __init__(
        self,
        device: str = "cpu",
        *,
        slots: int = 4,
        budget_pages: int = 400,
        max_seq_len: int = 64,
        slack: int = 0,
        **pool_options: Any,
    ) -> None:
        inner = _core.host_backend(4096) if device == "cpu" else _core.cuda_backend(0)
        self.backend = _core.FaultyBackend(inner)
        self.backends.append(self.backend)
        self.page = self.backend.page_bytes
        pool_options = {
            name: pages * self.page if name.endswith("watermark") else pages
            for name, pages in pool_options.items()
        }
        self.pool = va.Pool(budget_pages * self.page, backend=self.backend, **pool_options)
        self.layout = va.KVLayout(
            num_layers=1,
            num_kv_heads=1,
            head_dim=self.page // TOKENS_PER_PAGE // 4,
            dtype=torch.float32,
            order="layer",
        )
        self.slots, self.max_seq_len = slots, max_seq_len
        self.kv = self.make_allocator(slack)

    def make_allocator(self, slack: int) -> va.KVAllocator:
        return va.KVAllocator(
            self.layout,
            max_sequences=self.slots,
            max_seq_len=self.max_seq_len,
            pool=self.pool,
            tail_slack_tokens=slack,
            lookahead_tokens=LOOKAHEAD,
        )

    def calls(self, name: str) -> int:
        return self.backend.calls().get(name, 0)

    def tensors(self, sequence: va.Sequence) -> list[torch.Tensor]:
        return [tensor[sequence.slot] for tensor in self.kv.layer(0)]

    def pages(self, sequence: va.Sequence) -> int:
        """In each region."""
        sizes = [m[3] for m in self.kv.mappings() if m[0] == sequence.slot and m[5] != "read"]
        return sum(sizes) // self.page // REGIONS

    def short_sequence(self) -> va.Sequence:
        """One that is mapped for just what it has, and that its next step makes the thread grow.

        The step itself needs no more than that.
        """
        sequence = self.kv.allocate(4)
        until(lambda: self.pages(sequence) == 2, "the sequence is mapped for its lookahead")
        return sequence

    def at_the_gate(self) -> va.Sequence:
        """A sequence that the thread is growing from two to three pages, halted before it maps."""
        sequence = self.short_sequence()
        self.halt_growth_of(sequence)
        return sequence

    def halt_growth_of(self, sequence: va.Sequence) -> None:
        self.backend.block("map")
        self.kv.step({sequence: 5})
        assert self.backend.wait_blocked("map", DEADLINE_S)


class Call(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.function()
        except BaseException as error:
            self.error = error

    def must_be_waiting(self) -> None:
        # A call that wrongly does not wait is back long before this.
        self.join(0.05)
        assert self.is_alive(), f"it did not wait ({self.error})"

    def finish(self) -> None:
        self.join(DEADLINE_S)
        assert not self.is_alive(), "it waits for ever"
        if self.error is not None:
            raise self.error


@on_every_device
def test_no_step_waits_when_sequences_grow_by_a_token_at_a_time(device: str) -> None:
    tokens = 2500 if device == "cpu" else 300
    rig = Rig(
        device, budget_pages=4 * REGIONS * (tokens // TOKENS_PER_PAGE + 20), max_seq_len=tokens
    )
    sequences = rig.kv.allocate_batch(4, 4)
    lengths = array("q", [4] * 4)

    def is_ahead() -> bool:
        wanted = rig.layout.mapped_bytes(min(lengths[0] + LOOKAHEAD, tokens), rig.page)
        return rig.kv.stats().mapped_bytes >= 4 * wanted

    for length in range(5, tokens + 1):
        until(is_ahead, f"the thread has mapped ahead of {length} tokens")
        lengths[:] = array("q", [length] * 4)
        rig.kv.step(lengths)
    stats = rig.kv.stats()
    assert stats.steps == tokens - 4
    assert stats.waited_steps == 0
    assert stats.ahead_failures == 0
    # After the first page of each sequence, the thread has mapped everything.
    assert rig.calls("map") == 4 * REGIONS + stats.ahead_mappings
    assert {sequence.length for sequence in sequences} == {tokens}
    rig.kv.check()


@on_every_device
def test_nothing_is_mapped_ahead_of_what_a_sequence_is_expected_to_need(device: str) -> None:
    most = 65 * TOKENS_PER_PAGE  # long enough for growth to be more than a page at a time
    rig = Rig(device, slots=2, budget_pages=600, max_seq_len=2 * most)
    kv = rig.kv
    told = kv.allocate(most - TOKENS_PER_PAGE, expected_tokens=most)
    other = kv.allocate(most - TOKENS_PER_PAGE)
    until(lambda: rig.pages(other) == 66, "the thread has mapped ahead, and more than a page")
    until(lambda: rig.pages(told) == 65, "the thread has mapped ahead, no more than is needed")
    for length in range(most - TOKENS_PER_PAGE + 1, most + 1):
        kv.step({told: length, other: length + 1})
    until(lambda: rig.pages(other) > 66, "the thread has mapped ahead again")
    assert rig.pages(told) == 65
    assert kv.stats().waited_steps == 0
    until(lambda: wakes_of_other_threads(0.05) <= 3, "the thread sleeps")
    # It was expected wrongly: it grows as if nothing had been said.
    kv.step({told: most + 1})
    until(lambda: rig.pages(told) > 66, "the thread maps ahead of it")
    waited = kv.stats().waited_steps
    assert waited == 1
    kv.step({told: most + 2})
    assert kv.stats().waited_steps == waited
    kv.check()
    # The next one in that slot is another.
    slot = told.slot
    told.free()
    again = kv.allocate(4)
    assert again.slot == slot
    before = rig.pages(again)
    kv.step({again: before * TOKENS_PER_PAGE - 1})
    until(lambda: rig.pages(again) > before, "the thread maps ahead of it")


@on_every_device
def test_step_waits_for_the_thread_when_it_is_growing_the_same_sequence(device: str) -> None:
    rig = Rig(device)
    sequence = rig.at_the_gate()
    for tensor in rig.tensors(sequence):
        tensor[:5] = 7.0
    rig.kv.step({sequence: 8})  # what is mapped already does not wait
    assert rig.kv.stats().waited_steps == 0
    call = Call(lambda: rig.kv.step({sequence: 12}))
    until(lambda: rig.kv.stats().waited_steps == 1, "the step waits")
    call.must_be_waiting()
    assert sequence.length == 8
    rig.backend.unblock("map")
    call.finish()
    assert sequence.length == 12
    until(lambda: rig.pages(sequence) == 4, "the thread is ahead again")
    # Four pages in each region, each of them mapped once.
    pool = rig.pool.stats()
    assert rig.calls("map") == pool.maps == pool.mappings == 4 * REGIONS
    assert rig.calls("create") == pool.creates == 4 * REGIONS
    for tensor in rig.tensors(sequence):
        assert bool((tensor[:5] == 7).all())
        assert bool((tensor[5:12] == 0).all())
    rig.kv.check()


@on_every_device
def test_others_do_not_wait_when_the_thread_is_growing_a_sequence(device: str) -> None:
    rig = Rig(device)
    sequence, idle, other = [rig.short_sequence() for _ in range(3)]
    idle.free()
    if device == "cuda":
        torch.cuda.synchronize()
    rig.halt_growth_of(sequence)
    rig.kv.allocate(3)  # adopts the idle slot
    rig.kv.step({other: 4})
    other.trim(2)
    other.free()
    assert rig.kv.stats().live_sequences == 2
    rig.pool.check()
    assert sequence.length == 5
    rig.backend.unblock("map")
    until(lambda: rig.pages(sequence) == 3, "the thread has grown the sequence")
    rig.kv.check()


@on_every_device
@pytest.mark.parametrize("operation", ["free", "trim", "trim_front", "close"])
def test_operation_waits_for_the_thread_when_it_is_growing_the_sequence(
    operation: str, device: str
) -> None:
    rig = Rig(device)
    sequence = rig.at_the_gate()
    tensor = rig.tensors(sequence)[0]
    tensor[:5] = 7.0
    call = Call(
        {
            "free": sequence.free,
            "trim": lambda: sequence.trim(1),
            "trim_front": lambda: sequence.trim_front(4),
            "close": rig.kv.close,
        }[operation]
    )
    call.must_be_waiting()
    rig.backend.unblock("map")
    call.finish()
    rig.pool.check()
    assert rig.calls("map") == 3 * REGIONS
    if operation == "close":
        assert bool((tensor[:5] == 7).all())  # a tensor outlives its allocator
        assert rig.pool.stats().mappings == 3 * REGIONS
    elif operation == "free":
        assert not sequence.alive
        until(lambda: rig.pool.reclaim() > 0, "the GPU has passed the fence")
        assert rig.pool.stats().held_bytes == 0
    elif operation == "trim":
        until(lambda: rig.pages(sequence) == 2, "all but the lookahead is gone")
        assert bool((tensor[:1] == 7).all())
    else:
        until(lambda: rig.pages(sequence) == 2, "the first page is gone")
        assert bool((tensor[4:5] == 7).all())


@on_every_device
@pytest.mark.parametrize("kind", ["failed", "out_of_memory"])
@pytest.mark.parametrize("call", ["create", "map", "set_access"])
def test_failure_in_the_background_is_counted_and_made_good_by_the_step(
    call: str, kind: str, device: str
) -> None:
    rig = Rig(device)
    sequence = rig.short_sequence()
    before = rig.kv.mappings()
    rig.backend.arm(call, 2, kind)  # the second region's
    rig.kv.step({sequence: 5})
    until(lambda: rig.kv.stats().ahead_failures == 1, "the failure is counted")
    assert rig.kv.mappings() == before
    rig.kv.check()
    rig.kv.step({sequence: 12})
    assert sequence.length == 12
    until(lambda: rig.pages(sequence) == 4, "the thread is ahead again")
    assert rig.kv.stats().ahead_failures == 1
    rig.kv.check()


@on_every_device
def test_lack_of_memory_in_the_background_is_counted_and_harmless(device: str) -> None:
    rig = Rig(device, budget_pages=2 * REGIONS)
    sequence = rig.short_sequence()
    rig.kv.step({sequence: 5})
    until(lambda: rig.kv.stats().ahead_failures > 0, "the failure is counted")
    rig.kv.step({sequence: 8})
    assert rig.kv.stats().waited_steps == 0
    with pytest.raises(va.OutOfPages):
        rig.kv.step({sequence: 9})
    assert sequence.length == 8
    rig.kv.check()


@on_every_device
def test_every_sequence_is_mapped_ahead_when_many_others_have_guards(device: str) -> None:
    # A guard makes room in steps only: those that have one, and are near its start for ever, must
    # not keep the thread from the rest.
    rig = Rig(device, slots=12, max_seq_len=256, slack=32)
    guarded = rig.kv.allocate_batch(11, 1)
    assert len([m for m in rig.kv.mappings() if m[5] == "read"]) == 11 * REGIONS
    last = rig.kv.allocate(40)  # has slack of its own
    assert last.slot > max(sequence.slot for sequence in guarded)
    until(lambda: rig.pages(last) >= (40 + 32 + LOOKAHEAD) // TOKENS_PER_PAGE, "it is mapped ahead")
    rig.kv.check()


@on_every_device
def test_thread_makes_progress_when_the_gil_is_held(device: str) -> None:
    rig = Rig(device)
    sequence = rig.at_the_gate()
    ahead = rig.kv.stats().ahead_mappings
    hold_the_gil_and_sleep = ctypes.PyDLL(None).usleep
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody can ask this thread for the GIL
    try:
        rig.backend.unblock("map")
        deadline = time.monotonic() + DEADLINE_S
        # Nothing in this loop lets go of it.
        while rig.kv.stats().ahead_mappings == ahead and time.monotonic() < deadline:
            hold_the_gil_and_sleep(1000)
        done = rig.kv.stats().ahead_mappings
    finally:
        sys.setswitchinterval(interval)
    assert done == ahead + REGIONS
    assert rig.pages(sequence) == 3


@on_every_device
def test_trimmed_memory_goes_back_by_itself_once_its_fence_has_passed(device: str) -> None:
    rig = Rig(device)
    sequence = rig.kv.allocate(12)
    until(lambda: rig.pages(sequence) == 4, "the thread is ahead")
    rig.backend.hold_fences()
    sequence.trim(1)
    unmaps, asked = rig.calls("unmap"), rig.calls("query")
    until(lambda: rig.calls("query") > asked + 3, "the thread looks at the fence")
    assert rig.kv.stats().retired_bytes > 0
    assert rig.calls("unmap") == unmaps
    rig.backend.release_fences()
    until(lambda: rig.kv.stats().retired_bytes == 0, "the thread has collected it")
    assert rig.calls("unmap") > unmaps
    rig.kv.check()


@on_every_device
def test_idle_memory_above_the_watermark_goes_back_by_itself_once_its_fence_has_passed(
    device: str,
) -> None:
    rig = Rig(device, high_watermark=1)
    sequence = rig.kv.allocate(12)
    until(lambda: rig.pages(sequence) == 4, "the thread is ahead")
    rig.backend.hold_fences()
    sequence.free()
    asked = rig.calls("query")
    until(lambda: rig.calls("query") > asked + 3, "the thread looks at the fence")
    assert rig.pool.stats().held_bytes == 4 * REGIONS * rig.page
    rig.backend.release_fences()
    until(lambda: rig.pool.stats().held_bytes <= rig.page, "the memory is given back")
    rig.kv.check()


def thread_ids() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def test_one_thread_is_started_with_a_pool_and_ended_with_it() -> None:
    def make(background: bool) -> va.Pool:
        return va.Pool(1 << 20, backend=_core.host_backend(4096), background=background)

    before = thread_ids()
    without = make(background=False)
    assert thread_ids() <= before
    with_thread = make(background=True)
    started = thread_ids() - before
    assert len(started) == 1
    del with_thread, without
    until(lambda: not started & thread_ids(), "its thread is gone")


def test_thread_is_joined_when_the_interpreter_exits_in_the_middle_of_its_work() -> None:
    script = """
import atexit, os, time

threads = lambda: set(os.listdir("/proc/self/task"))

def report():
    deadline = time.monotonic() + 10
    while started & threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    print("running" if started & threads() else "joined")

atexit.register(report)  # runs after what is registered later

import torch
import vattention as va

before = threads()
kv = va.KVAllocator(
    va.KVLayout(num_layers=8, num_kv_heads=1, head_dim=64, dtype=torch.float32, order="layer"),
    max_sequences=8, max_seq_len=1 << 16, memory="1GiB", device="cpu", page_bytes=4096,
    lookahead_tokens=1024, low_watermark="1MiB",
)
started = threads() - before
assert len(started) == 1
keys, _ = kv.layer(0)
sequences = kv.allocate_batch(8, 1)
for tokens in range(2, 200):
    kv.step({sequence: tokens * 16 for sequence in sequences})
sequences[0].free()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "joined\n", "")


def test_the_thread_may_be_stopped_from_two_threads_at_once() -> None:
    # In a process of its own: what is joined twice ends it.
    script = """
import threading
import vattention as va
from vattention import _core

backend = _core.FaultyBackend(_core.host_backend(4096))
backend.block("create")
pool = va.Pool(100 * 4096, backend=backend, low_watermark=4096)
assert backend.wait_blocked("create")
stopping = [threading.Thread(target=pool._core.stop, daemon=True) for _ in range(2)]
for thread in stopping:
    thread.start()
stopping[0].join(0.2)
assert all(thread.is_alive() for thread in stopping)
backend.unblock("create")
for thread in stopping:
    thread.join(10)
print("stopped" if not any(thread.is_alive() for thread in stopping) else "waiting")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


class Worker(Call):
    """Begins, grows, trims and frees sequences at random, and looks at what they hold."""

    def __init__(self, kv: va.KVAllocator, random_seed: int, seconds: float) -> None:
        self.kv = kv
        self.random = random.Random(random_seed)
        self.seconds = seconds
        self.sequences: dict[va.Sequence, tuple[int, int]] = {}  # first token, value
        self.done = {"allocate": 0, "step": 0, "trim": 0, "trim_front": 0, "free": 0, "refused": 0}
        super().__init__(self.work)

    def work(self) -> None:
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            try:
                self.one_operation()
            except (va.OutOfPages, va.OutOfSlots):
                self.done["refused"] += 1
                if self.sequences:
                    self.free(self.random.choice(list(self.sequences)))
        while self.sequences:
            self.free(next(iter(self.sequences)))

    def one_operation(self) -> None:
        if not self.sequences or self.random.random() < 0.15:
            tokens = self.random.randint(0, 40)
            sequence = self.kv.allocate(tokens)
            value = self.random.randint(1, 1 << 20)
            self.sequences[sequence] = (0, value)
            self.fill(sequence, 0, tokens)
            self.done["allocate"] += 1
            return
        choice = self.random.random()
        if choice < 0.6:
            some = self.random.sample(
                list(self.sequences), self.random.randint(1, len(self.sequences))
            )
            before = {sequence: sequence.length for sequence in some}
            growth = self.random.choice((1, 1, 1, 5, 20))
            self.kv.step({sequence: min(64, before[sequence] + growth) for sequence in some})
            for sequence in some:
                self.fill(sequence, before[sequence], sequence.length)
            self.done["step"] += 1
            return
        sequence = self.random.choice(list(self.sequences))
        first, value = self.sequences[sequence]
        length = sequence.length
        if choice < 0.75:
            sequence.trim(self.random.randint(first, length))
            self.done["trim"] += 1
        elif choice < 0.85:
            first = self.random.randint(first, length)
            self.sequences[sequence] = (first, value)
            sequence.trim_front(first)
            self.done["trim_front"] += 1
        else:
            self.free(sequence)

    def fill(self, sequence: va.Sequence, start: int, end: int) -> None:
        for tensor in self.kv.layer(0):
            new = tensor[sequence.slot, start:end]
            value = self.sequences[sequence][1]  # may be there from before a trim
            assert bool(((new == 0) | (new == value)).all()), "new tokens are another's"
            new.fill_(value)

    def free(self, sequence: va.Sequence) -> None:
        first, value = self.sequences.pop(sequence)
        for tensor in self.kv.layer(0):
            held = tensor[sequence.slot, first : sequence.length]
            assert bool((held == value).all()), "a sequence does not hold what was written to it"
        sequence.free()
        self.done["free"] += 1


@on_every_device
def test_contents_and_counts_are_right_when_threads_share_a_pool(device: str, seed: int) -> None:
    rig = Rig(device, slots=6, budget_pages=60, high_watermark=30, low_watermark=4)
    allocators = [rig.kv, rig.make_allocator(slack=6)]
    workers = [Worker(allocators[i % 2], seed * 10 + i, seconds=1.0) for i in range(4)]
    budgets = itertools.cycle([60, 50])
    while any(worker.is_alive() for worker in workers):
        rig.backend.hold_fences()
        time.sleep(0.002)
        rig.pool.check()
        rig.backend.release_fences()
        rig.pool.reclaim()
        with contextlib.suppress(va.OutOfPages):
            rig.pool.set_budget(next(budgets) * rig.page)
    for worker in workers:
        worker.finish()
    done = {name: sum(worker.done[name] for worker in workers) for name in workers[0].done}
    assert min(done.values()) > 0, done
    for kv in allocators:
        kv.check()
        stats = kv.stats()
        assert (stats.live_sequences, stats.live_tokens, stats.mapped_bytes) == (0, 0, 0)
    if device == "cuda":
        torch.cuda.synchronize()
    rig.pool.set_watermarks(0)
    guard_bytes = allocators[1].stats().guard_bytes

    def nothing_is_held() -> bool:
        rig.pool.reclaim()
        return rig.pool.stats().held_bytes == guard_bytes

    until(nothing_is_held, "all but the guard is given back")
    assert rig.pool.stats().mappings == 0


@on_every_device
def test_counts_are_right_when_a_step_waits_for_the_readers_of_a_guard(device: str) -> None:
    rig = Rig(device, slack=6, background=False)
    sequence = rig.kv.allocate(4)
    rig.backend.block("synchronize")
    step = Call(lambda: rig.kv.step({sequence: 20}))
    assert rig.backend.wait_blocked("synchronize", DEADLINE_S)
    try:
        rig.pool.check()
        assert sequence.length == 4
    finally:
        rig.backend.unblock("synchronize")
    step.finish()
    rig.pool.check()


def full_pool(device: str) -> tuple[Rig, va.Sequence, va.Sequence]:
    """A rig whose memory is used up, a sequence with a page to spare in each region, and another.

    The spare pages are ready: the sequence could grow into them without a driver call.
    """
    rig = Rig(device, budget_pages=6 * REGIONS, background=False)
    spare = rig.kv.allocate(4)
    rig.kv.step({spare: 8})
    spare.trim(4)  # leaves its lookahead mapped
    growing = rig.kv.allocate(16)
    assert (rig.pages(spare), rig.pages(growing)) == (2, 4)
    assert rig.kv.stats().surplus_bytes == REGIONS * rig.page
    return rig, spare, growing


@on_every_device
def test_step_waits_when_what_it_would_use_is_being_taken_for_another(device: str) -> None:
    rig, spare, growing = full_pool(device)
    rig.backend.block("unmap")
    growth = Call(lambda: rig.kv.step({growing: 20}))
    assert rig.backend.wait_blocked("unmap", DEADLINE_S)
    step = Call(lambda: rig.kv.step({spare: 8}))
    step.must_be_waiting()
    rig.backend.unblock("unmap")
    growth.finish()
    with pytest.raises(va.OutOfPages):
        step.finish()
    assert (spare.length, growing.length) == (4, 20)
    assert (rig.pages(spare), rig.pages(growing)) == (1, 5)
    rig.kv.check()


@on_every_device
def test_step_does_not_take_from_one_of_its_sequences_what_that_is_to_have(device: str) -> None:
    rig, spare, growing = full_pool(device)
    with pytest.raises(va.OutOfPages):
        rig.kv.step({spare: 8, growing: 20})
    assert (spare.length, growing.length) == (4, 16)
    assert (rig.pages(spare), rig.pages(growing)) == (2, 4)
    rig.kv.check()


@on_every_device
def test_step_takes_from_one_of_its_sequences_what_that_does_not_need(device: str) -> None:
    rig = Rig(device, budget_pages=8 * REGIONS, background=False)
    spare = rig.kv.allocate(4)
    for tokens in (8, 16):
        rig.kv.step({spare: tokens})  # has extents of one, one and two pages
    spare.free()
    if device == "cuda":
        torch.cuda.synchronize()
    spare = rig.kv.allocate(0)
    growing = rig.kv.allocate(16)
    assert (rig.pages(spare), rig.pages(growing)) == (4, 4)
    rig.kv.step({spare: 8, growing: 24})
    assert (rig.pages(spare), rig.pages(growing)) == (2, 6)
    rig.kv.check()


@on_every_device
def test_step_waits_when_the_thread_turns_from_one_of_its_sequences_to_another(
    device: str,
) -> None:
    rig = Rig(device)
    first, second = rig.short_sequence(), rig.short_sequence()
    rig.halt_growth_of(second)
    step = Call(lambda: rig.kv.step({first: 12, second: 12}))
    until(lambda: rig.kv.stats().waited_steps == 1, "the step waits for the second")
    step.must_be_waiting()
    rig.kv.step({first: 5})  # leaves work for the thread, which does it next
    rig.backend.block("create")
    rig.backend.unblock("map")
    assert rig.backend.wait_blocked("create", DEADLINE_S)
    step.must_be_waiting()
    rig.backend.unblock("create")
    step.finish()
    until(lambda: rig.pages(first) == rig.pages(second) == 4, "the thread is ahead again")
    assert rig.calls("map") == rig.pool.stats().maps == 2 * 4 * REGIONS
    rig.kv.check()


@on_every_device
def test_allocate_waits_when_the_only_free_slot_is_being_emptied(device: str) -> None:
    rig = Rig(device, slots=2, background=False)
    rig.kv.allocate(8)
    freed = rig.kv.allocate(8)
    freed.free()
    if device == "cuda":
        torch.cuda.synchronize()
    rig.backend.block("unmap")
    reclaim = Call(rig.pool.reclaim)
    assert rig.backend.wait_blocked("unmap", DEADLINE_S)
    made: list[va.Sequence] = []
    allocate = Call(lambda: made.append(rig.kv.allocate(8)))
    allocate.must_be_waiting()
    rig.backend.unblock("unmap")
    reclaim.finish()
    allocate.finish()
    assert made[0].slot == freed.slot
    assert rig.pages(made[0]) == 2
    rig.kv.check()


@on_every_device
def test_memory_counts_against_the_budget_until_it_is_destroyed(device: str) -> None:
    rig = Rig(device, budget_pages=2 * REGIONS, background=False)
    rig.kv.allocate(8).free()
    if device == "cuda":
        torch.cuda.synchronize()
    rig.backend.block("destroy")
    reclaim = Call(rig.pool.reclaim)
    assert rig.backend.wait_blocked("destroy", DEADLINE_S)
    creates = rig.calls("create")
    allocate = Call(lambda: rig.kv.allocate(8))
    allocate.must_be_waiting()
    assert rig.calls("create") == creates
    rig.backend.unblock("destroy")
    reclaim.finish()
    allocate.finish()
    assert rig.pool.stats().held_bytes == 2 * REGIONS * rig.page
    rig.kv.check()


def test_allocator_can_go_when_the_driver_has_failed_in_a_reclaim_that_waited() -> None:
    rig = Rig(background=False)
    rig.kv.allocate(8).free()
    sequence = rig.kv.allocate(8)
    rig.backend.hold_fences()
    sequence.free()
    asked = rig.calls("query")
    call = Call(rig.pool.reclaim)
    until(lambda: rig.calls("query") > asked + 3, "it waits for the fence")
    rig.backend.arm("unmap")
    rig.backend.release_fences()
    with pytest.raises(va.BackendError):
        call.finish()
    rig.kv.check()
    del sequence, call
    rig.kv.close()
    rig.kv = None
    rig.pool.reclaim()
    assert rig.pool.stats().held_bytes == 0


# ---- what only shows when two things happen at once ----


def test_the_thread_leaves_a_tail_alone_while_kernels_from_before_the_trim_may_read_it() -> None:
    rig = Rig()
    sequence = rig.kv.allocate(4)
    for tokens in (8, 12, 16, 20, 24, 28):
        rig.kv.step({sequence: tokens})
    until(lambda: rig.pages(sequence) >= 8, "the thread is ahead")
    for tensor in rig.tensors(sequence):
        tensor[:28] = 7
    rig.backend.hold_fences()  # a kernel that reads all 28 tokens runs on
    sequence.trim(4)
    rig.kv.step({sequence: 9})  # takes the tail back
    zeros = rig.calls("zero")
    asked = rig.calls("query")
    rig.kv.step({sequence: 10})
    until(lambda: rig.calls("query") > asked, "the thread looks at the fence")
    assert rig.calls("zero") == zeros
    assert bool((rig.tensors(sequence)[0][16:28] == 7).all())
    rig.backend.release_fences()
    rig.kv.step({sequence: 20})
    assert bool((rig.tensors(sequence)[0][12:20] == 0).all())
    rig.kv.check()


def test_a_wake_is_not_lost_when_it_comes_in_the_middle_of_a_pass() -> None:
    backend = _core.FaultyBackend(_core.host_backend(4096))
    Rig.backends.append(backend)
    backend.block("create")
    pool = va.Pool(400 * 4096, backend=backend, low_watermark=2 * 4096)
    assert backend.wait_blocked("create", DEADLINE_S)
    pool.set_watermarks(low=20 * 4096)
    backend.unblock("create")
    until(lambda: pool.stats().free_bytes == 20 * 4096, "the new low watermark is kept")


def test_watermarks_that_meet_do_not_fight() -> None:
    rig = Rig(low_watermark=4, high_watermark=4)
    rig.kv.allocate(8).free()

    def idle_pages() -> tuple[int, int]:
        return rig.pool.stats().free_bytes // rig.page, rig.kv.stats().cached_bytes // rig.page

    until(lambda: idle_pages() == (4, 0), "what is idle is what is asked for")
    creates = rig.calls("create")
    for _ in range(20):
        rig.pool.set_watermarks(low=4 * rig.page, high=4 * rig.page)  # wakes the thread
        time.sleep(0.001)
    assert idle_pages() == (4, 0)
    assert rig.calls("create") == creates


def test_giving_memory_back_ends_though_the_thread_keeps_the_pool_filled() -> None:
    """What goes to the driver would come back at once, for as long as a fence does not pass."""
    rig = Rig(low_watermark=20, high_watermark=400)
    rig.kv.close()
    rig.kv = va.KVAllocator(
        rig.layout, max_sequences=4, max_seq_len=64, pool=rig.pool, fence_timeout_s=0.05
    )

    def is_filled() -> bool:
        return rig.pool.stats().free_bytes >= 20 * rig.page

    sequence = rig.kv.allocate(40)
    until(is_filled, "the pool is filled")
    rig.backend.hold_fences()
    sequence.free()
    Call(rig.pool.reclaim).finish()
    until(is_filled, "the pool is filled again")
    with pytest.raises(va.OutOfPages, match="did not finish in time"):
        Call(lambda: rig.pool.set_budget(10 * rig.page)).finish()
    # What is mapped ahead is taken too.
    live = rig.kv.allocate(4)
    until(lambda: rig.pages(live) > 1, "the thread has mapped ahead")
    until(is_filled, "the pool is filled again")
    rig.backend.release_fences()
    rig.pool.set_budget(10 * rig.page)
    assert rig.pool.stats().held_bytes <= 10 * rig.page
    until(lambda: rig.pages(live) > 1, "the thread maps ahead again")
    rig.kv.check()


@pytest.mark.parametrize("gain", ["budget", "memory", "slot"])
def test_a_wait_for_a_fence_ends_when_something_else_will_do(gain: str) -> None:
    rig = Rig(slots=2, budget_pages=4 * REGIONS, background=False)
    late, other = rig.kv.allocate(8), rig.kv.allocate(8)
    rig.backend.hold_fences()
    late.free()
    asked = rig.calls("query")
    if gain == "slot":
        call = Call(lambda: rig.kv.allocate(0))
    else:
        call = Call(lambda: rig.kv.step({other: 12}))
    until(lambda: rig.calls("query") > asked + 3, "it waits for the fence")
    if gain == "budget":
        rig.pool.set_budget(100 * rig.page)
    elif gain == "memory":
        rig.backend.release_fences()
    else:
        other.trim(0)
        rig.backend.release_fences()
        other.free()
    call.finish()
    rig.kv.check()


def test_a_wait_for_a_fence_ends_when_the_allocator_is_closed() -> None:
    rig = Rig(slots=1, background=False)
    late = rig.kv.allocate(8)
    rig.backend.hold_fences()
    late.free()
    asked = rig.calls("query")
    call = Call(lambda: rig.kv.allocate(8))
    until(lambda: rig.calls("query") > asked + 3, "it waits for the fence")
    rig.kv.close()
    with pytest.raises(va.Closed):
        call.finish()


def test_the_thread_sleeps_once_every_fence_has_passed() -> None:
    rig = Rig(high_watermark=100)
    sequence = rig.kv.allocate(8)
    rig.backend.hold_fences()
    sequence.free()
    assert wakes_of_other_threads(0.1) > 10  # it looks at the fence
    rig.backend.release_fences()
    until(lambda: wakes_of_other_threads(0.1) <= 3, "the thread sleeps")


@on_every_device
def test_the_thread_is_not_woken_for_a_guard_that_it_leaves_alone(device: str) -> None:
    rig = Rig(device, slack=24)
    sequence = rig.kv.allocate(4)  # its slack is a guard: a step has to take it away
    until(lambda: wakes_of_other_threads(0.05) <= 3, "the thread sleeps")

    assert wakes_of_other_threads_during(lambda: step_often(rig, sequence, 8)) <= 10
    assert any(mapping[5] == "read" for mapping in rig.kv.mappings())
    assert rig.kv.stats().waited_steps == 0
    rig.kv.check()


@on_every_device
def test_the_thread_is_not_woken_for_memory_that_it_did_not_find(device: str) -> None:
    rig = Rig(device, budget_pages=2 * REGIONS)
    sequence = rig.short_sequence()
    until(lambda: wakes_of_other_threads(0.05) <= 3, "the thread sleeps")
    rig.kv.step({sequence: 5})
    until(lambda: rig.kv.stats().ahead_failures == 1, "the failure is counted")

    assert wakes_of_other_threads_during(lambda: step_often(rig, sequence, 5)) <= 10
    assert rig.kv.stats().ahead_failures == 1
    rig.pool.set_budget(20 * rig.page)
    rig.kv.step({sequence: 5})
    until(lambda: rig.pages(sequence) == 3, "the thread maps ahead of it")
    rig.kv.check()


def test_the_thread_looks_again_where_a_fence_may_have_passed() -> None:
    rig = Rig(budget_pages=4 * REGIONS)
    sequence, freed = rig.short_sequence(), rig.short_sequence()
    rig.backend.hold_fences()
    freed.free()
    rig.kv.step({sequence: 5})
    until(lambda: rig.kv.stats().ahead_failures > 0, "the failure is counted")
    rig.backend.release_fences()
    rig.kv.step({sequence: 5})
    until(lambda: rig.pages(sequence) == 3, "the thread maps ahead of it")
    rig.kv.check()


def step_often(rig: Rig, sequence: va.Sequence, tokens: int) -> None:
    """So far apart that a thread could go to sleep in between."""
    for _ in range(100):
        rig.kv.step({sequence: tokens})
        time.sleep(0.001)


def wakes_of_other_threads(duration_s: float) -> int:
    """The same of a time in which this thread does nothing."""
    return wakes_of_other_threads_during(lambda: time.sleep(duration_s))


def wakes_of_other_threads_during(function: Callable[[], None]) -> int:
    """How often threads that live all that time, and are not this one, have gone to sleep."""

    def counts() -> dict[str, int]:
        found = {}
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = (task / "status").read_text()
                (count,) = re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)
                found[task.name] = int(count)
        found.pop(str(threading.get_native_id()), None)
        return found

    before = counts()
    function()
    after = counts()
    return sum(after[task] - count for task, count in before.items() if task in after)


@on_every_device
def test_a_full_device_is_asked_for_no_more_than_is_needed(device: str) -> None:
    rig = Rig(device, background=False, max_seq_len=400)
    sequence = rig.kv.allocate(64 * TOKENS_PER_PAGE)
    rig.backend.arm("create", 1, "out_of_memory")
    rig.kv.step({sequence: sequence.length + 1})  # would take two pages at once
    rig.backend.disarm()
    assert rig.pages(sequence) == 65
    rig.kv.step({sequence: 66 * TOKENS_PER_PAGE})
    assert rig.pages(sequence) == 67
    rig.kv.check()


def test_mappings_of_freed_slots_make_room_where_the_driver_takes_no_more() -> None:
    backend = _core.FaultyBackend(_core.host_backend(4096))
    most = backend.max_mappings
    page = 4096
    pool = va.Pool(4 * most * page, backend=backend, background=False, max_extent=page)
    layout = va.KVLayout.latent(num_layers=1, latent_dim=page // 4, dtype=torch.float32)
    kv = va.KVAllocator(layout, max_sequences=2, max_seq_len=most, pool=pool, lookahead_tokens=0)
    live, idle = kv.allocate(1), kv.allocate(most - 40)
    idle.free()
    kv.step({live: 100})
    assert live.length == 100
    kv.check()


def test_what_the_device_still_has_is_kept_free_where_it_has_less_than_the_low_watermark() -> None:
    backend = _core.FaultyBackend(_core.host_backend(4096))
    Rig.backends.append(backend)
    backend.arm("create", 5, "out_of_memory")
    pool = va.Pool(400 * 4096, backend=backend, low_watermark=10 * 4096)
    until(lambda: pool.stats().free_bytes == 4 * 4096, "what could be had is free")
    assert pool.stats().creates == 4
    assert "destroy" not in backend.calls()
    pool.check()


def test_the_thread_takes_nothing_of_a_full_device_while_a_call_tries_again() -> None:
    rig = Rig(low_watermark=4)
    until(lambda: rig.pool.stats().free_bytes == 4 * rig.page, "the pool is filled")
    creates = rig.calls("create")
    rig.backend.arm("create", 1, "out_of_memory")
    rig.backend.block("map")
    call = Call(lambda: rig.kv.allocate(16))
    assert rig.backend.wait_blocked("map", DEADLINE_S)  # the four pages have gone back
    call.must_be_waiting()
    assert rig.calls("create") == creates + 1 + REGIONS  # the one that failed, and the call's own
    rig.backend.unblock("map")
    call.finish()
    until(lambda: rig.pool.stats().free_bytes == 4 * rig.page, "the pool is filled again")
    rig.kv.check()
