"""`KVAllocator` and `Sequence`: what they promise, seen through their tensors and figures."""

from __future__ import annotations

import array
import dataclasses
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vattention as va
from vattention import _core

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
HOST_PAGE_BYTES = 4096

# One region, 256 bytes a token: a page of the host holds 16 tokens, one of CUDA 8,192.
ONE = va.KVLayout.latent(num_layers=1, latent_dim=128, dtype=torch.bfloat16)
# K and V of two layers, 256 bytes a token each, in four regions.
LAYER = va.KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16, order="layer")
LAYOUTS = {
    "layer": LAYER,
    # Two layers' K in one region and two layers' V in another, then one layer's of each.
    "balanced": va.KVLayout(
        num_layers=3,
        num_kv_heads=3,
        head_dim=40,
        v_head_dim=24,
        dtype=torch.float16,
        order="balanced",
        layers_per_row=2,
    ),
    # 1,440 bytes a row, which do not divide a page.
    "token": va.KVLayout(
        num_layers=3, num_kv_heads=3, head_dim=40, dtype=torch.float16, order="token"
    ),
    "latent-token": va.KVLayout.latent(
        num_layers=3, latent_dim=72, dtype=torch.bfloat16, order="token"
    ),
    "latent-layer": va.KVLayout.latent(
        num_layers=2, latent_dim=72, dtype=torch.bfloat16, order="layer"
    ),
    "unequal-heads": va.KVLayout(
        num_layers=2,
        num_kv_heads=2,
        head_dim=48,
        v_head_dim=32,
        dtype=torch.float16,
        order="token",
    ),
    "unequal-heads-layer": va.KVLayout(
        num_layers=1,
        num_kv_heads=2,
        head_dim=24,
        v_head_dim=100,
        dtype=torch.bfloat16,
        order="layer",
    ),
    # 24 bytes of K and of V, rounded up to 32.
    "fp8": va.KVLayout(
        num_layers=2, num_kv_heads=1, head_dim=24, dtype=torch.float8_e4m3fn, order="token"
    ),
    "int8": va.KVLayout(num_layers=2, num_kv_heads=4, head_dim=32, dtype=torch.int8, order="layer"),
    "fp32": va.KVLayout(
        num_layers=2, num_kv_heads=1, head_dim=20, dtype=torch.float32, order="token"
    ),
    # Three regions, of which the last has smaller rows.
    "layers-per-row": va.KVLayout(
        num_layers=5,
        num_kv_heads=2,
        head_dim=16,
        dtype=torch.bfloat16,
        order="token",
        layers_per_row=2,
    ),
    # On the host a row takes more than a page.
    "large-rows": va.KVLayout(
        num_layers=3,
        num_kv_heads=4,
        head_dim=128,
        dtype=torch.bfloat16,
        order="token",
        row_padding_bytes=16,
    ),
}


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> va.KVLayout:
    return LAYOUTS[request.param]


def make_backend(device: str) -> _core.FaultyBackend:
    """The device's backend, which counts its calls."""
    if device == "cpu":
        return _core.FaultyBackend(_core.host_backend(HOST_PAGE_BYTES))
    return _core.FaultyBackend(_core.cuda_backend(torch.cuda.current_device()))


def page_bytes(device: str) -> int:
    return HOST_PAGE_BYTES if device == "cpu" else _core.cuda_backend(0).page_bytes


def unit_tokens(layout: va.KVLayout, page: int) -> int:
    """Tokens of about a page a region."""
    return max(1, layout.tokens_per_page(page))


def make(
    device: str,
    layout: va.KVLayout = LAYER,
    *,
    pages: int = 512,
    max_units: int = 64,
    max_extent_pages: int | None = None,
    backend: _core.Backend | None = None,
    zero: bool = True,
    background: bool = False,
    **options: Any,
) -> va.KVAllocator:
    """An allocator that does nothing on its own, with a budget in pages."""
    page = page_bytes(device)
    pool = va.Pool(
        pages * page,
        device,
        page_bytes=page if device == "cpu" and backend is None else None,
        max_extent=None if max_extent_pages is None else max_extent_pages * page,
        zero=zero,
        background=background,
        backend=backend,
    )
    settings: dict[str, Any] = {
        "max_sequences": 4,
        "max_seq_len": max_units * unit_tokens(layout, page),
        "lookahead_tokens": 0,
    }
    return va.KVAllocator(layout, pool=pool, **(settings | options))


def unit(kv: va.KVAllocator) -> int:
    return unit_tokens(kv.layout, kv.pool.page_bytes)


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
        time.sleep(0.001)


def settle(device: str) -> None:
    """Waits until the device is done with what was freed, so that it can be adopted."""
    if device == "cuda":
        torch.cuda.synchronize()


def snapshot(kv: va.KVAllocator, sequences: list[va.Sequence]) -> tuple[object, ...]:
    """Everything that an operation which fails must leave as it was."""
    stats = dataclasses.asdict(kv.stats())
    for counter in ("steps", "waited_steps"):
        del stats[counter]
    # What the GPU was not done with at first may be ready for the next sequence by now.
    stats["cached_bytes"] += stats.pop("retired_bytes")
    return stats, kv.mappings(), [seq.length if seq.alive else None for seq in sequences]


class Model:
    """What the tokens of each sequence must hold, kept beside the allocator in plain tensors.

    Tokens that were trimmed and grown again may hold zeros or what was there: each byte is one of
    the two.
    """

    def __init__(self, kv: va.KVAllocator, seed: int) -> None:
        self.kv = kv
        self.generator = torch.Generator(kv.device).manual_seed(seed)
        tensors = [t for layer in range(kv.layout.num_layers) for t in kv.layer(layer)]
        # A torch op on the bytes, whatever the dtype. The V of a latent has none.
        self.components = [t.view(torch.uint8) for t in tensors if t.shape[-1] > 0]
        self.now: dict[va.Sequence, list[torch.Tensor]] = {}
        self.old: dict[va.Sequence, list[torch.Tensor]] = {}
        self.first: dict[va.Sequence, int] = {}

    def begin(self, *sequences: va.Sequence) -> None:
        for seq in sequences:
            nothing = [c[0, :0].clone() for c in self.components]
            self.now[seq], self.old[seq], self.first[seq] = nothing, list(nothing), 0
        self.grown(*sequences)

    def grown(self, *sequences: va.Sequence) -> None:
        """They are longer now: what is new reads as zero."""
        for seq in sequences:
            for kept in (self.now[seq], self.old[seq]):
                for i, values in enumerate(kept):
                    new = seq.length - len(values)
                    if new > 0:
                        kept[i] = torch.cat([values, values.new_zeros(new, *values.shape[1:])])

    def write(self, seq: va.Sequence, start: int, stop: int) -> None:
        for i, component in enumerate(self.components):
            data = torch.randint(
                1,  # never zero, so that what was cleared is told from what was not
                256,
                (stop - start, *component.shape[2:]),
                dtype=torch.uint8,
                device=self.kv.device,
                generator=self.generator,
            )
            component[seq.slot, start:stop] = data
            self.now[seq][i][start:stop] = data
            self.old[seq][i][start:stop] = data

    def trimmed(self, seq: va.Sequence) -> None:
        for values in self.now[seq]:
            values[seq.length :] = 0

    def trimmed_front(self, seq: va.Sequence, first_token: int) -> None:
        self.first[seq] = first_token

    def ended(self, seq: va.Sequence) -> None:
        del self.now[seq], self.old[seq], self.first[seq]

    def check(self) -> None:
        self.kv.check()
        for seq in self.now:
            first, length = self.first[seq], seq.length
            for component, now, old in zip(
                self.components, self.now[seq], self.old[seq], strict=True
            ):
                found = component[seq.slot, first:length]
                right = (found == now[first:length]) | (found == old[first:length])
                assert bool(right.all()), (seq, (~right).nonzero()[0].tolist())


