"""Hugging Face transformers: a key/value cache to pass to ``generate()`` as ``past_key_values``."""

from vattention.integrations.transformers.cache import CacheStats, VAttentionCache, VAttentionLayer

__all__ = ["CacheStats", "VAttentionCache", "VAttentionLayer"]
