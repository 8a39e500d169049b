"""Hugging Face transformers: a cache whose memory grows, and decode at the memory's speed.

enable(model)
model.generate(**inputs)                         # our cache, our attention, decode as a graph

cache = VAttentionCache(model.config, max_batch_size=4, max_seq_len=4096)
model.generate(**inputs, cache=cache)            # our cache alone; all else as it was

Before transformers 5.24 the argument `cache` is `past_key_values`.
"""

from vattention.integrations.transformers.cache import CacheStats, VAttentionCache, VAttentionLayer
from vattention.integrations.transformers.enable import disable, enable, new_cache, release

__all__ = [
    "CacheStats",
    "VAttentionCache",
    "VAttentionLayer",
    "disable",
    "enable",
    "new_cache",
    "release",
]
