"""FlashInfer, through its public calls: paged kernels over memory that has no pages of theirs.

They take pages of tokens by number, and a page need not begin where another ends. Slots are whole
rows apart, so a layer's K is one row of tokens, and a page is shown at each of them: a page has
the number of its first token, and a sequence's pages begin every `_PAGE_TOKENS` of its tokens. The
table is arithmetic, made anew for a step. One page for a whole slot would do for the kernels, but
what plans their work divides a sequence between pages only.

One prompt alone needs no table: where there is FlashAttention-3, FlashInfer's own build of it gets
a tensor that ends at the sequence's length.

What is always true:

- Nothing at or behind a length is read. A sequence of length 0 gives zeros.
- A batch is planned once until it changes, not once a layer, from what the host knows.
- Nothing waits. FlashInfer copies a plan from memory that it writes again at the next one: what
  made a plan makes another only when the device has its copy, and until then a second one does.
- Plans of one device and stream share scratch memory, so they run one after another.

Read and measured with FlashInfer 0.6.12. What is used is older: `out` and `enable_pdl` of `run`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from vattention.allocator import KVAllocator
from vattention.attention.backend import Backend, Scales
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs, Options
from vattention.attention.torch_flash import as_one_sequence
from vattention.errors import ConfigError

__all__ = ["FlashInfer"]

_PAGE_TOKENS = 64
"""So fine is work divided. Kernels see no difference; a chunk has at least 128 tokens anyway."""

_FA3_QUERIES = 128
"""A tile. FlashAttention-3 does not divide K here: of fewer queries it makes too little work."""

_FA3_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 * 2**20


class FlashInfer(Backend):
    """`BatchPrefillWithPagedKVCacheWrapper`, and for a prompt `single_prefill_with_kv_cache`."""

    name = "flashinfer"
    needs = Needs(
        device="cuda",
        capabilities=((8, 0), (100, 0)),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(256, 64),
        whole_rows=True,
        equal_strides=True,
        # Numbers of pages are int32; tokens of a batch, rounded up to pages, are uint32.
        max_tokens=2**31,
        softcap=True,
        # It could be, for a query a row: planned for longer sequences than there are, some chunks
        # are empty. But then a split and a merge is paid where neither is of use.
        graph_safe=False,
        host_lengths=True,
    )

    @classmethod
    def missing(cls) -> str | None:
        """The package, or what its kernels come from."""
        spec = importlib.util.find_spec("flashinfer")
        if spec is None or spec.origin is None:
            return "the package flashinfer-python"
        if not _has_kernels(Path(spec.origin).parent):
            return "the package flashinfer-jit-cache, or nvcc to compile flashinfer-python's kernels"
        return None

    def __init__(self, kv: KVAllocator, options: Options) -> None:
        super().__init__(kv, options)
        window = options.window
        # One that no sequence exceeds is none: windows have kernels of their own, to be compiled.
        self._window_left = -1 if window is None or window >= kv.max_seq_len else window - 1
        self._has_fa3 = (
            torch.cuda.get_device_capability(kv.device) == (9, 0)
            and kv.layout.head_dim in _FA3_HEAD_DIMS
            and self._window_left < 0
        )

    @property
    def version(self) -> str:
        """The package's."""
        import flashinfer

        return str(flashinfer.__version__)

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
        import flashinfer

        if q.stride(-1) != 1:
            q = q.contiguous()
        if self._has_fa3 and batch.num_rows == 1 and batch.num_queries >= _FA3_QUERIES:
            assert batch.host_lengths is not None
            slot, length = batch.host_slots[0], batch.host_lengths[0]
            output: torch.Tensor = flashinfer.single_prefill_with_kv_cache(
                q,
                k[slot, :length],
                v[slot, :length],
                causal=self.options.causal,
                sm_scale=self.scale,
                logits_soft_cap=self.options.softcap,
                backend="fa3",
            )
            return output
        if q.shape[0] * max(q.stride(0), q.shape[1] * q.shape[2]) >= 2**32:
            raise ConfigError(
                f"FlashInfer finds queries with 32 bits, too few for {q.shape[0]} of these: "
                "split the batch, or use another backend"
            )
        # Layers may lie in rows of two sizes, and numbers are counted in rows.
        slot_tokens = k.stride(0) // k.stride(1)
        page_tokens = min(_PAGE_TOKENS, (k.shape[0] - 1) * slot_tokens + k.shape[1])
        plan: _Plan = batch.derived(
            ("flashinfer", self, slot_tokens, page_tokens),
            lambda: self._plan(batch, slot_tokens, page_tokens),
        )
        output = plan.wrapper.run(
            q,
            (_as_pages(k, page_tokens), _as_pages(v, page_tokens)),
            out=q.new_empty(q.shape),
            # The kernel before it may have written what it reads before it would wait for that.
            enable_pdl=False,
        )
        return output

    def _plan(self, batch: Batch, slot_tokens: int, page_tokens: int) -> _Plan:
        """Divides the work of a batch, and makes its table of pages."""
        layout, heads = self.layout, self.options.num_heads
        query_starts, page_starts, last_lengths, pages = _page_table(
            batch, slot_tokens, page_tokens
        )
        num_bytes = _split_bytes(
            heads,
            layout.num_kv_heads,
            layout.head_dim,
            batch.num_queries // batch.num_rows,
            torch.cuda.get_device_properties(batch.kv.device).multi_processor_count,
        )
        with _scratch(batch.kv.device).borrow(num_bytes) as plan:
            plan.wrapper.plan(
                query_starts,
                page_starts,
                pages,
                last_lengths,
                heads,
                layout.num_kv_heads,
                layout.head_dim,
                page_tokens,
                causal=self.options.causal and batch.max_queries > 1,
                sm_scale=self.scale,
                window_left=self._window_left,
                logits_soft_cap=self.options.softcap,
                q_data_type=layout.dtype,
                kv_data_type=layout.dtype,
            )
        return plan


