"""Memory, and kernels that are still to run: what CUDA does later must find what was there before.

A test that says "not yet" keeps a stream busy for BUSY_MS, and checks that it still is.
"""

from __future__ import annotations

import array
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator

import attend_in_a_process as attend
import pytest
import torch

import vattention as va
from vattention import _core

pytestmark = pytest.mark.gpu

MiB, GiB, TiB = 1 << 20, 1 << 30, 1 << 40
PAGE = 2 * MiB
# 2,048 bytes a row, in a region for K and one for V.
LAYOUT = va.KVLayout(num_layers=1, num_kv_heads=1, head_dim=512, dtype=torch.int32, order="layer")
TOKENS = 1_024  # a page of each
BUSY_MS = 500.0

Spin = Callable[[float], None]


def make(**options: object) -> va.KVAllocator:
    settings = {"max_sequences": 4, "max_seq_len": 64 * TOKENS, "lookahead_tokens": 0}
    if "pool" not in options:
        settings |= {"device": "cuda", "memory": "4GiB", "background": False}
    kv = va.KVAllocator(LAYOUT, **(settings | options))
    assert kv.pool.page_bytes == PAGE
    return kv


def write(kv: va.KVAllocator, seq: va.Sequence, value: int) -> None:
    for tensor in kv.layer(0):
        tensor[seq.slot, : seq.length].fill_(value)


def holds(kv: va.KVAllocator, seq: va.Sequence, value: int, first: int = 0) -> bool:
    """Whether all its tokens, from the first, have that value."""
    parts = [tensor[seq.slot, first : seq.length] for tensor in kv.layer(0)]
    return all(bool((part == value).all()) for part in parts)


def state(kv: va.KVAllocator) -> tuple[object, ...]:
    """What an operation that fails must leave alone."""
    stats = kv.stats()
    kv.check()
    return (
        kv.mappings(),
        stats.live_sequences,
        stats.live_tokens,
        stats.free_slots,
        stats.mapped_bytes,
        stats.cached_bytes + stats.retired_bytes,
        stats.held_bytes,
        stats.free_bytes,
    )


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


class LateReader:
    """Copies a sequence on the current stream, which is kept busy first."""

    def __init__(self, kv: va.KVAllocator, seq: va.Sequence, spin: Spin) -> None:
        parts = [tensor[seq.slot, : seq.length] for tensor in kv.layer(0)]
        self._copies = [torch.zeros_like(part) for part in parts]
        torch.cuda.synchronize()
        spin(BUSY_MS)
        for copy, part in zip(self._copies, parts, strict=True):
            copy.copy_(part)
        self._done = recorded()

    @property
    def has_read(self) -> bool:
        return self._done.query()

    def saw(self, value: int) -> bool:
        self._done.synchronize()
        return all(bool((copy == value).all()) for copy in self._copies)


@pytest.fixture(scope="module", autouse=True)
def _kernels_are_loaded() -> None:
    """The first use of a kernel loads it, which may wait for all that runs."""
    with make() as kv:
        seq = kv.allocate(TOKENS)
        write(kv, seq, 3)
        part = kv.layer(0)[0][seq.slot, :TOKENS]
        copy = torch.zeros_like(part)
        copy.copy_(part)
        assert holds(kv, seq, 3)
        assert bool((copy == 3).all())
        torch.zeros((), dtype=torch.int64, device="cuda").add_((part != 3).any())
    torch.cuda.synchronize()


