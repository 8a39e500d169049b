"""Attention over an allocator's slots, by kernels that know nothing of it.

    batch = Batch.of({prompt: 512, other: 1})    # how many of its last tokens are queries
    append(k, v, layer, batch)                   # write K and V of those tokens
    out = attend(q, kv, layer, batch)            # [513, heads, head_dim]

Each backend is one file, which states as data what its kernels need: `Needs`.
"""

from vattention.attention.append import Rope, append
from vattention.attention.attend import Attention, attend, backends
from vattention.attention.backend import Backend, Scales
from vattention.attention.batch import Batch
from vattention.attention.choice import BACKENDS, front_slack_tokens, tail_slack_tokens
from vattention.attention.needs import Needs, Options

__all__ = [
    "BACKENDS",
    "Attention",
    "Backend",
    "Batch",
    "Needs",
    "Options",
    "Rope",
    "Scales",
    "append",
    "attend",
    "backends",
    "front_slack_tokens",
    "tail_slack_tokens",
]
