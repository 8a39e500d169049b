"""One case of test_attention_tails.py: attention over slots whose tails are not mapped.

    python attend_in_a_process.py CASE

These are kernels that are called by hand, since `vattention.attention` has no backend for them;
attend_by_backend.py has those of its backends, and takes from here what is right and how slots are
filled.

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
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import vattention as va

PASSED, FAILED, FAULTED, SKIPPED = 0, 1, 3, 77

ABOUT_TO_FAULT = "now one token beyond what is mapped"

DEVICE = os.environ.get("VATTENTION_TEST_DEVICE", "cuda")
"""The tests say nothing else. "cpu" is for trying these scripts themselves without a GPU."""

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
}

# Of the sum of all |p * v|. Rounding each p, and the output, costs half of this at most.
TOLERANCE = {
    torch.float32: 2**-10,  # products may be of TF32
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
    torch.float8_e4m3fn: 2**-3,
}


class WrongAnswer(AssertionError):
    """A kernel's output is not the reference's, or memory is not mapped as it should be."""


class Unsupported(Exception):
    """This torch, or this library, has no such kernel for such a shape."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise WrongAnswer(message)


# ---- what is right ----


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: bool,
    *,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float32, and the same over the magnitudes of the values.

    The last query is at the last key: a causal mask is aligned there. Over no keys it is zero.

    Args:
        query: ``[queries, heads, dim]``.
        keys: ``[length, kv_heads, dim]``; query heads in groups share one of them.
        values: ``[length, kv_heads, v_dim]``.
        causal: whether a query sees no keys behind its own position.
        window: how many keys a query sees, its own included.
        softcap: bound of the scores.
        sinks: ``[heads]``: scores that take weight and have no value.
        scale: factor on the scores.

    Returns:
        Two tensors ``[queries, heads, v_dim]``, in float32.
    """
    num_queries, heads, dim = query.shape
    length, kv_heads, v_dim = values.shape
    if length == 0:
        zero = torch.zeros(num_queries, heads, v_dim, device=query.device)
        return zero, zero
    grouped = query.float().reshape(num_queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("nhgd,lhd->hgnl", grouped, keys.float())
    scores *= dim**-0.5 if scale is None else scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    key = torch.arange(length, device=query.device)
    at = key[length - num_queries :, None]
    if causal:
        scores.masked_fill_(key > at, -torch.inf)
    if window is not None:
        scores.masked_fill_(key <= at - window, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., :length]
    both = (values.float(), values.float().abs())
    return tuple(torch.einsum("hgnl,lhd->nhgd", weights, x).flatten(1, 2) for x in both)


def expect_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: bool,
    what: str,
    *,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> None:
    """Raises WrongAnswer unless `output` is the attention, as exactly as its type allows.

    Args:
        output: what a kernel returned.
        query, keys, values, causal: see `attention`.
        what: begins the message.
        dtype: what the kernel computed in; by default the type of `query`.
        how: see `attention`.
    """
    shape = (*query.shape[:2], values.shape[-1])
    require(output.shape == shape, f"{what}: {tuple(output.shape)} instead of {shape}")
    want, magnitude = attention(query, keys, values, causal, **how)
    error = (output.float() - want).abs()
    allowed = TOLERANCE[dtype or query.dtype] * magnitude
    # NaN is not within anything.
    wrong = int((~(error <= allowed)).sum())
    require(
        wrong == 0,
        f"{what}: {wrong} of {error.numel()} elements are wrong, by {error.max():.3g} at most "
        f"where they are {want.abs().max():.3g} at most",
    )


# ---- sequences ----


def about_pages(page_tokens: int) -> list[int]:
    """Lengths on both sides of where pages end; one of them 0."""
    one, two = page_tokens, 2 * page_tokens
    return [one, 0, two + 1, 1, one - 1, two, one + 1, 600, two - 1]


class Filled:
    """Sequences of random keys and values, and what was written to them.

    Args:
        layout: what they lie in.
        lengths: of the sequences, from how many tokens a page holds.
        slack_tokens: readable beyond each length.
        tails: what the rest of the memory that is mapped is filled with; None: it stays zero.
        max_extent: as for an allocator.
        max_pages: how many a slot has addresses for.

    Attributes:
        kv: the allocator; nothing but what the lengths need is mapped in it.
        sequences: in the order of their lengths.
        page_tokens: whole tokens in a page.
        layers: the first and the last: whose keys begin, and whose values end, a row.
        unused_slot: has no sequence, and no memory.
    """

    def __init__(
        self,
        layout: va.KVLayout,
        *,
        lengths: Callable[[int], list[int]] = about_pages,
        slack_tokens: int = 0,
        tails: float | None = None,
        max_extent: int | None = None,
        max_pages: int = 4,
    ) -> None:
        pool = make_pool()
        self.page_tokens = layout.tokens_per_page(pool.page_bytes)
        wanted = lengths(self.page_tokens)
        self.kv = va.KVAllocator(
            layout,
            max_sequences=len(wanted) + 1,
            max_seq_len=max(max_pages * self.page_tokens, 1_024, max(wanted) + 1),
            pool=pool,
            lookahead_tokens=0,
            tail_slack_tokens=slack_tokens,
            max_extent=max_extent,
        )
        self.sequences = [self.kv.allocate(length) for length in wanted]
        self.unused_slot = len(wanted)
        require(
            self.unused_slot not in [seq.slot for seq in self.sequences],
            "slots are not taken in their order",
        )
        if slack_tokens == 0:
            self._expect_no_more_than_is_needed()
        self.layers = sorted({0, layout.num_layers - 1})
        self._random = torch.Generator(DEVICE).manual_seed(1)
        if tails is not None:
            self._fill_what_is_mapped(tails)
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

    def extend(self, seq: va.Sequence, length: int) -> None:
        """Lengthens a sequence, whose new tokens are random, to `length`."""
        start = seq.length
        self.kv.step({seq: length})
        layout = self.kv.layout
        for layer in self.layers:
            both = self._written[layer, seq]
            dims = layout.head_dim, layout.v_dim
            for tensor, old, dim in zip(self.kv.layer(layer), both, dims, strict=True):
                new = self.normal(length - start, layout.num_kv_heads, dim).to(layout.dtype)
                tensor[seq.slot, start:length] = new
                both = (*both[1:], torch.cat([old, new]))
            self._written[layer, seq] = both

    def expect_what_was_written(self) -> None:
        for (layer, seq), written in self._written.items():
            for tensor, wanted in zip(self.kv.layer(layer), written, strict=True):
                same = torch.equal(tensor[seq.slot, : len(wanted)], wanted)
                require(same, f"the memory of {seq}, layer {layer}, has changed")
        self.kv.check()

    def _write(self, layer: int, seq: va.Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        layout, length = self.kv.layout, seq.length
        k = self.normal(length, layout.num_kv_heads, layout.head_dim)
        v = self.normal(length, layout.num_kv_heads, layout.v_dim)
        # The tokens at the edges weigh about as much as all others, lest they be missed unnoticed.
        edges = {0, length - 1, self.page_tokens - 1, self.page_tokens, 2 * self.page_tokens - 1}
        for edge in edges:
            if 0 <= edge < length:
                v[edge] *= max(1.0, length / 4)
        if layout.itemsize == 1:  # whose largest number is 448
            v.clamp_(-256, 256)
        written = k.to(layout.dtype), v.to(layout.dtype)
        for tensor, values in zip(self.kv.layer(layer), written, strict=True):
            tensor[seq.slot, :length] = values
        return written

    def _fill_what_is_mapped(self, value: float) -> None:
        layout, mapped = self.kv.layout, self._mapped_bytes()
        for layer in self.layers:
            place = layout.placement(layer)
            regions = place.k_region, place.v_region
            for tensor, region in zip(self.kv.layer(layer), regions, strict=True):
                for seq in self.sequences:
                    rows = mapped.get((seq.slot, region), 0) // layout.row_bytes[region]
                    here = tensor[seq.slot, :rows]
                    here.copy_(torch.full(here.shape, value, device=DEVICE).to(layout.dtype))

    def _mapped_bytes(self) -> dict[tuple[int, int], int]:
        """By slot and region, without guards."""
        mapped: dict[tuple[int, int], int] = {}
        for slot, region, _, size, _, access in self.kv.mappings():
            if access == "read_write":
                mapped[slot, region] = mapped.get((slot, region), 0) + size
        return mapped

    def _expect_no_more_than_is_needed(self) -> None:
        page = self.kv.pool.page_bytes
        accesses = {mapping.access for mapping in self.kv.mappings()}
        require(accesses == {"read_write"}, "there is a guard where no slack was asked for")
        mapped = {place: size // page for place, size in self._mapped_bytes().items()}
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


def indexing(k, v, slots, lengths, queries, causal):
    """No attention kernel at all: plain reads of the slots."""
    return [
        attention(query, k[slot, :length], v[slot, :length], causal)[0].to(query.dtype)
        for slot, length, query in zip(slots, lengths, queries, strict=True)
    ]


def flash_dense(k, v, slots, lengths, queries, causal):
    """Torch's flash attention, a sequence after the other: no whole number of rows is needed."""
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


