"""The smallest useful program: torch's attention over K and V whose memory grows with them."""

import torch
from torch.nn.functional import scaled_dot_product_attention

import vattention as va

PROMPT, END, LAYERS, HEADS, DIM = 1_000, 1_200, 4, 8, 64
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16


def states(tokens: int) -> torch.Tensor:
    """Stands for what a model computes: [tokens, heads, dim]."""
    return torch.randn(tokens, HEADS, DIM, dtype=dtype, device=device)


layout = va.KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype)
with va.KVAllocator(layout, max_sequences=16, max_seq_len=32_768, device=device) as kv:
    layers = [kv.layer(i) for i in range(LAYERS)]  # K and V, [slots, tokens, heads, dim]
    seq = kv.allocate(PROMPT)  # a slot, with memory behind its first tokens
    for k, v in layers:
        k[seq.slot, :PROMPT], v[seq.slot, :PROMPT] = states(PROMPT), states(PROMPT)

    for length in range(PROMPT + 1, END + 1):
        kv.step({seq: length})  # once per decode step: maps what the new token needs
        for k, v in layers:
            k[seq.slot, length - 1], v[seq.slot, length - 1] = states(1)[0], states(1)[0]
            q, keys, values = states(1), k[seq.slot, :length], v[seq.slot, :length]  # no copies
            heads_first = (x.transpose(0, 1)[None] for x in (q, keys, values))
            scaled_dot_product_attention(*heads_first)

    stats = kv.stats()
    print(f"on {device}: {seq.length:,} tokens, whose K and V take {stats.used_bytes:,} bytes")
    print(f"reserved: {stats.reserved_bytes:,} bytes of addresses")
    print(f"mapped: {stats.mapped_bytes:,} bytes of memory")
    seq.free()  # the slot stays mapped, for the next sequence
    print(f"after free, kept for the next: {kv.stats().cached_bytes:,} bytes")
