"""Attention in plain torch, row after row: what the others are compared with, and all a CPU has.

Named `torch`: it computes whatever the others can, windows, softcap, sinks and unequal heads, but
for 8-bit floats, in the queries' own precision or better. It needs the lengths on the host.
"""

from __future__ import annotations

import itertools

import torch

from vattention.attention.backend import Backend, Scales
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs

__all__ = ["Torch", "attention"]


class Torch(Backend):
    """`torch.nn.functional.scaled_dot_product_attention`, and matrix products where it lacks."""

    name = "torch"
    needs = Needs(
        device="cpu",
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        head_dims=(2**20, 1),
        v_head_dims=((1, 2**20, 1, 2**20),),
        softcap=True,
        sinks=True,
        graph_safe=False,
        host_lengths=True,
        alignment_bytes=1,
    )

    @classmethod
    def missing(cls) -> str | None:
        """Nothing."""
        return None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
        *,
        sinks: torch.Tensor | None,
        scales: Scales | None,
    ) -> torch.Tensor:
        """See `Backend.attend`."""
        lengths = batch.host_lengths
        assert lengths is not None
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        starts = batch.query_starts.tolist()
        for slot, length, (start, stop) in zip(
            batch.host_slots, lengths, itertools.pairwise(starts), strict=True
        ):
            if length == 0:
                continue
            first = self._first_seen(length, stop - start)
            out[start:stop] = attention(
                q[start:stop],
                k[slot, first:length],
                v[slot, first:length],
                causal=self.options.causal,
                window=self.options.window,
                softcap=self.options.softcap,
                scale=self.scale,
                sinks=sinks,
            )
        return out

    def _first_seen(self, length: int, queries: int) -> int:
        """Below a window there may be no memory."""
        window = self.options.window
        return 0 if window is None else max(0, length - queries - window + 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one sequence; its last query is at its last key.

    Args:
        q: ``[queries, heads, dim]``.
        k: ``[tokens, kv_heads, dim]``, at least as many tokens as queries.
        v: ``[tokens, kv_heads, v_dim]``.
        causal: see `Options`, as for the others.
        scale: factor on the scores.
        window: or None.
        softcap: or 0.
        sinks: ``[heads]`` or None.

    Returns:
        ``[queries, heads, v_dim]``.
    """
    queries, tokens = q.shape[0], k.shape[0]
    unseen = None
    if (causal and queries > 1) or window is not None:
        at = torch.arange(tokens - queries, tokens, device=q.device)[:, None]
        key = torch.arange(tokens, device=q.device)
        unseen = key > at
        if window is not None:
            unseen |= key <= at - window
    if softcap == 0 and sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=None if unseen is None else ~unseen,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q.float().reshape(queries, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("nhgd,lhd->hgnl", grouped, k.float()) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if unseen is not None:
        scores = scores.masked_fill(unseen, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., :tokens]
    return torch.einsum("hgnl,lhd->nhgd", weights, v.float()).flatten(1, 2).to(q.dtype)
