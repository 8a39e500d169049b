"""Lets `generate()` look for the end a step late, so that the host never waits for the device.

transformers has this (`DeferredStopCheck`), and allows it where it has measured it. With steps that
are one graph it pays on CUDA too: while the device runs a step, the host prepares the next. It
costs one step at the end, which transformers takes back. Where a version has no such check,
nothing is changed.
"""

from __future__ import annotations

from typing import Any

from transformers.generation import utils

from vattention.integrations.transformers.ragged import RaggedCache

__all__ = ["defer_stop_checks"]

_done = False


def defer_stop_checks() -> None:
    """From now on, generations over a `RaggedCache` on a GPU look for their end a step late."""
    global _done
    check = getattr(utils, "DeferredStopCheck", None)
    allowed = getattr(check, "is_supported", None)
    if _done or allowed is None:
        return
    _done = True

    def is_supported(
        device: Any, cache: Any, cache_is_returned: bool, is_assistant: bool, *others: Any
    ) -> bool:
        if isinstance(cache, RaggedCache) and device.type == "cuda" and not is_assistant:
            return True
        return bool(allowed(device, cache, cache_is_returned, is_assistant, *others))

    check.is_supported = staticmethod(is_supported)  # type: ignore[union-attr]
