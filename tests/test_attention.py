"""`vattention.attention` on the host: its backend "torch", batches, appending, and refusals."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.util
import itertools
import json
import math
import re
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vattention as va
from vattention.attention import (
    BACKENDS,
    Attention,
    Backend,
    Batch,
    Needs,
    Options,
    Rope,
    Scales,
    append,
    attend,
    backends,
    choice,
    flash_attn_3,
    front_slack_tokens,
    tail_slack_tokens,
)

HOST_PAGE_BYTES = 4096

# 128 bytes of K, and of V, a token and layer: a page holds 32 tokens in layer order, 16 in
# balanced, 8 in token order.
ORDERS = ("balanced", "layer", "token")

# Of the sum of all |p * v|. Rounding each p, and the output, costs half of this at most.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-17}


def make_layout(**changes: Any) -> va.KVLayout:
    given = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    return va.KVLayout(**(given | changes))


def make(
    layout: va.KVLayout | None = None, *, zero: bool = True, memory: str = "8MiB", **options: Any
) -> va.KVAllocator:
    """An allocator in which nothing is mapped but what lengths need."""
    pool = va.Pool(memory, "cpu", page_bytes=HOST_PAGE_BYTES, zero=zero, background=False)
    settings = {"max_sequences": 8, "max_seq_len": 256, "lookahead_tokens": 0} | options
    return va.KVAllocator(layout or make_layout(), pool=pool, **settings)


@pytest.fixture
def kv() -> va.KVAllocator:
    return make()


# ---- what is right ----


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence in float64, a query and a head at a time.

    Returns:
        The attention, and the same over the magnitudes of V: what rounding is measured by.
    """
    queries, heads, dim = q.shape
    tokens, kv_heads, v_dim = v.shape
    q, k, v = q.double(), k.double(), v.double()
    outs = torch.zeros(2, queries, heads, v_dim, dtype=torch.float64)
    for n, head in itertools.product(range(queries), range(heads)):
        at = tokens - queries + n
        stop = at + 1 if causal else tokens
        first = 0 if window is None else max(0, at + 1 - window)
        if first >= stop:
            continue
        place = head // (heads // kv_heads)
        scores = k[first:stop, place] @ q[n, head] * (dim**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        weights /= weights.sum() + (0 if sinks is None else sinks[head].double().exp())
        seen = v[first:stop, place]
        outs[0, n, head], outs[1, n, head] = weights @ seen, weights @ seen.abs()
    return outs[0], outs[1]


class Filled:
    """Sequences of random K and V, with NaN in all that is mapped behind their lengths."""

    def __init__(self, kv: va.KVAllocator, lengths: list[int], seed: int = 1) -> None:
        self.kv = kv
        self.random = torch.Generator().manual_seed(seed)
        self.sequences = [kv.allocate(length) for length in lengths]
        self.written: dict[tuple[int, va.Sequence], tuple[torch.Tensor, torch.Tensor]] = {}
        layout = kv.layout
        if layout.dtype.is_floating_point:
            poison(kv)
        for layer, seq in itertools.product(range(layout.num_layers), self.sequences):
            n, heads = seq.length, layout.num_kv_heads
            k = self.normal(n, heads, layout.head_dim).to(layout.dtype)
            v = self.normal(n, heads, layout.v_dim).to(layout.dtype)
            keys, values = kv.layer(layer)
            keys[seq.slot, :n], values[seq.slot, :n] = k, v
            self.written[layer, seq] = k, v

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def queries(self, num_queries: int, num_heads: int) -> torch.Tensor:
        layout = self.kv.layout
        return self.normal(num_queries, num_heads, layout.head_dim).to(layout.dtype)

    def expect(
        self, out: torch.Tensor, q: torch.Tensor, layer: int, rows: dict[va.Sequence, int], **how
    ) -> None:
        """That `out` is the attention of all rows, back to back."""
        layout = self.kv.layout
        assert out.shape == (*q.shape[:2], layout.v_dim)
        assert out.dtype is q.dtype
        end = 0
        for seq, n in rows.items():
            start, end = end, end + n
            want, magnitude = naive(q[start:end], *self.written[layer, seq], **how)
            error = (out[start:end].double() - want).abs()
            # NaN is not within anything.
            assert (error <= TOLERANCE[q.dtype] * magnitude + 1e-30).all(), (seq, n, error.max())
        assert end == len(q)


def memory_of(kv: va.KVAllocator) -> dict[int, np.ndarray]:
    """All bytes that are mapped, by address; not copied."""
    return {
        mapping.address: np.frombuffer(
            (ctypes.c_uint8 * mapping.size_bytes).from_address(mapping.address), dtype=np.uint8
        )
        for mapping in kv.mappings()
        if mapping.access == "read_write"
    }


def poison(kv: va.KVAllocator) -> None:
    """NaN of every float here, in every mapped byte."""
    for memory in memory_of(kv).values():
        memory[:] = 0xFF


# ---- attend ----

LENGTHS = [1, 7, 8, 9, 31, 32, 33, 65]  # about where pages end, in each order


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer", [0, 1])
def test_decode_is_the_attention_of_one_query(order: str, layer: int) -> None:
    filled = Filled(make(make_layout(order=order)), LENGTHS)
    for sequences in (filled.sequences, filled.sequences[::-1], filled.sequences[2:3]):
        rows = dict.fromkeys(sequences, 1)
        q = filled.queries(len(rows), 4)
        filled.expect(attend(q, filled.kv, layer, Batch.of(rows)), q, layer, rows)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_batches_mix_prefill_and_decode(order: str, causal: bool) -> None:
    filled = Filled(make(make_layout(order=order)), LENGTHS)
    counts = [1, 7, 3, 9, 1, 31, 1, 65]  # all of a sequence, some of it, one
    rows = dict(zip(filled.sequences, counts, strict=True))
    # Slots in another order, too.
    for some in (rows, dict(reversed(rows.items()))):
        q = filled.queries(sum(counts), 4)
        out = attend(q, filled.kv, 1, some, causal=causal)
        filled.expect(out, q, 1, some, causal=causal)


@pytest.mark.parametrize(
    ("kv_heads", "heads"), [(1, 1), (1, 8), (2, 2), (2, 8), (2, 16), (8, 8), (3, 6)]
)
def test_query_heads_share_heads_of_k(kv_heads: int, heads: int) -> None:
    filled = Filled(make(make_layout(num_kv_heads=kv_heads)), [33, 5])
    rows = dict(zip(filled.sequences, [1, 5], strict=True))
    q = filled.queries(6, heads)
    filled.expect(attend(q, filled.kv, 0, rows), q, 0, rows)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_dtypes_and_heads_of_v_that_differ(dtype: torch.dtype, order: str) -> None:
    layout = make_layout(dtype=dtype, head_dim=24, v_head_dim=8, num_layers=3, order=order)
    filled = Filled(make(layout), [17, 40, 1])
    rows = dict(zip(filled.sequences, [1, 20, 1], strict=True))
    q = filled.queries(22, 4)
    filled.expect(attend(q, filled.kv, 2, rows), q, 2, rows)


EXTRAS: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "window-of-one": {"window": 1},
    "window-beyond": {"window": 1_000},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -3.0, 2.0, 0.0])},
    "scale": {"scale": 0.7},
    "all": {"window": 6, "softcap": 2.0, "sinks": torch.tensor([1.0, 0.0, -1.0, 3.0]), "scale": 1},
}


@pytest.mark.parametrize("how", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [1, 20, 33, 9]], ids=["decode", "ragged"])
def test_windows_softcap_sinks_and_scale(how: dict[str, Any], counts: list[int]) -> None:
    filled = Filled(make(), [4, 20, 40, 9])
    rows = dict(zip(filled.sequences, counts, strict=True))
    q = filled.queries(sum(counts), 4)
    filled.expect(attend(q, filled.kv, 0, rows, **how), q, 0, rows, **how)


@pytest.mark.parametrize("how", [{"softcap": 1.5}, {"sinks": torch.zeros(4)}], ids=str)
def test_softcap_and_sinks_where_queries_see_what_is_behind_them(how: dict[str, Any]) -> None:
    filled = Filled(make(), [20, 9])
    rows = dict(zip(filled.sequences, [5, 9], strict=True))
    q = filled.queries(14, 4)
    out = attend(q, filled.kv, 0, rows, causal=False, **how)
    filled.expect(out, q, 0, rows, causal=False, **how)


def test_the_last_query_is_at_the_last_key(kv: va.KVAllocator) -> None:
    """V says which tokens were seen: token i adds 2**-i, with a weight of 1 over their number."""
    seq = kv.allocate(12)
    keys, values = kv.layer(0)
    keys[seq.slot, :12] = 0
    values[seq.slot, :12] = (2.0 ** -torch.arange(12))[:, None, None]
    out = attend(torch.ones(3, 2, 16), kv, 0, {seq: 3})
    seen = [sum(2.0**-i for i in range(n)) / n for n in (10, 11, 12)]
    assert out[:, 0, 0].tolist() == pytest.approx(seen)
    out = attend(torch.ones(3, 2, 16), kv, 0, {seq: 3}, window=2)
    seen = [(2.0 ** -(n - 1) + 2.0 ** -(n - 2)) / 2 for n in (10, 11, 12)]
    assert out[:, 0, 0].tolist() == pytest.approx(seen)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_what_is_below_every_window_is_not_read(order: str, queries: int) -> None:
    """It is not mapped: reading there would end the process."""
    kv = make(make_layout(order=order), max_extent=HOST_PAGE_BYTES)
    filled = Filled(kv, [200, 3])
    seq, other = filled.sequences
    window = 8
    first = 200 - queries - window + 1
    seq.trim_front(first)
    start = kv.layer(0)[0][seq.slot].data_ptr()
    lowest = min(m.address for m in kv.mappings() if m.slot == seq.slot and m.region == 0)
    assert lowest > start, "nothing was unmapped: the test tests nothing"
    rows = {other: 1, seq: queries}
    q = filled.queries(1 + queries, 4)
    for how in ({}, {"softcap": 2.0}):
        out = attend(q, kv, 0, rows, window=window, **how)
        filled.expect(out, q, 0, rows, window=window, **how)


