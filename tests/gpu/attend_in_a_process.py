"""One case of test_attention_tails.py: attention over slots whose tails are not mapped.

    python attend_in_a_process.py CASE

A kernel that reads what is not mapped takes its CUDA context with it, so each case has a process of
its own. It prints what it does before it does it, and exits with one of the codes below.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import vattention as va

PASSED, FAILED, FAULTED, SKIPPED = 0, 1, 3, 77

ABOUT_TO_FAULT = "now one token beyond what is mapped"

DEVICE = "cuda"
FA3_LIBRARY = "VATTENTION_FA3"

LAYOUTS = {
    # 2,048 bytes a row: 1,024 tokens fill a page of 2 MiB.
    "layer-bf16-128": va.KVLayout(
        num_layers=2, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, order="layer"
    ),
    "layer-fp16-64": va.KVLayout(
        num_layers=2, num_kv_heads=16, head_dim=64, dtype=torch.float16, order="layer"
    ),
    # 8,192 bytes a row: 256 tokens.
    "token-bf16-128": va.KVLayout(
        num_layers=2, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, order="token"
    ),
    # 4,096 bytes a row: 512 tokens.
    "token-fp16-64": va.KVLayout(
        num_layers=4, num_kv_heads=4, head_dim=64, dtype=torch.float16, order="token"
    ),
    # 12,304 bytes a row: pages end inside of rows, and slots are not a whole number of rows.
    "token-bf16-128-padded": va.KVLayout(
        num_layers=3,
        num_kv_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        order="token",
        row_padding_bytes=16,
    ),
    # 65,536 bytes a row: 32 tokens, so that what a tile holds spans several pages.
    "token-bf16-128-wide": va.KVLayout(
        num_layers=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, order="token"
    ),
}

# Of the sum of all |p * v|. Rounding each p, and the output, costs half of this at most.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


class WrongAnswer(AssertionError):
    """A kernel's output is not the reference's, or memory is not mapped as it should be."""


class Unsupported(Exception):
    """This torch, or this library, has no such kernel for such a shape."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise WrongAnswer(message)