def _has_kernels(package: Path) -> bool:
    """Whether it comes with kernels, or can compile them."""
    if importlib.util.find_spec("flashinfer_jit_cache") is not None or shutil.which("nvcc"):
        return True
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return Path(toolkit, "bin", "nvcc").exists() or any(package.glob("data/aot/*/*.so"))


def _as_pages(cache: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """A page at every token: ``[pages, page_tokens, heads, dim]``.

    Pages near the end are not among them, and may be used: only the address of the first counts.
    """
    tokens, heads, dim = as_one_sequence(cache).shape
    row, head = cache.stride()[1:3]
    return cache.as_strided((tokens - page_tokens + 1, page_tokens, heads, dim), (row, row, head, 1))


def _page_table(batch: Batch, slot_tokens: int, page_tokens: int) -> tuple[torch.Tensor, ...]:
    """Where rows' queries and pages start, tokens on their last pages, and numbers of pages.

    All are int32, on the host, and pinned where a device will copy them.
    """
    lengths = torch.tensor(batch.host_lengths)
    counts = (lengths + page_tokens - 1).div(page_tokens, rounding_mode="floor")
    starts = pad(counts.cumsum(0), (1, 0))
    total = int(starts[-1])
    # Page n of the batch begins in token ``firsts[its row] + n * page_tokens``.
    firsts = torch.tensor(batch.host_slots) * slot_tokens - starts[:-1] * page_tokens
    pages = firsts.repeat_interleave(counts, output_size=total) + torch.arange(total) * page_tokens
    parts = (
        torch.tensor([0, *itertools.accumulate(batch.host_queries)]),
        starts,
        lengths - (counts - 1).clamp_(min=0) * page_tokens,
        pad(pages, (0, 1)),  # one that is not used, lest there be none
    )
    table = torch.cat(parts).to(torch.int32)
    if batch.kv.device.type == "cuda":
        table = table.pin_memory()
    return table.split([len(part) for part in parts])


def _split_bytes(
    heads: int, kv_heads: int, head_dim: int, row_queries: int, processors: int
) -> int:
    """What a plan may take of the scratch memory, by the rules of FlashInfer's planner.

    Where it divides K it makes at most two blocks a processor, and takes for each, and each query
    head, a tile of float32 outputs and their sums.
    """
    packed = row_queries * (heads // kv_heads) + heads // kv_heads  # a row's on the average, at most
    tile = 16 if packed <= 16 else 64 if packed <= 64 else 128
    return heads * (2 * processors // kv_heads) * tile * (head_dim + 1) * 4 + 2**10
