"""A transformers `Cache` whose keys and values stay where they were first written.

One allocator holds all layers of one type (full attention, sliding window), because those layers
have one shape and grow together; allocators of different types draw on one pool. A sequence of the
batch is a slot of each allocator, and the batch is a run of consecutive slots, so what attention
receives is a plain view: `buffer[first_row : first_row + batch, start:stop].transpose(1, 2)`. New
tokens are written in place behind the old ones. Old tokens move only when the batch itself is
rearranged, and then only those in which two rows differ.

    VAttentionCache -> VAttentionLayer, one per model layer
                    -> _LayerGroup, one per layer type -> KVAllocator
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, get_args

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from vattention import (
    ConfigError,
    KVAllocator,
    KVLayout,
    KVStats,
    Pool,
    Sequence,
    SequenceTooLong,
    VAttentionError,
)
from vattention.attention.tensors import is_tensor, shown
from vattention.config import check_int, check_tokens, parse_bytes
from vattention.integrations.transformers.versions import LayerKind, layer_kinds, no_cache
from vattention.layout import Order

__all__ = ["CacheStats", "VAttentionCache", "VAttentionLayer"]

# Layer types of a config that keep one key and one value per token. Chunked attention differs from
# sliding attention in its mask alone.
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_KEEPS_NOTHING = "dummy"

# Giving memory back costs driver calls, so it waits until at least this many tokens can go.
_MIN_TRIM_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What a cache holds.

    Attributes:
        batch_size: rows in use; 0 while the cache is empty.
        num_tokens: tokens in each row, those below a sliding window included.
        reserved_bytes: addresses reserved, over all layer types; these cost no memory.
        mapped_bytes: memory mapped behind rows in use, over all layer types; what other rows keep
            for their next use is in `layer_types`, as `cached_bytes` and `retired_bytes`.
        layer_types: the statistics of the allocator of each layer type that has been used.
    """

    batch_size: int
    num_tokens: int
    reserved_bytes: int
    mapped_bytes: int
    layer_types: Mapping[str, KVStats]


class _Memory:
    """The pool that the allocators of one cache share: the caller's, or one of the cache's own."""

    def __init__(
        self, memory: int | str | None, page_bytes: int | str | None, pool: Pool | None
    ) -> None:
        if pool is not None and (memory is not None or page_bytes is not None):
            raise ConfigError(
                "a pool brings its own memory and page size: pass either pool=, or memory= and "
                "page_bytes="
            )
        if pool is not None and not isinstance(pool, Pool):
            raise ConfigError(f"pool must be a vattention.Pool; got {type(pool).__name__}")
        for name, size in (("memory", memory), ("page_bytes", page_bytes)):
            if size is not None:
                parse_bytes(size, name=name)
        self._memory = memory
        self._page_bytes = page_bytes
        self._pool = pool
        self._is_own = pool is None

    def pool_for(self, device: torch.device) -> Pool:
        if self._pool is None:
            self._pool = Pool(memory=self._memory, device=str(device), page_bytes=self._page_bytes)
        return self._pool

    def close(self) -> None:
        """Let go of the cache's own pool, which would keep memory for a next use."""
        if self._is_own:
            self._pool = None


