"""Which GPU is the current one, for kernels that take it and not that of their tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["on"]

_AS_IT_IS = nullcontext()


def on(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts, that device is the current one; the CPU, or one that is already: nothing."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _AS_IT_IS
    return torch.cuda.device(device)
