"""The cases of one backend of `vattention.attention`, for test_attention_tails.py.

    python attend_by_backend.py BACKEND.GROUP     all cases of a group, one after the other
    python attend_by_backend.py missing           which backends cannot be used here, as JSON

Every backend has the same cases, as far as its needs say that it can compute them. What lies behind
a length is hostile: nothing but guard pages where no slack is needed, and NaN, or large numbers
where they must be finite, in the rest of the last page. A kernel that reads what is not mapped
takes its CUDA context with it, so it ends the process; what was found until then is printed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attend_in_a_process import (
    ABOUT_TO_FAULT,
    DEVICE,
    FAILED,
    FAULTED,
    PASSED,
    SKIPPED,
    Filled,
    Unsupported,
    WrongAnswer,
    about_pages,
    expect_attention,
    is_fault,
    make_pool,
    ragged,
    require,
    synchronize,
)

import vattention as va
from vattention.attention import BACKENDS, Batch, Needs, Options, Rope, Scales, append, attend

FLOAT8 = torch.float8_e4m3fn
BEYOND = "beyond"

NOT_BUILT = re.compile(
    r"(not|n't|only|no longer) (been |be )?(support|built|compiled|implemented|available|enabled)"
    r"|unsupported|no kernel|disabled",
    re.IGNORECASE,
)


def make_layout(dtype: torch.dtype, **changes: Any) -> va.KVLayout:
    """8 heads of 128 in two layers, unless told otherwise."""
    given = {"num_layers": 2, "num_kv_heads": 8, "head_dim": 128, "dtype": dtype, "order": "token"}
    return va.KVLayout(**(given | changes))


def about_pages_and_tiles(page_tokens: int) -> list[int]:
    return [*about_pages(page_tokens), 127, 128, 129, 255, 256, 257]


def about_slack(page_tokens: int, slack: int) -> list[int]:
    """Lengths behind which slack ends where a page does, and on both sides of them."""
    last = -slack % page_tokens
    return [last + page_tokens, last + 1, last + page_tokens - 1]


def few(page_tokens: int) -> list[int]:
    return [page_tokens + 1, 0, 257, 1, page_tokens, 128, 600]


def fill(name: str, layout: va.KVLayout, **options: Any) -> Filled:
    """Sequences with as much mapped behind them as the backend needs, and no more."""
    needs = BACKENDS[name].needs
    large = 256.0 if layout.itemsize == 1 else 1e4
    slack = needs.tail_slack_of(layout.dtype)
    settings = {
        "slack_tokens": slack,
        "tails": large if needs.finite_tail else float("nan"),
    }
    if slack and options.get("lengths") is about_pages_and_tiles:
        options["lengths"] = lambda page_tokens: (
            about_pages_and_tiles(page_tokens) + about_slack(page_tokens, slack)
        )
    filled = Filled(layout, **(settings | options))
    if filled.kv.tail_slack_tokens >= filled.page_tokens:
        guarded = {slot for slot, *_, access in filled.kv.mappings() if access == "read"}
        shortest = min((seq for seq in filled.sequences if seq.length), key=lambda seq: seq.length)
        require(shortest.slot in guarded, "a short sequence has no guard")
    return filled


# ---- calls ----


@contextlib.contextmanager
def if_built() -> Iterator[None]:
    """Raises Unsupported where a kernel says that it was not built for such a shape."""
    try:
        yield
    except RuntimeError as error:
        ours = isinstance(error, va.VAttentionError)
        if ours or is_fault(error) or not NOT_BUILT.search(str(error)):
            raise
        raise Unsupported(str(error).strip().splitlines()[0]) from error


def call(name: str, *given: Any, **how: Any) -> torch.Tensor:
    """`attend`, and nothing is running any more."""
    with if_built():
        output = attend(*given, backend=name, **how)
    synchronize()  # a fault shows here, and not in the next call
    return output


Row = tuple[va.Sequence | None, int]
"""A sequence, and how many queries; None: padding, in a slot without memory."""


def attend_rows(
    name: str,
    filled: Filled,
    rows: list[Row],
    *,
    layers: tuple[int, ...] = (0,),
    group: int = 4,
    causal: bool = True,
    scaled: bool = False,
    sinks: bool = False,
    **how: Any,
) -> None:
    """One batch, for one layer after another as a model does; and every row of it compared.

    Args:
        name: of the backend.
        filled: the sequences.
        rows: of the batch.
        layers: of those that were written.
        group: query heads for each head of K.
        causal: as for `attend`.
        scaled: whether 8-bit floats have scales.
        sinks: whether heads have sinks, in bfloat16.
        how: as for `attend`, and as for `attention`, which says what is right.
    """
    kv, layout = filled.kv, filled.kv.layout
    counts = [n for _, n in rows]
    slots = [filled.unused_slot if seq is None else seq.slot for seq, _ in rows]
    lengths = [0 if seq is None else seq.length for seq, _ in rows]
    heads = group * layout.num_kv_heads
    options = f"{causal=}, {how}, {scaled=}, {sinks=}"
    what = f"{heads} heads, {options}, {counts} queries of {lengths}"
    print(what, flush=True)
    if sinks:
        how["sinks"] = torch.linspace(-2, 3, heads, device=DEVICE).bfloat16()
    scales, factors = None, torch.ones(3, len(rows), layout.num_kv_heads, device=DEVICE)
    if scaled:
        factors = torch.rand(factors.shape, device=DEVICE) + 0.5
        scales = Scales(q=factors[0], k=factors[1], v=factors[2])
    batch = Batch(kv, len(rows), sum(counts))
    batch.fill_rows(slots, lengths, counts)
    for layer in layers:
        q = filled.normal(sum(counts), heads, layout.head_dim).to(layout.dtype)
        output = call(name, q, kv, layer, batch, causal=causal, scales=scales, **how)
        parts = zip(rows, output.split(counts), q.split(counts), strict=True)
        for i, ((seq, _), part, query) in enumerate(parts):
            where = f"{what}: layer {layer}, row {i}, {seq}"
            if seq is None or seq.length == 0:
                require(not part.any(), f"{where} is padding, its output is not zero")
                continue
            keys, values = filled.written(layer, seq)
            if scaled:
                of_q, of_k, of_v = factors[:, i, :, None]
                query = query.float() * of_q.repeat_interleave(group, 0)
                keys, values = keys.float() * of_k, values.float() * of_v
            expect_attention(part, query, keys, values, causal, where, dtype=layout.dtype, **how)


def with_padding(rows: list[Row]) -> list[Row]:
    """Padding before, between and behind."""
    padded: list[Row] = [(None, 1)]
    for i, row in enumerate(rows):
        padded += [row, (None, 1)] if i % 3 == 2 else [row]
    return [*padded, (None, 1)]


def batches(filled: Filled, each: bool) -> Iterator[list[Row]]:
    """Decode, prefill and both, in several orders of slots; and each sequence by itself."""
    everyone = filled.sequences
    shuffled = random.Random(1).sample(everyone, len(everyone))
    for some in (everyone, everyone[::-1]):
        yield [(seq, 1) for seq in some]
    yield with_padding([(seq, 1) for seq in shuffled])
    yield [(seq, ragged(seq)) for seq in everyone]
    yield [(seq, ragged(seq)) for seq in shuffled]
    yield with_padding([(seq, 1 if i % 2 else ragged(seq)) for i, seq in enumerate(shuffled)])
    for seq in everyone if each else ():
        yield [(seq, 1)]
        yield [(seq, min(max(seq.length, 1), 300))]


def everything(
    name: str,
    layout: va.KVLayout,
    groups: tuple[int, ...] = (4,),
    *,
    lengths: Callable[[int], list[int]] = about_pages_and_tiles,
    each: bool = True,
    **how: Any,
) -> None:
    """All batches, over the first and the last layer."""
    filled = fill(name, layout, lengths=lengths)
    for group in groups:
        for rows in batches(filled, each):
            attend_rows(name, filled, rows, layers=tuple(filled.layers), group=group, **how)
    filled.expect_what_was_written()


# ---- cases ----


def trimmed(name: str, layout: va.KVLayout, front_tokens: int) -> None:
    """Memory below the window is gone; where pages and tiles end together, right up to it.

    Kernels with windows begin with the tile that holds the first token of the window. Where pages
    do not end where tiles do, `front_tokens` must stay mapped below it.
    """
    window = 100
    filled = fill(
        name, layout, lengths=lambda _: [1_900, 3, 1_333], max_extent=make_pool().page_bytes
    )
    first, short, third = filled.sequences
    before = len(filled.kv.mappings())
    for queries in (200, 1):
        for seq in (first, third):
            seq.trim_front(max(seq.length - queries - window + 1 - front_tokens, 0))
        synchronize()
        filled.kv.pool.reclaim()
        require(len(filled.kv.mappings()) < before, "nothing was unmapped")
        before = len(filled.kv.mappings())
        rows: list[Row] = [(third, queries), (short, 1), (first, queries)]
        for some in (rows, rows[:1]):
            attend_rows(name, filled, some, layers=tuple(filled.layers), window=window)


def exact(name: str, layout: va.KVLayout) -> None:
    """Without slack: the tensor ends where all sequences do, or else it is refused."""
    needs = BACKENDS[name].needs
    for length in (1, 200, 257, 1_024):
        filled = fill(name, layout, lengths=lambda _, n=length: [n] * 3, slack_tokens=0)
        rows: list[Row] = [(seq, 1) for seq in filled.sequences]
        attend_rows(name, filled, rows)
        attend_rows(name, filled, with_padding(rows))
        attend_rows(name, filled, [(seq, min(length, 130)) for seq in filled.sequences])
    filled = fill(name, layout, slack_tokens=0)
    try:
        attend_rows(name, filled, [(seq, 1) for seq in filled.sequences])
    except va.ConfigError as refused:
        told = f"tail_slack_tokens={needs.tail_slack_of(layout.dtype)}"
        require(told in str(refused), f"the message does not say what to do: {refused}")
    else:
        raise WrongAnswer("lengths that differ were not refused, though nothing is behind them")


def limit(name: str, layout: va.KVLayout, tokens: int, words: str) -> None:
    """Addresses from a limit on are refused; below it the last slot has right answers."""
    slots, needs, heads = 4, BACKENDS[name].needs, 4 * layout.num_kv_heads
    if needs.max_elements is not None:  # sequences must be short enough for that
        row = layout.row_bytes[0] // layout.itemsize
        slots = max(slots, -(-tokens * row // needs.max_elements))
    make = functools.partial(
        va.KVAllocator,
        layout,
        max_sequences=slots,
        pool=make_pool(),
        lookahead_tokens=0,
        tail_slack_tokens=needs.tail_slack_of(layout.dtype),
    )
    row_bytes = layout.row_bytes[0] + layout.row_bytes[1]
    for most in (tokens // slots, 2**46 // row_bytes // slots - 2**20):  # the other is 64 TiB
        with make(max_seq_len=most) as kv:
            one = kv.allocate(1)
            q = torch.zeros(1, heads, layout.head_dim, device=DEVICE, dtype=layout.dtype)
            try:
                attend(q, kv, 0, {one: 1}, backend=name)
            except va.ConfigError as refused:
                print(f"{most:,} tokens a slot: {refused}", flush=True)
                require(words in str(refused), f"the limit is not named: {refused}")
                require("max_seq_len" in str(refused), f"it is not said what to do: {refused}")
            else:
                raise WrongAnswer(f"{slots} slots of {most:,} tokens were not refused")
    page_tokens = layout.tokens_per_page(make_pool().page_bytes)
    with make(max_seq_len=tokens // slots - 8 * page_tokens) as kv:
        sequences = sorted((kv.allocate(0) for _ in range(slots)), key=lambda seq: seq.slot)
        first, last = sequences[0], sequences[-1]
        kv.step({last: 1_000, first: 3})
        keys, values = kv.layer(0)
        written = {}
        for seq in (first, last):
            shape = seq.length, layout.num_kv_heads, layout.head_dim
            written[seq] = tuple(
                torch.randn(shape, device=DEVICE).to(layout.dtype) for _ in range(2)
            )
            keys[seq.slot, : seq.length], values[seq.slot, : seq.length] = written[seq]
        for rows in ({last: 1}, {last: 1, first: 1}, {first: 3, last: 200}, {last: 1_000}):
            q = torch.randn(sum(rows.values()), heads, layout.head_dim, device=DEVICE)
            q = q.to(layout.dtype)
            output = call(name, q, kv, 0, Batch.of(rows))
            for seq, part, query in zip(
                rows, output.split([*rows.values()]), q.split([*rows.values()]), strict=True
            ):
                what = f"below the limit, {rows}: {seq}"
                expect_attention(part, query, *written[seq], True, what)


def limit_in_a_sequence(name: str, layout: va.KVLayout, elements: int) -> None:
    """Rows so far apart that a sequence's last is beyond a limit are refused; up to it, right."""
    most = elements * layout.itemsize // layout.row_bytes[0]
    heads, pool = 4 * layout.num_kv_heads, va.Pool("8GiB", DEVICE, background=False)
    with va.KVAllocator(layout, max_sequences=1, max_seq_len=most + 1, pool=pool) as kv:
        q = torch.zeros(1, heads, layout.head_dim, device=DEVICE, dtype=layout.dtype)
        try:
            attend(q, kv, 0, {kv.allocate(1): 1}, backend=name)
        except va.ConfigError as refused:
            require("elements in a sequence" in str(refused), f"not the limit: {refused}")
            require("max_seq_len" in str(refused), f"it is not said what to do: {refused}")
        else:
            raise WrongAnswer(f"{most + 1:,} tokens a slot were not refused")
    generator = torch.Generator(DEVICE).manual_seed(1)
    layer = layout.num_layers - 1
    with va.KVAllocator(layout, max_sequences=1, max_seq_len=most, pool=pool) as kv:
        seq = kv.allocate(most)
        shape = most, layout.num_kv_heads, layout.head_dim
        written = [
            torch.randn(shape, device=DEVICE, generator=generator).to(layout.dtype)
            for _ in range(2)
        ]
        for tensor, values in zip(kv.layer(layer), written, strict=True):
            tensor[seq.slot] = values
        for queries in (1, 70):
            q = torch.randn(queries, heads, layout.head_dim, device=DEVICE, generator=generator)
            q = q.to(layout.dtype)
            output = call(name, q, kv, layer, Batch.of({seq: queries}))
            what = f"{queries} queries at the end of {most:,} tokens"
            expect_attention(output, q, *written, True, what)


