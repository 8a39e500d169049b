"""Calls of one model on several streams, in the order in which they were made.

All calls of an enabled model write to the same tensors, and what a call has enqueued must be passed
before memory is given up, wherever that is done: by a call on another stream, or by a collector.
"""

from __future__ import annotations

import torch

from vattention.attention.device import on

__all__ = ["StreamOrder"]


class StreamOrder:
    """Which stream of a device the last call ran on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def lead(self) -> None:
        """Begins a call: the stream in use waits for the last call's, and is the last one now.

        Calls are made one after another; that is for the caller to see to.
        """
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream

    def follow(self) -> None:
        """Before memory is given up outside of a call, perhaps beside one on another thread."""
        last = self._last
        if last is None:
            return
        with on(self._device):
            if torch.cuda.is_current_stream_capturing():
                return  # which nothing may be waited for in; giving up is refused there, too
            stream = torch.cuda.current_stream(self._device)
            if stream != last:
                stream.wait_stream(last)
