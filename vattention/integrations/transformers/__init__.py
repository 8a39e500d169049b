"""Hugging Face transformers: a key/value cache whose memory grows with the sequences.

cache = VAttentionCache(model.config, max_batch_size=4, max_seq_len=4096)
model.generate(**inputs, past_key_values=cache)
"""

from vattention.integrations.transformers.cache import CacheStats, VAttentionCache, VAttentionLayer

__all__ = ["CacheStats", "VAttentionCache", "VAttentionLayer"]
