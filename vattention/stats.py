"""What a pool and an allocator tell about themselves. All sizes are in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class MappingInfo(NamedTuple):
    """One extent at one place; see :meth:`KVAllocator.mappings`."""

    slot: int
    region: int
    """See :mod:`vattention.layout`."""
    address: int
    size_bytes: int
    handle: int
    """The driver's, or the host backend's, name of the extent."""
    access: str
    """``"read_write"``; or ``"read"`` for the guard behind a short sequence, which many share."""


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """A pool at one moment; the counts are since it was made."""

    budget_bytes: int
    """Most physical memory the pool may hold."""
    held_bytes: int
    """Physical memory it holds now: never more than the budget."""
    peak_held_bytes: int
    """Most it has held."""
    free_bytes: int
    """Of what it holds, the part that is mapped nowhere."""
    mappings: int
    """Mappings at the driver now, aliases included."""
    creates: int
    """Extents created."""
    destroys: int
    """Extents given back to the driver."""
    maps: int
    """Mappings made."""
    unmaps: int
    """Unmap calls made; one may undo many mappings."""


@dataclass(frozen=True, kw_only=True)
class KVStats:
    """An allocator at one moment, with its pool's figures beside it."""

    reserved_bytes: int
    """Virtual addresses reserved: these cost no memory."""
    mapped_bytes: int
    """Physical memory behind live sequences."""
    used_bytes: int
    """What K and V of the sequences' tokens take, those that `trim_front` gave back included: the
    least that a cache needs which gives none back."""
    cached_bytes: int
    """Mapped behind freed slots and ready for the next sequence."""
    retired_bytes: int
    """Given up, and kept until the GPU has passed the last use."""
    surplus_bytes: int
    """Of `mapped_bytes`, whole extents that the present lengths do not need."""
    guard_bytes: int
    """The one shared extent behind short sequences where there is tail slack."""
    live_sequences: int
    """Sequences that have been allocated and not freed."""
    live_tokens: int
    """Their lengths, summed."""
    free_slots: int
    """Slots without a sequence, whether something is mapped in them or not."""
    steps: int
    """Steps done, since the allocator was made; so are the counts below."""
    waited_steps: int
    """Steps that mapped memory, or waited for that or for its clearing, those that failed too."""
    ahead_mappings: int
    """Mappings made by the background thread before a step needed them."""
    ahead_failures: int
    """Times that the background thread found no memory, or that the driver refused it."""
    adoptions: int
    """Sequences that began in a slot that was mapped already."""
    pool: PoolStats

    @property
    def held_bytes(self) -> int:
        """Physical memory the pool holds now, for all its allocators."""
        return self.pool.held_bytes

    @property
    def peak_held_bytes(self) -> int:
        """The most physical memory the pool has held."""
        return self.pool.peak_held_bytes

    @property
    def free_bytes(self) -> int:
        """Physical memory the pool holds that is mapped nowhere."""
        return self.pool.free_bytes

    @property
    def budget_bytes(self) -> int:
        """The most physical memory the pool may hold."""
        return self.pool.budget_bytes
