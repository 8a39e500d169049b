"""The allocator: K and V tensors over reserved addresses, backed as sequences grow."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from vattention import _core
from vattention.config import MAX_BYTES, check_int, check_tokens, parse_bytes
from vattention.errors import Closed, ConfigError
from vattention.layout import KVLayout, TensorSpec
from vattention.pool import Pool
from vattention.sequence import Sequence
from vattention.stats import KVStats, MappingInfo

# Slots cost host memory, used or not: some hundred bytes each, and more with many regions.
_MAX_SEQUENCES = 2**20
_MAX_TIMEOUT_S = 1e9
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class KVAllocator:
    """K and V of many sequences in contiguous virtual memory that is backed as they grow.

    Each sequence has a slot: a row of the tensors that :meth:`layer` returns. Their addresses never
    change; what changes is how much of a row has physical memory behind it. Only tokens below a
    sequence's length may be touched: there is nothing behind the rest.

    Streams: memory is ready for kernels launched on the current stream after a call returns, and
    :meth:`Sequence.free`, :meth:`Sequence.trim` and :meth:`Sequence.trim_front` must be called
    where the last use was launched: on the same stream, or on one that waits for it. A sequence
    that is used on several streams needs that wait between them as any tensor does. No call may be
    made on a stream that is being captured into a CUDA graph, but a graph captured earlier stays
    valid while memory grows. Threads: any; calls are serialised.

    Args:
        layout: what a token takes and how it lies.
        max_sequences: slots; at most 1,048,576.
        max_seq_len: tokens a slot has addresses for; costs nothing until used.
        memory, device, page_bytes, low_watermark, high_watermark, zero, background: as for
            :class:`Pool`, which is made of them.
        pool: a pool to draw on, instead of all those.
        tail_slack_tokens: tokens readable beyond each length, for kernels that load whole tiles;
            they read as finite. Short sequences share one extent of zeros for it. FlashAttention-3
            loads whole tiles by TMA, 192 tokens or 224 of 8 bits, unless the tensor that it is
            given ends at the sequence's length; FlashAttention-2 and torch's kernels need none:
            :func:`vattention.attention.tail_slack_tokens` says what is installed needs. Source:
            tests/gpu/test_attention_tails.py, on an H200.
        lookahead_tokens: the background thread keeps at least this many tokens mapped ahead of
            each length; also what :meth:`Sequence.trim` leaves mapped for growing again.
        max_extent: the largest physical allocation of this allocator; by default the pool's. A
            sliding window wants it small: memory below it goes back in whole extents.
        fence_timeout_s: how long to wait for the GPU when memory or a slot that was freed is
            needed; then :class:`OutOfPages` or :class:`OutOfSlots` says so.

    Raises:
        ConfigError: an argument is out of range or contradicts another.
        BackendUnavailable: there is no such device; the message says why.
        OutOfPages: there is no room for the guard that tail slack needs.
        BackendError: the driver refused to reserve the addresses.

    After :meth:`close` every other method that needs memory raises Closed.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        max_sequences: int,
        max_seq_len: int,
        memory: int | str | None = None,
        device: str | torch.device | None = None,
        page_bytes: int | str | None = None,
        low_watermark: int | str | None = None,
        high_watermark: int | str | None = None,
        zero: bool | None = None,
        background: bool | None = None,
        pool: Pool | None = None,
        tail_slack_tokens: int = 0,
        lookahead_tokens: int = 16,
        max_extent: int | str | None = None,
        fence_timeout_s: float = 30.0,
    ) -> None:
        """Reserves the addresses; takes no memory yet."""
        if not isinstance(layout, KVLayout):
            raise ConfigError(f"layout must be a KVLayout; got {type(layout).__name__}")
        options = {
            "memory": memory,
            "device": device,
            "page_bytes": page_bytes,
            "low_watermark": low_watermark,
            "high_watermark": high_watermark,
            "zero": zero,
            "background": background,
        }
        given: dict[str, Any] = {name: o for name, o in options.items() if o is not None}
        if pool is None:
            pool = Pool(**given, max_extent=max_extent)
        elif not isinstance(pool, Pool):
            raise ConfigError(f"pool must be a Pool; got {type(pool).__name__}")
        elif given:
            raise ConfigError(
                "pool already says where the memory is and how it is kept: leave out "
                + ", ".join(given)
            )
        self.layout = layout
        self.pool = pool
        self.device = pool.device
        self.max_sequences = check_int(
            max_sequences, name="max_sequences", minimum=1, maximum=_MAX_SEQUENCES
        )
        self.max_seq_len = check_int(max_seq_len, name="max_seq_len", minimum=1)
        slack = check_int(tail_slack_tokens, name="tail_slack_tokens", minimum=0)
        guard_pages = _guard_pages(layout, slack, pool.page_bytes)
        self._geometry = layout.region_geometry(
            self.max_sequences, self.max_seq_len, pool.page_bytes, guard_pages
        )
        self._core: _core.Allocator | None = _core.Allocator(
            pool=pool._core,
            regions=list(
                zip(
                    self._geometry.region_offsets_bytes,
                    self._geometry.slot_strides_bytes,
                    layout.row_bytes,
                    strict=True,
                )
            ),
            reserved_bytes=self._geometry.reserved_bytes,
            max_extent_bytes=(
                pool.max_extent_bytes
                if max_extent is None
                else parse_bytes(max_extent, name="max_extent")
            ),
            max_sequences=self.max_sequences,
            max_seq_len=self.max_seq_len,
            tail_slack_tokens=slack,
            guard_pages=guard_pages,
            lookahead_tokens=check_int(lookahead_tokens, name="lookahead_tokens", minimum=0),
            fence_timeout_ms=int(_check_timeout(fence_timeout_s) * 1000),
        )
        self.tail_slack_tokens = slack
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # What vattention.attention.attend has made for this allocator.
        self._attentions: dict[Any, Any] = {}

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, over all slots; the same tensors, at the same address, for ever.

        They may outlive the allocator: what is mapped then stays mapped until they are gone.

        Returns:
            K ``[max_sequences, max_seq_len, num_kv_heads, head_dim]`` and V the same with
            ``v_head_dim``, in the layout's dtype; strided, the last two dimensions dense.

        Raises:
            ConfigError: there is no such layer.
        """
        # Once a layer and step: no check where it was handed out before; closing forgets all.
        tensors = self._layers.get(layer) if type(layer) is int else None
        if tensors is None:
            core = self._open()
            layer = check_int(layer, name="layer", minimum=0, maximum=self.layout.num_layers - 1)
            k, v = self.layer_specs(layer)
            tensors = self._tensor(core, k), self._tensor(core, v)
            if self._core is not core:  # closed meanwhile: kept here, they would keep its memory
                raise Closed("the allocator was closed")
            self._layers[layer] = tensors
        return tensors

    def layer_specs(self, layer: int) -> tuple[TensorSpec, TensorSpec]:
        """Where K and V of one layer lie, and their shapes and strides, without the tensors.

        Raises:
            ConfigError: there is no such layer.
        """
        return self.layout.tensor_specs(
            layer,
            region_offsets_bytes=self._geometry.region_offsets_bytes,
            slot_strides_bytes=self._geometry.slot_strides_bytes,
            max_sequences=self.max_sequences,
            max_seq_len=self.max_seq_len,
        )

    def allocate(self, num_tokens: int = 0, *, expected_tokens: int = 0) -> Sequence:
        """Begins a sequence, mapped for `num_tokens` tokens, in the freed slot that fits best.

        Args:
            num_tokens: its length to begin with.
            expected_tokens: how long it may get; 0: unknown. It decides which freed slot fits best,
                so that short prompts with long answers find the memory of others; and until it is
                longer, nothing is mapped ahead for more. Nothing is mapped because of it.

        Raises:
            OutOfSlots: every slot has a live sequence.
            OutOfPages: the budget does not hold it; nothing has changed.
            SequenceTooLong: `num_tokens` or `expected_tokens` is more than `max_seq_len`.
            BackendError: the driver refused; nothing has changed.
        """
        tokens = check_int(num_tokens, name="num_tokens", minimum=0)
        expected = check_int(expected_tokens, name="expected_tokens", minimum=0)
        ((slot, generation),) = self._open().allocate(1, tokens, self._stream(), expected)
        return Sequence(self, slot, generation)

    def allocate_batch(self, num_sequences: int, num_tokens: int = 0) -> list[Sequence]:
        """Begins several sequences in consecutive slots, so that a batch is one slice.

        All of them, or none. Raises what :meth:`allocate` raises, :class:`OutOfSlots` also when
        free slots are too scattered.
        """
        count = check_int(num_sequences, name="num_sequences", minimum=1)
        tokens = check_int(num_tokens, name="num_tokens", minimum=0)
        ids = self._open().allocate(count, tokens, self._stream())
        return [Sequence(self, slot, generation) for slot, generation in ids]

    def step(self, lengths: Mapping[Sequence, int] | Any) -> None:
        """Says how long sequences are in the engine's next step; call it once, before the step.

        Maps what is missing: for all of them, or for none. With nothing to map, which is what the
        background thread sees to, it makes no driver call. It never shortens a sequence.

        Args:
            lengths: a mapping of sequences to their lengths in tokens; or a contiguous int64 array
                on the host (NumPy, a torch CPU tensor, ``array.array``) with the length for each
                slot, up to the last one of interest, 0 for slots to leave alone. The array is the
                faster form.

        Raises:
            OutOfPages: the budget does not hold the step; no length has changed.
            StaleSequence: one of the sequences has been freed, or a slot has none.
            SequenceTooLong: a length is more than `max_seq_len`.
            ConfigError: a length is less than before, or `lengths` is neither form.
            BackendError: the driver refused; no length has changed.
        """
        # No name for the core: the traceback of an error that somebody keeps would keep it too.
        if isinstance(lengths, torch.Tensor):
            address, count = _check_lengths(lengths), lengths.numel()
            if not self._open().try_step_at(address, count):
                self._open().step_at(address, count, self._stream())
        elif isinstance(lengths, Mapping):
            self._open().step_sequences(self._read_lengths(lengths), self._stream())
        elif not self._open().try_step_lengths(lengths):
            self._open().step_lengths(lengths, self._stream())

    def stats(self) -> KVStats:
        """What is reserved, mapped and used now, and what has been done."""
        figures = self._open().stats()
        figures["mapped_bytes"] = figures.pop("live_bytes")
        figures["used_bytes"] = figures["live_tokens"] * self.layout.token_bytes
        return KVStats(pool=self.pool.stats(), **figures)

    def reclaim(self) -> int:
        """Gives idle memory back to the driver; see :meth:`Pool.reclaim`."""
        self._open()
        return self.pool.reclaim()

    def mappings(self) -> list[MappingInfo]:
        """Every mapping, retired ones included; for looking at memory, not for a hot path."""
        return [MappingInfo(*mapping) for mapping in self._open().mappings()]

    def check(self) -> None:
        """Recomputes everything that must always be true; for tests and debugging.

        Raises:
            AssertionError: something is not.
        """
        self._open().check()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._core is None

    def close(self) -> None:
        """Ends every sequence and gives the memory back; idempotent.

        Where tensors of :meth:`layer` are still alive, the memory goes back with the last of them,
        so that they stay safe to read. Before it goes, the device is waited for, as
        ``torch.cuda.synchronize()`` does, unless there were neither live sequences nor such
        tensors and the GPU is done with what was freed. While another thread captures a CUDA
        graph, see to it that there are none, or the capture fails.
        """
        core = self._core
        if core is not None:
            self._layers.clear()
            self._attentions.clear()
            core.close()
            self._core = None

    def __del__(self) -> None:
        """Closes it: tensors that outlive it stay safe to read."""
        if getattr(self, "_core", None) is not None:
            with contextlib.suppress(Closed):  # of a process that has forked
                self.close()

    def __enter__(self) -> KVAllocator:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def __repr__(self) -> str:
        """Its size, or that it is closed."""
        shape = f"max_sequences={self.max_sequences}, max_seq_len={self.max_seq_len}"
        return f"KVAllocator({shape}, {'closed' if self.closed else self.device})"

    def _read_lengths(self, lengths: Mapping[Any, Any]) -> list[tuple[int, int, int]]:
        """Slot, generation and length of each sequence."""
        own = [
            (sequence._slot, sequence._generation, tokens)
            for sequence, tokens in lengths.items()
            if type(tokens) is int
            and -MAX_BYTES <= tokens <= MAX_BYTES
            and type(sequence) is Sequence
            and sequence._kv is self
        ]
        if len(own) == len(lengths):
            return own
        # Some are integers of another kind, or wrong.
        own = []
        for sequence, tokens in lengths.items():
            if not isinstance(sequence, Sequence):
                raise ConfigError(f"lengths must map sequences; got the key {sequence!r}")
            if sequence._kv is not self:
                raise ConfigError("lengths has a sequence of another allocator")
            own.append(
                (sequence._slot, sequence._generation, check_tokens(tokens, name="a length"))
            )
        return own

    def _open(self) -> _core.Allocator:
        if self._core is None:
            raise Closed("the allocator is closed: make a new one")
        return self._core

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _tensor(self, core: _core.Allocator, spec: TensorSpec) -> torch.Tensor:
        dtype = self.layout.dtype
        capsule = core.to_dlpack(
            offset_bytes=spec.offset_bytes,
            shape=list(spec.shape),
            strides=list(spec.strides),
            item_bytes=dtype.itemsize,
        )
        # Tensors made inside inference mode could not be written outside of it.
        with torch.inference_mode(False):
            integers: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
            assert integers.dtype == _INTEGER_OF_SIZE[dtype.itemsize]
            return integers.view(dtype)


def _check_lengths(lengths: torch.Tensor) -> int:
    """Where a tensor of lengths lies."""
    if (
        not lengths.is_cpu
        or lengths.dtype is not torch.int64
        or lengths.layout is not torch.strided
        or lengths.dim() != 1
        or not lengths.is_contiguous()
        or lengths.is_neg()
    ):
        raise ConfigError(
            "lengths is read on the host: pass a contiguous one-dimensional int64 CPU tensor, not "
            f"one of shape {tuple(lengths.shape)}, {lengths.dtype}, on {lengths.device}"
        )
    return lengths.data_ptr()


def _check_timeout(seconds: object) -> float:
    if isinstance(seconds, (int, float)) and 0 <= seconds <= _MAX_TIMEOUT_S:
        return seconds
    raise ConfigError(f"fence_timeout_s must be from 0 to {_MAX_TIMEOUT_S:.0f}; got {seconds!r}")


def _guard_pages(layout: KVLayout, slack_tokens: int, page_bytes: int) -> int:
    """Room behind each slot for the guard: a power of two pages that hold the slack of any row.

    The guard begins where a page ends, at or behind the last token, so it need not be longer.
    """
    if slack_tokens == 0:
        return 0
    most = max(-(-slack_tokens * row // page_bytes) for row in layout.row_bytes)
    return 1 << (most - 1).bit_length()