@pytest.mark.parametrize("how", [{}, {"softcap": 1.0}, {"window": 3}], ids=str)
def test_padding_reads_nothing_and_is_exactly_zero(kv: va.KVAllocator, how: dict) -> None:
    filled = Filled(kv, [9, 0, 4])
    first, empty, last = filled.sequences
    unmapped = kv.max_sequences - 1  # a slot with no sequence and no memory
    batch = Batch(kv, 4)
    slots = [unmapped, first.slot, empty.slot, last.slot]
    batch.fill_rows(slots, [0, 9, 0, 4])
    q = filled.queries(4, 4)
    out = attend(q, kv, 0, batch, **how)
    assert torch.equal(out[[0, 2]], torch.zeros(2, 4, 16))
    filled.expect(out[[1, 3]], q[[1, 3]], 0, {first: 1, last: 1}, **how)
    batch.fill_rows(slots[:1], [0])
    assert torch.equal(attend(q[:1], kv, 0, batch, **how), torch.zeros(1, 4, 16))


def test_attention_computes_nothing_but_its_output(kv: va.KVAllocator) -> None:
    filled = Filled(kv, LENGTHS)
    before = {address: memory.copy() for address, memory in memory_of(kv).items()}
    q = filled.queries(8, 4)
    kept = q.clone()
    attend(q, kv, 0, dict.fromkeys(filled.sequences, 1), sinks=torch.zeros(4))
    assert torch.equal(q, kept)
    for address, memory in memory_of(kv).items():
        assert np.array_equal(memory, before[address])


def test_queries_may_be_strided(kv: va.KVAllocator) -> None:
    filled = Filled(kv, [9, 30])
    rows = dict(zip(filled.sequences, [1, 6], strict=True))
    q = filled.queries(7, 8)[:, 2:6]
    filled.expect(attend(q, kv, 0, rows), q, 0, rows)


def test_a_batch_with_a_bound_above_its_lengths(kv: va.KVAllocator) -> None:
    filled = Filled(kv, [9, 30])
    batch = Batch(kv, 2)
    for bound in (30, 31, kv.max_seq_len):
        batch.fill_rows([seq.slot for seq in filled.sequences], [9, 30], max_length=bound)
        q = filled.queries(2, 4)
        filled.expect(attend(q, kv, 0, batch), q, 0, dict.fromkeys(filled.sequences, 1))


def test_generation_with_append_and_attend_is_one_causal_attention(kv: va.KVAllocator) -> None:
    """Prompts, then tokens one by one, with other sequences coming and going between."""
    random = torch.Generator().manual_seed(3)
    total = [40, 23, 70]
    k, v, q = ([torch.randn(n, heads, 16, generator=random) for n in total] for heads in (2, 2, 4))
    got: list[list[torch.Tensor]] = [[], [], []]
    done = [0, 0, 0]
    sequences = [kv.allocate() for _ in total]

    def run(counts: list[int]) -> None:
        rows = {i: n for i, n in enumerate(counts) if n}
        kv.step({sequences[i]: done[i] + n for i, n in rows.items()})
        batch = Batch.of({sequences[i]: n for i, n in rows.items()})
        new = [torch.cat([x[i][done[i] : done[i] + n] for i, n in rows.items()]) for x in (k, v, q)]
        for layer in range(2):
            append(new[0], new[1], layer, batch)
            out = attend(new[2], kv, layer, batch)
        for (i, n), part in zip(rows.items(), out.split(list(rows.values())), strict=True):
            got[i].append(part)
            done[i] += n

    run([30, 0, 64])
    run([1, 17, 1])
    for _ in range(5):
        run([1, 1, 1])
    run([4, 1, 0])
    for i, n in enumerate(done):
        want, magnitude = naive(q[i][:n], k[i][:n], v[i][:n])
        error = (torch.cat(got[i]).double() - want).abs()
        assert (error <= 2**-17 * magnitude).all()


# ---- append ----


@pytest.fixture(params=[None, "half", "interleaved"])
def interleaved(request: pytest.FixtureRequest) -> bool | None:
    return {None: None, "half": False, "interleaved": True}[request.param]


def make_rope(half: int, positions: int = 256, interleaved: bool = False) -> Rope:
    angles = torch.outer(torch.arange(positions).double(), 1.0 / 100 ** (torch.arange(half) / half))
    return Rope(
        cos=angles.cos().float().contiguous(),
        sin=angles.sin().float().contiguous(),
        interleaved=interleaved,
    )


def turn(x: torch.Tensor, position: int, rope: Rope) -> torch.Tensor:
    """One token's heads as complex numbers, each times its angle's; in float64."""
    half = rope.cos.shape[1]
    x = x.double().clone()
    places = [(2 * i, 2 * i + 1) if rope.interleaved else (i, i + half) for i in range(half)]
    first, second = (list(part) for part in zip(*places, strict=True))
    angle = torch.complex(rope.cos[position].double(), rope.sin[position].double())
    turned = torch.complex(x[:, first], x[:, second]) * angle
    x[:, first], x[:, second] = turned.real, turned.imag
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("head_dims", [(16, 16), (24, 8)], ids=str)
def test_append_writes_its_tokens_and_nothing_else(order: str, head_dims: tuple[int, int]) -> None:
    dim, v_dim = head_dims
    layout = make_layout(
        head_dim=dim, v_head_dim=v_dim, num_layers=3, dtype=torch.float16, order=order
    )
    kv = make(layout)
    sequences = [kv.allocate(n) for n in (9, 40, 0, 33)]
    random = np.random.default_rng(1)
    for memory in memory_of(kv).values():
        memory[:] = random.integers(0, 256, len(memory), dtype=np.uint8)
    expected = {address: memory.copy() for address, memory in memory_of(kv).items()}
    nine, forty, empty, thirty = sequences
    batch = Batch(kv, 5, 64)
    # One of many, padding in the middle, all of a sequence, and a slot without memory.
    batch.fill_rows(
        [forty.slot, empty.slot, nine.slot, kv.max_sequences - 1, thirty.slot],
        [40, 0, 9, 0, 33],
        [3, 1, 9, 1, 1],
    )
    k, v = torch.randn(15, 2, dim), torch.randn(15, 2, v_dim)
    assert append(k, v, 1, batch) is None
    base = min(kv.layer(0)[0].data_ptr() for _ in range(1)) - kv.layer_specs(0)[0].offset_bytes
    tokens = [(forty, 37 + i) for i in range(3)] + [None]
    tokens += [(nine, i) for i in range(9)] + [None, (thirty, 32)]
    for token, new_k, new_v in zip(tokens, k, v, strict=True):
        if token is None:
            continue
        for new, spec in zip((new_k, new_v), kv.layer_specs(1), strict=True):
            place = token[0].slot * spec.strides[0] + token[1] * spec.strides[1]
            address = base + spec.offset_bytes + 2 * place
            raw = new.half().numpy().tobytes()
            for start, memory in expected.items():
                if start <= address < start + len(memory):
                    memory[address - start : address - start + len(raw)] = list(raw)
                    break
            else:
                pytest.fail("a token that was appended is not mapped")
    for start, memory in memory_of(kv).items():
        assert np.array_equal(memory, expected[start])


