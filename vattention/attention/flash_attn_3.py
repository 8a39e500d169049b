"""FlashAttention-3, for Hopper, from whichever of its builds is installed.

All of them register one operator with the same arguments, less or more:

- `flash_attn_3`: the package built from FlashAttention's `hopper/` folder;
- `fa3_fwd`: the same, forward only, as a wheel;
- vLLM's `_vllm_fa3_C`, from an installed vLLM, or from the file that `VATTENTION_FA3` names.

It loads whole tiles by TMA: behind a length something must be mapped, and be finite. The longest
tiles that hopper/tile_size.h names are of 192 tokens, of 224 in 8 bits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from vattention.allocator import KVAllocator
from vattention.attention.backend import Backend, Scales
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs, Options

__all__ = ["LIBRARY", "FlashAttention3", "FlashAttention3Forward", "FlashAttention3Vllm"]

LIBRARY = "VATTENTION_FA3"
"""The variable that names a file which registers vLLM's operator."""


class _FlashAttention3(Backend):
    """The operator `fwd`, with an index of slots.

    Attributes:
        namespace: where its build registers operators.
        build: how a reader would find it.
        has_even_rows: whether it has the kernels for rows of one length, which are faster in 16
            bits.
    """

    namespace: ClassVar[str]
    build: ClassVar[str]
    has_even_rows: ClassVar[bool] = True

    @classmethod
    def missing(cls) -> str | None:
        """Its build."""
        try:
            return None if _is_loaded(cls) else f"{cls.build} is not installed"
        except Exception as error:  # built for another torch, say: they raise what they like
            return f"{cls.build} cannot be loaded: {type(error).__name__}: {error}"

    @classmethod
    @abstractmethod
    def _load(cls) -> bool:
        """Registers the operator if its build is here, and says whether it is."""

    def __init__(self, kv: KVAllocator, options: Options) -> None:
        super().__init__(kv, options)
        _is_loaded(type(self))
        self._op = getattr(torch.ops, self.namespace).fwd.default
        self._plan_op = getattr(torch.ops, self.namespace).get_scheduler_metadata.default
        self._at = {argument.name: i for i, argument in enumerate(self._op._schema.arguments)}
        self._plan_parameters = [argument.name for argument in self._plan_op._schema.arguments]
        self._multiprocessors = torch.cuda.get_device_properties(kv.device).multi_processor_count
        self._constant: dict[str, Any] = {
            "softmax_scale": self.scale,
            "window_size_left": self.window[0],
            "window_size_right": self.window[1],
            "attention_chunk": 0,
            "softcap": options.softcap,
            "is_rotary_interleaved": True,
            "num_splits": 0,
            "sm_margin": 0,
            "cp_world_size": 1,
            "cp_rank": 0,
        }

    @property
    def version(self) -> str:
        """Which build it is; none of them says more."""
        return self.namespace

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
        key = (self, k.shape[1])
        is_even, prepared = batch.derived(key, lambda: self._prepare(q, k, v, batch))
        given = prepared.copy()
        at = self._at
        given[at["q"]] = q.view(batch.num_rows, batch.max_queries, *q.shape[1:]) if is_even else q
        given[at["k"]], given[at["v"]] = k, v
        if sinks is not None:
            given[at["s_aux"]] = sinks.to(torch.bfloat16).contiguous()
        if scales is not None:
            given[at["q_descale"]] = scales.q
            given[at["k_descale"]] = scales.k
            given[at["v_descale"]] = scales.v
        output: torch.Tensor = self._op(*given)[0]
        return output.flatten(0, 1) if is_even else output

    def _prepare(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> tuple[bool, list[Any]]:
        """Whether rows are even; and the arguments but for those that each layer has its own of."""
        given = self._constant | {"kv_batch_idx": batch.slots, "is_causal": self.is_causal(batch)}
        # In 8 bits they have not been measured.
        is_even = self.has_even_rows and k.dtype.itemsize > 1 and _are_even(batch, k.shape[1])
        if not is_even:
            given |= self._ragged(q, k, v, batch)
        # By name, since builds differ in what they take; what none of them is given is optional.
        return is_even, [given.get(name) for name in self._at]

    def _ragged(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> dict[str, Any]:
        """What the operator is told of rows of different lengths."""
        splits, margin = self._splits(batch)
        return {
            "cu_seqlens_q": batch.query_starts,
            "seqused_k": batch.lengths,
            "max_seqlen_q": batch.max_queries,
            "max_seqlen_k": k.shape[1],
            "num_splits": splits,
            "scheduler_metadata": self._plan(q, k, v, batch, splits, margin),
        }

    def _splits(self, batch: Batch) -> tuple[int, int]:
        """The most parts of a row (0: as the operator thinks), and what the plan leaves out.

        The plan keeps a tenth of them in reserve, against rows of unequal lengths. A single row
        has none to be unequal to, so for it the reserve is taken back. What that gives is in
        bench/results: pages with this plan, and without it.
        """
        if batch.num_rows > 1 or batch.max_queries > 1:
            return 0, 0
        return self._multiprocessors // self.layout.num_kv_heads + 1, -(self._multiprocessors // 14)

    def _plan(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
        splits: int,
        margin: int,
    ) -> torch.Tensor:
        """How the work is split, on the device; the operator does it in every layer otherwise."""
        given = self._constant | {
            "batch_size": batch.num_rows,
            "max_seqlen_q": batch.max_queries,
            "max_seqlen_k": k.shape[1],
            "num_heads": q.shape[1],
            "num_heads_k": k.shape[2],
            "headdim": k.shape[3],
            "headdim_v": v.shape[3],
            "qkv_dtype": q.dtype,
            "seqused_k": batch.lengths,
            "cu_seqlens_q": batch.query_starts,
            "max_seqlen_k_new": 0,
            "is_causal": self.is_causal(batch),
            "has_softcap": self.options.softcap > 0,
            "num_splits": splits,
            "sm_margin": margin,
        }
        plan: torch.Tensor = self._plan_op(*[given.get(name) for name in self._plan_parameters])
        return plan


_HOPPER = ((9, 0), (10, 0))
_NEEDS = Needs(
    device="cuda",
    capabilities=_HOPPER,
    dtypes=(torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    head_dims=(256, 8),
    # As hopper/flash_api.cpp says.
    v_head_dims=((1, 64, 1, 512), (129, 192, 97, 128)),
    v_head_dims_8bit=((1, 64, 1, 64), (129, 192, 97, 128)),
    tail_slack_tokens=192,
    tail_slack_tokens_8bit=224,
    front_slack_tokens=224,
    finite_tail=True,
    max_tokens=2**31,
    max_slot_bytes=2**40,  # of a stride, in what describes a tensor to TMA
    softcap=True,
)


class FlashAttention3(_FlashAttention3):
    """The package that is built from FlashAttention's `hopper/` folder."""

    name = "fa3"
    namespace = "flash_attn_3"
    build = "the package flash_attn_3 (built from FlashAttention's folder hopper/)"
    needs = _NEEDS

    @classmethod
    def _load(cls) -> bool:
        return _import("flash_attn_3")


class FlashAttention3Forward(_FlashAttention3):
    """The wheel `fa3-fwd`: built without half precision, and without windows."""

    name = "fa3_fwd"
    namespace = "fa3_fwd"
    build = "the package fa3-fwd"
    needs = replace(_NEEDS, dtypes=(torch.bfloat16, torch.float8_e4m3fn), window=False)

    @classmethod
    def _load(cls) -> bool:
        return _import("fa3_fwd")


class FlashAttention3Vllm(_FlashAttention3):
    """The one inside vLLM: it has sinks."""

    name = "fa3_vllm"
    namespace = "_vllm_fa3_C"
    build = f"_vllm_fa3_C (of the package vllm, or of the file that {LIBRARY} names)"
    has_even_rows = False
    needs = replace(_NEEDS, sinks=True, max_heads_with_sinks=64, equal_heads_with_sinks=True)

    @classmethod
    def _load(cls) -> bool:
        path = os.environ.get(LIBRARY)
        if not path:
            # Its folder, without importing vLLM, which takes seconds.
            spec = importlib.util.find_spec("vllm")
            folders = [] if spec is None else spec.submodule_search_locations or []
            files = [
                file
                for folder in folders
                for file in Path(folder, "vllm_flash_attn").glob("_vllm_fa3_C*.so")
            ]
            if not files:
                return False
            path = str(files[0])
        torch.ops.load_library(path)
        return True


def _are_even(batch: Batch, length: int) -> bool:
    """Whether all rows have one length, that of K, and one number of queries, more than one.

    A graph would hold that length, and a row of one query is as fast in any kernel.
    """
    lengths, queries = batch.host_lengths, batch.host_queries
    if lengths is None or batch.max_queries == 1 or batch.is_captured:
        return False
    return lengths == [length] * len(lengths) and queries == queries[:1] * len(queries)


def _import(package: str) -> bool:
    if importlib.util.find_spec(package) is None:
        return False
    importlib.import_module(f"{package}._C")
    return True


@functools.cache
def _is_loaded(cls: type[_FlashAttention3]) -> bool:
    def is_registered() -> bool:
        return hasattr(getattr(torch.ops, cls.namespace), "fwd")

    return is_registered() or (cls._load() and is_registered())
