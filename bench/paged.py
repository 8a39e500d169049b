"""What attention over slots is compared with: the same K and V in pages, and who reads those.

A cache has a quarter more pages than are used, and those of a sequence lie in random order, as
after some time in an engine; all layers share one table. Tables are as wide as is needed and made
before anything is timed, and what a library can plan ahead of its calls is planned then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vattention.attention.flash_attn_3 import FlashAttention3Vllm
from vattention.attention.reference import attention

from .common import Context

Call = Callable[[], torch.Tensor]

NO_PLAN = (0, 0)
OUR_PLAN = "with our plan"
_WORKSPACE_BYTES = 128 << 20


class Absent(Exception):
    """What it calls is not installed."""


@dataclass(frozen=True)
class Queries:
    """The last tokens of some sequences of one length, as many of each."""

    q: torch.Tensor  # [rows * queries, heads, dim]
    rows: int
    queries: int
    length: int
    # What our FlashAttention-3 backend asks its plan for here: parts, and multiprocessors left out.
    our_plan: tuple[int, int] = NO_PLAN

    @property
    def causal(self) -> bool:
        return self.queries > 1

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[-1])

    @property
    def starts(self) -> torch.Tensor:
        """int32 ``[rows + 1]``, on the host."""
        return torch.arange(self.rows + 1, dtype=torch.int32) * self.queries


class Pages:
    """K and V of each layer, ``[pages, page_tokens, heads, dim]``, and the table of pages."""

    def __init__(
        self,
        context: Context,
        packed: list[tuple[torch.Tensor, torch.Tensor]],
        page_tokens: int,
    ) -> None:
        rows, length, heads, dim = packed[0][0].shape
        assert length % page_tokens == 0
        used = rows * length // page_tokens
        order = torch.randperm(used + used // 4, device=context.device)[:used]
        self.page_tokens = page_tokens
        self.count = used + used // 4
        self.table = order.view(rows, -1).to(torch.int32)

        def scatter(tensor: torch.Tensor) -> torch.Tensor:
            pages = tensor.new_empty(self.count, page_tokens, heads, dim)
            pages[order] = tensor.view(-1, page_tokens, heads, dim)
            return pages

        self.layers = [(scatter(k), scatter(v)) for k, v in packed]


@dataclass(frozen=True)
class Peer:
    """A kernel that reads pages of so many tokens."""

    kernel: str
    page_tokens: int
    # Its version, and a call for each layer.
    bind: Callable[[Queries, Pages], tuple[str, list[Call]]]

    @property
    def place(self) -> str:
        return f"paged {self.page_tokens}"


def peers(context: Context, of: Queries) -> list[Peer]:
    """FA3 as vLLM calls it; and where our backend asks its plan for more, also with that."""
    if not context.cuda:
        return [Peer("torch", size, _torch) for size in (16, 64)]
    sizes = (16, 64, 128, 256) if of.causal else (16, 64, 256)
    flashinfer = _flashinfer_prefill if of.causal else _flashinfer_decode
    planned = [] if of.our_plan == NO_PLAN else sizes
    return [
        *(Peer("FA3", size, _fa3) for size in sizes),
        *(Peer(f"FA3 {OUR_PLAN}", size, _fa3_with_our_plan) for size in planned),
        Peer("FA2", 256, _fa2),
        Peer("FlashInfer", 16, flashinfer),
    ]


def _torch(of: Queries, pages: Pages) -> tuple[str, list[Call]]:
    """Gathers the pages of a sequence and computes as our backend for the host does."""

    def bind(k: torch.Tensor, v: torch.Tensor) -> Call:
        def row(i: int) -> torch.Tensor:
            used = pages.table[i].long()
            return attention(
                of.q[i * of.queries : (i + 1) * of.queries],
                k[used].flatten(0, 1),
                v[used].flatten(0, 1),
                causal=of.causal,
                scale=of.scale,
            )

        return lambda: torch.cat([row(i) for i in range(of.rows)])

    return torch.__version__, [bind(k, v) for k, v in pages.layers]


def _fa3_with_our_plan(of: Queries, pages: Pages) -> tuple[str, list[Call]]:
    return _fa3(of, pages, of.our_plan)


def _fa3(of: Queries, pages: Pages, asked: tuple[int, int] = NO_PLAN) -> tuple[str, list[Call]]:
    """vLLM's operator, called as vLLM does, its plan made ahead."""
    splits, margin = asked
    missing = FlashAttention3Vllm.missing()
    if missing:
        raise Absent(missing)
    operators = torch.ops._vllm_fa3_C
    device = of.q.device
    k = pages.layers[0][0]
    both: dict[str, Any] = {
        "cu_seqlens_q": of.starts.to(device),
        "seqused_k": torch.full((of.rows,), of.length, dtype=torch.int32, device=device),
        "max_seqlen_q": of.queries,
        "max_seqlen_k": of.length,
        "is_causal": of.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "num_splits": splits,
    }
    plan = _call_by_name(
        operators.get_scheduler_metadata.default,
        both
        | {
            "batch_size": of.rows,
            "num_heads": of.q.shape[1],
            "num_heads_k": k.shape[2],
            "headdim": k.shape[3],
            "headdim_v": k.shape[3],
            "qkv_dtype": of.q.dtype,
            "page_size": pages.page_tokens,
            "max_seqlen_k_new": 0,
            "has_softcap": False,
            "sm_margin": margin,
        },
    )()

    def bind(k: torch.Tensor, v: torch.Tensor) -> Call:
        call = _call_by_name(
            operators.fwd.default,
            both
            | {
                "q": of.q,
                "k": k,
                "v": v,
                "page_table": pages.table,
                "scheduler_metadata": plan,
                "softmax_scale": of.scale,
                "softcap": 0.0,
                "sm_margin": 0,
                "is_rotary_interleaved": True,
                "cp_world_size": 1,
                "cp_rank": 0,
            },
        )
        return lambda: call()[0]

    return FlashAttention3Vllm.namespace, [bind(k, v) for k, v in pages.layers]


