"""A live request: its slot, and how long it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vattention.config import check_tokens

if TYPE_CHECKING:
    from vattention.allocator import KVAllocator


class Sequence:
    """A live sequence of an allocator; made by :meth:`KVAllocator.allocate`, never by hand.

    It is compared and hashed by identity, so it can be a key of :meth:`KVAllocator.step`. After
    :meth:`free` all that looks at its tokens or changes them raises :class:`StaleSequence`, also
    when its slot has a new sequence; after :meth:`KVAllocator.close`, :class:`Closed`. As a context
    manager it frees itself. May be used from any thread.
    """

    __slots__ = ("__weakref__", "_generation", "_kv", "_slot")

    def __init__(self, kv: KVAllocator, slot: int, generation: int) -> None:
        """Names the `generation`-th sequence of a slot."""
        self._kv = kv
        self._generation = generation
        self._slot = slot

    @property
    def slot(self) -> int:
        """The row of the tensors of :meth:`KVAllocator.layer` that is this sequence's."""
        return self._slot

    @property
    def length(self) -> int:
        """Tokens it holds.

        Raises:
            StaleSequence: it has been freed.
        """
        return self._kv._open().length(self._slot, self._generation)

    @property
    def alive(self) -> bool:
        """Whether it has not been freed yet, nor its allocator closed."""
        return not self._kv.closed and self._kv._open().alive(self._slot, self._generation)

    def trim(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens.

        What lies wholly behind them, and behind a small margin for growing again, goes back to
        the pool once the GPU has passed this point of the current stream: call it after the last
        kernel that reads those tokens was launched there.

        Raises:
            StaleSequence: it has been freed.
            ConfigError: it holds fewer tokens, :meth:`trim_front` gave the rest away, or
                `num_tokens` is no whole number.
            BackendError: the driver refused; nothing has changed.
        """
        kv = self._kv
        tokens = check_tokens(num_tokens, name="num_tokens")
        kv._open().trim(self._slot, self._generation, tokens, kv._stream())

    def trim_front(self, first_token: int) -> None:
        """Declares that tokens below `first_token` are not needed any more.

        Whole extents below it go back to the pool once the GPU has passed this point of the
        current stream; reading there afterwards faults. The tokens above keep their addresses.
        The call for a sliding window. Attention kernels load some tokens below a window as well:
        leave as many as :func:`vattention.attention.front_slack_tokens` says.

        Raises:
            StaleSequence: it has been freed.
            ConfigError: `first_token` is not within the sequence, or no whole number.
            BackendError: the driver refused; nothing has changed.
        """
        kv = self._kv
        token = check_tokens(first_token, name="first_token")
        kv._open().trim_front(self._slot, self._generation, token, kv._stream())

    def free(self) -> None:
        """Ends the sequence.

        Its slot stays mapped, for the next sequence to adopt, and is handed on only once the GPU
        has passed this point of the current stream.

        Raises:
            StaleSequence: it has been freed already.
            BackendError: the driver refused; the sequence is still live.
        """
        kv = self._kv
        kv._open().free(self._slot, self._generation, kv._stream())

    def __enter__(self) -> Sequence:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Frees it, unless that has been done, or its allocator is closed."""
        if self.alive:
            self.free()

    def __repr__(self) -> str:
        """The slot and the length, or that it is stale."""
        state = f"length={self.length}" if self.alive else "stale"
        return f"Sequence(slot={self.slot}, {state})"
