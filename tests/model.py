"""A naive model of the allocator: what must be true of it, kept in the plainest way.

It knows which sequences live, how long they are, what was written where, and between which bounds
the pages lie that they take. It does not know how slots are chosen, when memory is handed on, or
how extents are cut. Beside it are the means to look at the real one: its tensors, on the host or
on a device, and what the system says of a host backend's memory. `test_model` compares the two.
"""

from __future__ import annotations

import bisect
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import vattention as va
from vattention import _core

HOST_PAGE_BYTES = 4096


class Disagreement(AssertionError):
    """The model and the real thing differ; the message says how to repeat it."""


@dataclass(frozen=True, kw_only=True)
class CacheSetup:
    """One allocator."""

    layout: va.KVLayout
    max_sequences: int = 8
    max_seq_len: int = 1_200
    max_extent_pages: int = 16
    tail_slack_tokens: int = 0
    lookahead_tokens: int = 16


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A pool with its allocators, and which kinds of events there are."""

    caches: tuple[CacheSetup, ...]
    budget_pages: int
    zero: bool = True
    background: bool = False
    faults: bool = True  # the driver says no
    holds: bool = True  # the GPU is not done
    watermarks: bool = False
    device: str = "cpu"
    fence_timeout_s: float = 0.001

    @property
    def max_extent_pages(self) -> int:
        return max(cache.max_extent_pages for cache in self.caches)


# ---- contents ----


def values(stamps: Any, positions: Any, view: Any) -> Any:
    """What tokens hold: never zero; int64 arithmetic without overflow, in NumPy and torch alike."""
    mixed = stamps * 1_000_003 + positions * 7_919 + view * 104_729
    mixed = (mixed ^ (mixed >> 7)) * 65_599
    return (mixed ^ (mixed >> 11)) | 1


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_POSITIVE = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFF_FFFF}


def integer_views(kv: va.KVAllocator) -> list[torch.Tensor]:
    """K and V of every layer that have bytes, as integers: ``[slots, tokens, heads, dim]``."""
    integers = _INTEGERS[kv.layout.itemsize]
    tensors = [t for layer in range(kv.layout.num_layers) for t in kv.layer(layer)]
    return [tensor.view(integers) for tensor in tensors if tensor.numel()]


class HostMemory:
    """The tensors of a cache on the host, read and written through NumPy."""

    def __init__(self, kv: va.KVAllocator, zero: bool) -> None:
        self._views = [view.numpy() for view in integer_views(kv)]
        self._numbers = np.arange(len(self._views))[:, None]
        self._mask = _POSITIVE[kv.layout.itemsize]
        self._zero = zero

    def write(self, slot: int, start: int, stop: int, stamp: int) -> None:
        self._store((slot, slice(start, stop)), stamp, np.arange(start, stop))

    def write_rows(self, slots: np.ndarray, positions: np.ndarray, stamp: int) -> None:
        """Writes one token in each of the slots."""
        self._store((slots, positions), stamp, positions)

    def check(
        self, slot: int, positions: np.ndarray, stamps: np.ndarray, loose: np.ndarray
    ) -> None:
        """Tokens hold what was written to them; zero where nothing was, or, if loose, either.

        Where memory is not zeroed, what was not written can be anything.
        """
        unwritten = stamps == 0
        expected = np.where(unwritten, 0, self._values(stamps, positions))
        for view, wanted in zip(self._views, expected, strict=True):
            found = view[slot, positions]
            right = found == wanted[:, None, None]
            if right.all():
                continue
            if self._zero:
                right |= loose[:, None, None] & (found == 0)
            else:
                right |= (loose | unwritten)[:, None, None]
            if not right.all():
                token = int(np.argmin(right.all(axis=(1, 2))))
                raise Disagreement(
                    f"token {positions[token]} of slot {slot} holds "
                    f"{found[token].ravel()[:8].tolist()}, not {wanted[token]}"
                    f"{' or 0' if loose[token] else ''} (write {stamps[token]})"
                )

    def settle(self) -> None:
        """Everything is compared at once here."""

    def _store(self, where: Any, stamp: int, positions: np.ndarray) -> None:
        for view, new in zip(self._views, self._values(stamp, positions), strict=True):
            view[where] = new[:, None, None]

    def _values(self, stamps: Any, positions: np.ndarray) -> np.ndarray:
        """``[views, tokens]``."""
        return values(stamps, positions, self._numbers) & self._mask


class DeviceMemory:
    """The same with torch kernels on the current stream; what differs is told by `settle`."""

    WINDOW = 200

    def __init__(self, kv: va.KVAllocator, zero: bool) -> None:
        self._views = integer_views(kv)
        self._numbers = torch.arange(len(self._views), device=kv.device)[:, None]
        self._mask = _POSITIVE[kv.layout.itemsize]
        self._zero = zero
        self._device = kv.device
        self._wrong = torch.zeros(self.WINDOW, dtype=torch.int64, device=kv.device)
        self._checks: list[str] = []

    def write(self, slot: int, start: int, stop: int, stamp: int) -> None:
        places = torch.arange(start, stop, device=self._device)
        self._store((slot, slice(start, stop)), stamp, places)

    def write_rows(self, slots: np.ndarray, positions: np.ndarray, stamp: int) -> None:
        rows, places = self._there(slots, positions)
        self._store((rows, places), stamp, places)

    def check(
        self, slot: int, positions: np.ndarray, stamps: np.ndarray, loose: np.ndarray
    ) -> None:
        places, written, either = self._there(positions, stamps, loose)
        unwritten = written == 0
        expected = torch.where(unwritten, 0, self._values(written, places))
        free = either.bool() if self._zero else either.bool() | unwritten
        for view, wanted in zip(self._views, expected, strict=True):
            found = view[slot, places]
            other = found != wanted.to(view.dtype)[:, None, None]
            allowed = free[:, None, None]
            self._wrong[len(self._checks)] += (
                other & ~(allowed & (found == 0) if self._zero else allowed)
            ).sum()
        self._checks.append(f"slot {slot}, tokens {positions[0]} to {positions[-1]}")
        if len(self._checks) == self.WINDOW:
            self.settle()

    def settle(self) -> None:
        """Waits for the comparisons so far.

        Raises:
            Disagreement: one of them failed.
        """
        for index, wrong in enumerate(self._wrong.tolist()):
            if wrong:
                raise Disagreement(
                    f"{self._checks[index]}: {wrong} elements do not hold what was written "
                    f"({len(self._checks) - index} comparisons ago)"
                )
        self._checks.clear()
        self._wrong.zero_()

    def _store(self, where: Any, stamp: int, places: torch.Tensor) -> None:
        for view, new in zip(self._views, self._values(stamp, places), strict=True):
            view[where] = new.to(view.dtype)[:, None, None]

    def _there(self, *arrays: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays).astype(np.int64)).to(self._device)

    def _values(self, stamps: Any, places: torch.Tensor) -> torch.Tensor:
        return values(stamps, places, self._numbers) & self._mask


class HostWitness:
    """What the system says of a host backend's memory; it has never heard of extents."""

    def __init__(self) -> None:
        before = self._descriptors()
        self.backend = _core.host_backend(HOST_PAGE_BYTES)
        (self._descriptor,) = self._descriptors() - before
        self._inode = os.fstat(self._descriptor).st_ino

    def resident_bytes(self) -> int:
        return os.fstat(self._descriptor).st_blocks * 512

    def mapped_bytes(self) -> int:
        total = 0
        with open("/proc/self/maps") as maps:
            for line in maps:
                columns = line.split(maxsplit=5)
                if int(columns[4]) == self._inode and "memfd:" in line:
                    start, end = columns[0].split("-")
                    total += int(end, 16) - int(start, 16)
        return total

    @staticmethod
    def _descriptors() -> set[int]:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                if "memfd:vattention" in os.readlink(f"/proc/self/fd/{name}"):
                    found.add(int(name))
            except FileNotFoundError:
                pass  # the descriptor that listed them
        return found