def ragged(seq: va.Sequence) -> int:
    """Several queries, another number for each slot, but never more than there are keys to see."""
    return min(max(seq.length, 1), 5 + 65 * seq.slot)


def square(seq: va.Sequence) -> int:
    """As many queries as keys: all that torch allows with a causal mask."""
    return seq.length


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How a kernel is to be tried.

    Attributes:
        attend: takes ``(k, v, slots, lengths, queries, causal)``, returns one output for each
            sequence.
        shortest: tokens; shorter sequences are left out.
        prefill: how many queries a sequence has in a prefill.
        groups: query heads for each head of K.
        layers: how many of the layers that were written are tried, from the last.
    """

    attend: Callable[..., list[torch.Tensor]]
    shortest: int = 0
    prefill: Callable[[va.Sequence], int] = ragged
    groups: tuple[int, ...] = (1, 4)
    layers: int = 2


KERNELS = {
    "indexing": Kernel(attend=indexing),
    "flash_dense": Kernel(attend=flash_dense, shortest=1),
    "sdpa_flash": Kernel(attend=sdpa(SDPBackend.FLASH_ATTENTION), shortest=1, prefill=square),
    # It takes no grouped heads.
    "sdpa_efficient": Kernel(
        attend=sdpa(SDPBackend.EFFICIENT_ATTENTION),
        shortest=1,
        prefill=square,
        groups=(1,),
    ),
    # It takes no single key, and makes a plan for each shape, which is slow.
    "sdpa_cudnn": Kernel(
        attend=sdpa(SDPBackend.CUDNN_ATTENTION),
        shortest=2,
        prefill=square,
        groups=(4,),
        layers=1,
    ),
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
    for layer, group in itertools.product(filled.layers[-kernel.layers :], kernel.groups):
        for seq in everyone:
            yield Call(layer=layer, num_queries={seq: 1}, group=group, causal=False)
            if (n := kernel.prefill(seq)) > 0:
                yield Call(layer=layer, num_queries={seq: n}, group=group, causal=True)


def tails(kernel: Kernel, layout: va.KVLayout) -> None:
    """Right answers, and no fault, over sequences that end everywhere about a page's end."""
    filled = Filled(layout)
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

    three = ("layer-bf16-128", "token-fp16-64", "token-bf16-128-padded")
    add("tails", tails, "flash_dense", "layer-fp16-64", "token-bf16-128-padded")
    add("tails", tails, "sdpa_flash", *three)
    add("tails", tails, "sdpa_efficient", *three)
    add("tails", tails, "sdpa_cudnn", *three)
    cases["tails-fa2_append-layer-bf16-128"] = lambda: appends(LAYOUTS["layer-bf16-128"])
    add("beyond", beyond, "indexing", "token-bf16-128")
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
    torch.manual_seed(1)  # each run of a case is the same
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