def _call_by_name(operator: Any, given: dict[str, Any]) -> Callable[[], Any]:
    """Builds differ in what they take; what none of them is given is optional."""
    arguments = [given.get(argument.name) for argument in operator._schema.arguments]
    return lambda: operator(*arguments)


def _fa2(of: Queries, pages: Pages) -> tuple[str, list[Call]]:
    import flash_attn

    q = of.q.view(of.rows, of.queries, *of.q.shape[1:])
    lengths = torch.full((of.rows,), of.length, dtype=torch.int32, device=of.q.device)

    def bind(k: torch.Tensor, v: torch.Tensor) -> Call:
        def call() -> torch.Tensor:
            output = flash_attn.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, block_table=pages.table, causal=of.causal
            )
            return output.flatten(0, 1)

        return call

    return str(flash_attn.__version__), [bind(k, v) for k, v in pages.layers]


def _flashinfer_decode(of: Queries, pages: Pages) -> tuple[str, list[Call]]:
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(of), "NHD", use_tensor_cores=True
    )
    starts, indices, last = _flashinfer_table(of, pages)
    wrapper.plan(
        starts,
        indices,
        last,
        num_qo_heads=of.q.shape[1],
        num_kv_heads=pages.layers[0][0].shape[2],
        head_dim=of.q.shape[2],
        page_size=pages.page_tokens,
        q_data_type=of.q.dtype,
        kv_data_type=of.q.dtype,
    )
    return _flashinfer_calls(of, pages, wrapper)


def _flashinfer_prefill(of: Queries, pages: Pages) -> tuple[str, list[Call]]:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(of), "NHD", backend="fa3")
    starts, indices, last = _flashinfer_table(of, pages)
    wrapper.plan(
        of.starts,
        starts,
        indices,
        last,
        num_qo_heads=of.q.shape[1],
        num_kv_heads=pages.layers[0][0].shape[2],
        head_dim_qk=of.q.shape[2],
        page_size=pages.page_tokens,
        causal=of.causal,
        q_data_type=of.q.dtype,
        kv_data_type=of.q.dtype,
    )
    return _flashinfer_calls(of, pages, wrapper)


def _workspace(of: Queries) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=of.q.device)


def _flashinfer_table(of: Queries, pages: Pages) -> tuple[torch.Tensor, ...]:
    """Where rows' pages start, their numbers, and tokens on the last, all on the host."""
    of_a_row = pages.table.shape[1]
    starts = torch.arange(of.rows + 1, dtype=torch.int32) * of_a_row
    last = torch.full((of.rows,), pages.page_tokens, dtype=torch.int32)
    return starts, pages.table.flatten().cpu(), last


def _flashinfer_calls(of: Queries, pages: Pages, wrapper: Any) -> tuple[str, list[Call]]:
    import flashinfer

    def bind(k: torch.Tensor, v: torch.Tensor) -> Call:
        return lambda: wrapper.run(of.q, (k, v))

    return str(flashinfer.__version__), [bind(k, v) for k, v in pages.layers]