@pytest.mark.parametrize(
    ("dtype", "new_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("half", [8, 4])
def test_append_turns_k_and_queries_by_their_positions(
    dtype: torch.dtype, new_dtype: torch.dtype, half: int, interleaved: bool | None
) -> None:
    kv = make(make_layout(dtype=dtype))
    first, second = kv.allocate(40), kv.allocate(3)
    batch = Batch(kv, 3, 10)
    batch.fill_rows([first.slot, 7, second.slot], [40, 0, 3], [6, 1, 3])
    k, v, q = (torch.randn(10, heads, 16).to(new_dtype) for heads in (2, 2, 6))
    kept = k.clone(), v.clone(), q.clone()
    rope = None if interleaved is None else make_rope(half, interleaved=interleaved)
    turned = append(k, v, 1, batch, rope=rope, q=q if rope else None)
    tokens = [(first, 34 + i) for i in range(6)] + [None] + [(second, i) for i in range(3)]
    keys, values = kv.layer(1)
    for i, token in enumerate(tokens):
        if token is None:
            continue
        seq, position = token
        want = turn(k[i], position, rope) if rope else k[i].double()
        # Rounded once, or first to the type of the new K.
        close = max(torch.finfo(x).eps for x in (dtype, new_dtype))
        got = keys[seq.slot, position].double()
        assert torch.allclose(got, want, rtol=close, atol=close), (seq, position)
        assert torch.equal(values[seq.slot, position].float(), v[i].to(dtype).float())
        if rope:
            assert turned is not None and turned.dtype is new_dtype
            close = torch.finfo(new_dtype).eps
            got = turned[i].double()
            assert torch.allclose(got, turn(q[i], position, rope), rtol=close, atol=close)
    assert all(torch.equal(a, b) for a, b in zip((k, v, q), kept, strict=True))
    if rope is None:
        assert turned is None
    elif half == 4:  # what lies behind the pairs is as it was
        assert torch.equal(turned[0, :, 8:], q[0, :, 8:])
        assert torch.equal(keys[first.slot, 34, :, 8:].float(), k[0, :, 8:].to(dtype).float())


def test_append_takes_views_of_a_fused_projection(interleaved: bool | None) -> None:
    kv, other = make(), make()
    rope = None if interleaved is None else make_rope(8, interleaved=interleaved)
    fused = torch.randn(12, 4 + 2 + 2, 16)
    q, k, v = fused.split([4, 2, 2], dim=1)
    results = []
    for one, views in ((kv, (k, v, q)), (other, [x.contiguous() for x in (k, v, q)])):
        seq = one.allocate(20)
        given = {"rope": rope, "q": views[2]} if rope else {}
        turned = append(views[0], views[1], 0, Batch.of({seq: 12}), **given)
        results.append((*(x[seq.slot, 8:20] for x in one.layer(0)), turned))
    for a, b in zip(*results, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_append_of_padding_alone_writes_nothing(kv: va.KVAllocator) -> None:
    batch = Batch(kv, 2)
    batch.fill_rows([0, 1], [0, 0])
    q = torch.randn(2, 4, 16)
    turned = append(*torch.randn(2, 2, 2, 16), 0, batch, rope=make_rope(8), q=q)
    assert turned is not None and turned.shape == q.shape
    assert kv.mappings() == []


def _table(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("cos", "sin"),
    [
        (_table(8), _table(8)),
        (_table(8, 4, dtype=torch.float64), _table(8, 4, dtype=torch.float64)),
        (_table(4, 8).T, _table(4, 8).T),
        (_table(8, 4), _table(8, 5)),
        (_table(8, 4), _table(8, 4).to("meta")),
    ],
    ids=["one-dimensional", "double", "strided", "unequal", "two-devices"],
)
def test_rope_refuses(cos: torch.Tensor, sin: torch.Tensor) -> None:
    with pytest.raises(va.ConfigError, match="cos and sin must"):
        Rope(cos=cos, sin=sin)


APPEND_REFUSES: dict[str, tuple[dict[str, Any], str]] = {
    "k-tokens": ({"k": torch.ones(4, 2, 16)}, r"k must be \[3, 2, 16\] on cpu; got \[4, 2, 16\]"),
    "k-heads": ({"k": torch.ones(3, 4, 16)}, "k must be"),
    "k-dim": ({"k": torch.ones(3, 2, 8)}, "k must be"),
    "k-2d": ({"k": torch.ones(3, 32)}, "k must be"),
    "k-integers": ({"k": torch.ones(3, 2, 16, dtype=torch.int32)}, "quantised numbers into"),
    "k-elsewhere": ({"k": torch.ones(3, 2, 16, device="meta")}, "k must be .* on cpu"),
    "k-strided-heads": ({"k": torch.ones(3, 2, 32)[..., ::2]}, "k must have dense heads"),
    "v-heads": ({"v": torch.ones(3, 1, 16)}, "v must be"),
    "v-strided-heads": ({"v": torch.ones(3, 16, 2).mT}, "v must have dense heads"),
    "q-without-rope": ({"q": torch.ones(3, 4, 16), "rope": None}, "pass rope too"),
    "q-tokens": ({"q": torch.ones(2, 4, 16)}, r"q must be \[3, num_heads, 16\]"),
    "q-2d": ({"q": torch.ones(3, 64)}, "q must be"),
    "q-integers": ({"q": torch.ones(3, 4, 16, dtype=torch.int64)}, "q must be .* floating point"),
    "k-none": ({"k": None}, "k must be .*; got a NoneType"),
    "batch": ({"batch": {}}, "batch must be a Batch; got dict"),
    "q-dim": ({"q": torch.ones(3, 4, 8)}, "q must be"),
    "q-strided-heads": ({"q": torch.ones(3, 4, 32)[..., ::2]}, "q must be .* with dense heads"),
    "few-positions": ({"rope": make_rope(8, positions=8)}, "have 8 positions, the batch has 9"),
    "too-many-pairs": ({"rope": make_rope(9)}, "turn 18 elements, a head has 16"),
    "rope-elsewhere": (
        {"rope": Rope(cos=_table(9, 8).to("meta"), sin=_table(9, 8).to("meta"))},
        "cos and sin must be on cpu",
    ),
    "rope-text": ({"rope": "x"}, "rope must be a Rope; got str"),
    "layer": ({"layer": 2}, "layer must be"),
}


@pytest.mark.parametrize(("changes", "message"), APPEND_REFUSES.values(), ids=APPEND_REFUSES)
def test_append_refuses_and_writes_nothing(
    kv: va.KVAllocator, changes: dict[str, Any], message: str
) -> None:
    seq = kv.allocate(9)
    poison(kv)
    given: dict[str, Any] = {
        "k": torch.ones(3, 2, 16),
        "v": torch.ones(3, 2, 16),
        "layer": 0,
        "rope": make_rope(8),
    }
    given |= {"batch": Batch.of({seq: 3})} | changes
    with pytest.raises(va.ConfigError, match=message):
        append(given.pop("k"), given.pop("v"), given.pop("layer"), given.pop("batch"), **given)
    assert all((memory == 0xFF).all() for memory in memory_of(kv).values())


def test_layers_first_seen_in_inference_mode_are_written_outside_of_it(
    kv: va.KVAllocator,
) -> None:
    seq = kv.allocate(3)
    with torch.inference_mode():
        keys, _ = kv.layer(0)
    append(torch.ones(3, 2, 16), torch.ones(3, 2, 16), 0, Batch.of({seq: 3}))
    assert (keys[seq.slot, :3] == 1).all()


def test_append_keeps_nothing_of_a_graph_of_gradients(kv: va.KVAllocator) -> None:
    seq = kv.allocate(1)
    hidden = torch.ones(1, 2, 16, requires_grad=True) * 2
    append(hidden, hidden, 0, Batch.of({seq: 1}))
    assert not any(tensor.requires_grad for tensor in kv.layer(0))
    gone = weakref.ref(hidden)
    del hidden
    assert gone() is None


# ---- batches ----


def state(batch: Batch) -> tuple[object, ...]:
    """Everything about a batch, its tensors' addresses included."""
    tensors = (batch.slots, batch.lengths, batch.query_starts, batch.query_rows)
    return (
        *(tensor.tolist() for tensor in tensors),
        *(tensor.data_ptr() for tensor in tensors),
        batch.positions().tolist(),
        batch.num_rows,
        batch.num_queries,
        batch.max_queries,
        batch.max_length,
        batch.host_lengths,
        batch.host_slots,
    )


def test_a_batch_says_what_it_was_filled_with(kv: va.KVAllocator) -> None:
    first, second, third = (kv.allocate(n) for n in (5, 40, 7))
    batch = Batch(kv, max_rows=4, max_queries=20)
    assert (batch.num_rows, batch.num_queries, batch.max_length) == (0, 0, 0)
    batch.fill({third: 7, first: 1, second: 3})
    assert batch.slots.tolist() == batch.host_slots == [third.slot, first.slot, second.slot]
    assert batch.lengths.tolist() == batch.host_lengths == [7, 5, 40]
    assert batch.query_starts.tolist() == [0, 7, 8, 11]
    assert batch.query_rows.tolist() == [0] * 7 + [1] + [2] * 3
    assert batch.positions().tolist() == [*range(7), 4, 37, 38, 39]
    assert (batch.num_rows, batch.num_queries) == (3, 11)
    assert (batch.max_queries, batch.max_length, batch.is_decode) == (7, 40, False)
    for tensor in (batch.slots, batch.lengths, batch.query_starts, batch.query_rows):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()
    assert repr(batch) == "Batch(num_rows=3, num_queries=11, max_length=40)"
    same = Batch.of({third: 7, first: 1, second: 3})
    addresses = slice(4, 8)
    assert state(same)[:4] == state(batch)[:4]
    assert state(same)[addresses.stop :] == state(batch)[addresses.stop :]
    batch.fill({first: 1, second: 1})
    assert batch.is_decode
    assert batch.query_rows.tolist() == [0, 1]
    assert batch.positions().tolist() == [4, 39]


def test_a_batch_takes_lengths_as_they_are_when_it_is_filled(kv: va.KVAllocator) -> None:
    seq = kv.allocate(5)
    batch = Batch(kv, 1)
    batch.fill({seq: 1})
    kv.step({seq: 9})
    assert batch.host_lengths == [5]
    batch.fill({seq: 1})
    assert batch.host_lengths == batch.lengths.tolist() == [9]


def test_addresses_are_kept_when_a_batch_is_filled_anew(kv: va.KVAllocator) -> None:
    batch = Batch(kv, max_rows=3, max_queries=9)

    def addresses() -> list[int]:
        tensors = (batch.slots, batch.lengths, batch.query_starts, batch.query_rows)
        return [tensor.data_ptr() for tensor in tensors]

    batch.fill_rows([0, 1, 2], [5, 6, 7], [1, 2, 6])
    kept = addresses()
    slots = batch.slots
    batch.fill_rows([4, 3, 5], [50, 60, 0], [2, 6, 1])
    assert addresses() == kept
    assert slots.tolist() == [4, 3, 5]
    batch.fill_rows([7], [8])
    batch.fill_rows([6, 6, 1], [5, 0, 1])
    assert addresses() == kept
    assert slots.tolist() == [6, 6, 1]


def test_rows_may_be_given_by_any_iterable_of_whole_numbers(kv: va.KVAllocator) -> None:
    batch = Batch(kv, 3, 9)
    batch.fill_rows(np.array([1, 2]), iter([4, 5]), torch.tensor([1, 3]))
    assert batch.slots.tolist() == [1, 2]
    assert batch.lengths.tolist() == [4, 5]
    assert batch.query_starts.tolist() == [0, 1, 4]
    assert batch.host_lengths == [4, 5]


def test_a_batch_advances_all_but_padding(kv: va.KVAllocator) -> None:
    batch = Batch(kv, 3)
    batch.fill_rows([0, 1, 2], [4, 0, 9])
    batch.advance()
    assert batch.lengths.tolist() == [5, 0, 10]
    batch.note_advance()
    assert batch.host_lengths == [5, 0, 10]
    assert batch.max_length == 10
    assert batch.positions()[[0, 2]].tolist() == [4, 9]
    assert batch.positions()[1] < 0
    batch.fill_rows([0, 1], [4, 6], max_length=100)
    batch.advance()
    batch.note_advance()
    assert batch.max_length == 100


def test_positions_are_new_as_soon_as_a_batch_advances(kv: va.KVAllocator) -> None:
    seq = kv.allocate(5)
    batch = Batch.of({seq: 1})
    assert batch.positions().tolist() == [4]
    kv.step({seq: 6})
    batch.advance()  # as captured, the host is told later
    append(torch.full((1, 2, 16), 3.0), torch.full((1, 2, 16), 3.0), 0, batch)
    keys, _ = kv.layer(0)
    assert [bool((keys[seq.slot, n] == 3).all()) for n in (4, 5)] == [False, True]


def test_a_batch_for_graphs_keeps_its_rows(kv: va.KVAllocator) -> None:
    """A graph reads as many rows as were there when it was captured."""
    batch = Batch(kv, 4, 8, graph=True)
    batch.fill_rows([0, 1, 2], [5, 5, 5])
    before = state(batch)
    addresses = [tensor.data_ptr() for tensor in (batch.slots, batch.lengths, batch.query_starts)]
    for slots, lengths, queries in (([0, 1], [5, 5], None), ([0, 1, 2], [5, 5, 5], [1, 1, 2])):
        with pytest.raises(va.ConfigError, match="have 3 rows and 3 queries.*rows of length 0"):
            batch.fill_rows(slots, lengths, queries)
        assert state(batch) == before
    batch.fill_rows([3, 4, 0], [7, 9, 0])
    assert [
        tensor.data_ptr() for tensor in (batch.slots, batch.lengths, batch.query_starts)
    ] == addresses


def test_a_batch_for_graphs_keeps_its_bound(kv: va.KVAllocator) -> None:
    batch = Batch(kv, 1, graph=True)
    batch.fill_rows([0], [5], max_length=6)
    batch.note_advance()
    before = state(batch)
    with pytest.raises(va.ConfigError, match="would have 7 tokens, where graphs .* are for 6"):
        batch.note_advance()
    assert state(batch) == before


def test_a_batch_without_rows_is_refused(kv: va.KVAllocator) -> None:
    batch, nothing = Batch(kv, 2), torch.zeros(0, 2, 16)
    for call in (
        batch.note_advance,
        lambda: attend(nothing, kv, 0, batch),
        lambda: append(nothing, nothing, 0, batch),
    ):
        with pytest.raises(va.ConfigError, match="has no rows yet: fill"):
            call()


def test_a_batch_of_padding_alone_does_not_advance(kv: va.KVAllocator) -> None:
    batch = Batch(kv, 2, graph=True)
    batch.fill_rows([0, 1], [0, 0])
    batch.advance()
    batch.note_advance()
    assert (batch.host_lengths, batch.max_length, batch.lengths.tolist()) == ([0, 0], 0, [0, 0])


def test_a_batch_is_filled_whatever_the_default_device_is(kv: va.KVAllocator) -> None:
    batch, first, second = Batch(kv, 2, 4), kv.allocate(9), kv.allocate(4)
    q = torch.ones(4, 4, 16)
    with torch.device("meta"):
        batch.fill({first: 3, second: 1})
        attend(q, kv, 0, batch)
    assert batch.lengths.tolist() == [9, 4]
    assert batch.query_rows.tolist() == [0, 0, 0, 1]


def test_what_was_derived_ends_where_a_capture_begins_or_ends(kv, monkeypatch) -> None:
    batch = Batch(kv, 1)
    batch.fill({kv.allocate(5): 1})
    # A batch of a GPU, over memory of a CPU.
    monkeypatch.setattr(batch, "kv", types.SimpleNamespace(device=torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    made, seen = itertools.count(), []
    for capturing in (False, False, True, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        batch.notice_capture()
        seen.append((batch.derived("a", lambda: next(made)), batch.is_captured))
    assert seen == [(0, False), (0, False), (1, True), (1, True), (2, False)]


def test_a_row_does_not_advance_beyond_max_seq_len(kv: va.KVAllocator) -> None:
    batch = Batch(kv, 2)
    batch.fill_rows([0, 1], [4, kv.max_seq_len - 1])
    batch.advance()
    batch.note_advance()
    before = state(batch)
    with pytest.raises(va.ConfigError, match="would have 257 tokens, where max_seq_len=256"):
        batch.note_advance()
    assert state(batch) == before
    batch.host_lengths = None
    with pytest.raises(va.ConfigError, match="does not know this batch's lengths: fill it first"):
        batch.note_advance()


def test_what_is_derived_is_made_once_until_the_batch_changes(kv: va.KVAllocator) -> None:
    batch = Batch(kv, 2)
    batch.fill_rows([0, 1], [4, 6])
    made = []

    def make_one() -> int:
        made.append(None)
        return 0  # a value that is false is a value

    changes: list[Callable[[], None]] = [
        batch.touch,
        lambda: batch.fill_rows([0], [4]),
        batch.note_advance,
        batch.advance,
    ]
    for n, change in enumerate(changes, start=1):
        assert batch.derived("a", make_one) == batch.derived("a", make_one) == 0
        assert len(made) == n
        change()
    assert batch.derived("b", lambda: 7) == 7


def test_stale_and_foreign_sequences_are_refused(kv: va.KVAllocator) -> None:
    seq, gone = kv.allocate(5), kv.allocate(5)
    foreign = make().allocate(5)
    gone.free()
    batch = Batch(kv, 2)
    batch.fill({seq: 1})
    before = state(batch)
    with pytest.raises(va.StaleSequence):
        batch.fill({seq: 1, gone: 1})
    with pytest.raises(va.ConfigError, match="queries has a sequence of another allocator"):
        batch.fill({seq: 1, foreign: 1})
    with pytest.raises(va.ConfigError, match="queries must map sequences to numbers; got 3"):
        batch.fill({3: 1})
    assert state(batch) == before
    with pytest.raises(va.StaleSequence):
        Batch.of({gone: 1})
    with pytest.raises(va.ConfigError, match="another allocator"):
        Batch.of({seq: 1, foreign: 1})
    with pytest.raises(va.ConfigError, match="got the key 'seq'"):
        Batch.of({"seq": 1})
    with pytest.raises(va.ConfigError, match="at least one sequence"):
        Batch.of({})
    for number in (0, 6, -1, 1.0, "1"):
        with pytest.raises(va.ConfigError, match="queries"):
            Batch.of({seq: number})
    kv.close()
    with pytest.raises(va.Closed):
        batch.fill({seq: 1})


ROWS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unlike": ({"slots": [0]}, "must be alike; got 1, 2 and 2"),
    "unlike-queries": ({"queries": [1]}, "must be alike; got 2, 2 and 1"),
    "none": ({"slots": [], "lengths": [], "queries": []}, "a batch of 0 rows does not fit"),
    "rows": (
        {"slots": [0] * 4, "lengths": [1] * 4, "queries": [1] * 4},
        "a batch of 4 rows does not fit max_rows=3",
    ),
    "queries": ({"queries": [4, 5]}, "9 queries do not fit max_queries=8"),
    "slot-below": ({"slots": [-1, 0]}, "a slot must be from 0 to 7"),
    "slot-above": ({"slots": [0, 8]}, "a slot must be from 0 to 7"),
    "length-below": ({"lengths": [-1, 5]}, "a length must be from 0 to max_seq_len=256"),
    "length-above": ({"lengths": [5, 257]}, "a length must be from 0 to max_seq_len=256"),
    "no-query": ({"queries": [0, 1]}, "of 4, 0 cannot be"),
    "more-queries-than-tokens": ({"queries": [5, 1]}, "of 4, 5 cannot be"),
    "bound-below": ({"max_length": 4}, "max_length must be"),
    "bound-above": ({"max_length": 257}, "max_length must be"),
    "bound-no-number": ({"max_length": 7.0}, "max_length must be"),
    "slot-bytes": ({"slots": b"abc"}, "must be alike; got 3, 2 and 2"),
    "slot-no-number": ({"slots": [0.0, 1.0]}, "slots must be whole numbers"),
    "length-no-number": ({"lengths": [4.5, 5]}, "lengths must be whole numbers"),
    "queries-no-number": ({"queries": [1.5, 1.5]}, "queries must be whole numbers"),
    "queries-text": ({"queries": ["1", "1"]}, "queries must be whole numbers"),
    "length-huge": ({"lengths": [2**40, 5]}, "lengths must be whole numbers"),
    "slot-bool": ({"slots": [True, 0]}, "slots must be whole numbers.*: a bool is none"),
    "slots-elsewhere": (
        {"slots": torch.zeros(2, dtype=torch.int32, device="meta")},
        "slots must be whole numbers",
    ),
}


@pytest.mark.parametrize(("changes", "message"), ROWS_REFUSED.values(), ids=ROWS_REFUSED)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(
    kv: va.KVAllocator, changes: dict[str, Any], message: str
) -> None:
    batch = Batch(kv, 3, 8)
    batch.fill_rows([3, 4, 5], [9, 0, 8], [3, 1, 2], max_length=20)
    before = state(batch)
    given = {"slots": [0, 1], "lengths": [4, 5], "queries": [1, 1]} | changes
    with pytest.raises(va.ConfigError, match=message):
        batch.fill_rows(**given)
    assert state(batch) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "max_rows must be"),  # the first argument is not an allocator: see below
        ((0,), "max_rows must be"),
        ((2**31,), "max_rows must be"),
        ((1, 0), "max_queries must be"),
        ((1, 2**31), "max_queries must be"),
        ((1, 1.5), "max_queries must be"),
    ],
)
def test_a_batch_refuses_sizes(
    kv: va.KVAllocator, arguments: tuple[Any, ...], message: str
) -> None:
    if arguments == (3,):
        with pytest.raises(va.ConfigError, match="kv must be a KVAllocator; got int"):
            Batch(3, 1)
        return
    with pytest.raises(va.ConfigError, match=message):
        Batch(kv, *arguments)


# ---- attend refuses ----


ATTEND_REFUSES: dict[str, tuple[dict[str, Any], str]] = {
    "q-tokens": ({"q": torch.ones(3, 4, 16)}, r"q must be \[2, 4, 16\] of torch.float32 on cpu"),
    "q-dim": ({"q": torch.ones(2, 4, 8)}, r"got \[2, 4, 8\] of torch.float32 on cpu"),
    "q-dtype": ({"q": torch.ones(2, 4, 16).half()}, "q must be .*; got .* of torch.float16"),
    "q-elsewhere": ({"q": torch.ones(2, 4, 16, device="meta")}, "q must be .* on meta"),
    "q-2d": ({"q": torch.ones(2, 64)}, "q must be"),
    "q-4d": ({"q": torch.ones(1, 2, 4, 16)}, "q must be"),
    "q-heads": ({"q": torch.ones(2, 3, 16)}, "3 query heads cannot share 2 heads of K"),
    "no-heads": ({"q": torch.ones(2, 0, 16)}, "num_heads must be"),
    "backend": ({"backend": "fa9"}, "\"auto\" or one of .*fa2.*torch; got 'fa9'"),
    "other-device": ({"backend": "fa2"}, "'fa2': it runs on cuda, the memory is on cpu"),
    "window": ({"window": 0}, "window must be"),
    "window-not-causal": ({"window": 4, "causal": False}, "it needs causal=True"),
    "softcap": ({"softcap": -1.0}, "softcap must be"),
    "softcap-nan": ({"softcap": math.nan}, "softcap must be"),
    "softcap-inf": ({"softcap": math.inf}, "softcap must be"),
    "softcap-none": ({"softcap": None}, "softcap must be"),
    "scale-nan": ({"scale": math.nan}, "scale must be"),
    "scale-text": ({"scale": "x"}, "scale must be"),
    "scale-bool": ({"scale": True}, "scale must be"),
    "scale-huge": ({"scale": 10**400}, "scale must be"),
    "scale-0": ({"scale": 0.0}, "scale must be above 0"),
    "scale-negative": ({"scale": -0.1}, "scale must be above 0"),
    "softcap-list": ({"softcap": [1.0]}, "softcap must be"),
    "causal": ({"causal": "x"}, "causal must be"),
    "backend-list": ({"backend": ["torch"]}, "backend must be"),
    "q-none": ({"q": None}, "q must be .*; got a NoneType"),
    "batch": ({"batch": 5}, "queries must map .*; got a int"),
    "sinks-integers": ({"sinks": torch.ones(4, dtype=torch.int64)}, "of floating point"),
    "scales-text": ({"scales": "x"}, "scales must be Scales|8-bit floats"),
    "scales": ({"scales": Scales(k=torch.ones(1, 2))}, "8-bit floats stand for; K is of"),
    "q-strided-heads": ({"q": torch.ones(2, 4, 32)[..., ::2]}, "q must have dense heads"),
    "sinks-list": ({"sinks": [1.0] * 4}, r"sinks must be \[4\] on cpu, .*; got a list"),
    "sinks-shape": ({"sinks": torch.ones(2)}, r"sinks must be \[4\] on cpu"),
    "sinks-2d": ({"sinks": torch.ones(4, 1)}, r"sinks must be \[4\] on cpu"),
    "sinks-elsewhere": ({"sinks": torch.ones(4, device="meta")}, r"sinks must be \[4\] on cpu"),
    "layer": ({"layer": 2}, "layer must be"),
}


@pytest.mark.parametrize(("changes", "message"), ATTEND_REFUSES.values(), ids=ATTEND_REFUSES)
def test_attend_refuses(kv: va.KVAllocator, changes: dict[str, Any], message: str) -> None:
    seq, other = kv.allocate(9), kv.allocate(3)
    given: dict[str, Any] = {
        "q": torch.ones(2, 4, 16),
        "kv": kv,
        "layer": 0,
        "batch": {seq: 1, other: 1},
    }
    with pytest.raises(va.ConfigError, match=message):
        attend(**(given | changes))
    attend(**given)  # and is none the worse for it


def test_attend_refuses_what_is_of_another_allocator(kv: va.KVAllocator) -> None:
    other = make(kv.layout, max_seq_len=kv.max_seq_len)
    batch = Batch.of({other.allocate(4): 1})
    with pytest.raises(va.ConfigError, match="of another allocator"):
        attend(torch.ones(1, 4, 16), kv, 0, batch)
    attention = Attention(kv, Options(num_heads=4))
    with pytest.raises(va.ConfigError, match="of another allocator"):
        attention(torch.ones(1, 4, 16), 0, batch)
    with pytest.raises(va.ConfigError, match="kv must be a KVAllocator; got Pool"):
        Attention(kv.pool, Options(num_heads=4))
    for refused in (lambda: Attention(kv, None), lambda: backends(kv, {"num_heads": 4})):
        with pytest.raises(va.ConfigError, match="options must be Options; got"):
            refused()
    with pytest.raises(va.ConfigError, match="batch must be a Batch; got dict"):
        attention(torch.ones(1, 4, 16), 0, {})
    with pytest.raises(va.ConfigError, match="q must be .*; got a NoneType"):
        attention(None, 0, Batch.of({kv.allocate(4): 1}))


def test_sinks_are_passed_where_the_options_say_so(kv: va.KVAllocator) -> None:
    batch = Batch.of({kv.allocate(4): 1})
    q = torch.ones(1, 4, 16)
    without, with_sinks = (Attention(kv, Options(num_heads=4, sinks=s)) for s in (False, True))
    for call in (
        lambda: without(q, 0, batch, sinks=torch.zeros(4)),
        lambda: with_sinks(q, 0, batch),
    ):
        with pytest.raises(va.ConfigError, match="pass sinks where the options say so"):
            call()


def test_attend_over_what_is_closed_or_stale(kv: va.KVAllocator) -> None:
    seq = kv.allocate(4)
    q = torch.ones(1, 4, 16)
    batch = Batch.of({seq: 1})
    seq.free()
    with pytest.raises(va.StaleSequence):
        attend(q, kv, 0, {seq: 1})
    kv.close()
    for call in (lambda: attend(q, kv, 0, batch), lambda: append(q[:, :2], q[:, :2], 0, batch)):
        with pytest.raises(va.Closed):
            call()


def test_a_backend_that_is_not_installed_says_what_to_install(
    kv: va.KVAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    absent = ("flash_attn", "flash_attn_3", "fa3_fwd", "vllm", "flashinfer")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else found(name, *a)
    )
    monkeypatch.delenv(flash_attn_3.LIBRARY, raising=False)
    flash_attn_3._is_loaded.cache_clear()
    wanted = {
        "fa2": "package flash_attn is not installed",
        "flashinfer": "package flashinfer-python is not installed",
        "fa3": "package flash_attn_3 .*hopper.* is not installed",
        "fa3_fwd": "package fa3-fwd is not installed",
        "fa3_vllm": "package vllm, or of the file that VATTENTION_FA3 names.* is not installed",
    }
    batch = Batch.of({kv.allocate(4): 1})
    for name, message in wanted.items():
        backend = BACKENDS[name]
        on_host = dataclasses.replace(
            backend.needs, device="cpu", capabilities=None, dtypes=(torch.float32,)
        )
        monkeypatch.setattr(backend, "needs", on_host)
        for call in (
            lambda name=name: attend(torch.ones(1, 4, 16), kv, 0, batch, backend=name),
            lambda name=name: Attention(kv, Options(num_heads=4), name),
        ):
            with pytest.raises(va.BackendUnavailable, match=f"backend '{name}': .*{message}"):
                call()
        reasons = backends(kv, Options(num_heads=4))
        assert len(reasons[name]) == 1 and reasons[name][0].endswith("is not installed")
        assert re.search(message, reasons[name][0])
    # What is not installed does not keep the others from running.
    assert attend(torch.ones(1, 4, 16), kv, 0, batch).shape == (1, 4, 16)
    flash_attn_3._is_loaded.cache_clear()


def test_backends_says_why_each_of_them_cannot_run(kv: va.KVAllocator) -> None:
    reasons = backends(kv, Options(num_heads=4))
    assert list(reasons) == list(BACKENDS)
    assert reasons["torch"] == []
    for name, why in reasons.items():
        assert name == BACKENDS[name].name
        if BACKENDS[name].needs.device == "cuda":
            assert why == ["it runs on cuda, the memory is on cpu"]
    shown = repr(Attention(kv, Options(num_heads=4)))
    assert shown == "Attention('auto': torch)"


def test_attend_says_why_no_backend_can_run() -> None:
    kv = make(va.KVLayout.latent(num_layers=1, latent_dim=16, dtype=torch.float32))
    seq = kv.allocate(4)
    message = r"no attention backend can run here: .*torch: .*a latent that is K and V at once"
    with pytest.raises(va.ConfigError, match=message):
        attend(torch.ones(1, 4, 16), kv, 0, {seq: 1})
    with pytest.raises(va.ConfigError, match="backend 'torch': it takes .*, not torch.int8"):
        Attention(make(make_layout(dtype=torch.int8)), Options(num_heads=2), "torch")


# ---- what attend keeps ----


def test_one_attention_is_kept_for_each_kind(kv: va.KVAllocator) -> None:
    other = kv.allocate(2)
    batch = Batch.of({kv.allocate(9): 1})
    q, sinks = torch.ones(1, 4, 16), torch.zeros(4)
    kinds: list[dict[str, Any]] = [
        {},
        {"causal": False},
        {"window": 3},
        {"softcap": 1.0},
        {"sinks": sinks},
        {"scale": 0.5},
        {"backend": "torch"},
        {"q": torch.ones(1, 2, 16)},
    ]
    for n, kind in enumerate(kinds, start=1):
        given = {"q": q} | kind
        for layer in (0, 1):
            attend(kv=kv, layer=layer, batch=batch, **given)
        attend(kv=kv, layer=0, batch=Batch.of({other: 1}), **given)
        assert len(kv._attentions) == n
    kv.close()
    assert not kv._attentions


@pytest.mark.parametrize("close", [True, False])
def test_attention_does_not_keep_the_allocator(close: bool) -> None:
    kv = make()
    pool = weakref.ref(kv.pool)
    batch = Batch.of({kv.allocate(9): 1})
    attend(torch.ones(1, 4, 16), kv, 0, batch)
    attention = Attention(kv, Options(num_heads=4))
    attention(torch.ones(1, 4, 16), 0, batch)
    gone = weakref.ref(kv)
    if close:
        kv.close()
    gc.disable()  # it is not a cycle that only the collector would end
    try:
        del kv, batch
        assert gone() is None
    finally:
        gc.enable()
    gc.collect()
    assert pool() is None
    del attention


@pytest.mark.parametrize(
    "scale",
    [
        *(torch.ones(2, 2), torch.ones(1, 2).half(), torch.ones(1, 2, device="meta")),
        *(torch.ones(2), [[1.0, 1.0]]),
    ],
    ids=["rows", "dtype", "device", "heads-alone", "list"],
)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_scales_that_do_not_fit_are_refused(monkeypatch, name: str, scale: torch.Tensor) -> None:
    kind = torch.float8_e4m3fn
    needs = dataclasses.replace(BACKENDS["torch"].needs, dtypes=(kind,))
    monkeypatch.setattr(BACKENDS["torch"], "needs", needs)
    with make(make_layout(dtype=kind)) as kv:
        q = torch.zeros(1, 4, 16, dtype=kind)
        with pytest.raises(
            va.ConfigError, match=rf"scales.{name} must be \[1, 2\] of torch.float32"
        ):
            attend(q, kv, 0, {kv.allocate(3): 1}, scales=Scales(**{name: scale}))


def test_a_library_that_is_another_is_missing(monkeypatch) -> None:
    monkeypatch.setenv(flash_attn_3.LIBRARY, "any.so")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    flash_attn_3._is_loaded.cache_clear()
    try:
        assert "VATTENTION_FA3 names" in (BACKENDS["fa3_vllm"].missing() or "")
    finally:
        flash_attn_3._is_loaded.cache_clear()


# ---- needs ----


NEEDS = Needs(device="cpu", dtypes=(torch.float32,), head_dims=(64, 8))
OPTIONS = Options(num_heads=4)


def unmet(
    needs: dict[str, Any], layout: dict[str, Any], options: dict[str, Any], **allocator: Any
) -> list[str]:
    with make(make_layout(**layout), **allocator) as kv:
        return dataclasses.replace(NEEDS, **needs).unmet_by(
            kv, dataclasses.replace(OPTIONS, **options)
        )


# 4,096 bytes are no whole number of these rows, nor are twice as many pages.
ROWS_OF_400 = {"row_padding_bytes": 16, "order": "balanced", "num_layers": 3}
FP16 = {"dtypes": (torch.float16,)}
ANY_V = ((1, 64, 1, 64),)

UNMET: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "device": ({"device": "cuda"}, {}, {}, {}, "it runs on cuda, the memory is on cpu"),
    "dtype": (FP16, {}, {}, {}, "it takes torch.float16, not torch.float32"),
    "head-too-large": ({}, {"head_dim": 72}, {}, {}, "heads of up to 64 in multiples of 8, not 72"),
    "head-multiple": ({}, {"head_dim": 20}, {}, {}, "heads of up to 64 in multiples of 8, not 20"),
    "latent": ({}, {"v_head_dim": 0}, {}, {}, "no kernel for a latent"),
    "v-heads": ({}, {"v_head_dim": 8}, {}, {}, "V must have heads of 16 as K has, not 8"),
    "v-heads-too-small": (
        {"v_head_dims": ((16, 16, 9, 64), (17, 64, 1, 64))},
        {"v_head_dim": 8},
        {},
        {},
        "V must have heads of 16 as K has, not 8",
    ),
    "window": ({"window": False}, {}, {"window": 4}, {}, "it has not sliding windows"),
    "softcap": ({}, {}, {"softcap": 1.0}, {}, "it has not a softcap"),
    "sinks": ({}, {}, {"sinks": True}, {}, "it has not sinks"),
    "heads": ({}, {}, {"num_heads": 3}, {}, "3 query heads cannot share 2 heads of K"),
    "equal-strides": (
        {"equal_strides": True, "v_head_dims": ANY_V},
        {"v_head_dim": 8, "order": "layer"},
        {},
        {},
        "K and V must lie in rows of the same size",
    ),
    "whole-rows-of-v": (
        {"whole_rows": True, "v_head_dims": ANY_V},
        {"v_head_dim": 8, "order": "layer"},
        {},
        {"max_seq_len": 65},
        "slots must have as many rows of K as of V",
    ),
    "whole-rows": (
        {"whole_rows": True},
        ROWS_OF_400,
        {},
        {"max_seq_len": 20},
        "a whole number of rows apart; here a slot has 8192 bytes, a row 400: choose "
        "row_padding_bytes or layers_per_row",
    ),
    # A page of 128-byte rows is 32 tokens: slots are 8 pages apart.
    "max-tokens": (
        {"max_tokens": 8 * 256},
        {"order": "layer"},
        {},
        {},
        "numbers tokens up to 2,048, here are 2,048: lower max_sequences or max_seq_len",
    ),
    "max-elements": (
        {"max_elements": 256 * 32 - 1},
        {"order": "layer"},
        {},
        {},
        "offsets up to 8,191 elements in a sequence, here are 8,192: lower max_seq_len, or choose",
    ),
    "max-slot-bytes": (
        {"max_slot_bytes": 256 * 128},
        {"order": "layer"},
        {},
        {},
        "less than 32,768 bytes apart, here they are 32,768: lower max_seq_len, or choose",
    ),
    "heads-with-sinks": (
        {"sinks": True, "max_heads_with_sinks": 2},
        {},
        {"sinks": True},
        {},
        "with sinks it takes up to 2 query heads, not 4",
    ),
    "v-heads-with-sinks": (
        {"sinks": True, "equal_heads_with_sinks": True, "v_head_dims": ANY_V},
        {"v_head_dim": 8},
        {"sinks": True},
        {},
        "with sinks V must have heads of 16 as K has, not 8",
    ),
    "alignment": ({"alignment_bytes": 256}, {"order": "layer"}, {}, {}, "multiples of 256 bytes"),
    "alignment-of-heads": ({"alignment_bytes": 16}, {"head_dim": 18}, {}, {}, "of 16 bytes"),
}


@pytest.mark.parametrize(
    ("needs", "layout", "options", "allocator", "message"), UNMET.values(), ids=UNMET
)
def test_an_unmet_need_is_told(
    needs: dict[str, Any],
    layout: dict[str, Any],
    options: dict[str, Any],
    allocator: dict[str, Any],
    message: str,
) -> None:
    reasons = unmet(needs, layout, options, **allocator)
    assert any(message in reason for reason in reasons), reasons
    assert len(set(reasons)) == len(reasons)


MET: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nothing-special": ({}, {}, {}, {}),
    "largest-head": ({}, {"head_dim": 64}, {}, {}),
    "v-heads": ({"v_head_dims": ANY_V}, {"v_head_dim": 8}, {}, {}),
    "v-heads-of-a-range": ({"v_head_dims": ((16, 16, 8, 8),)}, {"v_head_dim": 8}, {}, {}),
    "window": ({}, {}, {"window": 4}, {}),
    "softcap": ({"softcap": True}, {}, {"softcap": 1.0}, {}),
    "no-softcap": ({}, {}, {"softcap": 0.0}, {}),
    "sinks": ({"sinks": True}, {}, {"sinks": True}, {}),
    "equal-strides-layer": ({"equal_strides": True}, {"order": "layer"}, {}, {}),
    "equal-strides-token": ({"equal_strides": True}, {"order": "token"}, {}, {}),
    "whole-rows": ({"whole_rows": True}, {"order": "token"}, {}, {}),
    # Slots are further apart, so that rows divide them.
    "whole-rows-large": ({"whole_rows": True}, ROWS_OF_400, {}, {"max_seq_len": 400}),
    "max-tokens": ({"max_tokens": 8 * 256 + 1}, {"order": "layer"}, {}, {}),
    "max-elements": ({"max_elements": 256 * 32}, {"order": "layer"}, {}, {}),
    "max-slot-bytes": ({"max_slot_bytes": 256 * 128 + 1}, {"order": "layer"}, {}, {}),
    "heads-with-sinks": ({"sinks": True, "max_heads_with_sinks": 4}, {}, {"sinks": True}, {}),
    "heads-without-sinks": ({"sinks": True, "max_heads_with_sinks": 2}, {}, {}, {}),
    "v-heads-without-sinks": (
        {"sinks": True, "equal_heads_with_sinks": True, "v_head_dims": ANY_V},
        {"v_head_dim": 8},
        {},
        {},
    ),
    "alignment": ({"alignment_bytes": 128}, {"order": "layer", "head_dim": 32}, {}, {}),
}