# ---- what is right ----


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float32, and the same over the magnitudes of the values.

    The last query is at the last key: a causal mask is aligned there. Over no keys it is zero.

    Args:
        query: ``[queries, heads, dim]``.
        keys: ``[length, kv_heads, dim]``; query heads in groups share one of them.
        values: the same.
        causal: whether a query sees no keys behind its own position.

    Returns:
        Two tensors like `query`, in float32.
    """
    num_queries, heads, dim = query.shape
    length, kv_heads, _ = keys.shape
    if length == 0:
        zero = torch.zeros_like(query, dtype=torch.float32)
        return zero, zero
    grouped = query.float().view(num_queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("nhgd,lhd->hgnl", grouped, keys.float()) / dim**0.5
    if causal:
        seen = torch.ones(num_queries, length, dtype=torch.bool, device=query.device)
        scores.masked_fill_(~seen.tril(length - num_queries), -torch.inf)
    weights = scores.softmax(-1)
    both = (values.float(), values.float().abs())
    return tuple(torch.einsum("hgnl,lhd->nhgd", weights, x).reshape(query.shape) for x in both)


def expect_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: bool,
    what: str,
) -> None:
    """Raises WrongAnswer unless `output` is the attention, as exactly as its type allows."""
    require(output.shape == query.shape, f"{what}: {output.shape} instead of {query.shape}")
    want, magnitude = attention(query, keys, values, causal)
    error = (output.float() - want).abs()
    allowed = TOLERANCE[query.dtype] * magnitude
    # NaN is not within anything.
    wrong = int((~(error <= allowed)).sum())
    require(
        wrong == 0,
        f"{what}: {wrong} of {error.numel()} elements are wrong, by {error.max():.3g} at most "
        f"where they are {want.abs().max():.3g} at most",
    )


# ---- sequences ----


class Filled:
    """Sequences of random keys and values, and what was written to them.

    Attributes:
        kv: the allocator; nothing but what the lengths need is mapped in it.
        sequences: of lengths on both sides of where pages end; one of them empty.
        page_tokens: whole tokens in a page.
    """

    def __init__(self, layout: va.KVLayout, slack_tokens: int = 0) -> None:
        pool = make_pool()
        self.page_tokens = tokens = layout.tokens_per_page(pool.page_bytes)
        self.kv = va.KVAllocator(
            layout,
            max_sequences=10,
            max_seq_len=max(4 * tokens, 1_024),
            pool=pool,
            lookahead_tokens=0,
            tail_slack_tokens=slack_tokens,
        )
        whole = (tokens, 2 * tokens)
        lengths = (whole[0], 0, whole[1] + 1, 1, whole[0] - 1, whole[1], whole[0] + 1, 600)
        self.sequences = [self.kv.allocate(length) for length in (*lengths, whole[1] - 1)]
        if slack_tokens == 0:
            self._expect_no_more_than_is_needed()
        # The layers whose keys begin, and whose values end, a row.
        self.layers = sorted({0, layout.num_layers - 1})
        self._random = torch.Generator(DEVICE).manual_seed(1)
        self._written = {
            (layer, seq): self._write(layer, seq) for layer in self.layers for seq in self.sequences
        }

    def written(self, layer: int, seq: va.Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        return self._written[layer, seq]

    def of_length(self, length: int) -> va.Sequence:
        return next(seq for seq in self.sequences if seq.length == length)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random, device=DEVICE)

    def append(self, layer: int, seq: va.Sequence, k: torch.Tensor, v: torch.Tensor) -> None:
        """Notes that a token was written to the end of a sequence."""
        keys, values = self._written[layer, seq]
        self._written[layer, seq] = torch.cat([keys, k[None]]), torch.cat([values, v[None]])

    def expect_what_was_written(self) -> None:
        for (layer, seq), written in self._written.items():
            for tensor, wanted in zip(self.kv.layer(layer), written, strict=True):
                same = torch.equal(tensor[seq.slot, : len(wanted)], wanted)
                require(same, f"the memory of {seq}, layer {layer}, has changed")
        self.kv.check()

    def _write(self, layer: int, seq: va.Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        layout, length = self.kv.layout, seq.length
        k, v = (self.normal(length, layout.num_kv_heads, layout.head_dim) for _ in range(2))
        # The tokens at the edges weigh about as much as all others, lest they be missed unnoticed.
        edges = {0, length - 1, self.page_tokens - 1, self.page_tokens, 2 * self.page_tokens - 1}
        for edge in edges:
            if 0 <= edge < length:
                v[edge] *= max(1.0, length / 4)
        written = k.to(layout.dtype), v.to(layout.dtype)
        for tensor, values in zip(self.kv.layer(layer), written, strict=True):
            tensor[seq.slot, :length] = values
        return written

    def _expect_no_more_than_is_needed(self) -> None:
        page = self.kv.pool.page_bytes
        mapped: dict[tuple[int, int], int] = {}
        for slot, region, _, size, _, access in self.kv.mappings():
            require(access == "read_write", "there is a guard where no slack was asked for")
            mapped[slot, region] = mapped.get((slot, region), 0) + size // page
        needed = {
            (seq.slot, region): pages
            for seq in self.sequences
            for region, pages in enumerate(self.kv.layout.pages(seq.length, page))
            if pages
        }
        require(mapped == needed, f"pages are mapped as {mapped}; the lengths need {needed}")


def make_pool() -> va.Pool:
    return va.Pool("4GiB", DEVICE, background=False)


# ---- kernels: each takes K and V of all slots, and for each sequence its queries ----


def whole_numbers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def running_sum(queries: list[torch.Tensor]) -> torch.Tensor:
    return whole_numbers([0, *itertools.accumulate(len(query) for query in queries)])


def indexing(k, v, slots, lengths, queries, causal):
    """No attention kernel at all: plain reads of the slots."""
    return [
        attention(query, k[slot, :length], v[slot, :length], causal)[0].to(query.dtype)
        for slot, length, query in zip(slots, lengths, queries, strict=True)
    ]


def flash_varlen(k, v, slots, lengths, queries, causal):
    """Torch's flash attention: slots are sequences that begin at multiples of their capacity."""
    starts = [slot * k.shape[1] for slot in slots]
    output = torch.ops.aten._flash_attention_forward.default(
        torch.cat(queries),
        k.view(-1, *k.shape[2:]),
        v.view(-1, *v.shape[2:]),
        running_sum(queries),
        whole_numbers([*starts, starts[-1] + k.shape[1]]),
        max(len(query) for query in queries),
        max(1, *lengths),  # with 0 it would not start the kernel
        0.0,
        causal,
        False,
        seqused_k=whole_numbers(lengths),
    )[0]
    return list(output.split([len(query) for query in queries]))