class _Shape(NamedTuple):
    """What one update must have in common with the others of its group."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, key_states: torch.Tensor, value_states: torch.Tensor) -> _Shape:
        if not all(is_tensor(x) and x.dim() == 4 for x in (key_states, value_states)):
            raise ConfigError(
                "VAttentionCache needs keys and values of [batch, heads, tokens, dim]; got "
                f"{shown(key_states)} and {shown(value_states)}"
            )
        if key_states.requires_grad or value_states.requires_grad:
            raise ConfigError(
                "VAttentionCache writes in place and carries no gradients: run the model under "
                "torch.no_grad() or torch.inference_mode()"
            )
        if key_states.shape[:3] != value_states.shape[:3]:
            raise ConfigError(
                "VAttentionCache needs keys and values with the same batch, heads and tokens; got "
                f"{tuple(key_states.shape)} and {tuple(value_states.shape)}"
            )
        return cls(
            num_kv_heads=key_states.shape[1],
            head_dim=key_states.shape[3],
            v_head_dim=value_states.shape[3],
            # Under autocast they differ.
            dtype=torch.promote_types(key_states.dtype, value_states.dtype),
            device=key_states.device,
        )


class _LayerGroup:
    """The layers of one type: one allocator, a row of it for each sequence of the batch.

    Between two calls these hold:
        - row i is slot i; the first `batch` rows are mapped for the tokens `[released, mapped)`
          (at least), the others for next to nothing;
        - `released <= window_start(lengths[i])` and `lengths[i] <= mapped` for every layer i;
        - outside of a forward pass all entries of `lengths` are equal;
        - rows i and j hold the same bytes for the tokens below `alike[i, j]`, where i != j.
    """

    def __init__(
        self,
        name: str,
        *,
        window: int | None,
        num_layers: int,
        max_batch_size: int,
        max_seq_len: int,
        order: Order,
        memory: _Memory,
    ) -> None:
        self.name = name
        self.window = window
        self.lengths = [0] * num_layers
        self.batch = 0
        self.mapped = 0
        self.released = 0
        self.recording = False
        self.max_seq_len = max_seq_len
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._settled = 0
        self._alike = torch.zeros(0, 0, dtype=torch.long, device="cpu")
        self._num_rows = max_batch_size
        self._order = order
        self._memory = memory
        self._shape: _Shape | None = None
        self._kv: KVAllocator | None = None
        self._rows: list[Sequence] = []
        self._closed = False

    @property
    def length(self) -> int:
        return max(self.lengths)

    def window_start(self, length: int) -> int:
        """The first token that the query after `length` tokens can see."""
        return 0 if self.window is None else max(0, length - self.window + 1)

    # Growth

    def update(
        self, index: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens of layer `index` and return all that its queries can see."""
        self.bind(key_states, value_states)
        start = self.lengths[index]
        stop = start + key_states.shape[2]
        if stop > self.mapped:
            self._extend(stop)
        keys, values = self.keys[index], self.values[index]
        keys[: self.batch, start:stop].copy_(key_states.transpose(1, 2))
        values[: self.batch, start:stop].copy_(value_states.transpose(1, 2))
        self.lengths[index] = stop
        return self.view(keys, start, stop), self.view(values, start, stop)

    def view(self, buffer: torch.Tensor, seen: int, stop: int) -> torch.Tensor:
        """`buffer` as [batch, heads, tokens, dim]: what is visible after `seen` tokens."""
        return buffer[: self.batch, self.window_start(seen) : stop].transpose(1, 2)

    def bind(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check that the tensors fit what is held; while that is nothing, make room for them."""
        shape, batch = _Shape.of(key_states, value_states), key_states.shape[0]
        if self._closed:
            raise ConfigError("this VAttentionCache is closed: construct another one")
        if self.mapped == 0:
            if shape != self._shape or batch > self._num_rows:
                self._build(shape, max(batch, self._num_rows))
            if not self._rows:
                assert self._kv is not None
                self._rows = self._kv.allocate_batch(self._num_rows)
            if batch != self.batch:
                self.batch = batch
                self._alike = torch.zeros(batch, batch, dtype=torch.long, device="cpu")
        elif shape != self._shape:
            raise ConfigError(
                f"the {self.name} layers of one VAttentionCache must be alike: they began with "
                f"{self._shape}, now came {shape}"
            )
        elif batch != self.batch:
            raise ConfigError(
                f"the cache holds a batch of {self.batch}, the update has {batch}: call reset() "
                "before another batch, or batch_repeat_interleave() to continue this one in "
                "several ways"
            )

    def _build(self, shape: _Shape, num_rows: int) -> None:
        self._drop()
        layout = KVLayout(
            num_layers=len(self.lengths),
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            v_head_dim=None if shape.v_head_dim == shape.head_dim else shape.v_head_dim,
            dtype=shape.dtype,
            order=self._order,
        )
        kv = KVAllocator(
            layout,
            max_sequences=num_rows,
            max_seq_len=self.max_seq_len,
            pool=self._memory.pool_for(shape.device),
        )
        layers = [kv.layer(index) for index in range(layout.num_layers)]
        if layers[0][0].device != shape.device:
            kv.close()
            raise ConfigError(
                f"the {self.name} layers are on {shape.device}, their memory on "
                f"{layers[0][0].device}: VAttentionCache serves the layers of one device, from a "
                "pool on that device"
            )
        self.keys = [keys for keys, _ in layers]
        self.values = [values for _, values in layers]
        self._kv, self._num_rows, self._shape = kv, num_rows, shape

    def _extend(self, stop: int) -> None:
        """Map the rows in use up to token `stop`, after giving back what left the window."""
        if stop > self.max_seq_len:
            raise SequenceTooLong(
                f"{stop} tokens do not fit a VAttentionCache of max_seq_len={self.max_seq_len}: "
                "construct it with a larger max_seq_len (addresses cost no memory), or generate "
                "fewer tokens"
            )
        assert self._kv is not None
        rows = self._rows[: self.batch]
        if self.window is not None:
            needed = self.window_start(self._settled if self.recording else min(self.lengths))
            if needed - self.released >= max(_MIN_TRIM_TOKENS, self.window // 4):
                self.released = needed
                for row in rows:
                    row.trim_front(needed)
        self._kv.step(dict.fromkeys(rows, stop))
        self.mapped = stop

    # Shrinking

    def record(self, recording: bool) -> None:
        """While recording, keep what `crop` may return to: all since the last `crop`."""
        if recording and not self.recording:
            self._settled = self.length
        self.recording = recording

    def length_after_crop(self, tokens_to_remove: int) -> int:
        """The length that `crop` leaves; see `VAttentionCache.crop` for what is raised."""
        length = self.length
        if self.window is not None and length >= self.window:
            if not self.recording:
                raise RuntimeError(
                    "the sliding window is full and the cache was not told to keep the tokens "
                    "below it: call activate_past_recording() before the tokens that crop() is to "
                    "remove are added"
                )
            if tokens_to_remove > 0:
                raise RuntimeError(
                    "the sliding window is full: crop() takes the number of tokens to remove, as a "
                    "negative number"
                )
        # A positive number is the length to keep, which transformers drops in 5.18.
        cropped = (
            min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove
        )
        cropped = max(0, cropped)
        if self.window_start(cropped) < self.released:
            raise RuntimeError(
                f"crop() to {cropped} tokens needs tokens from {self.window_start(cropped)} on, "
                f"but memory below token {self.released} was given back when it left the window"
            )
        return cropped

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; their memory goes back if it is much."""
        self.lengths = [min(length, old) for old in self.lengths]
        self._settled = length
        self._alike.clamp_(max=length)
        if length == 0:
            rows, self._rows = self._rows, []
            self.batch = self.mapped = self.released = 0
            for row in rows:  # not trimmed: a row that was trimmed at its front cannot be, to 0
                row.free()
        elif self.mapped - length >= _MIN_TRIM_TOKENS:
            self.mapped = length
            for row in self._rows[: self.batch]:
                row.trim(length)

    def trim_idle_rows(self) -> None:
        """Give back the memory of the rows that are not in the batch."""
        for row in self._rows[self.batch :]:
            if row.length > self.released:
                row.trim_front(self.released)
                row.trim(self.released)

    # Rearrangement of the batch

    def back_rows(self, num_rows: int) -> None:
        """Map rows behind the batch, as far as the batch is mapped, so that `num_rows` are."""
        if num_rows > self._num_rows:
            raise ConfigError(
                f"a batch of {num_rows} does not fit the {self._num_rows} rows of this "
                f"VAttentionCache: construct it with max_batch_size={num_rows} (addresses cost no "
                "memory)"
            )
        added = self._rows[self.batch : num_rows]
        if added:
            assert self._kv is not None
            self._kv.step(dict.fromkeys(added, self.mapped))
            for row in added:
                row.trim_front(self.released)

    def gather(self, sources: list[int]) -> None:
        """Let row i hold what row `sources[i]` held, for every i. The rows must be mapped.

        Rows that were once copied from one another are alike up to the token at which they parted
        (beams of one prompt), so only what follows is copied.
        """
        length = self.length
        moves = [
            (target, source, start)
            for target, source in enumerate(sources)
            if target != source
            and (start := max(self.released, self._num_alike(target, source))) < length
        ]
        targets = {target for target, _, _ in moves}
        for buffer in (*self.keys, *self.values):
            # A row that is both read and written is read first: in a cycle none could go first.
            taken = [
                buffer[source, start:length].clone()
                if source in targets
                else buffer[source, start:length]
                for _, source, start in moves
            ]
            for (target, _, start), tokens in zip(moves, taken, strict=True):
                buffer[target, start:length].copy_(tokens)
        self._alike.fill_diagonal_(length)
        self._alike = self._alike[sources][:, sources]
        self.batch = len(sources)

    def _num_alike(self, row: int, other: int) -> int:
        return int(self._alike[row, other]) if row < self.batch else 0

    # The end

    @property
    def allocator(self) -> KVAllocator | None:
        return self._kv

    def stats(self) -> KVStats | None:
        return None if self._kv is None else self._kv.stats()

    def close(self) -> None:
        self._drop()
        self._closed = True

    def _drop(self) -> None:
        kv, self._kv = self._kv, None
        self.lengths = [0] * len(self.lengths)
        self.batch = self.mapped = self.released = self._settled = 0
        self.keys, self.values, self._rows, self._shape = [], [], [], None
        if kv is not None:
            kv.close()


def _names(kinds: list[LayerKind]) -> dict[LayerKind, str]:
    """What groups of layers are called: by their type, and by window if a type has several."""
    distinct = dict.fromkeys(kinds)
    types = Counter(kind.layer_type for kind in distinct)
    return {
        kind: kind.layer_type if types[kind.layer_type] == 1 else f"{kind.layer_type}:{kind.window}"
        for kind in distinct
    }


def not_copied(self: object, protocol: Any) -> Any:
    """What `copy` and `pickle` call: K and V have one owner, and a copy would write over them."""
    raise ConfigError(
        f"a {type(self).__name__} is not copied: its memory is its own; begin another cache with "
        "the same prompt, or use transformers' DynamicCache where one is to be copied"
    )


def _chosen(rows: torch.Tensor, indices: Any) -> torch.Tensor:
    """Of the numbers of rows those that a caller names."""
    try:
        return rows[torch.as_tensor(indices).cpu()].reshape(-1)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(
            f"rows are named by a tensor of whole numbers up to {len(rows) - 1}, or by a mask of "
            f"{len(rows)}: {error}"
        ) from error


class VAttentionLayer(CacheLayerMixin):
    """One model layer's keys and values in a `VAttentionCache`.

    The layers of a type share their rows: what concerns whole rows is done by the cache, not here.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, group: _LayerGroup, index: int) -> None:
        # The base class would set keys, values and is_initialized, which are computed here.
        self._group = group
        self._index = index

    @property
    def is_sliding(self) -> bool:
        """Whether the layer sees only a window of the tokens."""
        return self._group.window is not None

    @property
    def is_initialized(self) -> bool:
        """Whether addresses are reserved."""
        return bool(self._group.keys)

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, [batch, heads, tokens, dim]: a view, good until the next update."""
        return self._held(self._group.keys)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, as `keys`."""
        return self._held(self._group.values)

    def _held(self, buffers: list[torch.Tensor]) -> torch.Tensor | None:
        if not buffers:
            return None
        length = self.get_seq_length()
        return self._group.view(buffers[self._index], length, length)

    @property
    def record_past(self) -> bool:
        """Whether tokens below a sliding window are kept until the next `crop`."""
        return self._group.recording

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self._group.record(recording)

    def activate_past_recording(self) -> None:
        """Keep tokens below a sliding window until the next `crop`, which may go back to them."""
        self._group.record(True)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve addresses for tensors like these ([batch, heads, tokens, dim]); map nothing."""
        self._group.bind(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VAttentionCache.update`, for this layer."""
        return self._group.update(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, those below a sliding window included."""
        return self._group.lengths[self._index]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number and first position of the keys that `update` will return."""
        length = self.get_seq_length()
        offset = self._group.window_start(length)
        return length + query_length - offset, offset

    def get_max_length(self) -> int:
        """The window of a sliding layer, else the tokens that fit."""
        return self._group.max_seq_len if self._group.window is None else self._group.window

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "the layers of a VAttentionCache share their rows: call this on the cache"
        )

    reset = reorder_cache = offload = prefetch = _refuse
    crop = batch_repeat_interleave = batch_select_indices = _refuse
    __reduce_ex__ = not_copied


class VAttentionCache(Cache):
    """A cache for `generate()` that neither concatenates nor preallocates.

    Pass it as `cache`, or as `past_key_values` before transformers 5.24.

    It reserves addresses for `max_batch_size` sequences of `max_seq_len` tokens and maps memory
    as they grow. `generate()` gives the same tokens as with `DynamicCache(config=config)`: greedy,
    sampled, beam search, assisted and prompt-lookup decoding, chunked prefill, continued chats.
    Memory that leaves a sliding window goes back to the pool.

    Addresses, device and dtype come with the first update. If that brings more sequences than
    `max_batch_size` (beam search multiplies them), rows are reserved for as many.

    For inference, from one thread. It cannot be copied or pickled. Tensors that `update` returns
    are views, good until the next update of their layer, `crop`, `reset`, `close` or rearrangement
    of the batch. They are strided: a model that calls `view` on them, as GPTNeoXJapanese does,
    fails.

    Args:
        config: the model's config. Layers that keep something else than a key and a value per token
            (linear attention, state space) and encoder-decoder models are refused.
        max_batch_size: sequences, beams and returned sequences counted one by one.
        max_seq_len: tokens of the longest sequence, with prompt, padding and an assistant's
            candidates.
        memory: budget in bytes, or as "60GiB"; by default what the device has.
        page_bytes: page size, on the host backend only.
        pool: draw on this pool instead of one of the cache's own.
        order: "token" (all layers of a token side by side, so that a short sequence takes little
            memory), "balanced" or "layer"; see `KVLayout`.

    Raises:
        ConfigError: the model or an argument is not supported.

    `update`, and with it the model's forward pass and `generate()`, raises
        OutOfPages: the budget is spent.
        SequenceTooLong: a sequence would exceed `max_seq_len`.
        ConfigError: the tensors do not fit what is held, or carry gradients.
    After each of these the cache is as it was before the forward pass.
    """

    def __init__(
        self,
        config: Any,
        max_batch_size: int = 4,
        max_seq_len: int = 4096,
        *,
        memory: int | str | None = None,
        page_bytes: int | str | None = None,
        pool: Pool | None = None,
        order: Order = "token",
    ) -> None:
        max_batch_size = check_int(max_batch_size, name="max_batch_size", minimum=1)
        max_seq_len = check_int(max_seq_len, name="max_seq_len", minimum=1)
        if order not in get_args(Order):
            raise ConfigError(f"order must be one of {get_args(Order)}; got {order!r}")
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(f"config must be a model's config; got {type(config).__name__}")
        if config.is_encoder_decoder:
            raise ConfigError(
                f"VAttentionCache serves decoder-only models; {config.model_type} has an encoder, "
                "whose keys and values need a cache of their own"
            )
        kinds = layer_kinds(config.get_text_config(decoder=True))
        kept = [kind for kind in kinds if kind.layer_type != _KEEPS_NOTHING]
        for kind in kept:
            if kind.layer_type not in _LAYER_TYPES:
                raise ConfigError(
                    f"VAttentionCache cannot hold {kind.layer_type} layers, which "
                    f"{config.model_type} has; it holds {', '.join(_LAYER_TYPES)}"
                )
        self._memory = _Memory(memory, page_bytes, pool)
        groups = {
            kind: _LayerGroup(
                name,
                window=kind.window,
                num_layers=kept.count(kind),
                max_batch_size=max_batch_size,
                max_seq_len=max_seq_len,
                order=order,
                memory=self._memory,
            )
            for kind, name in _names(kept).items()
        }
        self._groups = {group.name: group for group in groups.values()}
        super().__init__(
            layers=[
                VAttentionLayer(groups[kind], kinds[:index].count(kind))
                if kind in groups
                else no_cache()
                for index, kind in enumerate(kinds)
            ]
        )

    @property
    def batch_size(self) -> int:
        """Rows in use, or -1 while the cache is empty."""
        return max(group.batch if group.mapped else -1 for group in self._groups.values())

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens to a layer and return what its queries attend to.

        Args:
            key_states: [batch, heads, new tokens, head_dim].
            value_states: [batch, heads, new tokens, v_head_dim].
            layer_idx: the layer.
            *args: what models pass for other caches; not used.
            **kwargs: likewise.

        Returns:
            Keys and values, [batch, heads, tokens, dim]: views of memory that never moves.

        Raises:
            OutOfPages, SequenceTooLong, ConfigError: see the class.
        """
        if not 0 <= layer_idx < len(self.layers):
            raise ConfigError(
                f"this VAttentionCache has {len(self.layers)} layers; the update is for layer "
                f"{layer_idx}: was it made from another model's config?"
            )
        try:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except VAttentionError:
            # Earlier layers may have taken this pass's tokens already: forget them.
            shortest = min(min(group.lengths) for group in self._groups.values())
            for group in self._groups.values():
                if group.length > shortest:
                    group.truncate(shortest)
            raise
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; a positive number is the length to keep.

        With sliding layers whose window is full this needs `activate_past_recording()` before
        those tokens are added, as with the default cache; `crop(0)` then says that all stay.

        Raises:
            RuntimeError: tokens that would become visible again are gone. Nothing has changed.
        """
        # Assisted decoding passes a tensor of one number.
        count = check_tokens(tokens_to_remove, name="tokens_to_remove")
        lengths = [group.length_after_crop(count) for group in self._groups.values()]
        for group, length in zip(self._groups.values(), lengths, strict=True):
            group.truncate(length)

    def reset(self) -> None:
        """Forget everything.

        Addresses stay, and memory stays mapped for the next use of these rows until the pool needs
        it elsewhere, or `Pool.reclaim` gives it back to the driver.
        """
        for group in self._groups.values():
            group.truncate(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i hold what row `beam_idx[i]` holds; copies what differs; waits for the GPU.

        Raises:
            ConfigError: these are no numbers of rows. Nothing has changed.
        """
        self._rearrange(lambda rows: _chosen(rows, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row be followed by `repeats - 1` copies of it.

        Raises:
            ConfigError: more rows than are reserved. Nothing has changed.
            OutOfPages: the budget is spent. Nothing has changed.
        """
        count = check_int(repeats, name="repeats", minimum=1)
        self._rearrange(lambda rows: rows.repeat_interleave(count))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers or a mask), in that order, and give back the others.

        Raises:
            ConfigError: these are no numbers of rows, and no mask of them. Nothing has changed.
        """
        self._rearrange(lambda rows: _chosen(rows, indices))

    def _rearrange(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let row i of the batch hold what row `choose(row numbers)[i]` holds now."""
        if self.batch_size < 0:
            return
        sources: list[int] = choose(torch.arange(self.batch_size, device="cpu")).tolist()
        if not sources:
            self.reset()
            return
        groups = self._groups.values()
        resized = len(sources) != self.batch_size
        try:
            for group in groups:
                group.back_rows(len(sources))
            for group in groups:
                group.gather(sources)
        finally:
            for group in groups if resized else ():
                group.trim_idle_rows()

    @property
    def allocators(self) -> Mapping[str, KVAllocator]:
        """The allocator of each layer type that has been used, for looking at its memory."""
        return {
            name: group.allocator
            for name, group in self._groups.items()
            if group.allocator is not None
        }

    def stats(self) -> CacheStats:
        """What the cache holds now."""
        used = {
            name: stats
            for name, group in self._groups.items()
            if (stats := group.stats()) is not None
        }
        return CacheStats(
            batch_size=max(0, self.batch_size),
            num_tokens=self.get_seq_length(),
            reserved_bytes=sum(stats.reserved_bytes for stats in used.values()),
            mapped_bytes=sum(stats.mapped_bytes for stats in used.values()),
            layer_types=used,
        )

    def close(self) -> None:
        """Give back memory and addresses; collecting the cache does the same. Twice is harmless."""
        for group in self._groups.values():
            group.close()
        self._memory.close()

    __reduce_ex__ = not_copied

    def __enter__(self) -> VAttentionCache:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