@pytest.mark.parametrize(("needs", "layout", "options", "allocator"), MET.values(), ids=MET)
def test_needs_that_are_met(
    needs: dict[str, Any],
    layout: dict[str, Any],
    options: dict[str, Any],
    allocator: dict[str, Any],
) -> None:
    assert unmet(needs, layout, options, **allocator) == []


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "fits", "fits_8bit"),
    [
        (64, 512, True, False),
        (64, 80, True, False),
        (48, 64, True, True),
        (64, 520, False, False),
        (128, 64, False, False),
        (192, 128, True, True),
        (192, 96, False, False),
    ],
)
def test_flash_attention_3_is_told_which_heads_of_v_it_has(k_dim, v_dim, fits, fits_8bit) -> None:
    needs = dataclasses.replace(BACKENDS["fa3"].needs, device="cpu")
    for dtype, expected in ((torch.bfloat16, fits), (torch.float8_e4m3fn, fits_8bit)):
        layout = make_layout(head_dim=k_dim, v_head_dim=v_dim, dtype=dtype)
        with make(layout) as kv:
            assert (needs.unmet_by(kv, OPTIONS) == []) is expected


def test_all_unmet_needs_are_told_at_once() -> None:
    reasons = unmet(
        {"window": False, "max_tokens": 1} | FP16,
        {"head_dim": 68},
        {"window": 2, "softcap": 1.0, "sinks": True, "num_heads": 5},
    )
    assert len(reasons) == 7


