"""Memory-efficient attention as torch ships it: any precision, also float32, on any CUDA device.

It knows no groups of query heads, so K and V are handed over once for each head of a group, with
the queries of that head; a row with one query takes the group as that many queries instead.
"""

from __future__ import annotations

import torch

from vattention.attention.backend import Backend, Scales
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs
from vattention.attention.torch_flash import as_one_sequence, slot_starts

__all__ = ["TorchEfficient"]

_ACCUMULATED_IN_REGISTERS = 128  # up to this head, K's or V's, whichever is the larger
_NO_MASK, _CAUSAL_FROM_BOTTOM_RIGHT = 0, 2


class TorchEfficient(Backend):
    """`aten::_efficient_attention_forward`."""

    name = "torch_efficient"
    needs = Needs(
        device="cuda",
        capabilities=((5, 0), (100, 0)),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        head_dims=(2**14, 8),
        v_head_dims=((1, 2**14, 1, 2**14),),
        whole_rows=True,
        max_tokens=2**31,
        # kernel_forward.h multiplies a key's number by the stride of K in int32.
        max_elements=2**31,
        window=False,
    )

    @classmethod
    def missing(cls) -> str | None:
        """A torch with CUDA."""
        return None if torch.version.cuda else "torch is no CUDA build"

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
        kv_heads = self.layout.num_kv_heads
        group = q.shape[1] // kv_heads
        starts = slot_starts(batch, k)
        keys, values = as_one_sequence(k)[None], as_one_sequence(v)[None]

        def call(queries: torch.Tensor, query_starts: torch.Tensor, most: int) -> torch.Tensor:
            output: torch.Tensor = torch.ops.aten._efficient_attention_forward.default(
                queries[None],
                keys,
                values,
                None,
                query_starts,
                starts,
                most,
                k.shape[1],
                0.0,
                _CAUSAL_FROM_BOTTOM_RIGHT if self.is_causal(batch) else _NO_MASK,
                False,
                scale=self.scale,
                seqlen_k=batch.lengths,
            )[0]
            return output[0]

        by_head = q.reshape(-1, kv_heads, group, q.shape[2])  # [queries, kv_heads, group, dim]
        if batch.is_decode:
            query_starts = batch.derived(
                ("group_starts", group), lambda: batch.query_starts * group
            )
            as_queries = by_head.transpose(1, 2).flatten(0, 1)
            output = call(as_queries, query_starts, group)
            output = output.reshape(-1, group, *output.shape[1:]).transpose(1, 2)
        else:
            parts = [
                call(by_head[:, :, i], batch.query_starts, batch.max_queries) for i in range(group)
            ]
            output = torch.stack(parts, dim=2)
        output = output.flatten(1, 2)
        if max(q.shape[2], v.shape[3]) > _ACCUMULATED_IN_REGISTERS:
            # Where there was nothing to see, it wrote nothing.
            empty = batch.derived("empty", lambda: (batch.lengths == 0)[batch.query_rows])
            output = output.masked_fill(empty[:, None, None], 0)
        return output
