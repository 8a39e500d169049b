"""What a kernel needs of memory and can compute, as data; and what there is, held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vattention.allocator import KVAllocator
from vattention.config import check_bool, check_int, check_number
from vattention.errors import ConfigError

__all__ = ["Needs", "Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What attention is to be computed; the same for all calls of a model's layer.

    Attributes:
        num_heads: query heads; a multiple of the layout's K and V heads.
        causal: whether a query sees nothing behind its own position. The last query of a row is
            its last token.
        window: how many tokens a query sees, itself included; None: all before it.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0: they do not.
        sinks: whether each query head has a learned logit that takes weight and has no value.
        scale: factor on the scores, above 0; None: ``head_dim ** -0.5``.

    Raises:
        ConfigError: an argument is out of range.
    """

    num_heads: int
    causal: bool = True
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        """Checks every argument, and keeps numbers of other libraries as Python's own."""
        self._keep("num_heads", check_int(self.num_heads, name="num_heads", minimum=1))
        if self.window is not None:
            window = check_int(self.window, name="window", minimum=1, maximum=2**31 - 1)
            self._keep("window", window)
            if not self.causal:
                raise ConfigError("a window looks back from each query: it needs causal=True")
        self._keep("softcap", check_number(self.softcap, name="softcap", minimum=0))
        for name in ("causal", "sinks"):
            check_bool(getattr(self, name), name=name)
        if self.scale is not None:
            scale = check_number(self.scale, name="scale")
            if scale <= 0:  # kernels mask by minus infinity before they scale
                raise ConfigError(f"scale must be above 0; got {scale}")
            self._keep("scale", scale)

    def _keep(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a backend's kernels need, and what they know.

    Attributes:
        device: "cuda", or "cpu".
        capabilities: compute capabilities that have the kernel, as (major, minor) from the first
            to before the second; None: any.
        dtypes: of K, V and the queries.
        head_dims: the largest head, and what a head's size must be a multiple of.
        v_head_dims: which sizes of V's heads may differ from K's: for heads of K from the first
            to the second, heads of V from the third to the fourth.
        v_head_dims_8bit: the same where K and V are of 8 bits; None: no others.
        tail_slack_tokens: tokens behind a length that are loaded though they do not count, so
            that something must be mapped there. Only where the tensor that is handed over ends
            behind that length: one sequence alone can be handed over exactly.
        tail_slack_tokens_8bit: the same where K and V are of 8 bits, if it is more.
        finite_tail: whether what is loaded there must be finite.
        whole_rows: whether slots must be a whole number of rows apart, as many in K as in V,
            because the kernel takes where they start in rows.
        equal_strides: whether K and V must have the same strides.
        max_tokens: slots times their rows must stay below this, where the kernel counts rows with
            that many numbers; None: no limit that matters.
        max_elements: a slot's rows times the elements from one to the next must not be more than
            this, where the kernel finds the tokens of a sequence with that many numbers.
        max_slot_bytes: from one slot to the next it must be less than this.
        front_slack_tokens: where it has a window, tokens below it that are loaded though they do
            not count: keep so many mapped when memory below a window is given back.
        window: whether it has sliding windows.
        softcap: whether it has a softcap.
        sinks: whether it has sinks.
        max_heads_with_sinks: the most query heads where there are sinks; None: as many as without.
        equal_heads_with_sinks: whether heads of V must be of K's size where there are sinks.
        max_query_elements: a batch's queries times their heads times the heads' size must stay
            below this, where the kernel finds queries with that many numbers.
        graph_safe: whether a CUDA graph of it serves other lengths than those at its capture.
        host_lengths: whether it plans on the host, from lengths that the host must know.
        splits_by_capacity: whether it divides its work by the length that it is told and not by
            the lengths that are: a bound far above them is slow.
        alignment_bytes: of addresses and strides.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, int]
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None = None
    v_head_dims: tuple[tuple[int, int, int, int], ...] = ()
    v_head_dims_8bit: tuple[tuple[int, int, int, int], ...] | None = None
    tail_slack_tokens: int = 0
    tail_slack_tokens_8bit: int = 0
    finite_tail: bool = False
    whole_rows: bool = False
    equal_strides: bool = False
    max_tokens: int | None = None
    max_elements: int | None = None
    max_slot_bytes: int | None = None
    max_query_elements: int | None = None
    front_slack_tokens: int = 0
    window: bool = True
    softcap: bool = False
    sinks: bool = False
    max_heads_with_sinks: int | None = None
    equal_heads_with_sinks: bool = False
    graph_safe: bool = True
    host_lengths: bool = False
    splits_by_capacity: bool = False
    alignment_bytes: int = 16

    def tail_slack_of(self, dtype: torch.dtype) -> int:
        """Tokens behind a length that are loaded where K and V have that dtype."""
        if dtype.itemsize > 1:
            return self.tail_slack_tokens
        return max(self.tail_slack_tokens, self.tail_slack_tokens_8bit)

    def _v_head_dims_of(self, dtype: torch.dtype) -> tuple[tuple[int, int, int, int], ...]:
        if dtype.itemsize == 1 and self.v_head_dims_8bit is not None:
            return self.v_head_dims_8bit
        return self.v_head_dims

    def unmet_by(self, kv: KVAllocator, options: Options) -> list[str]:
        """Why these kernels cannot run over that allocator's memory; empty if they can.

        Tail slack is not among it: whether it matters depends on the batch, see
        :meth:`slack_unmet_by`.
        """
        layout, reasons = kv.layout, []
        if kv.device.type != self.device:
            return [f"it runs on {self.device}, the memory is on {kv.device}"]
        if self.device == "cuda" and self.capabilities is not None:
            first, end = self.capabilities
            device = torch.cuda.get_device_capability(kv.device)
            if not first <= device < end:
                reasons.append(
                    f"it has kernels for compute capability {first[0]}.{first[1]} to below "
                    f"{end[0]}.{end[1]}, the device has {device[0]}.{device[1]}"
                )
            if layout.dtype is torch.bfloat16 and device < (8, 0):
                reasons.append("bfloat16 needs compute capability 8.0")
        if layout.dtype not in self.dtypes:
            reasons.append(f"it takes {_names(self.dtypes)}, not {layout.dtype}")
        largest, multiple = self.head_dims
        if layout.head_dim > largest or layout.head_dim % multiple:
            reasons.append(
                f"it takes heads of up to {largest} in multiples of {multiple}, not "
                f"{layout.head_dim}"
            )
        if layout.is_latent:
            reasons.append("it has no kernel for a latent that is K and V at once")
        elif layout.v_dim != layout.head_dim and not any(
            k_from <= layout.head_dim <= k_to and v_from <= layout.v_dim <= v_to
            for k_from, k_to, v_from, v_to in self._v_head_dims_of(layout.dtype)
        ):
            reasons.append(f"V must have heads of {layout.head_dim} as K has, not {layout.v_dim}")
        elif options.sinks and self.equal_heads_with_sinks and layout.v_dim != layout.head_dim:
            reasons.append(
                f"with sinks V must have heads of {layout.head_dim} as K has, not {layout.v_dim}"
            )
        most = self.max_heads_with_sinks
        if options.sinks and most is not None and options.num_heads > most:
            reasons.append(f"with sinks it takes up to {most} query heads, not {options.num_heads}")
        for wanted, has, name in (
            (options.window is not None, self.window, "sliding windows"),
            (options.softcap > 0, self.softcap, "a softcap"),
            (options.sinks, self.sinks, "sinks"),
        ):
            if wanted and not has:
                reasons.append(f"it has not {name}")
        if options.num_heads % layout.num_kv_heads:
            reasons.append(
                f"{options.num_heads} query heads cannot share {layout.num_kv_heads} heads of K"
            )
        return reasons + self._strides_unmet_by(kv)

    def _strides_unmet_by(self, kv: KVAllocator) -> list[str]:
        reasons = []
        item = kv.layout.itemsize
        for layer in _distinct_layers(kv):
            k, v = kv.layer_specs(layer)
            if self.equal_strides and k.strides != v.strides:
                reasons.append("K and V must lie in rows of the same size")
            if self.whole_rows and k.strides[0] * v.strides[1] != v.strides[0] * k.strides[1]:
                reasons.append("slots must have as many rows of K as of V")
            for spec in (k, v):
                slot, row = spec.strides[:2]
                if self.whole_rows and slot % row:
                    reasons.append(
                        f"slots must be a whole number of rows apart; here a slot has {slot * item}"
                        f" bytes, a row {row * item}: choose row_padding_bytes or layers_per_row "
                        "so that a row divides the page"
                    )
                tokens = kv.max_sequences * -(-slot // row)
                if self.max_tokens is not None and tokens >= self.max_tokens:
                    reasons.append(
                        f"it numbers tokens up to {self.max_tokens:,}, here are {tokens:,}: lower "
                        "max_sequences or max_seq_len"
                    )
                elements = kv.max_seq_len * row
                if self.max_elements is not None and elements > self.max_elements:
                    reasons.append(
                        f"it computes offsets up to {self.max_elements:,} elements in a sequence, "
                        f"here are {elements:,}: lower max_seq_len, or choose an order whose rows "
                        "are shorter"
                    )
                if self.max_slot_bytes is not None and slot * item >= self.max_slot_bytes:
                    reasons.append(
                        f"slots must be less than {self.max_slot_bytes:,} bytes apart, here they "
                        f"are {slot * item:,}: lower max_seq_len, or choose an order whose rows "
                        "are shorter"
                    )
                if any(stride * item % self.alignment_bytes for stride in spec.strides[:3]):
                    reasons.append(f"strides must be multiples of {self.alignment_bytes} bytes")
        return list(dict.fromkeys(reasons))

    def slack_unmet_by(self, kv: KVAllocator, exact: bool) -> list[str]:
        """Why tails are not fit for these kernels; empty if they are.

        Args:
            kv: the allocator.
            exact: whether every tensor that is handed over ends at its sequence's length.
        """
        reasons = []
        needed = self.tail_slack_of(kv.layout.dtype)
        if not exact and kv.tail_slack_tokens < needed:
            reasons.append(
                f"it loads up to {needed} tokens behind a length, and only {kv.tail_slack_tokens} "
                f"are mapped: make the KVAllocator with tail_slack_tokens={needed}"
            )
        if self.finite_tail and not kv.pool.zero:
            reasons.append(
                "what lies behind a length must be finite, and this pool is not cleared: make the "
                "Pool with zero=True"
            )
        return reasons


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _distinct_layers(kv: KVAllocator) -> range:
    """The first and the last: all others lie in rows like the first's."""
    last = kv.layout.num_layers - 1
    return range(0, last + 1, max(last, 1))