@pytest.mark.parametrize("name", BACKENDS)
def test_every_limit_is_held_where_addresses_really_exceed_it(name: str) -> None:
    """Address space is free: the limits of real backends, over real reservations."""
    needs = dataclasses.replace(BACKENDS[name].needs, device="cpu", capabilities=None)
    layout = va.KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float16)
    rows_in_a_page = HOST_PAGE_BYTES // 16
    cases = []
    for slots in (1, 16):
        if needs.max_tokens is not None:
            most = needs.max_tokens // slots
            cases += [(slots, most, "numbers tokens", True)]
            cases += [(slots, most - rows_in_a_page, "numbers tokens", False)]
        if needs.max_elements is not None:
            most = needs.max_elements // 8
            cases += [(slots, most + 1, "computes offsets", True)]
            cases += [(slots, most, "computes offsets", False)]
    for slots, most, word, told in cases:
        with make(layout, max_sequences=slots, max_seq_len=most) as kv:
            reasons = needs.unmet_by(kv, Options(num_heads=1))
            assert any(word in reason for reason in reasons) is told, reasons


def test_the_first_and_the_last_layer_are_looked_at() -> None:
    """The last row has fewer layers: here a page is a whole number of the others, not of it."""
    layout = make_layout(num_layers=7, layers_per_row=4, order="balanced")
    needs = dataclasses.replace(NEEDS, whole_rows=True)
    with make(layout, max_seq_len=8) as kv:
        (reason,) = needs.unmet_by(kv, OPTIONS)
        assert "here a slot has 4096 bytes, a row 384" in reason
    with make(dataclasses.replace(layout, num_layers=4), max_seq_len=8) as kv:
        assert needs.unmet_by(kv, OPTIONS) == []