def flash_dense(k, v, slots, lengths, queries, causal):
    """The same, one sequence after the other; for slots that are not a whole number of rows."""
    return [
        torch.ops.aten._flash_attention_forward.default(
            query[None],
            k[slot : slot + 1, :length],
            v[slot : slot + 1, :length],
            None,
            None,
            len(query),
            length,
            0.0,
            causal,
            False,
        )[0][0]
        for slot, length, query in zip(slots, lengths, queries, strict=True)
    ]


def sdpa(backend: SDPBackend):
    """scaled_dot_product_attention, held to one of its backends."""

    def attend(k, v, slots, lengths, queries, causal):
        outputs = []
        for slot, length, query in zip(slots, lengths, queries, strict=True):
            try:
                with sdpa_kernel(backend):
                    output = torch.nn.functional.scaled_dot_product_attention(
                        query[None].transpose(1, 2),
                        k[slot : slot + 1, :length].transpose(1, 2),
                        v[slot : slot + 1, :length].transpose(1, 2),
                        is_causal=causal,
                        enable_gqa=query.shape[1] != k.shape[2],
                    )
            except RuntimeError as error:
                # Which shapes cuDNN takes depends on its version; the other two take all of these.
                if backend == SDPBackend.CUDNN_ATTENTION and is_refusal(error):
                    shape = f"{tuple(query.shape)} over {length}"
                    raise Unsupported(f"cuDNN takes no {shape}: {error}") from error
                raise
            outputs.append(output.transpose(1, 2)[0])
        return outputs

    return attend


def fa2(k, v, slots, lengths, queries, causal):
    """FlashAttention-2's decode, with the slots as an index into the batch."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise Unsupported(f"flash_attn cannot be imported: {error}") from error
    longest = max(lengths)
    if longest == 0:
        return [torch.zeros_like(query) for query in queries]
    output = flash_attn_with_kvcache(
        torch.stack(queries),
        k[:, :longest],
        v[:, :longest],
        cache_seqlens=whole_numbers(lengths),
        cache_batch_idx=whole_numbers(slots),
        causal=causal,
    )
    return list(output)


def fa3(k, v, slots, lengths, queries, causal):
    """FlashAttention-3, which loads whole tiles: it needs the slack."""
    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        torch.ops.load_library(os.environ[FA3_LIBRARY])
    longest = max(lengths)
    if longest == 0:
        return [torch.zeros_like(query) for query in queries]
    given = {
        "q": torch.cat(queries),
        "k": k[:, :longest],
        "v": v[:, :longest],
        "cu_seqlens_q": running_sum(queries),
        "seqused_k": whole_numbers(lengths),
        "max_seqlen_q": max(len(query) for query in queries),
        "max_seqlen_k": longest,
        "kv_batch_idx": whole_numbers(slots),
        "softmax_scale": k.shape[-1] ** -0.5,
        "is_causal": causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "is_rotary_interleaved": True,
        "num_splits": 0,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
    }
    # It has no defaults. What it has and we do not know of is optional, or else this fails.
    forward = torch.ops._vllm_fa3_C.fwd.default
    arguments = [given.pop(argument.name, None) for argument in forward._schema.arguments]
    require(not given, f"FA3 does not take {list(given)}: {forward._schema}")
    output = forward(*arguments)[0]
    return list(output.split([len(query) for query in queries]))


def ragged(seq: va.Sequence) -> int:
    """Several queries, another number for each slot, but never more than there are keys to see."""
    return min(max(seq.length, 1), 5 + 65 * seq.slot)


def square(seq: va.Sequence) -> int:
    """As many queries as keys: all that torch allows with a causal mask."""
    return seq.length


def four(seq: va.Sequence) -> int:
    """The same number for a whole batch; 0, which leaves it out, where that is too many."""
    return 4 if seq.length >= 4 else 0


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How a kernel is to be tried.

    Attributes:
        attend: takes ``(k, v, slots, lengths, queries, causal)``, returns one output for each
            sequence.
        batched: whether it takes several sequences in one call.
        shortest: tokens; shorter sequences are left out.
        prefill: how many queries a sequence has in a prefill.
        groups: query heads for each head of K.
        layers: how many of the layers that were written are tried, from the last.
        slack_tokens: tokens that it may read beyond a length.
    """

    attend: Callable[..., list[torch.Tensor]]
    batched: bool = True
    shortest: int = 0
    prefill: Callable[[va.Sequence], int] = ragged
    groups: tuple[int, ...] = (1, 4)
    layers: int = 2
    slack_tokens: int = 0


