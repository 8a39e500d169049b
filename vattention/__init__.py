"""The malloc of KV caches: contiguous virtual tensors whose memory is mapped as they grow."""

from vattention._core import __version__
from vattention.allocator import KVAllocator
from vattention.errors import (
    BackendError,
    BackendUnavailable,
    Closed,
    ConfigError,
    OutOfPages,
    OutOfSlots,
    SequenceTooLong,
    StaleSequence,
    VAttentionError,
)
from vattention.layout import KVLayout
from vattention.pool import Pool
from vattention.sequence import Sequence
from vattention.stats import KVStats, MappingInfo, PoolStats

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "Closed",
    "ConfigError",
    "KVAllocator",
    "KVLayout",
    "KVStats",
    "MappingInfo",
    "OutOfPages",
    "OutOfSlots",
    "Pool",
    "PoolStats",
    "Sequence",
    "SequenceTooLong",
    "StaleSequence",
    "VAttentionError",
    "__version__",
]
