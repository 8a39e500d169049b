"""Everything this package raises on purpose.

`VAttentionError` is above all of them, and most are also the built-in exception that a caller who
has never heard of this package would catch. All of them survive pickling, so that a worker process
can hand one to its parent. The extension raises these very classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "Closed",
    "ConfigError",
    "OutOfPages",
    "OutOfSlots",
    "SequenceTooLong",
    "StaleSequence",
    "VAttentionError",
]


class VAttentionError(Exception):
    """The base of every error of this package."""

    _keywords: ClassVar[tuple[str, ...]] = ()
    """Keyword-only arguments of the constructor, each kept as an attribute of that name."""

    def __reduce__(self) -> tuple[Callable[..., VAttentionError], tuple[Any, ...], dict[str, Any]]:
        """Rebuild by all arguments; the inherited way leaves the keyword-only ones out."""
        keywords = {name: getattr(self, name) for name in self._keywords}
        return partial(type(self), **keywords), self.args, self.__dict__


class ConfigError(VAttentionError, ValueError):
    """An argument or a setting cannot be used: says which, what was given, what is allowed."""


class OutOfPages(VAttentionError, MemoryError):
    """The budget, or the device, has too few pages for a request; nothing was changed.

    Attributes:
        needed: bytes of physical memory that the request still lacked.
        free: bytes that the pool could hand out at once.
        reclaimable: bytes that could be had by giving up what nobody uses any more.
        budget: bytes that the pool may hold in all.
    """

    _keywords = ("needed", "free", "reclaimable", "budget")

    def __init__(
        self, message: str, *, needed: int, free: int, reclaimable: int, budget: int
    ) -> None:
        """Take the message and the four amounts, all in bytes."""
        super().__init__(message)
        self.needed = needed
        self.free = free
        self.reclaimable = reclaimable
        self.budget = budget


class OutOfSlots(VAttentionError):
    """As many sequences are live as the allocator has slots; nothing was changed."""


class SequenceTooLong(VAttentionError, ValueError):
    """More tokens were asked for than a slot has addresses for; nothing was changed."""


class StaleSequence(VAttentionError, LookupError):
    """A sequence was used after it was freed."""


class Closed(VAttentionError, RuntimeError):
    """An allocator was used after it was closed, or a pool in a forked child of its process."""


class BackendError(VAttentionError, RuntimeError):
    """A call of the driver, or of the operating system, failed.

    Attributes:
        call: name of the call, for example ``"cuMemMap"``.
        code: what it returned: a ``CUresult``, or an ``errno`` on the host.
    """

    _keywords = ("call", "code")

    def __init__(self, message: str, *, call: str, code: int) -> None:
        """Take the message, the call that failed and its code."""
        super().__init__(message)
        self.call = call
        self.code = code


class BackendUnavailable(BackendError):
    """The device asked for cannot be used on this machine: says why, and what to do.

    ``call`` is ``""`` and ``code`` is 0 where no call was made, for example for want of a driver.
    """

    def __init__(self, message: str, *, call: str = "", code: int = 0) -> None:
        """Take the message and, if one was made, the call that failed and its code."""
        super().__init__(message, call=call, code=code)