# ---- tensors ----


def test_layer_tensors_are_what_the_layout_says(device: str, layout: va.KVLayout) -> None:
    with make(device, layout) as kv:
        heads = layout.num_kv_heads
        for layer in range(layout.num_layers):
            k, v = kv.layer(layer)
            for tensor, dim in ((k, layout.head_dim), (v, layout.v_dim)):
                assert tensor.shape == (kv.max_sequences, kv.max_seq_len, heads, dim)
                assert tensor.dtype == layout.dtype
                assert tensor.device == kv.device
                assert tensor.device.type == device
                assert tensor.stride()[2:] == (max(dim, 1), 1)
                for stride in tensor.stride()[:2]:
                    assert stride * layout.itemsize % 16 == 0
                assert tensor.data_ptr() % 16 == 0


def test_layer_gives_the_same_tensors_for_ever(device: str) -> None:
    with make(device) as kv:
        before = [t for i in range(kv.layout.num_layers) for t in kv.layer(i)]
        addresses = [t.data_ptr() for t in before]
        assert len(set(addresses)) == len(addresses)
        seq = kv.allocate(1)
        kv.step({seq: kv.max_seq_len})
        seq.trim(1)
        seq.free()
        kv.reclaim()
        after = [t for i in range(kv.layout.num_layers) for t in kv.layer(i)]
        assert all(a is b for a, b in zip(before, after, strict=True))
        assert [t.data_ptr() for t in after] == addresses


@pytest.mark.parametrize("layer", [-1, 2, "0", None])
def test_layer_that_does_not_exist_is_refused(layer: object) -> None:
    with make("cpu") as kv, pytest.raises(va.ConfigError, match="layer must be"):
        kv.layer(layer)


def test_making_an_allocator_takes_no_memory(device: str) -> None:
    with make(device) as kv:
        kv.layer(0)
        assert kv.stats().held_bytes == 0
        assert kv.mappings() == []


# ---- contents ----


def test_contents_survive_growth_trim_and_adoption(
    device: str, layout: va.KVLayout, seed: int
) -> None:
    with make(device, layout, pages=2_000, max_extent_pages=4) as kv:
        u = unit(kv)
        model = Model(kv, seed)
        a, b, c, d = (kv.allocate(n) for n in (1, 2 * u + 1, 5 * u - 1, 0))
        model.begin(a, b, c, d)
        model.check()
        for seq in (a, b, c):
            model.write(seq, 0, seq.length)

        for seq, more in ((a, 1), (b, u), (c, 6 * u + 1), (d, 3 * u)):
            start = seq.length
            kv.step({seq: start + more})
            model.grown(seq)
            model.check()
            model.write(seq, start, seq.length)
        model.check()

        b.trim(u)
        model.trimmed(b)
        model.check()
        kv.step({b: 4 * u})
        model.grown(b)
        model.check()
        model.write(b, u, 2 * u)
        model.check()

        c.trim_front(7 * u)
        model.trimmed_front(c, 7 * u)
        model.check()
        kv.step({c: 13 * u})
        model.grown(c)
        model.check()
        model.write(c, 8 * u, 13 * u)
        model.check()

        for seq in (a, b, c, d):
            model.ended(seq)
            seq.free()
        # Each takes a slot of a former owner, whose bytes must not be seen: not within what the
        # slot had, nor behind it, nor in the hole that trim_front left.
        later = [kv.allocate(n) for n in (3 * u, 1, 0)]
        model.begin(*later)
        model.check()
        later.append(kv.allocate(14 * u))
        model.begin(later[-1])
        kv.step({later[1]: 5 * u, later[2]: 2 * u + 1})
        model.grown(*later)
        model.check()
        for seq in later:
            model.write(seq, 0, seq.length)
        kv.reclaim()
        model.check()


@pytest.mark.parametrize("name", ["layer", "balanced", "token"])
@pytest.mark.parametrize("background", [False, True])
def test_contents_are_right_after_any_operations(
    device: str, name: str, background: bool, seed: int
) -> None:
    rng = random.Random(seed)
    with make(
        device,
        LAYOUTS[name],
        pages=15 * LAYOUTS[name].num_regions,
        max_units=8,
        max_extent_pages=2,
        background=background,
        lookahead_tokens=3,
    ) as kv:
        u = unit(kv)
        model = Model(kv, seed)
        live: list[va.Sequence] = []
        refused = 0
        for _ in range(300):
            try:
                if not live or (len(live) < kv.max_sequences and rng.random() < 0.3):
                    live.append(kv.allocate(rng.choice((0, 1, u, rng.randrange(4 * u)))))
                    model.begin(live[-1])
                    continue
                seq = rng.choice(live)
                length = seq.length
                first = model.first[seq]
                what = rng.choice(("grow", "grow", "write", "trim", "trim_front", "free"))
                if what == "grow":
                    kv.step({seq: min(kv.max_seq_len, length + rng.choice((1, u, 2 * u)))})
                    model.grown(seq)
                    model.write(seq, max(first, length - 1), seq.length)
                elif what == "write" and length > first:
                    start = rng.randrange(first, length)
                    model.write(seq, start, rng.randint(start, length))
                elif what == "trim":
                    seq.trim(rng.randint(first, length))
                    model.trimmed(seq)
                elif what == "trim_front":
                    first = rng.randint(first, length)
                    seq.trim_front(first)
                    model.trimmed_front(seq, first)
                elif what == "free":
                    live.remove(seq)
                    model.ended(seq)
                    seq.free()
            except va.OutOfPages:
                refused += 1
            model.check()
        print(f"{refused} operations did not fit")


