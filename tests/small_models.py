"""Configs of small models, for the tests of every integration."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

WINDOW = 16
VOCAB = 97
PAD = 0
FULL, SLIDING = "full_attention", "sliding_attention"

SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    # Far larger than in trained models, so that each token depends on all that went before.
    initializer_range=0.4,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
    tie_word_embeddings=False,
)


def deepseek_v3() -> Any:
    """K and V come from one latent, and K has wider heads than V."""
    return transformers.DeepseekV3Config(
        kv_lora_rank=24,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        **{**SMALL, "num_key_value_heads": 4, "head_dim": 8},
    )