KERNELS = {
    "indexing": Kernel(attend=indexing, batched=False),
    "flash_varlen": Kernel(attend=flash_varlen),
    "flash_dense": Kernel(attend=flash_dense, batched=False, shortest=1),
    "sdpa_flash": Kernel(
        attend=sdpa(SDPBackend.FLASH_ATTENTION), batched=False, shortest=1, prefill=square
    ),
    # It takes no grouped heads.
    "sdpa_efficient": Kernel(
        attend=sdpa(SDPBackend.EFFICIENT_ATTENTION),
        batched=False,
        shortest=1,
        prefill=square,
        groups=(1,),
    ),
    # It takes no single key, and makes a plan for each shape, which is slow.
    "sdpa_cudnn": Kernel(
        attend=sdpa(SDPBackend.CUDNN_ATTENTION),
        batched=False,
        shortest=2,
        prefill=square,
        groups=(4,),
        layers=1,
    ),
    "fa2": Kernel(attend=fa2, prefill=four),
    "fa3": Kernel(attend=fa3, slack_tokens=256),
}


# ---- cases ----


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a kernel: how many queries each sequence has, and how many heads a head of K."""

    layer: int
    num_queries: dict[va.Sequence, int]
    group: int
    causal: bool

    def run(self, filled: Filled, kernel: Kernel, more_tokens: int = 0) -> None:
        """Attends, and compares; tells the kernel that sequences are longer by `more_tokens`."""
        layout, batch = filled.kv.layout, list(self.num_queries)
        shape = self.group * layout.num_kv_heads, layout.head_dim
        queries = [filled.normal(n, *shape).to(layout.dtype) for n in self.num_queries.values()]
        lengths = [seq.length + more_tokens for seq in batch]
        what = (
            f"layer {self.layer}, {shape[0]} heads, {'causal' if self.causal else 'decode'}, "
            f"queries {[len(query) for query in queries]} over lengths {lengths}"
        )
        print(what, flush=True)
        k, v = filled.kv.layer(self.layer)
        slots = [seq.slot for seq in batch]
        outputs = kernel.attend(k, v, slots, lengths, queries, self.causal)
        synchronize()  # a fault shows here, and not in the next call
        for seq, query, output in zip(batch, queries, outputs, strict=True):
            keys, values = filled.written(self.layer, seq)
            expect_attention(output, query, keys, values, self.causal, f"{what}: {seq}")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def calls(filled: Filled, kernel: Kernel) -> Iterator[Call]:
    everyone = [seq for seq in filled.sequences if seq.length >= kernel.shortest]
    batches = [[seq] for seq in everyone]
    if kernel.batched:  # in the order of the slots, and in another
        batches = [everyone, everyone[::-1], *batches]
    for layer, group in itertools.product(filled.layers[-kernel.layers :], kernel.groups):
        for batch in batches:
            yield Call(layer=layer, num_queries=dict.fromkeys(batch, 1), group=group, causal=False)
            several = {seq: n for seq in batch if (n := kernel.prefill(seq)) > 0}
            if several:
                yield Call(layer=layer, num_queries=several, group=group, causal=True)


def tails(kernel: Kernel, layout: va.KVLayout) -> None:
    """Right answers, and no fault, over sequences that end everywhere about a page's end."""
    filled = Filled(layout, kernel.slack_tokens)
    if kernel.slack_tokens >= filled.page_tokens:
        guarded = {slot for slot, *_, access in filled.kv.mappings() if access == "read"}
        require(filled.of_length(1).slot in guarded, "a short sequence has no guard")
    done = {False: 0, True: 0}
    why = ""
    for call in calls(filled, kernel):
        try:
            call.run(filled, kernel)
            done[call.causal] += 1
        except Unsupported as error:
            why = str(error)
            print(f"unsupported: {why}", flush=True)
    filled.expect_what_was_written()
    print(f"{done[False]} decodes and {done[True]} prefills", flush=True)
    if not all(done.values()):
        raise Unsupported(why)


