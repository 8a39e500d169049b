"""Where each byte of a KV cache lies: pure arithmetic, no memory.

The terms, from small to large:

- A *component* is one token's K, or V, of one layer: ``[num_kv_heads, head_dim]``, packed.
- A *row* is what one token occupies contiguously in a region: one or more components.
- A *slot* is the rows of one sequence, token after token.
- A *region* is an array of slots, one for each sequence. A layout has one or more.

What is always true: components start at multiples of `ALIGNMENT_BYTES` and never overlap; row and
slot strides are multiples of it too; a slot starts at the start of a page, and rows need not divide
pages. One token's row has the same number in every region, so growing a sequence by a token grows
its slot in each region by one row.

What a row holds is a choice between small sequences and fast reading. ``order="layer"`` gives each
layer's K, and each layer's V, a region of its own: what a kernel reads is dense, and a sequence
holds at least one page in each region. ``order="token"`` puts K and V of several layers, all unless
fewer are asked for, into a row: a page then holds few tokens of many layers, which suits short
sequences and costs kernels some per cent. ``order="balanced"``, the default, puts several layers'
K into a row and their V into another, as many as fit `BALANCED_ROW_BYTES`: kernels read it about
as fast as packed tensors, and a sequence holds a fraction of the pages that layer order needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from vattention.config import MAX_BYTES, check_int, format_bytes
from vattention.errors import ConfigError

__all__ = [
    "ALIGNMENT_BYTES",
    "BALANCED_ROW_BYTES",
    "Geometry",
    "KVLayout",
    "Order",
    "Placement",
    "TensorSpec",
]

Order = Literal["balanced", "layer", "token"]

ALIGNMENT_BYTES = 16
"""Kernels that load by TMA need bases and strides that are multiples of this."""

BALANCED_ROW_BYTES = 8192
"""The longest row of balanced order unless another number of layers is asked for: of rows of 2 to
128 KiB, with K and V apart or together, padded or not, the longest that kernels read about as fast
as packed tensors. How fast that is: bench/results, attention."""

_MAX_LAYERS = 2**20

# By name, since which of the 8-bit floats exist depends on the version of torch.
_DTYPE_NAMES = (
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "int32",
    "int16",
    "int8",
    "uint8",
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a layer's components lie in a row.

    Attributes:
        k_region: index of the region that holds K.
        k_offset_bytes: start of K in a row of that region.
        v_region: index of the region that holds V.
        v_offset_bytes: start of V in a row of that region. The V of a latent has no bytes; its
            offset is the end of K, rounded up to `ALIGNMENT_BYTES`, in K's region.
    """

    k_region: int
    k_offset_bytes: int
    v_region: int
    v_offset_bytes: int


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where slots lie in a reservation, whose regions stand back to back.

    Attributes:
        region_offsets_bytes: start of each region; a multiple of the page.
        slot_strides_bytes: for each region, from one slot to the next; a multiple of the page.
        reserved_bytes: addresses of all regions together.
    """

    region_offsets_bytes: tuple[int, ...]
    slot_strides_bytes: tuple[int, ...]
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One layer's K or V over all slots, as a strided tensor.

    Attributes:
        offset_bytes: its first element, from the start of the reservation; a multiple of
            `ALIGNMENT_BYTES`.
        shape: ``[max_sequences, max_seq_len, num_kv_heads, head_dim]``.
        strides: in elements, one for each of those.
    """

    offset_bytes: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """The shape of a KV cache and the order of its bytes.

    Attributes:
        num_layers: layers that keep K and V; 1 to 1,048,576.
        num_kv_heads: heads of K, and of V, that one layer keeps for a token.
        head_dim: elements in a head of K. A multiple of 16 bytes lets TMA address single heads.
        dtype: float32, float16, bfloat16, an 8-bit float, or a signed or unsigned 1-byte, or
            signed 2- or 4-byte integer.
        order: ``"balanced"``: some layers' K share a row, and their V another. ``"token"``: layers
            share a row, K and V. ``"layer"``: a region for each layer's K and V. See above.
        v_head_dim: elements in a head of V; None: as many as K has; 0: there is no V, K is a
            latent that serves as both (MLA).
        layers_per_row: not for layer order: so many layers in a row. None: all for token order,
            as many as fit `BALANCED_ROW_BYTES` for balanced. Regions follow each other until all
            layers are placed, so the last may hold fewer.
        row_padding_bytes: not for layer order: bytes left unused at the end of every row; a
            multiple of `ALIGNMENT_BYTES`.

    Raises:
        ConfigError: an argument cannot be used; the message says which and what is allowed.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    order: Order = "balanced"
    v_head_dim: int | None = None
    layers_per_row: int | None = None
    row_padding_bytes: int = 0

    def __post_init__(self) -> None:
        """Check every argument, and keep Python's own integers: others wrap when they are large."""
        self._keep_int("num_layers", minimum=1, maximum=_MAX_LAYERS)
        self._keep_int("num_kv_heads", minimum=1)
        self._keep_int("head_dim", minimum=1)
        if self.v_head_dim is not None:
            self._keep_int("v_head_dim", minimum=0)
        _check_dtype(self.dtype)
        if self.order not in get_args(Order):
            raise ConfigError(f"order must be one of {get_args(Order)}; got {self.order!r}")
        if self.layers_per_row is not None:
            if self.order == "layer":
                raise ConfigError(
                    f'layers_per_row must be None with order="layer", where a row holds one '
                    f"layer's K or V; got {self.layers_per_row!r}"
                )
            self._keep_int("layers_per_row", minimum=1, maximum=self.num_layers)
        self._keep_int("row_padding_bytes", minimum=0)
        _aligned(self.row_padding_bytes, name="row_padding_bytes", minimum=0)
        if self.order == "layer" and self.row_padding_bytes:
            raise ConfigError(
                f'row_padding_bytes must be 0 with order="layer"; got {self.row_padding_bytes}'
            )

    def _keep_int(self, name: str, *, minimum: int, maximum: int = MAX_BYTES) -> None:
        value = check_int(getattr(self, name), name=name, minimum=minimum, maximum=maximum)
        object.__setattr__(self, name, value)

    @classmethod
    def latent(
        cls,
        *,
        num_layers: int,
        latent_dim: int,
        dtype: torch.dtype,
        order: Order = "balanced",
        layers_per_row: int | None = None,
        row_padding_bytes: int = 0,
    ) -> KVLayout:
        """Return the layout of a cache that keeps one latent vector a layer and token (MLA).

        Args:
            num_layers: see `KVLayout`.
            latent_dim: elements of the vector, the decoupled rotary key included.
            dtype: see `KVLayout`.
            order: see `KVLayout`.
            layers_per_row: see `KVLayout`.
            row_padding_bytes: see `KVLayout`.

        Raises:
            ConfigError: as `KVLayout` does.
        """
        check_int(latent_dim, name="latent_dim", minimum=1)
        return cls(
            num_layers=num_layers,
            num_kv_heads=1,
            head_dim=latent_dim,
            dtype=dtype,
            order=order,
            v_head_dim=0,
            layers_per_row=layers_per_row,
            row_padding_bytes=row_padding_bytes,
        )

    @property
    def is_latent(self) -> bool:
        """Whether there is no V."""
        return self.v_head_dim == 0

    @property
    def v_dim(self) -> int:
        """Elements in a head of V: `v_head_dim`, or what its None stands for."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def k_bytes(self) -> int:
        """A token's own bytes of K in one layer, nothing rounded."""
        return self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def v_bytes(self) -> int:
        """A token's own bytes of V in one layer, nothing rounded; 0 for a latent."""
        return self.num_kv_heads * self.v_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        """A token's own bytes over all layers, K and V, nothing rounded or padded."""
        return self.num_layers * (self.k_bytes + self.v_bytes)

    @property
    def token_stride_bytes(self) -> int:
        """Bytes that one more token takes in all regions together, padding included."""
        return sum(self.row_bytes)

    @property
    def num_regions(self) -> int:
        """Regions: one for each row that a token has; K and V together in token order only."""
        groups = -(-self.num_layers // self._layers_per_row)
        return groups * (2 if self._apart else 1)

    # The allocator asks at every growth and there may be many regions, so this is kept.
    @cached_property
    def row_bytes(self) -> tuple[int, ...]:
        """For each region, from one token's row to the next; multiples of `ALIGNMENT_BYTES`."""
        components = (self._k_stride_bytes, self._v_stride_bytes)
        rows = components if self._apart else (sum(components),)
        sizes: list[int] = []
        for first in range(0, self.num_layers, self._layers_per_row):
            layers = min(self._layers_per_row, self.num_layers - first)
            sizes += [layers * row + self.row_padding_bytes for row in rows]
        return tuple(sizes)

    def placement(self, layer: int) -> Placement:
        """Return where a layer's K and V lie.

        Args:
            layer: 0 to ``num_layers - 1``.

        Raises:
            ConfigError: there is no such layer.
        """
        layer = check_int(layer, name="layer", minimum=0, maximum=self.num_layers - 1)
        group, place = divmod(layer, self._layers_per_row)
        k_bytes, v_bytes = self._k_stride_bytes, self._v_stride_bytes
        if self._apart:
            return Placement(
                k_region=2 * group,
                k_offset_bytes=place * k_bytes,
                v_region=2 * group + 1,
                v_offset_bytes=place * v_bytes,
            )
        start = place * (k_bytes + v_bytes)
        return Placement(
            k_region=group,
            k_offset_bytes=start,
            v_region=group,
            v_offset_bytes=start + k_bytes,
        )

    def pages(self, tokens: int, page_bytes: int) -> tuple[int, ...]:
        """Return, for each region, how many pages hold a sequence's first rows.

        Args:
            tokens: length of the sequence; 0 or more.
            page_bytes: size of a page; a multiple of `ALIGNMENT_BYTES`.

        Raises:
            ConfigError: an argument cannot be used.
        """
        tokens = check_int(tokens, name="tokens", minimum=0)
        page_bytes = _aligned(page_bytes, name="page_bytes", minimum=1)
        return tuple(-(-tokens * row // page_bytes) for row in self.row_bytes)

    def mapped_bytes(self, tokens: int, page_bytes: int) -> int:
        """Return the physical bytes that a sequence needs: all its `pages`, whole.

        Args:
            tokens: length of the sequence; 0 or more.
            page_bytes: size of a page; a multiple of `ALIGNMENT_BYTES`.

        Raises:
            ConfigError: an argument cannot be used.
        """
        return sum(self.pages(tokens, page_bytes)) * page_bytes

    def tokens_per_page(self, page_bytes: int) -> int:
        """Return how many whole tokens one page in each region holds; 0 if a row is larger.

        Regions with smaller rows hold more in their page; the largest row decides.

        Args:
            page_bytes: size of a page; a multiple of `ALIGNMENT_BYTES`.

        Raises:
            ConfigError: the argument cannot be used.
        """
        _aligned(page_bytes, name="page_bytes", minimum=1)
        return page_bytes // max(self.row_bytes)

    def region_geometry(
        self, max_sequences: int, max_seq_len: int, page_bytes: int, guard_pages: int = 0
    ) -> Geometry:
        """Return where slots lie when regions stand back to back in one reservation.

        Slots are a whole number of rows apart where that at most doubles their addresses: kernels
        that count where a slot starts in rows need it.

        Args:
            max_sequences: slots in each region.
            max_seq_len: tokens that a slot has addresses for.
            page_bytes: size of a page; a multiple of `ALIGNMENT_BYTES`.
            guard_pages: pages of addresses kept free behind every slot, in each region.

        Raises:
            ConfigError: an argument cannot be used, or the addresses exceed `MAX_BYTES`.
        """
        max_sequences = check_int(max_sequences, name="max_sequences", minimum=1)
        max_seq_len = check_int(max_seq_len, name="max_seq_len", minimum=1)
        guard_pages = check_int(guard_pages, name="guard_pages", minimum=0)
        page_bytes = _aligned(page_bytes, name="page_bytes", minimum=1)
        strides = [
            _whole_rows((pages + guard_pages) * page_bytes, row, page_bytes)
            for pages, row in zip(self.pages(max_seq_len, page_bytes), self.row_bytes, strict=True)
        ]
        reserved_bytes = sum(strides) * max_sequences
        if reserved_bytes > MAX_BYTES:
            raise ConfigError(
                f"max_sequences={max_sequences} and max_seq_len={max_seq_len} need "
                f"{reserved_bytes} bytes of addresses, at {self.token_stride_bytes} bytes a token "
                f"and guard_pages={guard_pages}; at most {format_bytes(MAX_BYTES)} is allowed"
            )
        offsets = []
        end = 0
        for stride in strides:
            offsets.append(end)
            end += stride * max_sequences
        return Geometry(
            region_offsets_bytes=tuple(offsets),
            slot_strides_bytes=tuple(strides),
            reserved_bytes=reserved_bytes,
        )

    def tensor_specs(
        self,
        layer: int,
        *,
        region_offsets_bytes: Sequence[int],
        slot_strides_bytes: Sequence[int],
        max_sequences: int,
        max_seq_len: int,
    ) -> tuple[TensorSpec, TensorSpec]:
        """Return a layer's K and V as strided tensors over all slots.

        Args:
            layer: 0 to ``num_layers - 1``.
            region_offsets_bytes: start of each region, a multiple of `ALIGNMENT_BYTES`. Regions
                that overlap are not noticed: they may be reservations of their own.
            slot_strides_bytes: for each region, from one slot to the next, a multiple of
                `ALIGNMENT_BYTES` and at least ``max_seq_len`` rows.
            max_sequences: slots; 1 or more.
            max_seq_len: tokens that the tensors show of a slot; 1 or more.

        Returns:
            K and V, ``[max_sequences, max_seq_len, num_kv_heads, head_dim]`` (for V: `v_dim`). The
            V of a latent has a last dimension of 0.

        Raises:
            ConfigError: an argument cannot be used.
        """
        place = self.placement(layer)
        max_sequences = check_int(max_sequences, name="max_sequences", minimum=1)
        max_seq_len = check_int(max_seq_len, name="max_seq_len", minimum=1)
        for name, given in (
            ("region_offsets_bytes", region_offsets_bytes),
            ("slot_strides_bytes", slot_strides_bytes),
        ):
            if len(given) != self.num_regions:
                raise ConfigError(
                    f"{name} must have one entry for each of the {self.num_regions} regions; "
                    f"got {len(given)}"
                )

        def spec(region: int, offset_bytes: int, dim: int) -> TensorSpec:
            row_bytes = self.row_bytes[region]
            base = region_offsets_bytes[region]
            _aligned(base, name=f"region_offsets_bytes[{region}]", minimum=0)
            stride = slot_strides_bytes[region]
            name = f"slot_strides_bytes[{region}]"
            _aligned(stride, name=name, minimum=max_seq_len * row_bytes)
            return TensorSpec(
                offset_bytes=base + offset_bytes,
                shape=(max_sequences, max_seq_len, self.num_kv_heads, dim),
                # As torch does, a dimension of no elements counts as one in the stride above it.
                strides=(stride // self.itemsize, row_bytes // self.itemsize, max(dim, 1), 1),
            )

        return (
            spec(place.k_region, place.k_offset_bytes, self.head_dim),
            spec(place.v_region, place.v_offset_bytes, self.v_dim),
        )

    @property
    def _layers_per_row(self) -> int:
        if self.order == "layer":
            return 1
        if self.layers_per_row is not None:
            return self.layers_per_row
        if self.order == "token":
            return self.num_layers
        fit = BALANCED_ROW_BYTES // max(self._k_stride_bytes, self._v_stride_bytes)
        return min(max(fit, 1), self.num_layers)

    @property
    def _apart(self) -> bool:
        """Whether V lies in rows of its own."""
        return self.order != "token" and not self.is_latent

    @property
    def _k_stride_bytes(self) -> int:
        return _round_up(self.k_bytes, ALIGNMENT_BYTES)

    @property
    def _v_stride_bytes(self) -> int:
        return _round_up(self.v_bytes, ALIGNMENT_BYTES)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _whole_rows(stride_bytes: int, row_bytes: int, page_bytes: int) -> int:
    """A stride of whole pages that is one of whole rows too, if that is at most twice as long."""
    both = _round_up(stride_bytes, math.lcm(page_bytes, row_bytes))
    return both if both <= 2 * stride_bytes else stride_bytes


def _aligned(value: object, *, name: str, minimum: int) -> int:
    number = check_int(value, name=name, minimum=minimum)
    if number % ALIGNMENT_BYTES:
        raise ConfigError(f"{name} must be a multiple of {ALIGNMENT_BYTES}; got {value}")
    return number


def _check_dtype(dtype: object) -> None:
    # getattr with a default, not a look-up in torch's table: one line serves every torch.
    allowed = [name for name in _DTYPE_NAMES if hasattr(torch, name)]
    if not any(dtype is getattr(torch, name) for name in allowed):
        raise ConfigError(f"dtype must be one of torch.{', torch.'.join(allowed)}; got {dtype!r}")
