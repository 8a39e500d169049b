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

The wrapper's mode for CUDA graphs is not used: it divides every batch, needed or not, for which
many queries need more scratch memory than there is. Written against FlashInfer 0.6.12; of an older
one, `run` must take `out` and `enable_pdl`.
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
from vattention.attention.backend import Backend, Scales, why_not_imported
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs, Options
from vattention.attention.torch_flash import as_one_sequence

__all__ = ["FlashInfer"]

_PAGE_TOKENS = 64
"""So fine is work divided. Kernels see no difference; a chunk has at least 128 tokens anyway."""

_FA3_QUERIES = 256
"""FlashAttention-3 does not divide K here: of fewer queries it makes too little work."""

_FA3_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 * 2**20
_MAX_QUERY_ELEMENTS = 2**32


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
        max_query_elements=_MAX_QUERY_ELEMENTS,
        softcap=True,
        # It could be, for a query a row: planned for longer sequences than there are, some chunks
        # are empty. But then a split and a merge is paid where neither is of use.
        graph_safe=False,
        host_lengths=True,
    )

    @classmethod
    def missing(cls) -> str | None:
        """The package, or what its kernels come from."""
        why = why_not_imported("flashinfer", "flashinfer-python")
        if why is None and not _has_kernels():
            return (
                "there are no kernels for flashinfer-python: the package flashinfer-jit-cache is "
                "not installed, nor nvcc to compile them"
            )
        return why

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
        if q.shape[0] * q.stride(0) >= _MAX_QUERY_ELEMENTS:
            q = q.contiguous()
        # Layers may lie in rows of two sizes, and numbers are counted in rows.
        slot_tokens = k.stride(0) // k.stride(1)
        page_tokens = min(_PAGE_TOKENS, k.shape[1])
        plan: _Plan = batch.derived(
            # A plan has scratch memory of its stream.
            ("flashinfer", self, slot_tokens, page_tokens, torch.cuda.current_stream()),
            lambda: self._plan(batch, slot_tokens, page_tokens),
        )
        output = plan.wrapper.run(
            q,
            (_as_pages(k, page_tokens), _as_pages(v, page_tokens)),
            out=q.new_empty(q.shape),
            # It would read the plan before it waits for the kernel before it.
            enable_pdl=False,
        )
        return output

    def _plan(self, batch: Batch, slot_tokens: int, page_tokens: int) -> _Plan:
        """Divides the work of a batch, and makes its table of pages."""
        layout, heads, device = self.layout, self.options.num_heads, batch.kv.device
        kv_heads = layout.num_kv_heads
        query_starts, page_starts, last_lengths, pages = _page_table(
            batch, slot_tokens, page_tokens
        )
        num_bytes = _split_bytes(
            heads,
            kv_heads,
            layout.head_dim,
            batch.num_queries * (heads // kv_heads) // batch.num_rows,
            torch.cuda.get_device_properties(device).multi_processor_count,
        )
        return _scratch(device).plan(
            num_bytes,
            qo_indptr=query_starts,
            paged_kv_indptr=page_starts,
            paged_kv_indices=pages,
            paged_kv_last_page_len=last_lengths,
            num_qo_heads=heads,
            num_kv_heads=kv_heads,
            head_dim_qk=layout.head_dim,
            page_size=page_tokens,
            causal=self.is_causal(batch),
            sm_scale=self.scale,
            window_left=self._window_left,
            logits_soft_cap=self.options.softcap,
            q_data_type=layout.dtype,
            kv_data_type=layout.dtype,
        )


def _has_kernels() -> bool:
    """Whether it comes with kernels, or can compile them."""
    import flashinfer

    if importlib.util.find_spec("flashinfer_jit_cache") is not None or shutil.which("nvcc"):
        return True
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return Path(toolkit, "bin", "nvcc").exists() or any(
        Path(flashinfer.__file__).parent.glob("data/aot/*/*.so")
    )


def _as_pages(cache: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """A page at every token: ``[pages, page_tokens, heads, dim]``.

    The last pages of the last slot are not among them and are used all the same: a kernel takes the
    strides from here and the numbers from the table. There are two at least wherever there is need
    of a stride, which one alone would lose on its way to the kernel.
    """
    tokens, heads, dim = as_one_sequence(cache).shape
    row, head = cache.stride()[1:3]
    return cache.as_strided(
        (tokens - page_tokens + 1, page_tokens, heads, dim), (row, row, head, 1)
    )


def _page_table(batch: Batch, slot_tokens: int, page_tokens: int) -> tuple[torch.Tensor, ...]:
    """Where rows' queries and pages start, tokens on their last pages, and numbers of pages.

    All are int32, on the host, and pinned where a device will copy them.
    """
    lengths = _on_host(batch.host_lengths)
    counts = (lengths + page_tokens - 1).div(page_tokens, rounding_mode="floor")
    starts = pad(counts.cumsum(0), (1, 0))
    total = int(starts[-1])
    # Page n of the batch begins in token ``firsts[its row] + n * page_tokens``.
    firsts = _on_host(batch.host_slots) * slot_tokens - starts[:-1] * page_tokens
    numbers = torch.arange(total, device="cpu")
    pages = firsts.repeat_interleave(counts, output_size=total) + numbers * page_tokens
    parts = (
        _on_host([0, *itertools.accumulate(batch.host_queries)]),
        starts,
        lengths - (counts - 1).clamp_(min=0) * page_tokens,
        pad(pages, (0, 1)),  # one that is not used, lest there be none
    )
    table = torch.cat(parts).to(torch.int32)
    if batch.kv.device.type == "cuda":
        table = table.pin_memory()
    views: tuple[torch.Tensor, ...] = table.split([len(part) for part in parts])
    return views


def _on_host(numbers: list[int] | None) -> torch.Tensor:
    return torch.tensor(numbers, device="cpu")


def _split_bytes(heads: int, kv_heads: int, head_dim: int, packed: int, processors: int) -> int:
    """What a plan may take of the scratch memory, by the rules of FlashInfer's planner.

    Where it divides K it makes at most two blocks a processor, and takes for each block and each
    query head a tile of float32 outputs and what they were divided by.

    Args:
        heads: of queries.
        kv_heads: of K.
        head_dim: of both.
        packed: a row's queries on the average, times the query heads of a head of K.
        processors: of the device.
    """
    tile = 16 if packed <= 16 else 64 if packed <= 64 else 128
    return heads * (2 * processors // kv_heads) * tile * (head_dim + 1) * 4 + 1024


@dataclass(eq=False)
class _Plan:
    """A wrapper that has planned a batch."""

    wrapper: Any


class _Scratch:
    """What plans of one device and one of its streams use in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)
        # Wrappers that are not in use, the workspace of each, and when the device has its plan.
        self._idle: deque[tuple[Any, torch.Tensor, torch.cuda.Event]] = deque()

    def plan(self, num_bytes: int, **arguments: Any) -> _Plan:
        """Plans with a wrapper that is the plan's alone, until the plan is gone.

        Args:
            num_bytes: of scratch memory that it may need.
            arguments: what is planned.
        """
        wrapper = self._take(max(num_bytes, _WORKSPACE_BYTES))
        workspace, copied = self._workspace, torch.cuda.Event()
        wrapper.plan(**arguments)
        copied.record(torch.cuda.current_stream(self._device))
        plan = _Plan(wrapper)
        # What still runs by this plan runs before what the next one does: it is the same stream.
        weakref.finalize(plan, self._idle.append, (wrapper, workspace, copied)).atexit = False
        return plan

    def _take(self, num_bytes: int) -> Any:
        import flashinfer

        # Elsewhere they could not be written again, if these are made where inference is on.
        with torch.inference_mode(False):
            if self._workspace.numel() < num_bytes:
                self._workspace = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            while True:
                try:
                    wrapper, workspace, copied = self._idle.popleft()
                except IndexError:  # perhaps another thread was before this one
                    break
                if not copied.query():
                    self._idle.appendleft((wrapper, workspace, copied))
                    break
                if workspace is self._workspace:
                    return wrapper
            return flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend="fa2"
            )


_SCRATCH: dict[tuple[torch.device, int], _Scratch] = {}
"""By device and stream. Kept for good: a plan that is being copied must not lose its memory."""


def _scratch(device: torch.device) -> _Scratch:
    stream = torch.cuda.current_stream(device)
    key = stream.device, stream.cuda_stream
    found = _SCRATCH.get(key)
    if found is None:
        found = _SCRATCH.setdefault(key, _Scratch(stream.device))
    return found