def test_tail_slack_is_needed_unless_tensors_end_at_lengths() -> None:
    needs = dataclasses.replace(NEEDS, tail_slack_tokens=32)
    for slack, ok in ((0, False), (31, False), (32, True), (64, True)):
        with make(tail_slack_tokens=slack) as kv:
            reasons = needs.slack_unmet_by(kv, exact=False)
            assert (reasons == []) is ok
            if not ok:
                assert f"only {slack} are mapped" in reasons[0]
                assert "tail_slack_tokens=32" in reasons[0]
            assert needs.slack_unmet_by(kv, exact=True) == []


def test_tail_slack_depends_on_the_width_of_the_dtype() -> None:
    needs = dataclasses.replace(NEEDS, tail_slack_tokens=32, tail_slack_tokens_8bit=48)
    narrow = dataclasses.replace(needs, dtypes=(torch.float8_e4m3fn,))
    assert needs.tail_slack_of(torch.float32) == needs.tail_slack_of(torch.float16) == 32
    assert narrow.tail_slack_of(torch.float8_e4m3fn) == 48
    assert dataclasses.replace(needs, tail_slack_tokens_8bit=0).tail_slack_of(torch.int8) == 32
    for slack, ok in ((47, False), (48, True)):
        with make(make_layout(dtype=torch.float8_e4m3fn), tail_slack_tokens=slack) as kv:
            assert (needs.slack_unmet_by(kv, exact=False) == []) is ok