def appends(layout: va.KVLayout) -> None:
    """FlashAttention-2 writes a token to the end of each sequence, and attends to it."""
    filled = Filled(layout)
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise Unsupported(f"flash_attn cannot be imported: {error}") from error
    kv, batch = filled.kv, filled.sequences
    before = [seq.length for seq in batch]
    kv.step({seq: seq.length + 1 for seq in batch})
    shape = len(batch), 1, layout.num_kv_heads, layout.head_dim
    for layer in filled.layers:
        k, v = kv.layer(layer)
        new_k, new_v = (filled.normal(*shape).to(layout.dtype) for _ in range(2))
        query = filled.normal(len(batch), 1, 4 * layout.num_kv_heads, layout.head_dim)
        query = query.to(layout.dtype)
        what = f"append to lengths {before}, layer {layer}"
        print(what, flush=True)
        outputs = flash_attn_with_kvcache(
            query,
            k[:, : max(before) + 1],
            v[:, : max(before) + 1],
            k=new_k,
            v=new_v,
            cache_seqlens=whole_numbers(before),
            cache_batch_idx=whole_numbers([seq.slot for seq in batch]),
            causal=True,
        )
        synchronize()
        for i, seq in enumerate(batch):
            filled.append(layer, seq, new_k[i, 0], new_v[i, 0])
            keys, values = filled.written(layer, seq)
            expect_attention(outputs[i], query[i], keys, values, True, f"{what}: {seq}")
    filled.expect_what_was_written()


def beyond(kernel: Kernel, layout: va.KVLayout) -> None:
    """Reads one token more than is mapped. It must not come back from that."""
    filled = Filled(layout)
    seq = filled.of_length(filled.page_tokens)  # its page is full: the next token has no memory
    call = Call(
        layer=filled.layers[-1], num_queries={seq: 1}, group=kernel.groups[-1], causal=False
    )
    call.run(filled, kernel)
    print(ABOUT_TO_FAULT, flush=True)
    call.run(filled, kernel, more_tokens=1)


def _cases() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[[], None]] = {}

    def add(kind: str, run: Callable[..., None], kernel: str, *layouts: str) -> None:
        for name in layouts:
            given = (KERNELS[kernel], LAYOUTS[name])
            cases[f"{kind}-{kernel}-{name}"] = lambda given=given: run(*given)

    whole_rows = ("layer-bf16-128", "layer-fp16-64", "token-bf16-128", "token-fp16-64")
    three = ("layer-bf16-128", "token-fp16-64", "token-bf16-128-padded")
    add("tails", tails, "flash_varlen", *whole_rows)
    add("tails", tails, "flash_dense", "layer-fp16-64", "token-bf16-128-padded")
    add("tails", tails, "sdpa_flash", *three)
    add("tails", tails, "sdpa_efficient", *three)
    add("tails", tails, "sdpa_cudnn", *three)
    add("tails", tails, "fa2", "layer-bf16-128", "token-bf16-128-padded")
    cases["tails-fa2_append-layer-bf16-128"] = lambda: appends(LAYOUTS["layer-bf16-128"])
    add("tails", tails, "fa3", "layer-bf16-128", "token-bf16-128", "token-bf16-128-wide")
    add("beyond", beyond, "indexing", "token-bf16-128")
    add("beyond", beyond, "flash_varlen", "layer-bf16-128", "token-bf16-128")
    add("beyond", beyond, "sdpa_flash", "token-fp16-64")
    add("beyond", beyond, "sdpa_efficient", "layer-bf16-128")
    add("beyond", beyond, "sdpa_cudnn", "layer-bf16-128")
    return cases


CASES = _cases()


def is_fault(error: Exception) -> bool:
    """Whether it is how CUDA says that a kernel touched what it must not."""
    text = str(error)
    words = ("illegal memory access", "illegal instruction", "unspecified launch failure")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def is_refusal(error: Exception) -> bool:
    """Whether it is how torch, or cuDNN, says that it has no kernel for such a shape."""
    words = ("No available kernel", "No viable backend", "No valid", "No execution plan")
    return any(word in str(error) for word in words)


def main() -> int:
    try:
        with torch.no_grad():
            CASES[sys.argv[1]]()
    except Unsupported as why:
        print("skipped:", " ".join(str(why).split()), flush=True)
        return SKIPPED
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        return FAULTED if is_fault(error) else FAILED
    print("passed", flush=True)
    return PASSED


if __name__ == "__main__":
    sys.exit(main())
