"""What a caller gave where a tensor is wanted."""

from __future__ import annotations

from typing import TypeGuard

import torch

__all__ = ["is_tensor", "shown"]


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor at all, whatever its annotation promises."""
    return isinstance(value, torch.Tensor)


def shown(value: object) -> str:
    """A tensor's shape, dtype and device, or what it is instead; for messages."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} of {value.dtype} on {value.device}"
    return f"a {type(value).__name__}"