def test_slack_for_what_is_installed(fakes) -> None:
    fakes(
        tiles=dataclasses.replace(NEEDS, tail_slack_tokens=32, tail_slack_tokens_8bit=48),
        longer=dataclasses.replace(NEEDS, tail_slack_tokens=64, front_slack_tokens=40, **FP16),
        other=dataclasses.replace(NEEDS, tail_slack_tokens=99, front_slack_tokens=7, device="cuda"),
        plain=NEEDS,
    )
    assert tail_slack_tokens(torch.float32, "cpu") == 32
    assert tail_slack_tokens(torch.float16, "cpu") == 64
    assert tail_slack_tokens(torch.float32, "cuda") == 99
    assert tail_slack_tokens(torch.float32, "cpu", "plain") == 0
    assert tail_slack_tokens(torch.float32, "cpu", "other") == 0  # of no use there
    assert front_slack_tokens("cpu") == 40
    assert front_slack_tokens("cpu", "plain") == 0
    assert front_slack_tokens() == 7
    with pytest.raises(va.ConfigError, match="backend must be"):
        tail_slack_tokens(backend="none")
    for no_device in ("meta", "mps", "gpu", 3.5):
        with pytest.raises(va.ConfigError, match="device must be 'cuda'"):
            front_slack_tokens(no_device)
    for no_dtype in ("cpu", "float16", None):
        with pytest.raises(va.ConfigError, match="dtype must be a torch.dtype"):
            tail_slack_tokens(no_dtype)


def test_a_finite_tail_needs_a_pool_that_is_cleared() -> None:
    needs = dataclasses.replace(NEEDS, finite_tail=True)
    with make(zero=False) as kv:
        reasons = needs.slack_unmet_by(kv, exact=False)
        assert len(reasons) == 1 and "zero=True" in reasons[0]
        assert NEEDS.slack_unmet_by(kv, exact=False) == []
    with make(zero=True) as kv:
        assert needs.slack_unmet_by(kv, exact=False) == []


def test_even_rows_are_told_from_ragged_ones(kv: va.KVAllocator) -> None:
    """FlashAttention-3 has faster kernels for rows of one length, that of the tensor."""
    first, second, third = (kv.allocate(n) for n in (9, 9, 8))

    def is_even(rows: dict[va.Sequence, int], length: int = 9, **options: Any) -> bool:
        batch = Batch(kv, 2, 18, **options)
        batch.fill(rows)
        return flash_attn_3._are_even(batch, length)

    assert is_even({first: 9})
    assert is_even({first: 2, second: 2})
    assert not is_even({first: 2, second: 2}, length=10)  # the tensor is longer
    assert not is_even({first: 2, second: 3})
    assert not is_even({first: 2, third: 2})
    assert not is_even({first: 1, second: 1})
    assert not is_even({first: 2, second: 2}, graph=True)
    batch = Batch.of({first: 2, second: 2})
    batch.host_lengths = None
    assert not flash_attn_3._are_even(batch, 9)


def test_a_package_that_cannot_be_imported_is_told(monkeypatch, tmp_path) -> None:
    """Whatever it raises: built for another torch, say, or for other kernels than are there."""
    for name in ("flashinfer", "flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('unfit')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "flashinfer-python cannot be imported: RuntimeError: unfit" in (
        BACKENDS["flashinfer"].missing() or ""
    )
    assert "flash_attn cannot be imported: RuntimeError: unfit" in (BACKENDS["fa2"].missing() or "")


# ---- which backend a batch gets ----


