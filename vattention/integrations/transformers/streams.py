"""Calls of one model on several streams, in the order in which they were made.

All calls of an enabled model write to the same tensors, and what a call has enqueued must be passed
before memory is given up, wherever that is done: by a call on another stream, or by a collector.
"""

from __future__ import annotations

import threading

import torch

__all__ = ["StreamOrder"]


class StreamOrder:
    """Which stream of a device the last call ran on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None
        self._lock = threading.RLock()  # a collector may call it wherever it comes

    def follow(self) -> None:
        """Lets the stream in use wait for what the one before it was given until now."""
        if self._device.type != "cuda":
            return
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
