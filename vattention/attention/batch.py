"""Which sequences take part in a step: slots, lengths and queries, on the device.

A batch has rows. Row `i` is one sequence: its slot, its length (this step's tokens included) and
its queries, which are its last tokens. Queries of all rows lie back to back, row after row, in the
tensors that attention takes.

What is always true:

- `slots`, `lengths`, `query_starts` and `query_rows` keep their addresses while the batch has as
  many rows, and one for graphs always has: so a CUDA graph that was captured with it stays valid
  when it is filled anew.
- Filling it is one copy to the device and a few small kernels; the host waits for none of them.
- A row of length 0 is padding: it reads nothing, nothing is written for it, its output is zero.
- `max_queries` and `max_length` are bounds that the host knows, `host_slots` and `host_queries`
  what it was filled with. `host_lengths` are the lengths themselves, and None once the host does
  not know them.
"""

from __future__ import annotations

import array
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from vattention.allocator import KVAllocator
from vattention.attention.device import on
from vattention.config import check_int
from vattention.errors import ConfigError
from vattention.sequence import Sequence

__all__ = ["Batch"]

_MAX_INT32 = 2**31 - 1


class Batch:
    """Sequences of one allocator and how many queries each has, for `attend` and `append`.

    Made once and filled for every step, or made for one step by :meth:`of`::

        batch = Batch(kv, max_rows=64, max_queries=8192)
        kv.step({seq: seq.length + n for seq, n in new_tokens.items()})
        batch.fill(new_tokens)

    It holds slots and lengths, not sequences: fill it anew when one of them has been freed or
    trimmed. Kernels would read what is not mapped any more, which ends the process.

    Args:
        kv: the allocator whose slots are meant.
        max_rows: the most sequences it is filled with.
        max_queries: the most queries, of all sequences together; by default one for each.
        graph: it will be captured into CUDA graphs: only backends that can be are chosen, and it
            is always filled with as many rows and queries as the first time; rows that are not in
            use are padding.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        kv: KVAllocator,
        max_rows: int,
        max_queries: int | None = None,
        *,
        graph: bool = False,
    ) -> None:
        """Takes 12 bytes a row and 4 a query on the device."""
        if not isinstance(kv, KVAllocator):
            raise ConfigError(f"kv must be a KVAllocator; got {type(kv).__name__}")
        rows = check_int(max_rows, name="max_rows", minimum=1, maximum=_MAX_INT32 // 4)
        queries = rows if max_queries is None else max_queries
        self.kv = kv
        self.graph = graph
        self.max_rows = rows
        self.capacity = check_int(
            queries, name="max_queries", minimum=1, maximum=_MAX_INT32 - 3 * rows - 1
        )
        with torch.inference_mode(False):
            self._all = torch.zeros(
                3 * rows + 1 + self.capacity, dtype=torch.int32, device=kv.device
            )
        self._derived: dict[object, Any] = {}
        self._in_capture = False
        self.num_rows = 0
        self.num_queries = 0
        self.max_queries = 0
        self.max_length = 0
        self.host_lengths: list[int] | None = []
        self.host_slots: list[int] = []
        self.host_queries: list[int] = []
        self._cut()

    @classmethod
    def of(cls, queries: Mapping[Sequence, int]) -> Batch:
        """A batch for one step.

        Args:
            queries: for each sequence, how many of its last tokens are queries.

        Raises:
            ConfigError: there is no sequence, they are of several allocators, or a number of
                queries is not from 1 to the sequence's length.
            StaleSequence: one has been freed.
        """
        _check_mapping(queries)
        if not queries:
            raise ConfigError("a batch needs at least one sequence")
        first = next(iter(queries))
        if not isinstance(first, Sequence):
            raise ConfigError(f"queries must map sequences to numbers; got the key {first!r}")
        counts = [check_int(n, name="a number of queries", minimum=1) for n in queries.values()]
        batch = cls(first._kv, len(counts), sum(counts))
        batch.fill(queries)
        return batch

    def fill(self, queries: Mapping[Sequence, int]) -> None:
        """Takes these sequences, as long as they are now, from row 0 on.

        Args:
            queries: for each sequence, how many of its last tokens are queries.

        Raises:
            ConfigError: more rows or queries than there is room for, a sequence of another
                allocator, or a number of queries that is not from 1 to the sequence's length.
                Nothing has changed.
            StaleSequence: one has been freed; nothing has changed.
        """
        _check_mapping(queries)
        for sequence in queries:
            if not isinstance(sequence, Sequence):
                raise ConfigError(f"queries must map sequences to numbers; got {sequence!r}")
            if sequence._kv is not self.kv:
                raise ConfigError("queries has a sequence of another allocator")
        self.fill_rows(
            [sequence.slot for sequence in queries],
            [sequence.length for sequence in queries],
            list(queries.values()),
        )

    def fill_rows(
        self,
        slots: Iterable[int],
        lengths: Iterable[int],
        queries: Iterable[int] | None = None,
        *,
        max_length: int | None = None,
    ) -> None:
        """The same from numbers, for an engine that keeps them: they are not looked up.

        Args:
            slots: a slot for each row.
            lengths: tokens of each row, this step's included; mapped already. 0: padding.
            queries: how many of its last tokens are queries; by default one for each. Padding
                has one.
            max_length: a bound that is kept instead of the longest of `lengths`, so that a graph
                captured now serves longer ones; at most the allocator's `max_seq_len`.

        Raises:
            ConfigError: lists of different sizes, more rows or queries than there is room for, or
                other numbers of them than a graph was made for, or a number out of range or not
                whole. Nothing has changed.
        """
        slots = _whole_numbers(slots, "slots")
        lengths = _whole_numbers(lengths, "lengths")
        counts = [1] * len(slots) if queries is None else _whole_numbers(queries, "queries")
        if not len(slots) == len(lengths) == len(counts):
            raise ConfigError(
                f"slots, lengths and queries must be alike; got {len(slots)}, {len(lengths)} and "
                f"{len(counts)}"
            )
        if not 1 <= len(slots) <= self.max_rows:
            raise ConfigError(f"a batch of {len(slots)} rows does not fit max_rows={self.max_rows}")
        self._check_rows(slots, lengths, counts)
        total = sum(counts)
        if total > self.capacity:
            raise ConfigError(f"{total} queries do not fit max_queries={self.capacity}")
        if (
            self.graph
            and self.num_rows
            and (len(slots), total) != (self.num_rows, self.num_queries)
        ):
            raise ConfigError(
                f"graphs of this batch have {self.num_rows} rows and {self.num_queries} queries, "
                f"not {len(slots)} and {total}: fill up with rows of length 0"
            )
        longest = max(lengths)
        if max_length is not None:
            longest = check_int(
                max_length, name="max_length", minimum=longest, maximum=self.kv.max_seq_len
            )
        starts = [0, *itertools.accumulate(counts)]
        rows, most = len(slots), max(counts)
        head = torch.tensor([*slots, *lengths, *starts], dtype=torch.int32, device="cpu")
        if self.kv.device.type == "cuda":
            head = head.pin_memory()
        self.num_rows, self.num_queries = rows, total
        self.max_queries, self.max_length = most, longest
        self.host_slots, self.host_lengths, self.host_queries = slots, lengths, counts
        self._cut()
        self._all[: 3 * rows + 1].copy_(head, non_blocking=True)
        if most == 1:
            torch.arange(total, dtype=torch.int32, device=self.kv.device, out=self.query_rows)
        else:
            numbers = torch.arange(rows, dtype=torch.int32, device=self.kv.device)
            counts_there = self.query_starts.diff()
            self.query_rows.copy_(torch.repeat_interleave(numbers, counts_there, output_size=total))
        self.touch()

    def advance(self) -> None:
        """Lengthens every row that is not padding by a token, on the device: a decode step.

        May be captured into a CUDA graph. The host's own numbers are told by
        :meth:`note_advance`, whenever the graph is replayed.
        """
        self.lengths.add_((self.lengths > 0).to(torch.int32))
        self.touch()

    def note_advance(self) -> None:
        """What :meth:`advance` did, for `host_lengths` and `max_length`.

        Raises:
            ConfigError: a row would be longer than `max_seq_len`, or than what graphs of this batch
                were captured for; nothing has changed.
        """
        self.require_filled()
        if self.host_lengths is None:
            raise ConfigError("the host does not know this batch's lengths: fill it first")
        lengths = [length + (length > 0) for length in self.host_lengths]
        longest = max(lengths)
        if longest > self.kv.max_seq_len:
            raise ConfigError(
                f"a row would have {longest} tokens, where max_seq_len={self.kv.max_seq_len}"
            )
        if self.graph and longest > self.max_length:
            raise ConfigError(
                f"a row would have {longest} tokens, where graphs of this batch are for "
                f"{self.max_length}: fill it with a larger max_length before they are captured"
            )
        self.host_lengths = lengths
        self.max_length = max(self.max_length, longest)
        self.touch()

    def require_filled(self) -> None:
        """Raises a `ConfigError` unless it has rows."""
        if not self.num_rows:
            raise ConfigError("this batch has no rows yet: fill() it first")

    def touch(self) -> None:
        """Forgets what was derived from the device's numbers: they have changed.

        Call it when the capture of a CUDA graph begins, so that the graph derives them itself. (A
        capture that follows eager calls is noticed, one that follows another capture is not.)
        """
        self._derived.clear()

    def notice_capture(self) -> None:
        """Forgets what was derived where a capture has begun or ended since.

        What was made outside would be gone, or old, when the graph is replayed; what was made
        inside is written by the graph only.
        """
        if self.kv.device.type == "cuda":
            with on(self.kv.device):
                in_capture = torch.cuda.is_current_stream_capturing()
            if in_capture is not self._in_capture:
                self._in_capture = in_capture
                self.touch()

    def derived(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once until the batch changes: one call a step, not a layer.

        After `notice_capture`.
        """
        value = self._derived.get(key)
        if value is None:
            value = self._derived[key] = make()
        return value

    def positions(self) -> torch.Tensor:
        """For each query, its place in its sequence: int64 ``[num_queries]`` on the device.

        Negative for padding.
        """
        self.notice_capture()

        def make() -> torch.Tensor:
            rows = self.query_rows
            behind = self.lengths - self.query_starts[1:]
            numbers = torch.arange(self.num_queries, device=rows.device)
            return numbers + behind[rows]

        positions: torch.Tensor = self.derived("positions", make)
        return positions

    @property
    def is_decode(self) -> bool:
        """Whether every row has one query."""
        return self.max_queries == 1

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph will hold it, or does: see `notice_capture`."""
        return self.graph or self._in_capture

    def _cut(self) -> None:
        """The views of what is in use; those of a batch of as many rows are always the same."""
        rows = self.num_rows
        self.slots, self.lengths = self._all[:rows], self._all[rows : 2 * rows]
        self.query_starts = self._all[2 * rows : 3 * rows + 1]
        start = 3 * self.max_rows + 1
        self.query_rows = self._all[start : start + self.num_queries]

    def _check_rows(self, slots: list[int], lengths: list[int], counts: list[int]) -> None:
        if min(slots) < 0 or max(slots) >= self.kv.max_sequences:
            raise ConfigError(f"a slot must be from 0 to {self.kv.max_sequences - 1}; got {slots}")
        if min(lengths) < 0 or max(lengths) > self.kv.max_seq_len:
            raise ConfigError(
                f"a length must be from 0 to max_seq_len={self.kv.max_seq_len}; got {lengths}"
            )
        for length, count in zip(lengths, counts, strict=True):
            if not 1 <= count <= max(length, 1):
                raise ConfigError(
                    f"queries are a sequence's last tokens: of {length}, {count} cannot be"
                )

    def __repr__(self) -> str:
        """How many rows and queries."""
        return (
            f"Batch(num_rows={self.num_rows}, num_queries={self.num_queries}, "
            f"max_length={self.max_length})"
        )


def _check_mapping(queries: object) -> None:
    if not isinstance(queries, Mapping):
        raise ConfigError(
            f"queries must map sequences to numbers of queries; got a {type(queries).__name__}"
        )


def _whole_numbers(values: Iterable[int], name: str) -> list[int]:
    """A list of them, of Python's own: torch would round what is none, and wrap what is large."""
    try:
        numbers = list(values)
        if bool in map(type, numbers):
            raise TypeError("a bool is none")
        return array.array("i", numbers).tolist()
    except (TypeError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"{name} must be whole numbers of 32 bits: {error}") from error
