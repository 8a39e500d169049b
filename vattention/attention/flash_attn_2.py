"""FlashAttention-2, from the package `flash_attn`.

Decode over contiguous slots takes its split kernel only where the slots come as an index; prefill
takes where they start and how long they are, as torch's own build of it does.
"""

from __future__ import annotations

import torch

from vattention.attention.backend import Backend, Scales, why_not_imported
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs
from vattention.attention.torch_flash import as_one_sequence, slot_starts

__all__ = ["FlashAttention2"]


class FlashAttention2(Backend):
    """`flash_attn_with_kvcache` for a query a row, the variable-length forward for several."""

    name = "fa2"
    needs = Needs(
        device="cuda",
        capabilities=((8, 0), (100, 0)),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(256, 8),
        whole_rows=True,
        max_tokens=2**31,
        front_slack_tokens=256,
        softcap=True,
        splits_by_capacity=True,
    )

    @classmethod
    def missing(cls) -> str | None:
        """The package."""
        return why_not_imported("flash_attn.flash_attn_interface", "flash_attn")

    @property
    def version(self) -> str:
        """The package's."""
        import flash_attn

        return str(flash_attn.__version__)

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
        from flash_attn import flash_attn_interface

        left, right = self.window
        if batch.is_decode:
            output: torch.Tensor = flash_attn_interface.flash_attn_with_kvcache(
                q.unsqueeze(1),
                k,
                v,
                cache_seqlens=batch.lengths,
                cache_batch_idx=batch.slots,
                softmax_scale=self.scale,
                window_size=(left, right),
                softcap=self.options.softcap,
            )
            return output.squeeze(1)
        outputs: tuple[torch.Tensor, ...] = flash_attn_interface._flash_attn_varlen_forward(
            q,
            as_one_sequence(k),
            as_one_sequence(v),
            batch.query_starts,
            slot_starts(batch, k),
            batch.max_queries,
            k.shape[1],
            0.0,
            self.scale,
            causal=self.is_causal(batch),
            window_size_left=left,
            window_size_right=right,
            softcap=self.options.softcap,
            seqused_k=batch.lengths,
        )
        return outputs[0]