def test_contents_are_right_while_the_background_thread_maps_ahead(device: str, seed: int) -> None:
    with make(device, pages=2_000, background=True, lookahead_tokens=64) as kv:
        u = unit(kv)
        model = Model(kv, seed)
        sequences = kv.allocate_batch(3, u - 1)
        model.begin(*sequences)
        stride = max(1, u // 4)
        for _ in range(40):
            for seq in sequences:
                start = seq.length
                kv.step({seq: start + stride})
                model.grown(seq)
                model.write(seq, start, seq.length)
        until(lambda: kv.stats().ahead_mappings > 0)
        model.check()


def test_a_sequence_of_a_million_tokens_is_addressable_to_its_end(device: str) -> None:
    page = page_bytes(device)
    units = -(-(1 << 20) // unit_tokens(ONE, page)) + 1
    with make(device, ONE, pages=units + 8, max_units=units) as kv:
        assert kv.max_seq_len > 1_000_000
        k, _ = kv.layer(0)
        seq = kv.allocate(100)
        kv.step({seq: kv.max_seq_len})
        places = [0, 99, 100, 999_999, kv.max_seq_len - 1]
        for value, at in enumerate(places, start=1):
            k[seq.slot, at] = value
        for value, at in enumerate(places, start=1):
            assert bool((k[seq.slot, at] == value).all())
        kv.check()
        with pytest.raises(va.SequenceTooLong):
            kv.step({seq: kv.max_seq_len + 1})


def test_slots_of_millions_of_tokens_cost_only_what_is_used(device: str) -> None:
    with make(device, max_sequences=64, max_seq_len=4_000_000) as kv:
        assert kv.stats().reserved_bytes >= 64 * 4_000_000 * LAYER.token_bytes
        seqs = [kv.allocate(1) for _ in range(3)]
        assert kv.stats().held_bytes == 3 * LAYER.num_regions * kv.pool.page_bytes
        k, _ = kv.layer(1)
        k[seqs[2].slot, 0] = 3
        assert float(k[seqs[2].slot, 0, 0, 0]) == 3.0
        kv.check()


# ---- lengths and memory ----


def test_allocate_and_step_map_whole_pages_of_the_tokens(device: str, layout: va.KVLayout) -> None:
    with make(device, layout, pages=1_000) as kv:
        u = unit(kv)
        page = kv.pool.page_bytes
        sequences = [kv.allocate(n) for n in (0, 1, u, u + 1)]
        for lengths in ([0, 1, u, u + 1], [1, 2 * u, 2 * u + 1, 5 * u]):
            kv.step(dict(zip(sequences, lengths, strict=True)))
            assert [seq.length for seq in sequences] == lengths
            mapped: dict[tuple[int, int], int] = {}
            for slot, region, _, size, _, access in kv.mappings():
                assert access == "read_write"
                mapped[slot, region] = mapped.get((slot, region), 0) + size
            for seq, length in zip(sequences, lengths, strict=True):
                pages = [mapped.get((seq.slot, r), 0) // page for r in range(layout.num_regions)]
                assert pages == list(layout.pages(length, page))
            kv.check()
        assert kv.stats().held_bytes == sum(layout.mapped_bytes(n, page) for n in lengths)


def test_extents_are_no_larger_than_max_extent(device: str) -> None:
    with make(device, ONE, max_extent_pages=4) as kv:
        kv.allocate(15 * unit(kv))
        sizes = sorted(m[3] // kv.pool.page_bytes for m in kv.mappings())
        assert sizes == [1, 2, 4, 4, 4]


def test_trim_gives_back_what_lies_behind(device: str) -> None:
    with make(device, max_extent_pages=1) as kv:
        u = unit(kv)
        seq = kv.allocate(8 * u)
        seq.trim(3 * u - 1)
        assert seq.length == 3 * u - 1
        kv.reclaim()
        assert kv.stats().held_bytes == LAYER.mapped_bytes(3 * u, kv.pool.page_bytes)
        seq.trim(0)
        kv.reclaim()
        assert seq.length == 0
        assert kv.stats().held_bytes == 0
        assert kv.mappings() == []
        kv.check()


def test_trim_keeps_the_lookahead_mapped(device: str) -> None:
    page = page_bytes(device)
    u = unit_tokens(ONE, page)
    with make(device, ONE, max_extent_pages=1, lookahead_tokens=2 * u) as kv:
        seq = kv.allocate(9 * u)
        seq.trim(3 * u)
        kv.reclaim()
        assert kv.stats().mapped_bytes == 5 * page
        kv.step({seq: 5 * u})
        assert kv.stats().waited_steps == 0


@pytest.mark.parametrize("tokens", [-1, 21, 2**40])
def test_trim_to_what_it_does_not_hold_changes_nothing(tokens: int) -> None:
    with make("cpu") as kv:
        seq = kv.allocate(20)
        before = snapshot(kv, [seq])
        with pytest.raises(va.ConfigError):
            seq.trim(tokens)
        assert snapshot(kv, [seq]) == before


def test_trim_front_gives_back_what_lies_below(device: str) -> None:
    with make(device, ONE, max_extent_pages=1) as kv:
        u = unit(kv)
        page = kv.pool.page_bytes
        seq = kv.allocate(9 * u)
        seq.trim_front(4 * u + 1)
        assert seq.length == 9 * u
        kv.reclaim()
        k, _ = kv.layer(0)
        start = k[seq.slot].data_ptr()
        assert sorted(m[2] - start for m in kv.mappings()) == [n * page for n in range(4, 9)]
        seq.trim_front(2 * u)  # below what went already
        assert kv.stats().mapped_bytes == 5 * page
        with pytest.raises(va.ConfigError, match="trim_front"):
            seq.trim(4 * u)
        kv.check()


@pytest.mark.parametrize("first_token", [-1, 21, 2**40])
def test_trim_front_beyond_the_sequence_changes_nothing(first_token: int) -> None:
    with make("cpu") as kv:
        seq = kv.allocate(20)
        before = snapshot(kv, [seq])
        with pytest.raises(va.ConfigError):
            seq.trim_front(first_token)
        assert snapshot(kv, [seq]) == before


def test_a_sliding_window_holds_no_more_than_its_window(device: str) -> None:
    with make(device, ONE, pages=6, max_units=1_000, max_extent_pages=1) as kv:
        u = unit(kv)
        seq = kv.allocate(0)
        for length in range(u, 300 * u, u):
            kv.step({seq: length})
            seq.trim_front(max(0, length - 4 * u))
        assert kv.stats().mapped_bytes <= 5 * kv.pool.page_bytes
        kv.check()


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_slot_left_by_a_sliding_window_serves_a_short_sequence(device: str, tokens: int) -> None:
    # Of the slot that the first sequence leaves, only the end is mapped: the front must not be
    # filled for the next one.
    with make(device, ONE, pages=6, max_units=1_000, max_extent_pages=1, max_sequences=1) as kv:
        u = unit(kv)
        seq = kv.allocate(0)
        for length in range(u, 50 * u, u):
            kv.step({seq: length})
            seq.trim_front(max(0, length - 4 * u))
        seq.free()
        again = kv.allocate(tokens)
        kv.step({again: 2 * u})
        k, _ = kv.layer(0)
        assert not bool(k[again.slot, : 2 * u].any())
        kv.check()


# ---- the forms of step ----

ARRAYS: dict[str, Callable[[list[int]], Any]] = {
    "numpy": lambda lengths: np.array(lengths, np.int64),
    "numpy-readonly": lambda lengths: np.frombuffer(array.array("q", lengths).tobytes(), np.int64),
    "torch": lambda lengths: torch.tensor(lengths, dtype=torch.int64),
    "array": lambda lengths: array.array("q", lengths),
    "memoryview": lambda lengths: memoryview(array.array("q", lengths)),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_step_with_an_array_sets_lengths_by_slot(form: str) -> None:
    with make("cpu") as kv:
        sequences = kv.allocate_batch(3, 5)
        u = unit(kv)
        # Once with memory to map and once without; zeros leave slots alone.
        kv.step(ARRAYS[form]([3 * u, 0, 7, 0]))
        assert [seq.length for seq in sequences] == [3 * u, 5, 7]
        kv.step(ARRAYS[form]([0, 6]))  # up to the last slot of interest
        assert [seq.length for seq in sequences] == [3 * u, 6, 7]
        kv.step(ARRAYS[form]([]))
        kv.step(ARRAYS[form]([3 * u, 6, 7]))
        assert [seq.length for seq in sequences] == [3 * u, 6, 7]
        assert kv.stats().steps == 4
        kv.check()


def test_step_with_a_mapping_sets_the_lengths_of_its_sequences() -> None:
    with make("cpu") as kv:
        a, b, c = kv.allocate_batch(3, 5)
        kv.step({a: 6, c: 5})
        assert [a.length, b.length, c.length] == [6, 5, 5]
        kv.step({})
        assert [a.length, b.length, c.length] == [6, 5, 5]
        u = unit(kv)
        kv.step({a: 50 * u, b: 5 * u})
        assert [a.length, b.length, c.length] == [50 * u, 5 * u, 5]
        kv.check()


REFUSED = {
    "list": lambda: [6, 6],
    "int": lambda: 6,
    "none": lambda: None,
    "bytes": lambda: b"12345678",
    "int32": lambda: np.array([6, 6], np.int32),
    "uint64": lambda: np.array([6, 6], np.uint64),
    "float64": lambda: np.array([6, 6], np.float64),
    "big-endian": lambda: np.array([6, 6], ">i8"),
    "torch-int32": lambda: torch.tensor([6, 6], dtype=torch.int32),
    "torch-bfloat16": lambda: torch.tensor([6, 6], dtype=torch.bfloat16),
    "no-dimension": lambda: np.array(6, np.int64),
    "two-dimensions": lambda: np.array([[6, 6]], np.int64),
    "not-contiguous": lambda: np.array([6, 0, 6, 0], np.int64)[::2],
    "torch-not-contiguous": lambda: torch.tensor([6, 0, 6, 0])[::2],
    "sparse": lambda: torch.tensor([6, 6]).to_sparse(),
    "too-many-slots": lambda: np.array([6, 6, 0, 0, 0], np.int64),
    "another-device": lambda: torch.zeros(2, dtype=torch.int64, device="meta"),
    "not-sequences": lambda: {"a": 6},
}


@pytest.mark.parametrize("case", REFUSED)
def test_step_with_neither_form_changes_nothing(case: str) -> None:
    with make("cpu") as kv:
        sequences = kv.allocate_batch(2, 5)
        before = snapshot(kv, sequences)
        with pytest.raises(va.ConfigError, match="lengths"):
            kv.step(REFUSED[case]())
        assert snapshot(kv, sequences) == before


@pytest.mark.parametrize("length", [6.5, "6", None, -1, 2**70])
def test_step_with_a_length_that_is_none_changes_nothing(length: Any) -> None:
    with make("cpu") as kv:
        seq = kv.allocate(5)
        before = snapshot(kv, [seq])
        with pytest.raises((va.ConfigError, va.SequenceTooLong)):
            kv.step({seq: length})
        assert snapshot(kv, [seq]) == before


@pytest.mark.gpu
def test_step_with_a_cuda_tensor_is_refused() -> None:
    with make("cuda") as kv:
        seq = kv.allocate(5)
        with pytest.raises(va.ConfigError, match="CPU tensor"):
            kv.step(torch.tensor([6], device="cuda"))
        assert seq.length == 5


def as_mapping(kv: va.KVAllocator, lengths: dict[va.Sequence, int]) -> object:
    return lengths


def as_array(kv: va.KVAllocator, lengths: dict[va.Sequence, int]) -> object:
    by_slot = np.zeros(kv.max_sequences, np.int64)
    for seq, length in lengths.items():
        by_slot[seq.slot] = length
    return by_slot


@pytest.mark.parametrize("form", [as_mapping, as_array])
def test_step_that_is_refused_for_one_sequence_changes_none(form: Callable[..., object]) -> None:
    with make("cpu", pages=64) as kv:
        a, b, gone = kv.allocate_batch(3, 5)
        gone.free()
        before = snapshot(kv, [a, b, gone])
        for refusal, lengths in (
            (va.ConfigError, {a: 100, b: 4}),
            (va.SequenceTooLong, {a: 100, b: kv.max_seq_len + 1}),
            (va.StaleSequence, {a: 100, gone: 6}),
            (va.StaleSequence, {gone: 6, a: 100}),
            (va.OutOfPages, {a: 100, b: kv.max_seq_len}),
        ):
            with pytest.raises(refusal):
                kv.step(form(kv, lengths))
            assert snapshot(kv, [a, b, gone]) == before, refusal
        kv.check()


def test_step_with_a_sequence_of_another_allocator_changes_nothing() -> None:
    with make("cpu") as kv, make("cpu") as other:
        seq, foreign = kv.allocate(5), other.allocate(5)
        before = snapshot(kv, [seq])
        with pytest.raises(va.ConfigError, match="another allocator"):
            kv.step({seq: 100, foreign: 100})
        assert snapshot(kv, [seq]) == before
        assert foreign.length == 5


def test_step_with_nothing_to_map_makes_no_backend_call(device: str) -> None:
    backend = make_backend(device)
    with make(device, backend=backend) as kv:
        sequences = kv.allocate_batch(3, unit(kv))
        for seq in sequences:
            seq.trim(1)
        kv.step(dict.fromkeys(sequences, 2))
        calls = backend.calls()
        for length in range(3, 12):
            kv.step(dict.fromkeys(sequences, length))
            kv.step(np.array([length] * 3, np.int64))
            kv.step(torch.tensor([0, length]))
        assert backend.calls() == calls
        assert [seq.length for seq in sequences] == [11] * 3


def test_step_finds_memory_that_was_mapped_ahead(device: str) -> None:
    with make(device, ONE, background=True, lookahead_tokens=4) as kv:
        u = unit(kv)
        seq = kv.allocate(u - 2)
        until(lambda: kv.stats().ahead_mappings == 1)
        kv.step({seq: u + 1})
        assert seq.length == u + 1
        assert kv.stats().waited_steps == 0


# ---- slots ----


def test_allocate_beyond_the_slots_says_how_many_are_live() -> None:
    with make("cpu") as kv:
        sequences = [kv.allocate(1) for _ in range(4)]
        assert {seq.slot for seq in sequences} == {0, 1, 2, 3}
        before = snapshot(kv, sequences)
        with pytest.raises(va.OutOfSlots, match="no slot is free: 4 of 4 hold live sequences"):
            kv.allocate(1)
        assert snapshot(kv, sequences) == before
        sequences[2].free()
        assert kv.allocate(1).slot == 2


def test_allocate_batch_takes_consecutive_slots(device: str) -> None:
    with make(device, max_sequences=6) as kv:
        first = kv.allocate(10)
        batch = kv.allocate_batch(4, 30)
        assert [seq.slot for seq in batch] == list(range(batch[0].slot, batch[0].slot + 4))
        assert first.slot not in {seq.slot for seq in batch}
        assert [seq.length for seq in batch] == [30] * 4
        k, _ = kv.layer(0)
        start = batch[0].slot
        k[start : start + 4, :30] = torch.arange(4, device=kv.device).view(4, 1, 1, 1)
        assert k[start : start + 4, 29, 0, 0].tolist() == [0, 1, 2, 3]
        kv.check()


def test_allocate_batch_without_neighbouring_slots_changes_nothing() -> None:
    with make("cpu") as kv:
        sequences = kv.allocate_batch(4, 1)
        sequences[0].free()
        sequences[2].free()
        before = snapshot(kv, sequences)
        message = "no 2 free slots stand in a row: 2 of 4 hold live sequences"
        with pytest.raises(va.OutOfSlots, match=message):
            kv.allocate_batch(2, 1)
        assert snapshot(kv, sequences) == before


@pytest.mark.parametrize("count", [5, 2**33])
def test_allocate_batch_of_more_than_there_are_slots_is_refused(count: int) -> None:
    with make("cpu") as kv, pytest.raises(va.OutOfSlots):
        kv.allocate_batch(count, 1)


def test_allocate_batch_that_does_not_fit_begins_none() -> None:
    with make("cpu", ONE, pages=5) as kv:
        seq = kv.allocate(unit(kv))
        before = snapshot(kv, [seq])
        with pytest.raises(va.OutOfPages):
            kv.allocate_batch(3, 2 * unit(kv))
        assert snapshot(kv, [seq]) == before
        assert len(kv.allocate_batch(2, 2 * unit(kv))) == 2
        kv.check()


@pytest.mark.parametrize(("count", "tokens"), [(0, 1), (-1, 1), (1, -1), (True, 1), (1, 1.0)])
def test_allocate_with_numbers_that_make_no_sense_is_refused(count: Any, tokens: Any) -> None:
    with make("cpu") as kv:
        with pytest.raises(va.ConfigError):
            kv.allocate_batch(count, tokens)
        assert kv.stats().live_sequences == 0


def test_allocate_of_more_than_a_slot_holds_is_refused() -> None:
    with make("cpu") as kv:
        with pytest.raises(va.SequenceTooLong, match="max_seq_len"):
            kv.allocate(kv.max_seq_len + 1)
        assert kv.stats().live_sequences == 0
        assert kv.mappings() == []


def test_allocate_adopts_the_freed_slot_that_fits_best(device: str) -> None:
    backend = make_backend(device)
    with make(device, ONE, backend=backend) as kv:
        u = unit(kv)
        sizes = (16 * u, u, 4 * u, 2 * u)
        slots = {}
        for seq, size in [(kv.allocate(size), size) for size in sizes]:
            slots[size] = seq.slot
            seq.free()
        settle(device)
        mappings = kv.mappings()
        calls = backend.calls()
        for size, tokens in ((4 * u, 3 * u), (u, 1), (2 * u, 2 * u), (16 * u, 15 * u)):
            assert kv.allocate(tokens).slot == slots[size]
        # Nothing but clearing, and seeing to it that it is known when the GPU is done with it.
        made = {name for name, count in backend.calls().items() if count != calls.get(name, 0)}
        assert made <= {"zero", "record", "query"}
        assert kv.mappings() == mappings
        assert kv.stats().adoptions == 4


def test_what_a_sequence_may_become_decides_which_slot_it_adopts(device: str) -> None:
    with make(device, ONE, max_sequences=3) as kv:
        u = unit(kv)
        long, short = kv.allocate(6 * u), kv.allocate(u)
        slots = long.slot, short.slot
        long.free()
        short.free()
        settle(device)
        assert kv.allocate(1, expected_tokens=6 * u).slot == slots[0]
        assert kv.allocate(1).slot == slots[1]
        with pytest.raises(va.SequenceTooLong):
            kv.allocate(1, expected_tokens=kv.max_seq_len + 1)
        with pytest.raises(va.ConfigError, match="expected_tokens"):
            kv.allocate(1, expected_tokens=-1)
        assert kv.stats().live_sequences == 2


def test_adoption_without_zeroing_makes_no_backend_call() -> None:
    backend = make_backend("cpu")
    with make("cpu", backend=backend, zero=False) as kv:
        kv.allocate(20).free()
        calls = backend.calls()
        seq = kv.allocate(20)
        assert backend.calls() == calls
        k, _ = kv.layer(0)
        k[seq.slot, :20] = 7
        kv.step({seq: 10 * unit(kv)})
        assert bool((k[seq.slot, :20] == 7).all())
        assert "zero" not in backend.calls()


def test_memory_is_taken_from_the_slot_that_was_freed_longest_ago(device: str) -> None:
    with make(device, ONE, pages=8, max_extent_pages=1) as kv:
        u = unit(kv)
        first, second, live = (kv.allocate(2 * u) for _ in range(3))
        second.free()
        first.free()
        settle(device)
        kv.step({live: 5 * u})  # two free pages, and one that must be taken
        assert {m[0] for m in kv.mappings()} == {first.slot, live.slot}
        kv.check()


# ---- out of pages ----


def test_out_of_pages_in_step_says_what_was_needed_and_there(device: str) -> None:
    with make(device, LAYER, pages=20, max_extent_pages=1) as kv:
        page, u = kv.pool.page_bytes, unit(kv)
        live = kv.allocate(2 * u)  # 8 pages
        freed = kv.allocate(u)  # 4 pages
        freed.free()
        before = snapshot(kv, [live, freed])
        with pytest.raises(va.OutOfPages) as caught:
            kv.step({live: 8 * u})  # 24 pages more
        error = caught.value
        assert error.needed == 24 * page
        assert error.free == 8 * page
        assert error.reclaimable == 4 * page
        assert error.budget == 20 * page
        assert snapshot(kv, [live, freed]) == before
        kv.step({live: 5 * u})  # 12 more: exactly what there is
        assert kv.stats().held_bytes == 20 * page
        kv.check()


def test_out_of_pages_in_allocate_changes_nothing(device: str) -> None:
    with make(device, LAYER, pages=20, max_extent_pages=1) as kv:
        page, u = kv.pool.page_bytes, unit(kv)
        live = kv.allocate(2 * u)
        freed = kv.allocate(u)
        freed.free()
        before = snapshot(kv, [live])
        with pytest.raises(va.OutOfPages) as caught:
            kv.allocate(4 * u)
        assert caught.value.needed > 8 * page
        assert caught.value.budget == 20 * page
        assert snapshot(kv, [live]) == before
        assert kv.allocate(3 * u).length == 3 * u
        kv.check()


def test_growth_takes_what_a_live_sequence_does_not_need(device: str) -> None:
    page = page_bytes(device)
    u = unit_tokens(ONE, page)
    with make(device, ONE, pages=10, max_extent_pages=1, lookahead_tokens=4 * u) as kv:
        trimmed = kv.allocate(8 * u)
        trimmed.trim(2 * u)
        assert kv.stats().surplus_bytes == 4 * page
        model = Model(kv, seed=0)
        model.begin(other := kv.allocate(0))
        kv.step({other: 8 * u})
        model.grown(other)
        model.check()
        assert trimmed.length == 2 * u
        assert kv.stats().surplus_bytes == 0
        kv.check()


@pytest.mark.parametrize("trimmed", [False, True])
def test_the_device_is_waited_for_only_where_surplus_may_be_in_use(trimmed: bool) -> None:
    backend = make_backend("cpu")
    options = {"lookahead_tokens": unit_tokens(ONE, HOST_PAGE_BYTES)} if trimmed else {}
    with make(
        "cpu", ONE, pages=80, max_units=128, max_extent_pages=1, backend=backend, **options
    ) as kv:
        u, page = unit(kv), kv.pool.page_bytes
        large = kv.allocate(64 * u)
        kv.step({large: 64 * u + 1})  # is given a page more than it needs
        if trimmed:
            kv.step({large: 66 * u})
            kv.step({large: 66 * u + 1})
            large.trim(66 * u)  # keeps what it may grow by, which kernels may be reading
        surplus = kv.stats().surplus_bytes
        assert surplus >= page
        needed = large.length // u + (large.length % u > 0)
        other = kv.allocate((80 - needed) * u)
        assert kv.stats().surplus_bytes < surplus
        assert other.alive
        assert ("synchronize_device" in backend.calls()) is trimmed
        kv.check()


def test_surplus_is_taken_before_a_late_fence_is_waited_for() -> None:
    backend = make_backend("cpu")
    options = {"max_extent_pages": 1, "backend": backend, "fence_timeout_s": 60.0}
    with make("cpu", ONE, pages=80, max_units=128, **options) as kv:
        u = unit(kv)
        large, freed = kv.allocate(64 * u), kv.allocate(10 * u)
        kv.step({large: 64 * u + 1})
        backend.hold_fences()
        freed.free()
        surplus = kv.stats().surplus_bytes
        assert surplus > 0
        start = time.monotonic()
        kv.allocate((80 - 65 - 10) * u)
        assert time.monotonic() - start < 30
        assert kv.stats().surplus_bytes < surplus
        assert kv.stats().retired_bytes > 0
        backend.release_fences()


# ---- tail slack ----


def tails_are_zero(kv: va.KVAllocator, seq: va.Sequence, slack: int) -> bool:
    tensors = [t for layer in range(kv.layout.num_layers) for t in kv.layer(layer)]
    tails = [t[seq.slot, seq.length : seq.length + slack].view(torch.uint8) for t in tensors]
    return not any(bool(tail.any()) for tail in tails)


@pytest.mark.parametrize("name", ["layer", "balanced", "token", "latent-token", "layers-per-row"])
def test_tail_slack_reads_as_zero_behind_every_length(device: str, name: str) -> None:
    layout = LAYOUTS[name]
    slack = 3 * unit_tokens(layout, page_bytes(device)) + 1
    with make(device, layout, pages=2_000, max_units=16, tail_slack_tokens=slack) as kv:
        u = unit(kv)
        model = Model(kv, seed=0)
        lengths = (1, u, 3 * u + 1, kv.max_seq_len - u, kv.max_seq_len)[: kv.max_sequences]
        sequences = [kv.allocate(n) for n in lengths]
        model.begin(*sequences)
        for seq in sequences:
            assert tails_are_zero(kv, seq, slack)
            model.write(seq, 0, seq.length)
        for more in (1, u, 5 * u):
            for seq in sequences:
                start = seq.length
                kv.step({seq: min(start + more, kv.max_seq_len)})
                model.grown(seq)
                assert tails_are_zero(kv, seq, slack)
                model.write(seq, start, seq.length)
        model.check()


def test_tail_slack_of_short_sequences_costs_one_guard(device: str) -> None:
    u = unit_tokens(LAYER, page_bytes(device))
    with make(device, tail_slack_tokens=5 * u) as kv:
        page = kv.pool.page_bytes
        guard = kv.stats().guard_bytes
        assert guard == kv.stats().held_bytes > 0
        short = kv.allocate_batch(3, 2)
        assert kv.stats().held_bytes == guard + 3 * LAYER.num_regions * page
        assert kv.stats().mapped_bytes == 3 * LAYER.num_regions * page
        guards = [m for m in kv.mappings() if m[5] == "read"]
        assert {m[0] for m in guards} == {seq.slot for seq in short}
        assert len({m[4] for m in guards}) == 1
        assert kv.allocate(0).length == 0
        assert len([m for m in kv.mappings() if m[5] == "read"]) == len(guards)
        kv.check()


def test_guard_is_replaced_when_its_sequence_grows(device: str) -> None:
    slack = 5 * unit_tokens(LAYER, page_bytes(device))
    with make(device, tail_slack_tokens=slack) as kv:
        u = unit(kv)
        model = Model(kv, seed=0)
        grown, short = kv.allocate_batch(2, 2)
        model.begin(grown, short)
        for seq in (grown, short):
            model.write(seq, 0, 2)
        kv.step({grown: 9 * u})
        model.grown(grown)
        model.write(grown, 2, 9 * u)
        model.check()
        assert {m[0] for m in kv.mappings() if m[5] == "read"} == {short.slot}
        assert tails_are_zero(kv, grown, slack)
        assert tails_are_zero(kv, short, slack)


def test_tail_slack_stays_readable_after_trim(device: str) -> None:
    slack = 5 * unit_tokens(LAYER, page_bytes(device))
    with make(device, tail_slack_tokens=slack, max_extent_pages=1) as kv:
        u = unit(kv)
        seq = kv.allocate(20 * u)
        for tensor in kv.layer(0):
            tensor[seq.slot, : 20 * u] = 3
        seq.trim(u)
        kv.reclaim()
        assert kv.stats().mapped_bytes < LAYER.mapped_bytes(20 * u, kv.pool.page_bytes)
        for tensor in kv.layer(0):  # as it was, or cleared
            tail = tensor[seq.slot, u : u + slack]
            assert bool(((tail == 3) | (tail == 0)).all())
        kv.check()


def test_guard_goes_with_the_sequence_that_was_trimmed_to_its_end(device: str) -> None:
    u = unit_tokens(ONE, page_bytes(device))
    with make(device, ONE, tail_slack_tokens=4 * u) as kv:
        guard = kv.stats().guard_bytes
        # Memory is so short that all slack is a guard, behind the one page that trim_front takes.
        kv.pool.set_budget(guard + kv.pool.page_bytes)
        seq = kv.allocate(u)
        own, *guards = [access for *_, access in kv.mappings()]
        assert (own, set(guards)) == ("read_write", {"read"})
        seq.trim_front(u)
        kv.check()
        assert tails_are_zero(kv, seq, 4 * u)
        seq.free()
        kv.reclaim()
        assert kv.mappings() == []
        assert kv.stats().held_bytes == guard
        kv.pool.set_budget(64 * kv.pool.page_bytes)
        again = kv.allocate(u)
        kv.step({again: 10 * u})
        assert tails_are_zero(kv, again, 4 * u)
        kv.check()


def test_nobody_meets_a_guard_before_its_allocator() -> None:
    pool = va.Pool("1MiB", "cpu", page_bytes=4096, background=False)
    done = threading.Event()

    def make() -> None:
        for _ in range(500):
            va.KVAllocator(
                ONE, max_sequences=1, max_seq_len=512, pool=pool, tail_slack_tokens=16
            ).close()
        done.set()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    while not done.is_set():
        pool.check()
    thread.join()
    pool.check()


def test_a_guard_that_does_not_fit_the_budget_is_out_of_pages() -> None:
    with pytest.raises(va.OutOfPages) as caught:
        make("cpu", ONE, pages=4, tail_slack_tokens=100)
    assert caught.value.needed > 4 * HOST_PAGE_BYTES
    assert caught.value.budget == caught.value.free == 4 * HOST_PAGE_BYTES


# ---- figures ----


def test_stats_tell_whose_memory_it_is(device: str) -> None:
    page = page_bytes(device)
    u = unit_tokens(LAYER, page)
    with make(device, pages=100, max_extent_pages=1, lookahead_tokens=2 * u) as kv:
        stride = kv.max_seq_len * 256
        assert kv.stats().reserved_bytes == kv.max_sequences * LAYER.num_regions * stride
        kv.allocate(0)
        a, b = kv.allocate(5 * u), kv.allocate(u + 1)
        b.free()
        a.trim(u)  # keeps 3 units
        settle(device)
        kv.allocate(1).free()  # adopts what b left
        stats = kv.stats()
        assert stats.live_sequences == 2
        assert stats.live_tokens == u
        assert stats.free_slots == 2
        assert stats.used_bytes == u * LAYER.token_bytes
        assert stats.mapped_bytes == 12 * page
        assert stats.surplus_bytes == 8 * page
        assert stats.guard_bytes == 0
        assert stats.held_bytes == stats.pool.held_bytes == 28 * page
        assert stats.peak_held_bytes == stats.held_bytes
        assert stats.budget_bytes == 100 * page
        assert stats.adoptions == 1
        # What one gave up is another's, or free, or still waited for.
        assert stats.cached_bytes + stats.retired_bytes + stats.free_bytes == 16 * page


def test_stats_count_what_waits_for_the_gpu_as_retired() -> None:
    backend = make_backend("cpu")
    with make("cpu", ONE, backend=backend, max_extent_pages=1) as kv:
        u = unit(kv)
        page = kv.pool.page_bytes
        freed, trimmed = kv.allocate(3 * u), kv.allocate(5 * u)
        backend.hold_fences()
        freed.free()
        trimmed.trim(u)
        stats = kv.stats()
        assert (stats.mapped_bytes, stats.cached_bytes) == (page, 0)
        assert stats.retired_bytes == 7 * page
        assert stats.free_bytes == 0
        # It is nobody else's meanwhile.
        other = kv.allocate(2 * u)
        assert other.slot != freed.slot
        kv.check()
        backend.release_fences()
        assert kv.reclaim() == 7 * page
        stats = kv.stats()
        assert stats.retired_bytes == 0
        assert stats.held_bytes == stats.mapped_bytes == 3 * page


def test_stats_count_operations(device: str) -> None:
    with make(device, ONE, max_extent_pages=1) as kv:
        u = unit(kv)
        seq = kv.allocate(1)
        kv.step({seq: 2})  # nothing to map
        kv.step({seq: 3 * u})  # two mappings
        assert (kv.stats().steps, kv.stats().waited_steps) == (2, 1)
        pool = kv.stats().pool
        assert (pool.creates, pool.maps, pool.mappings) == (3, 3, 3)
        assert (pool.destroys, pool.unmaps) == (0, 0)
        seq.free()
        kv.reclaim()
        pool = kv.stats().pool
        assert (pool.creates, pool.maps, pool.mappings) == (3, 3, 0)
        assert pool.destroys == 3
        assert pool.unmaps == 1
        assert kv.stats().adoptions == 0


# ---- the end ----

METHODS: dict[str, Callable[[va.KVAllocator, va.Sequence], object]] = {
    "layer": lambda kv, seq: kv.layer(0),
    "allocate": lambda kv, seq: kv.allocate(1),
    "allocate_batch": lambda kv, seq: kv.allocate_batch(2, 1),
    "step-mapping": lambda kv, seq: kv.step({seq: 6}),
    "step-array": lambda kv, seq: kv.step(np.array([6], np.int64)),
    "stats": lambda kv, seq: kv.stats(),
    "reclaim": lambda kv, seq: kv.reclaim(),
    "mappings": lambda kv, seq: kv.mappings(),
    "check": lambda kv, seq: kv.check(),
    "length": lambda kv, seq: seq.length,
    "trim": lambda kv, seq: seq.trim(1),
    "trim_front": lambda kv, seq: seq.trim_front(1),
    "free": lambda kv, seq: seq.free(),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_that_the_allocator_is_closed(method: str) -> None:
    kv = make("cpu")
    seq = kv.allocate(5)
    kv.close()
    with pytest.raises(va.VAttentionError, match="the allocator is closed"):
        METHODS[method](kv, seq)


def test_close_ends_every_sequence_and_gives_memory_back(device: str) -> None:
    kv = make(device)
    pool = kv.pool
    seq = kv.allocate(100)
    kv.allocate(100).free()
    assert not kv.closed
    assert seq.alive
    kv.close()
    kv.close()  # harmless
    assert kv.closed
    assert not seq.alive
    assert "closed" in repr(kv)
    assert "stale" in repr(seq)
    assert pool.stats().mappings == 0
    assert pool.stats().free_bytes == pool.stats().held_bytes
    pool.check()


def test_context_manager_closes_also_after_an_exception() -> None:
    kv = make("cpu")
    with pytest.raises(ZeroDivisionError), kv as entered:
        assert entered is kv
        kv.allocate(1 // 0)
    assert kv.closed


STALE: dict[str, Callable[[va.KVAllocator, va.Sequence], object]] = {
    name: METHODS[name] for name in ("step-mapping", "length", "trim", "trim_front", "free")
}


@pytest.mark.parametrize("slot_is_reused", [False, True])
@pytest.mark.parametrize("method", STALE)
def test_a_stale_sequence_is_refused(method: str, slot_is_reused: bool) -> None:
    with make("cpu", max_sequences=1) as kv:
        seq = kv.allocate(5)
        seq.free()
        sequences = [kv.allocate(3)] if slot_is_reused else []
        assert not seq.alive
        assert repr(seq) == "Sequence(slot=0, stale)"
        before = snapshot(kv, sequences)
        with pytest.raises(va.StaleSequence):
            STALE[method](kv, seq)
        assert snapshot(kv, sequences) == before


def test_sequences_are_compared_by_identity() -> None:
    with make("cpu", max_sequences=1) as kv:
        first = kv.allocate(1)
        first.free()
        second = kv.allocate(2)
        assert first.slot == second.slot
        assert first != second
        assert len({first, second}) == 2
        assert repr(second) == "Sequence(slot=0, length=2)"


def test_a_sequence_whose_object_is_dropped_stays_live() -> None:
    with make("cpu") as kv:
        kv.allocate(5)
        assert kv.stats().live_sequences == 1
        assert kv.allocate(1).slot == 1


# ---- settings ----


@pytest.mark.parametrize(
    "options",
    [
        {"max_sequences": 0},
        {"max_sequences": 2**33},
        {"max_sequences": 1.0},
        {"max_seq_len": 0},
        {"max_seq_len": 2**61},
        {"tail_slack_tokens": -1},
        {"tail_slack_tokens": 2**61},
        {"lookahead_tokens": -1},
        {"fence_timeout_s": -1.0},
        {"fence_timeout_s": float("nan")},
        {"max_extent": 3 * HOST_PAGE_BYTES},
        {"max_extent": HOST_PAGE_BYTES // 2},
        {"max_extent": "many"},
        {"memory": "1MiB"},
        {"device": "cpu"},
        {"page_bytes": HOST_PAGE_BYTES},
        {"zero": False},
    ],
    ids=repr,
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any]) -> None:
    pool = va.Pool("1MiB", "cpu", page_bytes=HOST_PAGE_BYTES, background=False)
    with pytest.raises(va.ConfigError):
        va.KVAllocator(ONE, **({"max_sequences": 2, "max_seq_len": 64, "pool": pool} | options))
    assert pool.stats().held_bytes == 0


def test_an_allocator_can_make_its_own_pool(device: str) -> None:
    page = page_bytes(device)
    with va.KVAllocator(
        ONE,
        max_sequences=2,
        max_seq_len=10_000,
        memory=8 * page,
        device=device,
        page_bytes=page if device == "cpu" else None,
        max_extent=2 * page,
        background=False,
    ) as kv:
        assert kv.pool.budget_bytes == 8 * page
        assert kv.pool.page_bytes == page
        assert kv.pool.max_extent_bytes == 2 * page
        assert kv.device == kv.pool.device
        assert kv.device.type == device
        assert kv.allocate(5).length == 5


def test_addresses_that_the_system_will_not_reserve_are_a_backend_error() -> None:
    with pytest.raises(va.BackendError) as caught:
        make("cpu", ONE, max_sequences=1, max_seq_len=1 << 50)
    assert caught.value.call
    assert caught.value.code != 0


# ---- what is not what it should be ----


@pytest.mark.parametrize("order", ["array", "tensor"])
def test_step_with_a_negative_length_changes_nothing(order: str) -> None:
    with make("cpu") as kv:
        seq = kv.allocate(5)
        lengths = torch.tensor([0, 0, 0, -1])
        with pytest.raises(va.ConfigError, match="cannot have -1 tokens"):
            kv.step(lengths if order == "tensor" else lengths.numpy())
        assert seq.length == 5


def test_a_sequence_keeps_its_slot_and_frees_itself_at_the_end_of_a_block() -> None:
    with make("cpu") as kv:
        with kv.allocate(5) as seq:
            with pytest.raises(AttributeError):
                seq.slot = 1  # type: ignore[misc]
            assert seq.alive
        assert not seq.alive
        with kv.allocate(5) as seq:
            seq.free()
        with pytest.raises(ZeroDivisionError), kv.allocate(5) as seq:
            kv.close()
            raise ZeroDivisionError


@pytest.mark.parametrize("tokens", [1.5, "3", None, True, 2**70])
def test_trimming_to_no_number_of_tokens_changes_nothing(tokens: Any) -> None:
    with make("cpu") as kv:
        seq = kv.allocate(5)
        with pytest.raises(va.ConfigError, match="num_tokens must be"):
            seq.trim(tokens)
        with pytest.raises(va.ConfigError, match="first_token must be"):
            seq.trim_front(tokens)
        assert seq.length == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "x"}, "layout must be a KVLayout; got str"),
        ({"pool": 7}, "pool must be a Pool; got int"),
        ({"zero": "yes"}, "zero must be True or False"),
        ({"background": 1}, "background must be True or False"),
        ({"max_sequences": 2**20 + 1}, "max_sequences must be an int from 1 to 1048576"),
    ],
)
def test_an_allocator_of_what_is_not_what_it_should_be_is_refused(
    options: dict[str, Any], message: str
) -> None:
    settings = {"layout": ONE, "max_sequences": 1, "max_seq_len": 10}
    settings |= {} if "pool" in options else {"device": "cpu", "memory": "1MiB"}
    with pytest.raises(va.ConfigError, match=message):
        va.KVAllocator(**(settings | options))


def test_integers_of_numpy_are_integers() -> None:
    with make("cpu") as kv:
        seq = kv.allocate(np.int64(5))
        kv.step({seq: np.int32(6)})
        seq.trim(np.uint8(4))
        assert seq.length == 4
        assert kv.layer(np.int64(0))[0] is kv.layer(0)[0]


def test_more_sequences_than_slots_are_told_so() -> None:
    with make("cpu") as kv, pytest.raises(va.OutOfSlots, match="5 sequences do not fit into 4"):
        kv.allocate_batch(5)


def test_the_cpu_has_one_name() -> None:
    assert va.Pool("1MiB", "cpu:0").device == torch.device("cpu")
