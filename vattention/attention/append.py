"""K and V of new tokens, written into the slots behind what their sequences hold.

One kernel writes both, and rotates queries and K by their positions first (RoPE) if it is told to.
It takes slots and positions from the batch, on the device, so that a CUDA graph of it writes to
wherever the sequences are when it is replayed. Where there is no Triton, or it does not know a kind
of 8-bit floats, torch does the same: on a GPU it waits there, and cannot be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vattention.attention.batch import Batch
from vattention.attention.device import on
from vattention.attention.tensors import is_tensor, shown
from vattention.config import check_bool
from vattention.errors import ConfigError

try:
    from vattention.attention import append_triton
except ImportError:  # there is no Triton
    append_triton = None  # type: ignore[assignment]

__all__ = ["Rope", "append"]


@dataclass(frozen=True, kw_only=True, eq=False)  # tensors have no one answer to ==
class Rope:
    """Rotary position embedding: the first ``2 * half`` elements of a head are turned in pairs.

    Attributes:
        cos: float32 ``[positions, half]``: of the angle of each pair.
        sin: the same.
        interleaved: a pair is elements 2i and 2i + 1; else i and i + half.

    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2.2.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Checks the tables."""
        for table in (self.cos, self.sin):
            if (
                not is_tensor(table)
                or table.dim() != 2
                or table.dtype is not torch.float32
                or not table.is_contiguous()
            ):
                raise ConfigError("cos and sin must be contiguous float32 [positions, half]")
        if self.cos.shape != self.sin.shape or self.cos.device != self.sin.device:
            raise ConfigError("cos and sin must have one shape, on one device")
        check_bool(self.interleaved, name="interleaved")


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    batch: Batch,
    *,
    rope: Rope | None = None,
    q: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes K and V of a batch's queries to where they belong in one layer.

    Args:
        k: ``[num_queries, kv_heads, head_dim]``, any strides with dense heads. Cast to the
            layout's dtype.
        v: ``[num_queries, kv_heads, v_head_dim]``.
        layer: 0 to ``num_layers - 1``.
        batch: which tokens these are: the last of each row. Padding is not written.
        rope: turn K by each token's position first, and `q` if it is given. Tables must have as
            many positions as the longest sequence.
        q: queries to turn, ``[num_queries, num_heads, head_dim]``.

    Returns:
        The queries, turned, in a new tensor; None if `q` is None. No gradients pass through it.

    Raises:
        ConfigError: a tensor does not fit the batch or the layout; nothing was written.
    """
    if not isinstance(batch, Batch):
        raise ConfigError(f"batch must be a Batch; got {type(batch).__name__}")
    kv = batch.kv
    keys, values = kv.layer(layer)
    _check(k, keys, batch, "k")
    _check(v, values, batch, "v")
    if q is not None and rope is None:
        raise ConfigError("q is given to be turned: pass rope too")
    if rope is not None:
        _check_rope(rope, q, batch, keys)
    if kv.device.type == "cuda" and _triton_fits(k, v, keys, keys if q is None else q):
        with on(kv.device):
            return append_triton.append(k, v, keys, values, batch, rope, q)
    with torch.no_grad():
        return _append(k, v, keys, values, batch, rope, q)


def _triton_fits(*tensors: torch.Tensor) -> bool:
    knows = getattr(append_triton, "knows", None)
    return knows is not None and all(knows(tensor.dtype, tensor.device) for tensor in tensors)


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    rope: Rope | None,
    q: torch.Tensor | None,
) -> torch.Tensor | None:
    positions = batch.positions()
    rows, live = batch.query_rows, positions >= 0
    turned = None
    if rope is not None:
        at = positions.clamp(min=0)
        k = _turn(k, rope, at)
        turned = None if q is None else _turn(q, rope, at)
    if not bool(live.all()):
        positions, rows, k, v = positions[live], rows[live], k[live], v[live]
    slots = batch.slots[rows].long()
    keys[slots, positions] = k.to(keys.dtype)
    values[slots, positions] = v.to(values.dtype)
    return turned


def _turn(x: torch.Tensor, rope: Rope, positions: torch.Tensor) -> torch.Tensor:
    half = rope.cos.shape[1]
    cos, sin = rope.cos[positions][:, None], rope.sin[positions][:, None]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if rope.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        both = pairs.flatten(-2)
    else:
        first, second = turned[..., :half], turned[..., half:]
        both = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([both.to(x.dtype), rest], dim=-1)


def _check(new: torch.Tensor, cache: torch.Tensor, batch: Batch, name: str) -> None:
    wanted = (batch.num_queries, *cache.shape[2:])
    batch.require_filled()
    if not is_tensor(new) or new.shape != wanted or new.device != cache.device:
        raise ConfigError(f"{name} must be {list(wanted)} on {cache.device}; got {shown(new)}")
    if not (new.is_floating_point() and cache.is_floating_point()):
        raise ConfigError(
            f"append writes floating point, not {new.dtype} into {cache.dtype}: write quantised "
            "numbers into KVAllocator.layer()"
        )
    if new.stride(-1) != 1:
        raise ConfigError(f"{name} must have dense heads; its strides are {new.stride()}")


def _check_rope(rope: Rope, q: torch.Tensor | None, batch: Batch, keys: torch.Tensor) -> None:
    if not isinstance(rope, Rope):
        raise ConfigError(f"rope must be a Rope; got {type(rope).__name__}")
    positions, half = rope.cos.shape
    if rope.cos.device != keys.device:
        raise ConfigError(f"cos and sin must be on {keys.device}; they are on {rope.cos.device}")
    if 2 * half > keys.shape[-1]:
        raise ConfigError(f"cos and sin turn {2 * half} elements, a head has {keys.shape[-1]}")
    if positions < batch.max_length:
        raise ConfigError(
            f"cos and sin have {positions} positions, the batch has {batch.max_length}"
        )
    if q is not None and (
        not is_tensor(q)
        or q.dim() != 3
        or not q.is_floating_point()
        or q.shape[0] != batch.num_queries
        or q.shape[2] != keys.shape[-1]
        or q.stride(-1) != 1
        or q.device != keys.device
    ):
        raise ConfigError(
            f"q must be [{batch.num_queries}, num_heads, {keys.shape[-1]}] of floating point with "
            f"dense heads on {keys.device}; got {shown(q)}"
        )