# ---- the model ----


@dataclass(eq=False)
class ModelSequence:
    handle: va.Sequence
    length: int
    capacity: int
    first: int = 0
    stamps: np.ndarray = field(init=False)  # for each token its last write; 0: none
    loose: np.ndarray = field(init=False)  # trimmed since: what was written, or zero

    def __post_init__(self) -> None:
        self.stamps = np.zeros(self.capacity, np.int64)
        self.loose = np.zeros(self.capacity, np.bool_)

    @property
    def slot(self) -> int:
        return self.handle.slot

    def write(self, start: int, stop: int, stamp: int) -> None:
        self.stamps[start:stop] = stamp
        self.loose[start:stop] = False


@dataclass(eq=False)
class Ghost:
    """Tokens that were given up while the GPU was not done: it may still read and write them."""

    slot: int
    start: int
    stop: int
    stamps: np.ndarray  # of the tokens from start on
    loose: np.ndarray
    freed: bool  # the whole sequence; else its owner may write there again


class ModelCache:
    """One allocator, its tensors, and what must be true of it."""

    def __init__(self, setup: CacheSetup, name: str, page_bytes: int) -> None:
        self.setup = setup
        self.name = name
        self.page_bytes = page_bytes
        self.live: dict[int, ModelSequence] = {}
        self.ghosts: list[Ghost] = []
        self.stale: deque[va.Sequence] = deque(maxlen=4)
        self.steps = 0
        self.kv: va.KVAllocator
        self.memory: HostMemory | DeviceMemory
        self.guard_bytes = 0

    def open(self, pool: va.Pool, setup: Setup) -> None:
        self.kv = va.KVAllocator(
            self.setup.layout,
            max_sequences=self.setup.max_sequences,
            max_seq_len=self.setup.max_seq_len,
            pool=pool,
            tail_slack_tokens=self.setup.tail_slack_tokens,
            lookahead_tokens=self.setup.lookahead_tokens,
            max_extent=self.setup.max_extent_pages * self.page_bytes,
            fence_timeout_s=setup.fence_timeout_s,
        )
        memory = HostMemory if setup.device == "cpu" else DeviceMemory
        self.memory = memory(self.kv, setup.zero)
        self.guard_bytes = self.kv.stats().guard_bytes
        self.steps = 0

    def close(self) -> None:
        del self.memory
        self.kv.close()
        del self.kv
        self.live.clear()
        self.ghosts.clear()

    @property
    def guard_pages(self) -> int:
        return self.guard_bytes // self.page_bytes

    @property
    def sequences(self) -> list[ModelSequence]:
        return list(self.live.values())

    def longest_free_run(self) -> int:
        best = run = 0
        for slot in range(self.setup.max_sequences):
            run = 0 if slot in self.live else run + 1
            best = max(best, run)
        return best

    def page_range(self, row_bytes: int, first: int, end: int) -> tuple[int, int]:
        """The pages of a region that tokens [first, end) touch."""
        end = min(end, self.setup.max_seq_len)
        return first * row_bytes // self.page_bytes, -(-end * row_bytes // self.page_bytes)

    def least_pages(self, first: int, length: int) -> int:
        """No sequence can live on fewer."""
        if length <= first:
            return 0
        ranges = (self.page_range(row, first, length) for row in self.setup.layout.row_bytes)
        return sum(end - begin for begin, end in ranges)

    def most_pages(self, first: int, length: int) -> int:
        """None can withhold more when memory is short: extents go back whole, or not at all."""
        if length == 0:
            return 0
        largest = self.setup.max_extent_pages
        front = largest if self.setup.tail_slack_tokens else largest - 1  # a guard needs an extent
        pages = 0
        for row in self.setup.layout.row_bytes:
            begin, end = self.page_range(row, first, length + self.setup.tail_slack_tokens)
            capacity = self.page_range(row, 0, self.setup.max_seq_len)[1]
            pages += min(end + largest - 1, capacity) - max(0, begin - front)
        return pages


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch made one."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            assert not out or out[-1][1] < start, "two mappings in one place"
            out.append((start, end))
    return out


def covers(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether one of the merged spans holds [start, end)."""
    index = bisect.bisect_right(spans, (start, 1 << 63)) - 1
    return index >= 0 and spans[index][0] <= start and end <= spans[index][1]
