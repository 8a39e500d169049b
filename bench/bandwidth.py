"""Whether kernels read our tensors as fast as packed ones.

Each variant is timed against the same bytes in packed tensors [batch, length, heads, dim], in turn,
by the same kernels, none of which knows of us:

- read: adds up K and V of all tokens of one layer, which is nothing but reading them;
- attention kernels in decode, one query a sequence, over K and V of one layer.

Both rotate over several layers. packed, a second copy: what the comparison itself scatters.
`2 MiB extents` are mapped in the order in which they were created; `shuffled`: in random order.
Slots have addresses for twice the length; what is handed over ends at the length. Before they are
timed, all outputs are compared with the packed ones', and those with a reference.

relative: the bandwidth over the packed one's, of the pairs. The floor is the bytes of K and V over
the faster of a copy (bytes read and written) and of reading two packed tensors end to end.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import vattention as va
from vattention.pool import MAX_EXTENT_BYTES

from .common import (
    GIB,
    MIB,
    Context,
    alternate,
    describe_layout,
    heading,
    in_turn,
    llama3_8b,
    measure_bandwidth,
    print_table,
    quantile,
    release_cache,
    show_bytes,
    small,
    summarize,
    time_device_us,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# The path of a library that defines torch.ops._vllm_fa3_C.fwd, FlashAttention-3 as vLLM builds it.
FA3_LIBRARY = "VATTENTION_FA3"
LAYERS = 4  # rotated over: several times the L2 in any shape
GROUP = 4  # query heads of one KV head
CONTROL = "packed, a second copy"

Call = Callable[[], torch.Tensor]


def run(context: Context) -> dict[str, object]:
    floors = measure_bandwidth(context)
    kernels, absent = _kernels(context)
    floors["read_bytes_per_s"] = measure_read(context, kernels[0])
    release_cache(context)
    variants = _variants(context)
    # Twice such a length is a whole number of padded rows in a whole number of pages.
    shapes = context.pick(
        [(32, 4_096), (8, 32_768), (128, 1_024), (1, 131_072)],
        [(4, 512), (1, 1_024)],
        [(32, 4_096), (1, 131_072)] if context.cuda else [(4, 512)],
    )
    results = [_run_shape(context, *shape, variants, kernels, floors) for shape in shapes]
    layout = variants[0].layout
    return {
        "what": __doc__,
        **floors,
        "query_heads": layout.num_kv_heads * GROUP,
        "layers_rotated_over": LAYERS,
        "kernels": {kernel.name: kernel.version for kernel in kernels},
        "absent": absent,
        "variants": {variant.name: variant.describe() for variant in variants},
        "shapes": results,
    }


# ---- where K and V lie ----


@dataclass(frozen=True)
class _Variant:
    name: str
    layout: va.KVLayout
    # Or "half": up to half as large; "small": of a page each; "shuffled": these in random order.
    extents: str = "large"

    @property
    def layers(self) -> list[int]:
        """The layers that are read: from the first to the last, evenly spaced."""
        return [round(i * (self.layout.num_layers - 1) / (LAYERS - 1)) for i in range(LAYERS)]

    def describe(self) -> dict[str, Any]:
        return describe_layout(self.layout) | {
            "layers_per_row": self.layout.layers_per_row,
            "row_padding_bytes": self.layout.row_padding_bytes,
            "row_bytes": self.layout.row_bytes[0],
            "layers_read": self.layers,
            "extents": self.extents,
        }


def _variants(context: Context) -> list[_Variant]:
    shape = llama3_8b if context.cuda else small
    many, some = context.pick(32, 16), 8
    layer = shape("layer", num_layers=LAYERS)
    token = shape("token", num_layers=many)
    padding = context.pick(2_048, 64)
    padded = dataclasses.replace(token, row_padding_bytes=padding)
    token_some = shape("token", num_layers=some)
    token_two = dataclasses.replace(shape("token", num_layers=LAYERS), layers_per_row=2)
    page = show_bytes(_page_bytes(context))
    balanced = shape("balanced", num_layers=LAYERS)
    half = show_bytes(MAX_EXTENT_BYTES // 2)
    return [
        _Variant("balanced order", balanced),
        _Variant(f"balanced order, extents up to {half}", balanced, "half"),
        *(
            _Variant(
                f"balanced order, {per_row} layers a row",
                dataclasses.replace(
                    shape("balanced", num_layers=-(-LAYERS // per_row) * per_row),
                    layers_per_row=per_row,
                ),
            )
            for per_row in (2, 3, 6, 8)  # of Llama-3-8B four fit the default
        ),
        _Variant("layer order", layer),
        _Variant(f"layer order, {page} extents", layer, "small"),
        _Variant(f"layer order, {page} extents, shuffled", layer, "shuffled"),
        _Variant("token order, 2 layers a row", token_two),
        _Variant(f"token order, {some} layers a row", token_some),
        _Variant(
            f"token order, {some} layers a row, {page} extents, shuffled", token_some, "shuffled"
        ),
        _Variant(f"token order, {many} layers a row", token),
        _Variant(f"token order, {many} layers a row, padded by {show_bytes(padding)}", padded),
    ]


def _page_bytes(context: Context) -> int:
    return va.Pool(GIB, context.device, background=False).page_bytes


class _Packed:
    """K and V of each layer in tensors of their own, without a gap."""

    def __init__(self, context: Context, batch: int, length: int, layout: va.KVLayout) -> None:
        size = (batch, length, layout.num_kv_heads, layout.head_dim)

        def fresh() -> torch.Tensor:
            return torch.randn(size, dtype=layout.dtype, device=context.device)

        self.layers = [(fresh(), fresh()) for _ in range(LAYERS)]
        self.about: dict[str, Any] = {}

    def close(self) -> None:
        self.layers.clear()


class _Ours:
    """The same in an allocator of ours."""

    def __init__(self, context: Context, batch: int, length: int, variant: _Variant) -> None:
        layout = variant.layout
        page_bytes = _page_bytes(context)
        largest = {"large": MAX_EXTENT_BYTES, "half": MAX_EXTENT_BYTES // 2}
        nbytes = batch * layout.mapped_bytes(length, page_bytes)
        self.pool = va.Pool(
            nbytes,
            context.device,
            max_extent=largest.get(variant.extents, page_bytes),
            background=False,
        )
        created_as = {}
        if variant.extents == "shuffled":
            created_as = _shuffle_free_pages(context, self.pool, nbytes // page_bytes)
        self.kv = va.KVAllocator(
            layout,
            max_sequences=batch,
            max_seq_len=2 * length,
            pool=self.pool,
            lookahead_tokens=0,
        )
        created = self.pool.stats().creates
        self.kv.allocate_batch(batch, length)
        stats = self.pool.stats()
        assert stats.held_bytes == nbytes
        self.about = {"mapped_bytes": nbytes, "mappings": stats.mappings}
        if created_as:
            assert stats.creates == created, "what was shuffled was not used"
            share = _share_in_order(self.kv, created_as)
            # Of a few pages some may be neighbours by chance.
            assert share < 0.1 or len(created_as) < 100, f"{share:.0%} are still in order"
            self.about["neighbours_in_order_of_creation"] = share
        self.layers = [
            (k[:, :length], v[:, :length]) for k, v in map(self.kv.layer, variant.layers)
        ]

    def close(self) -> None:
        self.layers.clear()
        self.kv.close()
        self.pool.reclaim()
        assert self.pool.stats().held_bytes == 0, "a tensor of it is still alive"


def _shuffle_free_pages(context: Context, pool: va.Pool, pages: int) -> dict[int, int]:
    """Leaves so many pages free in the pool, in random order; returns as which each was created.

    Another allocator of the same pool takes them, one a sequence, and gives them up in that order.
    """
    head_dim = pool.page_bytes // 32
    one_page_a_token = va.KVLayout(
        num_layers=1, num_kv_heads=16, head_dim=head_dim, dtype=torch.uint8, order="token"
    )
    assert one_page_a_token.row_bytes == (pool.page_bytes,)
    with va.KVAllocator(
        one_page_a_token, max_sequences=pages, max_seq_len=1, pool=pool, lookahead_tokens=0
    ) as other:
        sequences = other.allocate_batch(pages, 1)
        created_as = {handle: slot for slot, _, _, _, handle, _ in other.mappings()}
        context.synchronize()
        order = np.random.default_rng(0).permutation(pages).tolist()
        for i in order:
            sequences[i].trim(0)
        while pool.stats().free_bytes < pages * pool.page_bytes:
            context.synchronize()
            sequences[order[-1]].trim(0)  # looks at the fences
    assert len(created_as) == pages
    return created_as


def _share_in_order(kv: va.KVAllocator, created_as: dict[int, int]) -> float:
    """Of the pages that are neighbours in the tensors, those created one after the other."""
    by_address = sorted((address, handle) for _, _, address, _, handle, _ in kv.mappings())
    neighbours = [
        abs(created_as[after] - created_as[before]) == 1
        for (start, before), (next_start, after) in itertools.pairwise(by_address)
        if next_start == start + kv.pool.page_bytes
    ]
    return sum(neighbours) / max(1, len(neighbours))


# ---- kernels ----


@dataclass(frozen=True)
class _Inputs:
    """What a decode needs besides K and V."""

    query: torch.Tensor  # [batch, query heads, dim]
    lengths: torch.Tensor  # int32 [batch]
    slots: torch.Tensor  # int32 [batch]
    query_starts: torch.Tensor  # int32 [batch + 1]: one query a sequence

    @classmethod
    def make(cls, context: Context, batch: int, length: int, layout: va.KVLayout) -> _Inputs:
        device = context.device
        heads = layout.num_kv_heads * GROUP
        return cls(
            torch.randn(batch, heads, layout.head_dim, dtype=layout.dtype, device=device),
            torch.full((batch,), length, dtype=torch.int32, device=device),
            torch.arange(batch, dtype=torch.int32, device=device),
            torch.arange(batch + 1, dtype=torch.int32, device=device),
        )

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.query.shape[-1])


@dataclass(frozen=True)
class _Kernel:
    name: str
    version: str
    # Given inputs, K and V of one layer: a call that computes its output.
    bind: Callable[[_Inputs, torch.Tensor, torch.Tensor], Call]
    # The same, slowly, of one sequence; and how far the two may be apart, relative to its norm.
    reference: Callable[[_Inputs, torch.Tensor, torch.Tensor, int], torch.Tensor]
    reference_tolerance: float
    # How far the outputs over two places of the same bytes may be apart.
    tolerance: float


def _kernels(context: Context) -> tuple[list[_Kernel], dict[str, str]]:
    """Those that run here; and the others, with the reason."""
    found: list[_Kernel] = []
    absent: dict[str, str] = {}
    candidates: dict[str, Callable[[], _Kernel]] = {"read": lambda: _read_kernel(context)}
    if context.cuda:
        candidates |= {"torch flash": _torch_flash, "FA2": _fa2, "FA3": _fa3}
    else:
        candidates["torch sdpa"] = _torch_sdpa
    layout = (llama3_8b if context.cuda else small)("layer", num_layers=1)
    size = (2, 512, layout.num_kv_heads, layout.head_dim)
    for name, make in candidates.items():
        k, v = (torch.randn(size, dtype=layout.dtype, device=context.device) for _ in range(2))
        try:
            kernel = make()
            inputs = _Inputs.make(context, 2, 256, layout)
            kernel.bind(inputs, k[:, :256], v[:, :256])()
            context.synchronize()
        except _Absent as reason:
            absent[name] = str(reason)
            if reason.__cause__ is not None:
                print(f"{name}: {reason.__cause__}", file=sys.stderr)
        except Exception as error:
            # Shown whole, but what it says may name paths, which are nobody's business.
            traceback.print_exc()
            absent[name] = f"failed: {type(error).__name__}"
        else:
            found.append(kernel)
    if "read" in absent:  # Triton is there, but does not work
        found.insert(0, _read_with_torch())
    for name, reason in absent.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    return found, absent


class _Absent(Exception):
    """The kernel is not installed."""


if triton is not None:

    @triton.jit
    def _add_up(k, v, out, slot_stride, token_stride, ROW: tl.constexpr, TOKENS: tl.constexpr):
        block = tl.program_id(0)
        slot = tl.program_id(1).to(tl.int64)
        token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        place = slot * slot_stride + token[:, None] * token_stride + tl.arange(0, ROW)[None, :]
        both = tl.load(k + place).to(tl.float32) + tl.load(v + place).to(tl.float32)
        total = tl.sum(tl.sum(both, axis=1), axis=0)
        tl.store(out + slot * tl.num_programs(0) + block, total)


def _read_kernel(context: Context) -> _Kernel:
    return _read_with_triton() if context.cuda and triton is not None else _read_with_torch()


def _read_with_triton() -> _Kernel:
    tokens = 16

    def bind(_: _Inputs, k: torch.Tensor, v: torch.Tensor) -> Call:
        batch, length, heads, dim = k.shape
        assert k.stride() == v.stride() and k.stride()[2:] == (dim, 1) and length % tokens == 0
        out = torch.full((batch, length // tokens), math.nan, device=k.device)

        def call() -> torch.Tensor:
            _add_up[(length // tokens, batch)](
                k, v, out, k.stride(0), k.stride(1), ROW=heads * dim, TOKENS=tokens, num_warps=8
            )
            return out

        return call

    def reference(_: _Inputs, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        by_token = _sum_of_tokens(k[slot : slot + 1], v[slot : slot + 1], torch.float64)
        return by_token.reshape(-1, tokens).sum(1)

    return _Kernel("read", f"triton {triton.__version__}", bind, reference, 1e-4, 1e-5)


def _read_with_torch() -> _Kernel:
    def bind(_: _Inputs, k: torch.Tensor, v: torch.Tensor) -> Call:
        return lambda: _sum_of_tokens(k, v, torch.float32)

    def reference(_: _Inputs, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        return _sum_of_tokens(k[slot : slot + 1], v[slot : slot + 1], torch.float64)[0]

    return _Kernel("read", f"torch.sum {torch.__version__}", bind, reference, 1e-4, 1e-4)


def _sum_of_tokens(k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return k.sum((2, 3), dtype=dtype) + v.sum((2, 3), dtype=dtype)


def _attention(name: str, version: str, bind: Any) -> _Kernel:
    return _Kernel(name, version, bind, _reference_attention, 1e-2, 5e-3)


def _reference_attention(
    inputs: _Inputs, k: torch.Tensor, v: torch.Tensor, slot: int
) -> torch.Tensor:
    keys, values = k[slot].double(), v[slot].double()  # [length, heads, dim]
    heads, dim = keys.shape[1:]
    query = inputs.query[slot].double().view(heads, GROUP, dim)
    scores = torch.einsum("hgd,shd->hgs", query, keys) * inputs.scale
    return torch.einsum("hgs,shd->hgd", scores.softmax(-1), values).reshape(heads * GROUP, dim)


def _torch_flash() -> _Kernel:
    """The flash attention inside torch, told where slots start and how long they are."""
    op = torch.ops.aten._flash_attention_forward.default

    def bind(inputs: _Inputs, k: torch.Tensor, v: torch.Tensor) -> Call:
        (keys, slot_tokens), (values, _) = _as_one_sequence(k), _as_one_sequence(v)
        assert k.stride() == v.stride()
        starts = inputs.query_starts * slot_tokens

        def call() -> torch.Tensor:
            return op(
                inputs.query,
                keys,
                values,
                inputs.query_starts,
                starts,
                1,
                k.shape[1],
                0.0,
                False,
                False,
                scale=inputs.scale,
                seqused_k=inputs.lengths,
            )[0]

        return call

    return _attention("torch flash", f"torch {torch.__version__}", bind)


def _as_one_sequence(cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All slots as one row of tokens [tokens, heads, dim]; and the tokens from slot to slot."""
    batch, length, heads, dim = cache.shape
    slot_stride, token_stride = cache.stride()[:2]
    if slot_stride % token_stride:
        raise ValueError("a slot must be a whole number of tokens")
    slot_tokens = slot_stride // token_stride
    tokens = (batch - 1) * slot_tokens + length
    return cache.as_strided((tokens, heads, dim), (token_stride, dim, 1)), slot_tokens


