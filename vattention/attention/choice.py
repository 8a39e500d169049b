"""Which backend runs: the one that is asked for, or the fastest where it was measured.

`measured.json` beside this file is what `python -m bench attention --save` wrote: for a device, a
phase and a shape, the time of each backend. `auto` looks up the nearest shape of the device in
use, or of the one most like it, and takes the fastest of those that can run. Times that differ by
less than they vary are the same: then the order of `BACKENDS` decides. A backend that was not
measured there comes after all that were.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from importlib import resources
from typing import Any

import torch

from vattention.attention.backend import Backend
from vattention.attention.flash_attn_2 import FlashAttention2
from vattention.attention.flash_attn_3 import (
    FlashAttention3,
    FlashAttention3Forward,
    FlashAttention3Vllm,
)
from vattention.attention.flashinfer import FlashInfer
from vattention.attention.reference import Torch
from vattention.attention.torch_efficient import TorchEfficient
from vattention.attention.torch_flash import TorchFlash
from vattention.errors import ConfigError

__all__ = ["BACKENDS", "backend_class", "fastest", "front_slack_tokens", "tail_slack_tokens"]

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend
    for backend in (
        FlashAttention3Vllm,
        FlashAttention3,
        FlashAttention3Forward,
        FlashAttention2,
        TorchFlash,
        FlashInfer,
        TorchEfficient,
        Torch,
    )
}
"""All of them by name; where nothing was measured, the first that can run is taken."""

_NOISE = 1.01
"""How far apart two times of one kernel may be."""


def backend_class(name: str) -> type[Backend]:
    """The backend of that name.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = BACKENDS.get(name)
    except TypeError:  # no text at all
        found = None
    if found is None:
        raise ConfigError(f'backend must be "auto" or one of {", ".join(BACKENDS)}; got {name!r}')
    return found


def tail_slack_tokens(
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    backend: str = "auto",
) -> int:
    """What `KVAllocator(tail_slack_tokens=)` must be for a backend, whatever the lengths are.

    For "auto": for every one of them that is installed.

    Args:
        dtype: of K and V.
        device: where they are.
        backend: "auto" or a name of `BACKENDS`.

    Raises:
        ConfigError: no such backend, device or dtype.
    """
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype must be a torch.dtype; got {dtype!r}")
    return max(
        (
            found.needs.tail_slack_of(dtype)
            for found in _usable(device, backend)
            if dtype in found.needs.dtypes
        ),
        default=0,
    )


def front_slack_tokens(device: torch.device | str = "cuda", backend: str = "auto") -> int:
    """How many tokens below a sliding window a backend loads, though they do not count.

    Where memory below a window is given back, keep so many mapped:
    ``seq.trim_front(max(0, seq.length - window - front_slack_tokens()))``. For "auto": enough for
    every one of them that is installed.

    Args:
        device: where K and V are.
        backend: "auto" or a name of `BACKENDS`.

    Raises:
        ConfigError: no such backend, or no device.
    """
    return max((found.needs.front_slack_tokens for found in _usable(device, backend)), default=0)


def _usable(device: torch.device | str, backend: str) -> list[type[Backend]]:
    """Those of that name, or all, that are installed for a kind of device."""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cuda", "cpu"):
        raise ConfigError(f"device must be 'cuda', 'cuda:N' or 'cpu', not {device!r}")
    classes = BACKENDS.values() if backend == "auto" else [backend_class(backend)]
    return [found for found in classes if found.needs.device == kind and not found.missing()]


def fastest(
    names: Iterable[str], device: torch.device, *, decode: bool, rows: int, length: int
) -> str:
    """The fastest of these backends for a batch of `rows` sequences of about `length` tokens."""
    names = list(names)
    times = _nearest(device, decode, rows, length)
    limit = min(times.get(name, math.inf) for name in names) * _NOISE
    equal = [name for name in names if times.get(name, math.inf) <= limit]
    return min(equal, key=list(BACKENDS).index)


def _nearest(device: torch.device, decode: bool, rows: int, length: int) -> dict[str, float]:
    """The times of the measured shape that is nearest, as a ratio in each direction."""
    if device.type != "cuda":
        return {}
    phase = "decode" if decode else "prefill"
    shapes = [shape for shape in _shapes(device.index or 0) if shape["phase"] == phase]
    if not shapes:
        return {}

    def distance(shape: dict[str, Any]) -> float:
        return abs(math.log(rows / shape["rows"])) + abs(math.log(max(length, 1) / shape["length"]))

    times: dict[str, float] = min(shapes, key=distance)["us"]
    return times


@functools.cache
def _shapes(device_index: int) -> list[dict[str, Any]]:
    """What was measured on this device, else on one of its capability."""
    text = resources.files("vattention.attention").joinpath("measured.json").read_text()
    devices: list[dict[str, Any]] = json.loads(text)["devices"]
    name = torch.cuda.get_device_name(device_index)
    capability = list(torch.cuda.get_device_capability(device_index))
    same = [device for device in devices if device["name"] == name]
    alike = [device for device in devices if device["capability"] == capability]
    return [shape for device in same or alike[:1] for shape in device["shapes"]]
