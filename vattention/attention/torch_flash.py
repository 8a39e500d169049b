"""FlashAttention as torch ships it: there wherever torch has CUDA, batched and ragged.

The operator takes where sequences start, in tokens, and how long they are, as two things, so slots
need no index: they start at multiples of their stride, and what lies between them is not touched.
"""

from __future__ import annotations

import torch

from vattention.attention.backend import Backend, Scales
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs

__all__ = ["TorchFlash"]


class TorchFlash(Backend):
    """`aten::_flash_attention_forward`."""

    name = "torch_flash"
    needs = Needs(
        device="cuda",
        capabilities=((8, 0), (100, 0)),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(256, 8),
        whole_rows=True,
        max_tokens=2**31,
        front_slack_tokens=256,
        splits_by_capacity=True,
    )

    @classmethod
    def missing(cls) -> str | None:
        """A torch with the operator."""
        if torch.backends.cuda.is_flash_attention_available():
            return None
        return "torch is no CUDA build with FlashAttention"

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
        left, right = self.window
        bounds = {} if left < 0 else {"window_size_left": left, "window_size_right": right}
        output: torch.Tensor = torch.ops.aten._flash_attention_forward.default(
            q,
            as_one_sequence(k),
            as_one_sequence(v),
            batch.query_starts,
            slot_starts(batch, k),
            batch.max_queries,
            k.shape[1],
            0.0,
            self.is_causal(batch),
            False,
            scale=self.scale,
            seqused_k=batch.lengths,
            **bounds,
        )[0]
        return output


def as_one_sequence(cache: torch.Tensor) -> torch.Tensor:
    """All slots as one row of tokens ``[tokens, heads, dim]``; slots are whole rows apart."""
    slots, length, heads, dim = cache.shape
    slot_stride, row_stride = cache.stride()[:2]
    tokens = (slots - 1) * (slot_stride // row_stride) + length
    return cache.as_strided((tokens, heads, dim), (row_stride, dim, 1))


def slot_starts(batch: Batch, cache: torch.Tensor) -> torch.Tensor:
    """In which token of that row each of a batch's slots starts: int32 ``[num_rows + 1]``.

    The last is where the last slot ends; kernels that are told lengths look at it for nothing.
    """
    rows = cache.stride(0) // cache.stride(1)

    def make() -> torch.Tensor:
        starts = batch.slots * rows
        return torch.cat([starts, starts[-1:] + rows])

    starts: torch.Tensor = batch.derived(("slot_starts", rows), make)
    return starts