def _fa2() -> _Kernel:
    try:
        import flash_attn
    except ImportError as error:
        raise _Absent("flash_attn cannot be imported") from error

    def bind(inputs: _Inputs, k: torch.Tensor, v: torch.Tensor) -> Call:
        query = inputs.query.unsqueeze(1)

        def call() -> torch.Tensor:
            out = flash_attn.flash_attn_with_kvcache(
                query, k, v, cache_seqlens=inputs.lengths, cache_batch_idx=inputs.slots
            )
            return out.squeeze(1)

        return call

    return _attention("FA2", f"flash_attn {flash_attn.__version__}", bind)


def _fa3() -> _Kernel:
    path = os.environ.get(FA3_LIBRARY)
    if not path:
        raise _Absent(f"{FA3_LIBRARY} names no library")
    torch.ops.load_library(path)
    op = torch.ops._vllm_fa3_C.fwd
    parameters = op.default._schema.arguments

    def bind(inputs: _Inputs, k: torch.Tensor, v: torch.Tensor) -> Call:
        given = {
            "q": inputs.query,
            "k": k,
            "v": v,
            "cu_seqlens_q": inputs.query_starts,
            "seqused_k": inputs.lengths,
            "max_seqlen_q": 1,
            "max_seqlen_k": k.shape[1],
            "softmax_scale": inputs.scale,
            "is_causal": False,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "is_rotary_interleaved": True,
            "num_splits": 0,
            "sm_margin": 0,
            "cp_world_size": 1,
            "cp_rank": 0,
        }
        # What is not given is optional in every version seen.
        arguments = [given.pop(parameter.name, None) for parameter in parameters]
        assert not set(given) - {"cp_world_size", "cp_rank"}, f"no such arguments: {set(given)}"
        return lambda: op(*arguments)[0]

    return _attention("FA3", "_vllm_fa3_C", bind)