class _Named(Backend):
    """Writes its name down, and computes nothing."""

    calls: list[str]

    @classmethod
    def missing(cls) -> str | None:
        return None

    @property
    def version(self) -> str:
        return "1"

    def attend(self, q, k, v, batch, *, sinks, scales):
        self.calls.append(self.name)
        self.shapes.append(k.shape)
        return q


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Puts backends of these needs in the place of all others; returns the names of their calls."""

    def put(**needs: Needs) -> list[str]:
        calls: list[str] = []
        named = {
            name: type(
                name, (_Named,), {"name": name, "needs": its, "calls": calls, "shapes": shapes}
            )
            for name, its in needs.items()
        }
        for module in (choice, sys.modules[attend.__module__]):
            monkeypatch.setattr(module, "BACKENDS", named)
        return calls

    shapes: list[torch.Size] = []
    put.shapes = shapes
    return put


def test_auto_takes_the_first_that_fits_the_batch(kv: va.KVAllocator, fakes) -> None:
    calls = fakes(
        other=dataclasses.replace(NEEDS, device="cuda"),
        half=dataclasses.replace(NEEDS, **FP16),
        tiles=dataclasses.replace(NEEDS, tail_slack_tokens=256),
        plain=NEEDS,
    )
    first, second, third = (kv.allocate(n) for n in (9, 9, 8))
    attention = Attention(kv, OPTIONS)
    assert repr(attention) == "Attention('auto': tiles, plain)"
    q = torch.ones(2, 4, 16)
    batch = Batch(kv, 2)
    for rows, name in (
        ({first: 1, second: 1}, "tiles"),  # the tensor ends at their length
        ({first: 1, third: 1}, "plain"),
        ({first: 1, second: 1}, "tiles"),
    ):
        batch.fill(rows)
        attention(q, 0, batch)
        assert calls.pop() == name
        assert fakes.shapes.pop()[1] == 9
    # Padding beside them reads nothing; a bound above the length is not where the tensor ends.
    batch.fill_rows([first.slot, third.slot], [9, 0])
    assert attention.backend_for(batch).name == "tiles"
    batch.fill_rows([first.slot, second.slot], [9, 9], max_length=10)
    assert attention.backend_for(batch).name == "plain"
    # A graph is replayed with other lengths.
    batch = Batch(kv, 2, graph=True)
    batch.fill({first: 1, second: 1})
    assert attention.backend_for(batch).name == "plain"


def test_a_batch_that_no_backend_fits_is_refused_with_reasons(kv: va.KVAllocator, fakes) -> None:
    fakes(
        tiles=dataclasses.replace(NEEDS, tail_slack_tokens=256),
        plans=dataclasses.replace(NEEDS, graph_safe=False, host_lengths=True),
    )
    batch = Batch.of({kv.allocate(9): 1, kv.allocate(8): 1})
    attention = Attention(kv, OPTIONS)
    assert attention.backend_for(batch).name == "plans"
    captured = Batch(kv, 2, graph=True)
    captured.fill_rows(batch.host_slots, [9, 8])
    with pytest.raises(va.ConfigError) as refused:
        attention.backend_for(captured)
    assert "tiles: it loads up to 256 tokens behind a length" in str(refused.value)
    assert "plans: it plans for the lengths at hand" in str(refused.value)
    batch.host_lengths = None
    batch.touch()
    with pytest.raises(va.ConfigError, match="plans: it plans on the host"):
        attention.backend_for(batch)
    with pytest.raises(va.ConfigError, match="make the KVAllocator with tail_slack_tokens=256"):
        attend(torch.ones(2, 4, 16), kv, 0, batch, backend="tiles")


def test_a_graph_prefers_what_divides_its_work_by_lengths(kv: va.KVAllocator, fakes) -> None:
    even = dataclasses.replace(NEEDS, splits_by_capacity=True)
    fakes(even=even, plans=dataclasses.replace(NEEDS, graph_safe=False), plain=NEEDS)
    attention = Attention(kv, OPTIONS)
    assert not attention.is_bound_by_capacity
    seq = kv.allocate(9)
    for graph, name in ((False, "even"), (True, "plain")):
        batch = Batch(kv, 1, graph=graph)
        batch.fill({seq: 1})
        assert attention.backend_for(batch).name == name
    fakes(even=even, plans=dataclasses.replace(NEEDS, graph_safe=False))
    attention = Attention(kv, OPTIONS)
    assert attention.is_bound_by_capacity
    assert attention.backend_for(batch).name == "even"


def test_a_pool_that_is_not_cleared_is_refused_where_tails_must_be_finite(fakes) -> None:
    fakes(tiles=dataclasses.replace(NEEDS, finite_tail=True))
    kv = make(zero=False)
    batch = Batch.of({kv.allocate(9): 1, kv.allocate(8): 1})
    with pytest.raises(va.ConfigError, match="make the Pool with zero=True"):
        attend(torch.ones(2, 4, 16), kv, 0, batch)


CUDA = torch.device("cuda", 0)
SHAPES = [
    {"phase": "decode", "rows": 32, "length": 4_096, "us": {"fa2": 1.0, "fa3": 2.0}},
    # Less apart than one kernel's times are.
    {
        "phase": "decode",
        "rows": 9_000,
        "length": 10**7,
        "us": {"fa2": 1.0, "fa3": 1.009, "fa3_fwd": 2},
    },
    {"phase": "decode", "rows": 1, "length": 131_072, "us": {"fa2": 9.0, "fa3": 8.0}},
    {"phase": "prefill", "rows": 1, "length": 32_768, "us": {"torch_flash": 5.0, "fa3": 4.0}},
]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_shapes", lambda index: SHAPES)


@pytest.mark.parametrize(
    ("names", "batch", "wanted"),
    [
        # The nearest shape, in the ratio of rows and of lengths.
        (["fa2", "fa3"], (True, 32, 4_096), "fa2"),
        (["fa3", "fa2"], (True, 64, 10_000), "fa2"),
        (["fa2", "fa3"], (True, 2, 65_536), "fa3"),
        (["fa2", "fa3"], (True, 1, 1_000), "fa2"),  # 32 x 4.1 from the one, 131 from the other
        (["fa2", "fa3"], (True, 1, 0), "fa2"),
        (["fa2", "fa3", "fa3_fwd"], (True, 9_000, 10**7), "fa3"),
        (["fa2", "fa3_fwd"], (True, 9_000, 10**7), "fa2"),
        # Only those that can run.
        (["fa3"], (True, 32, 4_096), "fa3"),
        (["fa3", "torch_flash"], (True, 32, 4_096), "fa3"),
        # What was not measured comes last, in the order of BACKENDS.
        (["fa3_vllm", "fa3", "fa2"], (True, 32, 4_096), "fa2"),
        (["torch_flash", "fa3_vllm"], (True, 32, 4_096), "fa3_vllm"),
        # The phases have shapes of their own.
        (["fa2", "fa3", "torch_flash"], (False, 32, 4_096), "fa3"),
        (["fa2", "torch_flash"], (False, 32, 4_096), "torch_flash"),
    ],
)
def test_the_fastest_where_it_was_measured(
    measured: None, names: list[str], batch: tuple[bool, int, int], wanted: str
) -> None:
    decode, rows, length = batch
    for some in itertools.permutations(names):
        assert choice.fastest(some, CUDA, decode=decode, rows=rows, length=length) == wanted


def test_without_measurements_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choice, "_shapes", lambda index: [s for s in SHAPES if s["phase"] == "decode"]
    )
    names = list(BACKENDS)[::-1]
    for device, decode in ((CUDA, False), (torch.device("cpu"), True)):
        got = choice.fastest(names, device, decode=decode, rows=1, length=1)
        assert got == names[-1]


def test_measurements_are_of_the_device_or_one_of_its_capability(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    devices = [
        {"name": "old", "capability": [8, 0], "shapes": [{"at": "old"}]},
        {"name": "alike", "capability": [9, 0], "shapes": [{"at": "alike"}]},
        {"name": "mine", "capability": [9, 0], "shapes": [{"at": "mine"}]},
    ]
    (tmp_path / "measured.json").write_text(json.dumps({"devices": devices}))
    monkeypatch.setattr(choice.resources, "files", lambda package: tmp_path)
    for name, capability, wanted in (
        ("mine", (9, 0), [{"at": "mine"}]),
        ("new", (9, 0), [{"at": "alike"}]),
        ("new", (12, 0), []),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index, name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        assert choice._shapes.__wrapped__(0) == wanted


def test_the_table_that_is_shipped_names_backends_and_shapes() -> None:
    text = choice.resources.files("vattention.attention").joinpath("measured.json").read_text()
    for device in json.loads(text)["devices"]:
        assert isinstance(device["name"], str)
        assert len(device["capability"]) == 2
        for shape in device["shapes"]:
            assert shape["phase"] in ("decode", "prefill")
            assert shape["rows"] >= 1 and shape["length"] >= 1
            assert set(shape["us"]) <= set(BACKENDS)
            assert all(us > 0 for us in shape["us"].values())


def test_options_are_values() -> None:
    assert Options(num_heads=4) == Options(num_heads=4, causal=True, window=None)
    assert hash(Options(num_heads=4)) == hash(Options(num_heads=4))
    options = Options(
        num_heads=np.int64(4), window=np.uint64(8), softcap=np.float32(2), scale=np.int32(1)
    )
    kept = (options.num_heads, options.window, options.softcap, options.scale)
    assert kept == (4, 8, 2.0, 1.0)
    assert [type(value) for value in kept] == [int, int, float, float]
    for given, message in (
        ({"num_heads": 0}, "num_heads must be"),
        ({"num_heads": 4, "window": 2**31}, "window must be"),
        ({"num_heads": 4, "window": 1.5}, "window must be"),
    ):
        with pytest.raises(va.ConfigError, match=message):
            Options(**given)