class Graph:
    """A step of decode as a CUDA graph: lengths advance, K and V are written, attention."""

    def __init__(self, name: str, filled: Filled, batch: Batch, group: int) -> None:
        self.name, self.filled, self.batch = name, filled, batch
        kv, layout, rows = filled.kv, filled.kv.layout, batch.num_rows

        def zeros(heads: int, dim: int) -> torch.Tensor:
            shape = len(filled.layers), rows, heads, dim
            return torch.zeros(shape, dtype=layout.dtype, device=DEVICE)

        self.q = zeros(group * layout.num_kv_heads, layout.head_dim)
        self.k = zeros(layout.num_kv_heads, layout.head_dim)
        self.v = zeros(layout.num_kv_heads, layout.v_dim)
        self.out = zeros(group * layout.num_kv_heads, layout.v_dim)
        positions = torch.arange(kv.max_seq_len, device=DEVICE)[:, None]
        angles = positions * 100.0 ** -torch.linspace(0, 1, layout.head_dim // 4, device=DEVICE)
        self.rope = Rope(cos=angles.cos().contiguous(), sin=angles.sin().contiguous())
        self._graph: torch.cuda.CUDAGraph | None = None

    def _step(self) -> None:
        self.batch.advance()
        if DEVICE == "cpu":
            self.batch.note_advance()
        for i, layer in enumerate(self.filled.layers):
            turned = append(self.k[i], self.v[i], layer, self.batch, rope=self.rope, q=self.q[i])
            assert turned is not None
            self.out[i] = attend(turned, self.filled.kv, layer, self.batch, backend=self.name)

    def capture(self) -> None:
        """Makes a step, and captures another, which is not made."""
        if DEVICE == "cpu":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), if_built():
            self._step()  # what is compiled or loaded at its first use
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.batch.touch()
            self._step()
        self.batch.touch()

    def replay(self, rows: list[va.Sequence | None], what: str) -> None:
        """One step for these sequences, who have a token more now; and every answer compared."""
        filled, kv = self.filled, self.filled.kv
        for tensor in (self.q, self.k, self.v):
            tensor.copy_(filled.normal(*tensor.shape))
        self.out.fill_(float("nan"))
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
            self.batch.note_advance()
        synchronize()
        what = f"{what}: {rows}"
        print(what, flush=True)
        lengths = [0 if seq is None else seq.length for seq in rows]
        require(self.batch.lengths.tolist() == lengths, f"{what}: lengths did not advance")
        require(self.batch.host_lengths == lengths, f"{what}: the host has other lengths")
        for (i, layer), (row, seq) in itertools.product(enumerate(filled.layers), enumerate(rows)):
            out = self.out[i, row]
            if seq is None:
                require(not out.any(), f"{what}: the output of padding is not zero")
                continue
            keys, values = kv.layer(layer)
            end = seq.length - 1
            wanted = turn(self.k[i, row], self.rope, end).float()
            got = keys[seq.slot, end].float()
            eps = 2 * torch.finfo(kv.layout.dtype).eps
            require(torch.allclose(got, wanted, rtol=eps, atol=eps), f"{what}: K of {seq}")
            require(torch.equal(values[seq.slot, end], self.v[i, row]), f"{what}: V of {seq}")
            filled.append(layer, seq, keys[seq.slot, end].clone(), self.v[i, row].clone())
            query = turn(self.q[i, row], self.rope, end)[None]
            written = filled.written(layer, seq)
            expect_attention(out[None], query, *written, True, f"{what}: layer {layer}, {seq}")


