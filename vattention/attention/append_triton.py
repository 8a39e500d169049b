"""The kernel of `append`: one program a token; imports Triton, so its module may be missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from vattention.attention.append import Rope
    from vattention.attention.batch import Batch

__all__ = ["append", "knows"]

# From which compute capability on; other 8-bit floats Triton has nowhere.
_CAPABILITIES_8BIT = {torch.float8_e5m2: (8, 0), torch.float8_e4m3fn: (8, 9)}


def knows(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton can convert to and from it there."""
    if dtype.itemsize > 1:
        return True
    first = _CAPABILITIES_8BIT.get(dtype)
    return first is not None and torch.cuda.get_device_capability(device) >= first


@triton.jit
def _move(
    source,
    target,
    source_head_stride,
    target_head_stride,
    cos,
    sin,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """All heads of one token; the first 2 * HALF elements of each turned by cos and sin."""
    head = tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)  # heads may be whole prompts apart
    if HALF > 0:
        i = tl.arange(0, BLOCK_HALF)[None, :]
        one = (i < HALF) & (head < HEADS)
        first = i * 2 if INTERLEAVED else i
        second = first + 1 if INTERLEAVED else i + HALF
        a = tl.load(source + head * source_head_stride + first, mask=one).to(tl.float32)
        b = tl.load(source + head * source_head_stride + second, mask=one).to(tl.float32)
        c = tl.load(cos + i, mask=i < HALF)
        s = tl.load(sin + i, mask=i < HALF)
        kind = target.dtype.element_ty
        tl.store(target + head * target_head_stride + first, (a * c - b * s).to(kind), mask=one)
        tl.store(target + head * target_head_stride + second, (b * c + a * s).to(kind), mask=one)
    if 2 * HALF < DIM:
        d = tl.arange(0, BLOCK_DIM)[None, :]
        rest = (d >= 2 * HALF) & (d < DIM) & (head < HEADS)
        x = tl.load(source + head * source_head_stride + d, mask=rest)
        place = target + head * target_head_stride + d
        tl.store(place, x.to(target.dtype.element_ty), mask=rest)


@triton.jit
def _append(
    k,
    v,
    keys,
    values,
    q,
    turned,
    cos,
    sin,
    slots,
    lengths,
    query_starts,
    query_rows,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    keys_slot_stride,
    keys_row_stride,
    values_slot_stride,
    values_row_stride,
    q_stride,
    q_head_stride,
    turned_stride,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    Q_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_Q_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(query_rows + token)
    position = tl.load(lengths + row) - tl.load(query_starts + row + 1) + token
    if position >= 0:  # not padding
        slot = tl.load(slots + row).to(tl.int64)
        c = cos + position * HALF
        s = sin + position * HALF
        _move(
            k + token * k_stride,
            keys + slot * keys_slot_stride + position * keys_row_stride,
            k_head_stride,
            DIM,
            c,
            s,
            KV_HEADS,
            DIM,
            HALF,
            INTERLEAVED,
            BLOCK_KV_HEADS,
            BLOCK_DIM,
            BLOCK_HALF,
        )
        _move(
            v + token * v_stride,
            values + slot * values_slot_stride + position * values_row_stride,
            v_head_stride,
            V_DIM,
            c,
            s,
            KV_HEADS,
            V_DIM,
            0,
            False,
            BLOCK_KV_HEADS,
            BLOCK_V_DIM,
            BLOCK_HALF,
        )
        if Q_HEADS > 0:
            _move(
                q + token * q_stride,
                turned + token * turned_stride,
                q_head_stride,
                DIM,
                c,
                s,
                Q_HEADS,
                DIM,
                HALF,
                INTERLEAVED,
                BLOCK_Q_HEADS,
                BLOCK_DIM,
                BLOCK_HALF,
            )


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    rope: Rope | None,
    q: torch.Tensor | None,
) -> torch.Tensor | None:
    """See `vattention.attention.append`, which has checked everything."""
    kv_heads, dim, v_dim = keys.shape[2], keys.shape[3], values.shape[3]
    turned = None if q is None else torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    half = 0 if rope is None else rope.cos.shape[1]
    q_heads = 0 if q is None else q.shape[1]
    # Where there is nothing to turn, any pointer does: it is not read.
    unused: Any = keys
    _append[(batch.num_queries,)](
        k,
        v,
        keys,
        values,
        unused if q is None else q,
        unused if turned is None else turned,
        unused if rope is None else rope.cos,
        unused if rope is None else rope.sin,
        batch.slots,
        batch.lengths,
        batch.query_starts,
        batch.query_rows,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        0 if q is None else q.stride(0),
        0 if q is None else q.stride(1),
        0 if turned is None else turned.stride(0),
        KV_HEADS=kv_heads,
        DIM=dim,
        V_DIM=v_dim,
        Q_HEADS=q_heads,
        HALF=half,
        INTERLEAVED=rope is not None and rope.interleaved,
        BLOCK_KV_HEADS=triton.next_power_of_2(kv_heads),
        BLOCK_Q_HEADS=triton.next_power_of_2(max(q_heads, 1)),
        BLOCK_DIM=triton.next_power_of_2(dim),
        BLOCK_V_DIM=triton.next_power_of_2(v_dim),
        BLOCK_HALF=triton.next_power_of_2(max(half, 1)),
    )
    return turned