@pytest.fixture(params=["the default stream", "another stream"])
def reading(request: pytest.FixtureRequest, apart: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where the old owner's kernels run, and where it gives its memory up."""
    return torch.cuda.default_stream() if "default" in request.param else apart


@pytest.fixture
def other(reading: torch.cuda.Stream, apart: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where the next owner's kernels run."""
    default = torch.cuda.default_stream()
    return apart if reading == default else default


# ---- memory that changes hands ----


def test_a_freed_slot_is_handed_on_after_the_last_reader(
    spin: Spin, reading: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    with make(max_sequences=1) as kv:
        old = kv.allocate(4 * TOKENS)
        write(kv, old, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, old, spin)
            old.free()
        assert not reader.has_read  # giving up waits for nothing
        with torch.cuda.stream(other):
            new = kv.allocate(4 * TOKENS)
            assert reader.has_read
            assert holds(kv, new, 0)
            write(kv, new, 1)
        assert reader.saw(7)
        assert new.slot == old.slot
        assert kv.stats().adoptions == 1


def test_another_slot_is_taken_while_a_freed_one_is_read(
    spin: Spin, reading: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    with make(max_sequences=2) as kv:
        old = kv.allocate(4 * TOKENS)
        write(kv, old, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, old, spin)
            old.free()
        with torch.cuda.stream(other):
            new = kv.allocate(4 * TOKENS)
            write(kv, new, 1)
        assert kv.stats().retired_bytes == 8 * PAGE
        assert not reader.has_read
        assert new.slot != old.slot
        assert reader.saw(7)
        third = kv.allocate(4 * TOKENS)
        assert third.slot == old.slot
        assert kv.stats().adoptions == 1
        assert holds(kv, third, 0)
        torch.cuda.synchronize()
        assert holds(kv, new, 1)


def test_memory_of_a_freed_slot_moves_to_another_after_the_last_reader(
    spin: Spin, reading: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    with make(max_sequences=2, memory=8 * PAGE) as kv:
        old = kv.allocate(4 * TOKENS)
        write(kv, old, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, old, spin)
            old.free()
        assert not reader.has_read
        with torch.cuda.stream(other):
            new = kv.allocate(4 * TOKENS)
            assert reader.has_read
            assert holds(kv, new, 0)
            write(kv, new, 1)
        assert reader.saw(7)
        assert new.slot != old.slot
        assert kv.stats().held_bytes == 8 * PAGE


@pytest.mark.parametrize(
    ("slots", "error"), [(1, va.OutOfSlots), (2, va.OutOfPages)], ids=["slots", "pages"]
)
def test_waiting_for_a_reader_ends_with_an_error_after_the_timeout(
    slots: int,
    error: type[va.VAttentionError],
    spin: Spin,
    reading: torch.cuda.Stream,
    other: torch.cuda.Stream,
) -> None:
    with make(max_sequences=slots, memory=8 * PAGE, fence_timeout_s=0.05) as kv:
        old = kv.allocate(4 * TOKENS)
        write(kv, old, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, old, spin)
            old.free()
        with torch.cuda.stream(other):
            before = state(kv)
            with pytest.raises(error):
                kv.allocate(4 * TOKENS)
            assert state(kv) == before
        assert not reader.has_read
        assert reader.saw(7)
        new = kv.allocate(4 * TOKENS)
        assert holds(kv, new, 0)


def test_trimmed_memory_is_handed_on_after_the_last_reader(
    spin: Spin, reading: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    with make(max_sequences=2, memory=16 * PAGE, max_extent=PAGE) as kv:
        old = kv.allocate(8 * TOKENS)
        write(kv, old, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, old, spin)
            old.trim(TOKENS)
        assert kv.stats().retired_bytes == 14 * PAGE
        assert not reader.has_read
        with torch.cuda.stream(other):
            new = kv.allocate(7 * TOKENS)
            assert reader.has_read
            assert holds(kv, new, 0)
            write(kv, new, 1)
        assert reader.saw(7)
        assert holds(kv, old, 7)
        assert old.length == TOKENS
        assert kv.stats().held_bytes == 16 * PAGE


def test_the_front_is_handed_on_after_the_last_reader(
    spin: Spin, reading: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    with make(max_sequences=2, memory=16 * PAGE, max_extent=PAGE) as kv:
        old = kv.allocate(8 * TOKENS)
        write(kv, old, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, old, spin)
            old.trim_front(6 * TOKENS)
        assert kv.stats().retired_bytes == 12 * PAGE
        assert not reader.has_read
        with torch.cuda.stream(other):
            new = kv.allocate(6 * TOKENS)
            assert reader.has_read
            assert holds(kv, new, 0)
            write(kv, new, 1)
        assert reader.saw(7)
        assert holds(kv, old, 7, first=6 * TOKENS)


def test_the_background_thread_unmaps_after_the_last_reader(
    spin: Spin, reading: torch.cuda.Stream, until: Callable[..., None]
) -> None:
    with make(max_extent=PAGE, background=True) as kv:
        old = kv.allocate(8 * TOKENS)
        write(kv, old, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, old, spin)
            old.trim(TOKENS)
        assert kv.stats().retired_bytes == 14 * PAGE
        assert not reader.has_read
        until(lambda: kv.stats().retired_bytes == 0)
        assert reader.has_read
        assert reader.saw(7)
        assert len(kv.mappings()) == 2
        assert holds(kv, old, 7)


@pytest.mark.parametrize("where", ["on the stream of the trim", "on another stream"])
def test_what_was_trimmed_can_be_grown_into_again_while_it_is_read(
    where: str, spin: Spin, reading: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    with make(max_extent=PAGE) as kv:
        seq = kv.allocate(8 * TOKENS)
        write(kv, seq, 7)
        with torch.cuda.stream(reading):
            reader = LateReader(kv, seq, spin)
            seq.trim(TOKENS)
        assert not reader.has_read
        with torch.cuda.stream(other if "another" in where else reading):
            kv.step({seq: 8 * TOKENS})
            assert holds(kv, seq, 0, first=TOKENS)
        assert reader.saw(7)
        seq.trim(TOKENS)
        assert holds(kv, seq, 7)


# ---- memory that is new ----


def test_memory_is_ready_on_the_stream_that_was_current(
    spin: Spin, apart: torch.cuda.Stream
) -> None:
    with make(max_sequences=1, max_extent=PAGE) as kv:
        dirty = kv.allocate(8 * TOKENS)
        write(kv, dirty, 9)
        dirty.free()
        copies = [torch.empty_like(t[0, : 8 * TOKENS]) for t in kv.layer(0)]
        torch.cuda.synchronize()

        spin(BUSY_MS)  # what goes to this stream by mistake comes too late, and clears a write
        busy = recorded()
        with torch.cuda.stream(apart):
            spin(20)
            seq = kv.allocate(2 * TOKENS)
            kv.step({seq: 8 * TOKENS})
            for copy, tensor in zip(copies, kv.layer(0), strict=True):
                copy.copy_(tensor[seq.slot, : 8 * TOKENS])
            write(kv, seq, 5)
        apart.synchronize()
        assert not busy.query()
        torch.cuda.synchronize()
        assert all(not bool(copy.any()) for copy in copies)
        assert holds(kv, seq, 5)
        assert kv.stats().adoptions == 1


def test_mapping_and_giving_up_do_not_wait_for_a_busy_gpu(
    spin: Spin, apart: torch.cuda.Stream
) -> None:
    with make(max_extent=PAGE) as kv:
        growing, ending = kv.allocate(TOKENS), kv.allocate(4 * TOKENS)
        write(kv, growing, 7)
        torch.cuda.synchronize()
        busy = []
        for stream in (apart, torch.cuda.default_stream()):
            with torch.cuda.stream(stream):
                spin(BUSY_MS)
                busy.append(recorded())
        kv.step({growing: 9 * TOKENS})
        new = kv.allocate(4 * TOKENS)
        ending.free()
        growing.trim(8 * TOKENS)
        assert not any(event.query() for event in busy)
        torch.cuda.synchronize()
        assert holds(kv, new, 0)
        assert holds(kv, growing, 0, first=TOKENS)
        growing.trim(TOKENS)
        assert holds(kv, growing, 7)


def test_a_step_with_nothing_to_map_calls_nothing_and_waits_for_nothing(
    spin: Spin, apart: torch.cuda.Stream
) -> None:
    backend = _core.FaultyBackend(_core.cuda_backend(torch.cuda.current_device()))
    with make(pool=va.Pool("4GiB", backend=backend, background=False)) as kv:
        sequences = [kv.allocate(100) for _ in range(3)]
        lengths = array.array("q", [100] * 3)
        torch.cuda.synchronize()
        kv.step(lengths)  # sees that what was allocated has been cleared
        busy = []
        for stream in (apart, torch.cuda.default_stream()):
            with torch.cuda.stream(stream):
                spin(BUSY_MS)
                busy.append(recorded())
        calls, waited = backend.calls(), kv.stats().waited_steps
        slowest_s = 0.0
        for length in range(101, 201):
            start = time.perf_counter()
            if length % 2:
                kv.step(dict.fromkeys(sequences, length))
            else:
                for slot in range(3):
                    lengths[slot] = length
                kv.step(lengths)
            slowest_s = max(slowest_s, time.perf_counter() - start)
        assert not any(event.query() for event in busy)
        assert backend.calls() == calls
        assert kv.stats().waited_steps == waited
        assert slowest_s < 0.020
        assert {seq.length for seq in sequences} == {200}


# ---- graphs ----


def test_a_graph_gives_right_answers_while_memory_grows_under_it(seed: int) -> None:
    """It is captured once, over addresses that stay: a decode step of a ragged batch."""
    layout = va.KVLayout(
        num_layers=2, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, order="layer"
    )
    batch, max_seq_len = 3, 32 * TOKENS
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cuda").to(layout.dtype)

    with (
        torch.no_grad(),
        va.KVAllocator(
            layout,
            max_sequences=batch,
            max_seq_len=max_seq_len,
            memory="4GiB",
            device="cuda",
            lookahead_tokens=0,
            background=False,
        ) as kv,
    ):
        sequences = kv.allocate_batch(batch, 600)
        k, v = kv.layer(1)
        written = [(normal(600, 8, 128), normal(600, 8, 128)) for _ in sequences]
        for seq, (keys, values) in zip(sequences, written, strict=True):
            k[seq.slot, :600] = keys
            v[seq.slot, :600] = values

        # What the graph reads: a step writes one token and attends to all of them.
        query, new_k, new_v = normal(batch, 32, 128), normal(batch, 8, 128), normal(batch, 8, 128)
        lengths = torch.full((batch,), 600, device="cuda")
        slots = torch.tensor([seq.slot for seq in sequences], device="cuda")
        starts = torch.tensor(
            [*(seq.slot * max_seq_len for seq in sequences), batch * max_seq_len],
            dtype=torch.int32,
            device="cuda",
        )
        places = torch.arange(batch + 1, dtype=torch.int32, device="cuda")

        def decode() -> torch.Tensor:
            k[slots, lengths] = new_k
            v[slots, lengths] = new_v
            lengths.add_(1)
            return torch.ops.aten._flash_attention_forward.default(
                query,
                k.view(-1, 8, 128),
                v.view(-1, 8, 128),
                places,
                starts,
                1,
                max_seq_len,
                0.0,
                False,
                False,
                seqused_k=lengths.int(),
            )[0]

        kv.step(dict.fromkeys(sequences, 601))
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            decode()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = decode()
        mapped_bytes = kv.stats().mapped_bytes

        # Lengths before each step; pages end at multiples of 1,024.
        for now in (
            (600, 600, 600),
            (1_023, 900, 700),
            (1_024, 1_000, 1_024),
            (4_096, 5_000, 2_047),
            (16_389, 20_000, 2_048),
            (32_766, 20_001, 16_383),
            (32_767, 20_002, 16_384),
        ):
            kv.step({seq: length + 1 for seq, length in zip(sequences, now, strict=True)})
            for i, (seq, length) in enumerate(zip(sequences, now, strict=True)):
                keys, values = written[i]
                had = len(keys)
                more = normal(length - had, 8, 128), normal(length - had, 8, 128)
                k[seq.slot, had:length], v[seq.slot, had:length] = more
                # The token that the step writes weighs about as much as all others.
                new_k[i], new_v[i] = normal(8, 128), normal(8, 128) * (length / 4)
                written[i] = (
                    torch.cat([keys, more[0], new_k[i : i + 1]]),
                    torch.cat([values, more[1], new_v[i : i + 1]]),
                )
            lengths.copy_(torch.tensor(now))
            query.copy_(normal(batch, 32, 128))
            graph.replay()
            torch.cuda.synchronize()
            assert lengths.tolist() == [length + 1 for length in now]
            for i, (keys, values) in enumerate(written):
                what = f"{len(keys)} tokens in place {i}"
                one = query[i : i + 1]
                attend.expect_attention(output[i : i + 1], one, keys, values, False, what)
        assert kv.stats().mapped_bytes >= 16 * mapped_bytes
        for seq, (keys, values) in zip(sequences, written, strict=True):
            assert torch.equal(k[seq.slot, : seq.length], keys)
            assert torch.equal(v[seq.slot, : seq.length], values)


def test_a_capturing_stream_is_refused_and_its_capture_goes_on() -> None:
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    with make(max_sequences=6, max_extent=PAGE) as kv:
        seq, cached = kv.allocate(4 * TOKENS - 10), kv.allocate(TOKENS)
        write(kv, seq, 7)
        cached.free()
        torch.cuda.synchronize()
        refused = {
            "a freed slot": lambda: kv.allocate(TOKENS),
            "new slots": lambda: kv.allocate_batch(3, TOKENS),
            "growth": lambda: kv.step({seq: 6 * TOKENS}),
            "trim": lambda: seq.trim(TOKENS),
            "trim_front": lambda: seq.trim_front(2 * TOKENS),
            "free": seq.free,
        }
        count.add_(1)
        count.zero_()
        before = state(kv)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            count.add_(1)
            for what, call in refused.items():
                with pytest.raises(va.BackendError) as raised:
                    call()
                assert raised.value.call == "cuStreamIsCapturing", what
                assert raised.value.code == 900, what  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
                assert state(kv) == before, what
            kv.step({seq: 4 * TOKENS})  # nothing to map
            count.add_(1)
        graph.replay()
        assert count.item() == 2

        # All of it works now.
        assert seq.length == 4 * TOKENS
        kv.step({seq: 6 * TOKENS})
        assert holds(kv, seq, 0, first=4 * TOKENS)
        new = kv.allocate(TOKENS)
        assert new.slot == cached.slot
        assert holds(kv, new, 0)
        seq.trim(TOKENS)
        assert holds(kv, seq, 7)
        seq.free()
        graph.replay()
        assert count.item() == 4


def test_the_background_thread_maps_during_a_capture_on_another_thread(
    until: Callable[..., None],
) -> None:
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    with make(max_extent=PAGE, lookahead_tokens=2 * TOKENS, background=True) as kv:
        seq = kv.allocate(TOKENS)
        until(lambda: kv.stats().mapped_bytes == 6 * PAGE)
        write(kv, seq, 7)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            count.add_(1)
            kv.step({seq: 2 * TOKENS})
            until(lambda: kv.stats().mapped_bytes == 8 * PAGE)
            count.add_(1)
        graph.replay()
        assert count.item() == 2
        stats = kv.stats()
        assert (stats.waited_steps, stats.ahead_failures) == (0, 0)
        kv.step({seq: 4 * TOKENS})
        assert holds(kv, seq, 0, first=TOKENS)
        seq.trim(TOKENS)
        assert holds(kv, seq, 7)


# ---- kernels beside ----


def test_contents_hold_while_memory_beside_them_is_mapped_and_unmapped(
    apart: torch.cuda.Stream, seed: int
) -> None:
    pages, rounds, reads_a_graph = 256, 160, 200
    generator = torch.Generator("cuda").manual_seed(seed)
    with make(
        max_sequences=3, max_seq_len=(pages + 128) * TOKENS, memory="8GiB", max_extent=PAGE
    ) as kv:
        below = kv.allocate(1)
        read = kv.allocate(pages * TOKENS)
        below.free()
        tensors = kv.layer(0)
        window = tensors[0][read.slot, : pages * TOKENS]
        window.random_(generator=generator)
        expected = window.sum(dtype=torch.int64)
        wrong, reads, bad = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(3))

        def check_once() -> None:
            wrong.add_(window.sum(dtype=torch.int64) != expected)
            reads.add_(1)

        apart.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(apart):
            check_once()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(reads_a_graph):
                check_once()

        running: deque[torch.cuda.Event] = deque()
        replays = beside = 0
        before = kv.pool.stats()
        for number in range(1, rounds + 1):
            while running and running[0].query():
                running.popleft()
            while len(running) < 2:
                with torch.cuda.stream(apart):
                    graph.replay()
                    running.append(recorded())
                replays += 1
            # On both sides of what is read, and every now and then right behind it.
            others = [kv.allocate(8 * TOKENS) for _ in range(2)]
            for seq in others:
                for tensor in tensors:
                    part = tensor[seq.slot, : 8 * TOKENS]
                    bad.add_((part != 0).any())
                    part.fill_(number)
                    bad.add_((part != number).any())
            if number % 16 == 0:
                kv.step({read: read.length + TOKENS})
            for seq in others:
                seq.free()
            kv.reclaim()
            beside += not running[-1].query()
        torch.cuda.synchronize()

        assert {seq.slot for seq in others} == {read.slot - 1, read.slot + 1}
        assert bad.item() == 0
        assert wrong.item() == 0
        assert reads.item() == 1 + replays * reads_a_graph
        assert beside > rounds / 2, "the kernels had ended before the memory was unmapped"
        after = kv.pool.stats()
        assert after.maps - before.maps >= 5_000
        assert after.destroys - before.destroys >= 5_000
        kv.check()


def test_an_allocator_whose_sequences_have_ended_goes_during_a_capture() -> None:
    pool = va.Pool("1GiB", "cuda")
    kv = make(pool=pool)
    seq = kv.allocate(8 * TOKENS)
    write(kv, seq, 7)
    torch.cuda.synchronize()
    seq.free()
    del seq
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        count.add_(1)
        kv.close()
        del kv
        count.add_(1)
    graph.replay()
    assert count.item() == 2
    pool.check()
    assert pool.reclaim() == 16 * PAGE
    assert pool.stats().held_bytes == 0


# ---- a full device ----


@pytest.fixture
def ballast() -> Iterator[Callable[[int], list[torch.Tensor]]]:
    """Takes all memory of the device but that many bytes; emptying the list gives it back."""
    taken: list[torch.Tensor] = []

    def take(left_bytes: int) -> list[torch.Tensor]:
        gc.collect()
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info()
        assert free_bytes > 2 * left_bytes
        taken.append(torch.empty(free_bytes - left_bytes, dtype=torch.uint8, device="cuda"))
        return taken

    yield take
    taken.clear()
    torch.cuda.empty_cache()


def test_out_of_pages_on_a_full_device_where_the_budget_is_larger(
    ballast: Callable[[int], list[torch.Tensor]],
) -> None:
    size = 16 * TOKENS  # 64 MiB
    with make(memory=TiB, max_sequences=64, max_seq_len=1_024 * TOKENS, max_extent=PAGE) as kv:
        sequences = [kv.allocate(size)]
        write(kv, sequences[0], 7)
        torch.cuda.synchronize()
        taken = ballast(GiB)

        with pytest.raises(va.OutOfPages, match="device") as raised:
            for _ in range(40):
                before = state(kv)
                sequences.append(kv.allocate(size))
        assert state(kv) == before
        assert len(sequences) >= 8
        assert raised.value.needed == 32 * PAGE
        assert raised.value.budget == TiB

        # What was made before the first that failed goes back.
        free_bytes, _ = torch.cuda.mem_get_info()
        with pytest.raises(va.OutOfPages):
            kv.step({sequences[0]: size + 1, sequences[1]: 600 * TOKENS})
        assert state(kv) == before
        assert torch.cuda.mem_get_info()[0] == pytest.approx(free_bytes, abs=16 * MiB)

        # What freed sequences hold is used first.
        for seq in (sequences.pop(), sequences.pop()):
            seq.free()
        torch.cuda.synchronize()
        held_bytes = kv.stats().held_bytes
        longer = kv.allocate(2 * size)
        assert kv.stats().held_bytes == held_bytes
        assert kv.stats().cached_bytes == 0

        taken.clear()
        torch.cuda.empty_cache()
        more = kv.allocate(600 * TOKENS)
        kv.step({sequences[0]: size + 1})
        assert holds(kv, more, 0)
        assert holds(kv, longer, 0)
        assert holds(kv, sequences[0], 0, first=size)
        sequences[0].trim(size)
        assert holds(kv, sequences[0], 7)
        kv.check()