def turn(x: torch.Tensor, rope: Rope, position: int) -> torch.Tensor:
    """What RoPE makes of one token's heads, not interleaved."""
    half = rope.cos.shape[1]
    cos, sin = rope.cos[position], rope.sin[position]
    a, b, rest = x[:, :half].float(), x[:, half : 2 * half].float(), x[:, 2 * half :]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def graph(name: str, layout: va.KVLayout, group: int) -> None:
    """Captured once, replayed while the memory under it grows to more than 16 times as much."""
    filled = fill(
        name,
        layout,
        # Less than a page each.
        lengths=lambda page: [1 + page * n // 16 for n in (1, 2, 7, 12, 0)] + [0, page // 3],
        max_pages=32,
    )
    kv, sequences = filled.kv, filled.sequences
    batch = Batch(kv, 6, graph=DEVICE != "cpu")

    def refill(rows: list[va.Sequence | None]) -> None:
        batch.fill_rows(
            [filled.unused_slot if seq is None else seq.slot for seq in rows],
            [0 if seq is None else seq.length for seq in rows],
            max_length=kv.max_seq_len,
        )

    def step(rows: list[va.Sequence | None]) -> None:
        kv.step({seq: seq.length + 1 for seq in rows if seq is not None})

    rows: list[va.Sequence | None] = [*sequences[:5], None]
    refill(rows)
    step(rows)  # for the call that precedes the capture, and writes a token
    at_capture = kv.stats().mapped_bytes
    captured = Graph(name, filled, batch, group)
    captured.capture()
    for seq in sequences[:5]:
        seq.trim(seq.length - 1)
    refill(rows)
    for i in range(3):
        step(rows)
        captured.replay(rows, f"replay {i} over {at_capture >> 20} MiB")
    page = filled.page_tokens
    others = [sequences[6], None, sequences[4], sequences[0], sequences[3], sequences[1]]
    for i, pages in enumerate((2, 9, 24)):
        for j, seq in enumerate(sequences):
            if seq.length:
                filled.extend(seq, pages * page + (-1, 0, 1, 40)[j % 4])
        for again, some in itertools.product(range(2), (rows, others)):
            refill(some)
            step(some)
            mapped = kv.stats().mapped_bytes
            captured.replay(some, f"growth {i}.{again} over {mapped >> 20} MiB")
        step(others)
        captured.replay(others, f"growth {i}: without filling it anew")
    require(mapped > 16 * at_capture, f"{mapped} bytes are not 16 times {at_capture}")
    filled.expect_what_was_written()


def beyond(name: str, layout: va.KVLayout) -> None:
    """Reads one token more than is mapped. It must not come back from that."""
    filled = fill(name, layout, tails=None)
    seq = filled.sequences[about_pages(filled.page_tokens).index(filled.page_tokens)]
    attend_rows(name, filled, [(seq, 1)], layers=(filled.layers[-1],))
    batch = Batch(filled.kv, 1)
    batch.fill_rows([seq.slot], [seq.length + 1])
    q = filled.normal(1, 4 * layout.num_kv_heads, layout.head_dim).to(layout.dtype)
    print(ABOUT_TO_FAULT, flush=True)
    call(name, q, filled.kv, filled.layers[-1], batch)


# ---- append ----


def append_as_on_the_host(
    dtype: torch.dtype,
    new_dtype: torch.dtype,
    *,
    kv_heads: int = 8,
    dim: int = 128,
    v_dim: int | None = None,
    group: int = 4,
    order: str = "token",
    half: int = 0,
    interleaved: bool = False,
    strided: bool = False,
) -> None:
    """What the kernel writes and turns is what torch does on the host, and nothing else is."""
    layout = va.KVLayout(
        num_layers=3,
        num_kv_heads=kv_heads,
        head_dim=dim,
        v_head_dim=v_dim,
        dtype=dtype,
        order=order,
    )
    generator = torch.Generator().manual_seed(1)
    q_heads, lengths, counts = group * kv_heads, [600, 0, 3, 257, 0], [1, 1, 3, 129, 1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    fused = normal(sum(counts), q_heads + 2 * kv_heads, dim).to(new_dtype)
    angles = normal(700, max(half, 1)) * 3
    q, k, v = fused.split([q_heads, kv_heads, kv_heads], dim=1)
    v = v[..., : layout.v_dim]
    before = [
        [normal(length, kv_heads, d).to(dtype) for d in (dim, layout.v_dim)]
        for length in lengths
        for _ in range(layout.num_layers)
    ]
    results: list[list[torch.Tensor]] = []
    turned: list[torch.Tensor] = []
    for device in ("cpu", DEVICE):
        kv = va.KVAllocator(
            layout,
            max_sequences=6,
            max_seq_len=700,
            pool=va.Pool("2GiB", device, background=False),
            lookahead_tokens=0,
        )
        sequences = [kv.allocate(length) for length in lengths]
        # Only these are mapped: a token that is written elsewhere faults.
        filled = iter(before)
        for seq, layer in itertools.product(sequences, range(layout.num_layers)):
            for tensor, values in zip(kv.layer(layer), next(filled), strict=True):
                tensor[seq.slot, : seq.length] = values.to(device)
        batch = Batch(kv, 6, 200)
        order_of_rows = [3, 1, 0, 4, 2]
        batch.fill_rows(
            # The fourth row is padding in a slot that never had memory.
            [5 if i == 4 else sequences[i].slot for i in order_of_rows],
            [lengths[i] for i in order_of_rows],
            [counts[i] for i in order_of_rows],
        )
        there = fused.to(device)
        q, k, v = there.split([q_heads, kv_heads, kv_heads], dim=1)
        v = v[..., : layout.v_dim]
        if not strided:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        rope = None
        if half:
            cos, sin = (f(angles).contiguous().to(device) for f in (torch.cos, torch.sin))
            rope = Rope(cos=cos, sin=sin, interleaved=interleaved)
        result = append(k, v, 1, batch, rope=rope, q=q if half else None)
        require((result is None) == (half == 0), "queries were turned, or not, against orders")
        live = batch.positions() >= 0
        if result is not None:
            turned.append(result[live].cpu())
        results.append(
            [
                tensor[seq.slot, : seq.length].cpu()
                for seq, layer in itertools.product(sequences, range(layout.num_layers))
                for tensor in kv.layer(layer)
            ]
        )
        kv.check()
    eps = max(torch.finfo(x).eps for x in (dtype, new_dtype))
    for i, (want, got) in enumerate(zip(*results, strict=True)):
        is_k_of_layer_1 = i % (2 * layout.num_layers) == 2
        if half and is_k_of_layer_1:
            # Rounded to one type, or first to the other; with a multiplication and addition fused.
            same = torch.allclose(got.float(), want.float(), rtol=eps, atol=eps)
        else:
            same = torch.equal(got.float(), want.float())
        require(same, f"tensor {i} is not as on the host")
    if half:
        eps = torch.finfo(new_dtype).eps
        want, got = (x.float() for x in turned)
        require(torch.allclose(got, want, rtol=eps, atol=eps), "queries are not as on the host")
        rest = torch.equal(got[..., 2 * half :], want[..., 2 * half :])
        require(rest, "what is not to be turned has changed")


def append_cases() -> dict[str, Callable[[], None]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "strided": {"strided": True},
        "strided-layer": {"strided": True, "order": "layer"},
        "rope": {"half": 64},
        "rope-interleaved": {"half": 64, "interleaved": True, "strided": True},
        "rope-partial": {"half": 16, "strided": True, "order": "balanced"},
        "rope-partial-interleaved": {"half": 20, "interleaved": True},
        "odd-heads-96": {"kv_heads": 3, "dim": 96, "half": 48, "group": 3, "strided": True},
        "odd-heads-80": {"kv_heads": 5, "dim": 80, "half": 10, "group": 1, "interleaved": True},
        "one-head-256": {"kv_heads": 1, "dim": 256, "half": 128, "group": 7},
        "unequal-heads": {"dim": 192, "v_dim": 128, "half": 32, "strided": True},
    }
    found: dict[str, Callable[[], None]] = {}
    for name, options in cases.items():
        found[name] = functools.partial(append_as_on_the_host, bf16, bf16, **options)
    for dtype, new in ((fp16, fp16), (fp16, bf16), (bf16, fp32), (fp32, fp32), (fp32, bf16)):
        for half in (0, 32):
            name = f"{'rope-' if half else ''}{str(new)[6:]}-to-{str(dtype)[6:]}"
            found[name] = functools.partial(append_as_on_the_host, dtype, new, half=half)
    for dtype, new in itertools.product((FLOAT8, torch.float8_e5m2), (bf16, fp16, fp32)):
        name = f"{str(new)[6:]}-to-{str(dtype)[6:]}"
        found[name] = functools.partial(append_as_on_the_host, dtype, new, strided=True)
        found[f"rope-{name}"] = functools.partial(append_as_on_the_host, dtype, new, half=64)
    return found


# ---- which cases there are ----


def cases_of(name: str) -> dict[str, dict[str, Callable[[], None]]]:
    """The groups of one backend, each a process, and their cases."""
    needs = BACKENDS[name].needs
    groups: dict[str, dict[str, Callable[[], None]]] = {}
    half_types = [t for t in (torch.bfloat16, torch.float16) if t in needs.dtypes]
    dtype = half_types[0] if half_types else needs.dtypes[0]

    def add(group: str, case: str, run: Callable[..., None], *given: Any, **options: Any) -> None:
        for layout in given:
            if isinstance(layout, va.KVLayout) and not takes(needs, layout):
                return
        run = functools.partial(run, name, *given, **options)
        groups.setdefault(group, {})[case] = run

    # 8,192 bytes a row: 256 tokens fill a page of 2 MiB.
    add("orders", "token", everything, make_layout(dtype), (8,))
    # 2,048 bytes: 1,024 tokens.
    add("orders", "layer", everything, make_layout(dtype, order="layer"), (1, 4))
    # 8,192 bytes for 4 layers' K; the last two have rows of their own.
    add("orders", "balanced", everything, make_layout(dtype, order="balanced", num_layers=6), (4,))
    # 65,536 bytes a row: 32 tokens, so that what a tile holds spans several pages.
    add("orders", "wide", everything, make_layout(dtype, num_layers=16), (1,), each=False)
    if not needs.whole_rows:
        # 12,304 bytes: pages end inside of rows, and slots are not a whole number of rows.
        padded = make_layout(dtype, num_layers=3, row_padding_bytes=16)
        add("orders", "padded", everything, padded, (4,))
    # 6,144 bytes: pages end inside of rows, and slots are a whole number of them.
    add("orders", "uneven", everything, make_layout(dtype, num_kv_heads=6), (4,), each=False)

    for dim, kv_heads, group in ((64, 4, 4), (256, 2, 4), (128, 1, 8), (96, 4, 1), (32, 8, 2)):
        for kind in (*half_types, torch.float32):
            layout = make_layout(kind, num_kv_heads=kv_heads, head_dim=dim)
            case = f"{kv_heads}x{dim}-{str(kind)[6:]}"
            add("heads", case, everything, layout, (group,), each=dim == 64, lengths=few)
    if needs.v_head_dims:
        for dim, v_dim in ((192, 128), (64, 256)):
            layout = make_layout(dtype, num_kv_heads=4, head_dim=dim, v_head_dim=v_dim)
            add("heads", f"k{dim}-v{v_dim}", everything, layout, lengths=few, each=False)

    kinds: dict[str, dict[str, Any]] = {"not-causal": {"causal": False}, "scale": {"scale": 0.2}}
    if needs.window:
        kinds |= {"window": {"window": 100}, "window-of-one": {"window": 1}}
        kinds["window-of-a-tile"] = {"window": 128}
    if needs.softcap:
        kinds["softcap"] = {"softcap": 2.0}
    if needs.window and needs.softcap:
        kinds["window-and-softcap"] = {"window": 33, "softcap": 5.0}
    if needs.sinks:
        kinds["sinks"] = {"sinks": True}
    if needs.sinks and needs.window:
        kinds["sinks-and-window"] = {"sinks": True, "window": 128}
    for case, how in kinds.items():
        add("options", case, everything, make_layout(dtype), (4,), each=False, **how)
    if needs.window:
        add("options", "window-trimmed", trimmed, make_layout(dtype), 0)
        wide = make_layout(dtype, num_layers=16)
        add("options", "window-trimmed-wide", trimmed, wide, needs.front_slack_tokens)
    if needs.tail_slack_tokens:
        add("options", "exact-token", exact, make_layout(dtype))
        add("options", "exact-layer", exact, make_layout(dtype, order="layer"))

    for dim in (128, 64, 256):
        # 8,192 bytes a row.
        layout = make_layout(FLOAT8, num_kv_heads=2048 // dim, head_dim=dim)
        if FLOAT8 in needs.dtypes:
            add("float8", f"{dim}", everything, layout, (4,), each=False)
            add("float8", f"{dim}-scaled", everything, layout, (1,), each=False, scaled=True)
    if FLOAT8 in needs.dtypes:
        layer = make_layout(FLOAT8, order="layer")
        add("float8", "layer-scaled", everything, layer, (8,), scaled=True)

    small = make_layout(dtype, num_layers=1, num_kv_heads=1, order="layer")
    if needs.max_tokens is not None:
        add("graph", "limit-tokens", limit, small, needs.max_tokens, "numbers tokens up to")
    if needs.max_elements is not None:
        # 65,536 elements a row.
        wide = make_layout(dtype, num_layers=32)
        add("graph", "limit-elements", limit_in_a_sequence, wide, needs.max_elements)
    if needs.graph_safe or DEVICE == "cpu":
        add("graph", "token", graph, make_layout(dtype), 4)
        add("graph", "balanced", graph, make_layout(dtype, order="balanced", num_layers=6), 1)

    if needs.tail_slack_tokens == 0:
        add(BEYOND, "token", beyond, make_layout(dtype))
    return groups


def takes(needs: Needs, layout: va.KVLayout) -> bool:
    """Whether the needs say that it computes such heads."""
    largest, multiple = needs.head_dims
    fits = layout.head_dim <= largest and layout.head_dim % multiple == 0
    return fits and layout.dtype in needs.dtypes


NAMES = [name for name, backend in BACKENDS.items() if backend.needs.device == DEVICE]


def all_groups() -> dict[str, dict[str, Callable[[], None]]]:
    """Every process's cases, by `BACKEND.GROUP`."""
    groups = {"append.cases": append_cases()}
    for name in NAMES:
        groups |= {f"{name}.{group}": cases for group, cases in cases_of(name).items()}
    return groups


# ---- a process ----


def why_not(name: str) -> str | None:
    """Why a backend cannot be used on this machine at all."""
    backend = BACKENDS[name]
    if missing := backend.missing():
        return " ".join(missing.split())
    # Any layout will do.
    layout = make_layout(backend.needs.dtypes[0])
    with va.KVAllocator(layout, max_sequences=1, max_seq_len=1, pool=make_pool()) as kv:
        reasons = backend.needs.unmet_by(kv, Options(num_heads=8))
    return "; ".join(why for why in reasons if "compute capability" in why) or None


def run_all(group: str) -> int:
    """Runs a group's cases; the last line about each begins with ``==``, its name, and a verdict.

    Returns:
        How the process should exit.
    """
    ended = PASSED
    for case, run in all_groups()[group].items():
        print(f">> {case}", flush=True)
        try:
            run()
        except Unsupported as why:
            print(f"== {case} skipped: {' '.join(str(why).split())}", flush=True)
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            fault = is_fault(error)
            print(f"== {case} {'faulted' if fault else 'failed'}", flush=True)
            if fault:
                return FAULTED
            ended = FAILED
        else:
            print(f"== {case} passed", flush=True)
    return ended


def main() -> int:
    asked = sys.argv[1]
    if asked == "missing":
        print(json.dumps({name: why for name in NAMES if (why := why_not(name))}))
        return PASSED
    name = asked.split(".")[0]
    if name in BACKENDS and (why := why_not(name)):
        print(f"skipped: {why}", flush=True)
        return SKIPPED
    torch.manual_seed(1)  # each run of a group is the same
    with torch.no_grad():
        return run_all(asked)


if __name__ == "__main__":
    sys.exit(main())