def _torch_sdpa() -> _Kernel:
    def bind(inputs: _Inputs, k: torch.Tensor, v: torch.Tensor) -> Call:
        query = inputs.query.unsqueeze(2)

        def call() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                query, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
            ).squeeze(2)

        return call

    return _attention("torch sdpa", f"torch {torch.__version__}", bind)


# ---- measuring ----


def measure_read(context: Context, read: _Kernel | None = None) -> float:
    """Bytes a second of reading two packed tensors end to end."""
    read = read or _read_kernel(context)
    layout = (llama3_8b if context.cuda else small)("layer", num_layers=1)
    nbytes = context.pick(GIB, MIB)
    packed = _Packed(context, 1, nbytes // layout.k_bytes, layout)
    inputs = _Inputs.make(context, 1, 1, layout)
    work = _rotating([read.bind(inputs, k, v) for k, v in packed.layers])
    samples = alternate(
        {"read": lambda: {"us": time_device_us(context, work)}},
        repetitions=context.pick(20, 5, 5),
        warmup=3,
    )
    return 2 * nbytes / quantile(samples["read"]["us"], 0.5) * 1e6


def _rotating(calls: list[Call]) -> Call:
    turns = in_turn(calls)
    return lambda: next(turns)()


def _run_shape(
    context: Context,
    batch: int,
    length: int,
    variants: list[_Variant],
    kernels: list[_Kernel],
    floors: dict[str, float],
) -> dict[str, Any]:
    torch.manual_seed(0)
    layout = variants[0].layout
    packed = _Packed(context, batch, length, layout)
    inputs = _Inputs.make(context, batch, length, layout)
    nbytes = batch * length * (layout.k_bytes + layout.v_bytes)
    fastest = max(floors["copy_bytes_per_s"], floors["read_bytes_per_s"])
    for kernel in kernels:
        _check_against_reference(kernel, inputs, packed)

    results: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for name, make in {
        CONTROL: lambda: _Packed(context, batch, length, layout),
        **{
            variant.name: lambda variant=variant: _Ours(context, batch, length, variant)
            for variant in variants
        },
    }.items():
        cache = make()
        for (k, v), (packed_k, packed_v) in zip(cache.layers, packed.layers, strict=True):
            k.copy_(packed_k)
            v.copy_(packed_v)
        del k, v
        about[name] = cache.about
        results.extend(
            {"variant": name} | _compare(context, kernel, inputs, packed, cache, nbytes)
            for kernel in kernels
        )
        cache.close()
    shape = {
        "batch": batch,
        "length": length,
        "bytes_of_a_layer": nbytes,
        "floor_us": nbytes / fastest * 1e6,
        "floor_gb_per_s": fastest / 1e9,
        "about": about,
        "results": results,
    }
    _show(context, shape, kernels)
    packed.close()
    release_cache(context)
    return shape


def _check_against_reference(kernel: _Kernel, inputs: _Inputs, packed: _Packed) -> None:
    k, v = packed.layers[0]
    out = kernel.bind(inputs, k, v)()
    for slot in {0, k.shape[0] - 1}:
        error = _relative_error(out[slot], kernel.reference(inputs, k, v, slot))
        assert error <= kernel.reference_tolerance, (
            f"{kernel.name} over packed tensors is off by {error:.2g} in sequence {slot}"
        )


def _relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN where one of them has NaN: then no comparison with a tolerance holds."""
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


def _compare(
    context: Context,
    kernel: _Kernel,
    inputs: _Inputs,
    packed: _Packed,
    cache: _Packed | _Ours,
    nbytes: int,
) -> dict[str, Any]:
    expected_calls = [kernel.bind(inputs, k, v) for k, v in packed.layers]
    calls = [kernel.bind(inputs, k, v) for k, v in cache.layers]
    errors = [
        _relative_error(call(), expected())
        for call, expected in zip(calls, expected_calls, strict=True)
    ]
    wrong = [error for error in errors if not error <= kernel.tolerance]
    assert not wrong, f"{kernel.name} computes something else than over packed tensors: {errors}"
    packed_work, work = _rotating(expected_calls), _rotating(calls)
    samples = alternate(
        {
            "packed": lambda: {"us": time_device_us(context, packed_work)},
            "this": lambda: {"us": time_device_us(context, work)},
        },
        repetitions=context.pick(50, 10, 20 if context.cuda else 5),
        warmup=3,
    )
    packed_us, us = samples["packed"]["us"], samples["this"]["us"]
    relative = [a / b for a, b in zip(packed_us, us, strict=True)]
    return {
        "kernel": kernel.name,
        "largest_error": max(errors),
        "packed_us": summarize(packed_us, keep=False),
        "us": summarize(us, keep=False),
        "relative": summarize(relative, keep=False),
        "packed_gb_per_s": nbytes / quantile(packed_us, 0.5) / 1e3,
        "gb_per_s": nbytes / quantile(us, 0.5) / 1e3,
    }


def _show(context: Context, shape: dict[str, Any], kernels: list[_Kernel]) -> None:
    by_place = {(result["variant"], result["kernel"]): result for result in shape["results"]}
    heading(
        context,
        f"bandwidth: {shape['batch']} x {shape['length']:,} tokens, "
        f"{show_bytes(shape['bytes_of_a_layer'])} a layer; GB/s, and relative to packed",
    )
    names = [kernel.name for kernel in kernels]
    rows = [
        (
            name,
            *(
                f"{result['gb_per_s']:,.0f} {result['relative']['median']:.3f}"
                for result in (by_place[name, kernel] for kernel in names)
            ),
        )
        for name in shape["about"]
    ]
    packed = [f"{by_place[CONTROL, kernel]['packed_gb_per_s']:,.0f}      " for kernel in names]
    floor = [f"{shape['floor_gb_per_s']:,.0f}      " for _ in names]
    print_table(("", *names), [("floor", *floor), ("packed", *packed), *rows])
