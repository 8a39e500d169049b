"""The cache that an enabled model generates with: each row holds its own tokens and no padding.

A row of the batch is a sequence of every allocator of the engine (one allocator for each kind of
layer). What transformers counts, the padded length of the batch, is `get_seq_length`; what is
stored of row `i` is `lengths[i]` tokens, from the start of its slot. K and V do not pass through
this object: the operator writes them, see `operator.py`.

What is always true between two calls:

- every row has a live sequence in every group, mapped for `lengths[i]` tokens at least;
- `stamp` differs from what it was before anything but `advance` changed the rows or lengths.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from vattention import Sequence
from vattention.config import check_tokens
from vattention.errors import Closed, ConfigError, StaleSequence
from vattention.integrations.transformers import operator
from vattention.integrations.transformers.cache import not_copied

if TYPE_CHECKING:
    from vattention.integrations.transformers.engine import Engine
    from vattention.integrations.transformers.streams import StreamOrder

__all__ = ["RaggedCache"]

_stamps = itertools.count(1)

# Tokens below a window, and below what a kernel loads there, that stay: as many can be taken back.
_KEPT_TOKENS = 256
# Giving memory back costs driver calls, so it waits until this many more tokens can go.
_MIN_TRIM_TOKENS = 256


class RaggedCache(Cache):
    """Made by an enabled model's `generate()`; may be passed to another one to continue a chat.

    Args:
        engine: of the model.
        expected_tokens: how long the longest row may get; finds rows memory that fits.
    """

    def __init__(self, engine: Engine, expected_tokens: int = 0) -> None:
        super().__init__(layers=[])
        self.engine = engine
        self.lengths: list[int] = []
        self.seen = 0
        self.decoded = 0  # the last so many tokens of each row came by decode steps
        self._expected_tokens = expected_tokens
        self._is_open = False
        self.handle = operator.handle(operator.register(self))
        self.stamp = next(_stamps)
        self.looked = 0  # the stamp when the engine looked at the model last
        self._rows: list[list[Sequence]] = [[] for _ in engine.groups]
        self._released: list[int] = [0] * len(engine.groups)
        self._end = weakref.finalize(self, _free_rows, self._rows, engine.order)

    # ---- what transformers asks ----

    @property
    def is_compileable(self) -> bool:
        """False: `generate()` must not compile the model, the engine sees to that."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return bool(self.lengths)

    @property
    def is_croppable(self) -> bool:
        """True."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """Empty: no mask is made from this cache."""
        return []

    def __len__(self) -> int:
        """Layers, as of every cache; models take one without any for none at all."""
        return len(self.engine.places)

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: tokens of a prompt that it holds already are not run again."""
        return [False] * len(self.engine.places)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what it is given: the operator writes it where it attends to it.

        Raises:
            ConfigError: it is another model that runs, or one that was disabled.
        """
        if not self.engine.is_running:
            raise ConfigError("this cache belongs to another model, or to one that was disabled")
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the batch has seen, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that fit a row."""
        return self.engine.max_seq_len

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As if every row held the padded batch."""
        return self.seen + query_length, 0

    def activate_past_recording(self) -> None:
        """Nothing: a token can always be taken back."""

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens of every row back.

        A positive number is the length to keep, of the padded batch. Memory below a window goes
        back, but up to 256 tokens can be taken back whatever the window.

        Raises:
            ConfigError: a row has fewer, or a window would reach what was given back; nothing has
                changed.
        """
        count = check_tokens(tokens_to_remove, name="tokens_to_remove")
        remove = -count if count <= 0 else max(0, self.seen - count)
        if remove == 0:
            return
        self.take_back([remove] * len(self.lengths))
        self.seen -= remove
        self.decoded = max(0, self.decoded - remove)

    def take_back(self, counts: Rows[int]) -> None:
        """Takes the last so many tokens of each row back; the padded batch is as long as it was.

        Raises:
            ConfigError: see `crop`; nothing has changed.
        """
        lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        if min(lengths) < 0:
            raise ConfigError(f"rows of {self.lengths} tokens cannot lose {list(counts)} of them")
        for group, released in zip(self.engine.groups, self._released, strict=True):
            reach = (group.window or 0) + group.front_slack_tokens
            if released and min(lengths) - reach < released:
                raise ConfigError(
                    f"rows of {self.lengths} tokens cannot lose {list(counts)}: what their window "
                    f"would reach then, below token {released}, was given back"
                )
        self.engine.order.follow()
        self._set(lengths, self.seen)
        self._trim(self._rows)

    def reset(self) -> None:
        """Ends every row; what they held stays mapped for those that come next."""
        _free_rows(self._rows, self.engine.order)
        self._released = [0] * len(self._rows)
        self.decoded = 0
        self._set([], 0)

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            "rows of this cache are not rearranged: pass a VAttentionCache or a DynamicCache"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse

    __reduce_ex__ = not_copied

    # ---- what the engine asks ----

    def is_decode(self, tokens: int) -> bool:
        """Whether so many tokens in each row are a decode step.

        The first of another turn is none, nor is one after the cache was changed: masks are looked
        at there, and the model. A row that has only had padding so far may get more of it.
        """
        looked = self.looked == self.stamp
        return tokens == 1 and looked and bool(self.lengths) and min(self.lengths) > 0

    def settle(self) -> None:
        """Takes back what a step began that was cut off, as one in a compiler's graph may be."""
        if self._is_open:
            self.undo_begin(self.lengths)

    def begin(self, counts: Rows[int]) -> None:
        """Makes rows with room for so many tokens each, or adds to those there are.

        All of them, or none: what is raised leaves the cache as it was.
        """
        groups = self.engine.groups
        if not self.lengths:
            made: list[list[Sequence]] = [[] for _ in groups]
            growth = max(0, self._expected_tokens - max(counts))
            try:
                for group, rows in zip(groups, made, strict=True):
                    for count in counts:
                        expected = min(count + growth, self.engine.max_seq_len)
                        rows.append(group.kv.allocate(count, expected_tokens=expected))
            except BaseException:
                _free_rows(made, self.engine.order)
                raise
            for own, rows in zip(self._rows, made, strict=True):
                own.extend(rows)
        else:
            self.extend([have + count for have, count in zip(self.lengths, counts, strict=True)])
        self._is_open = True

    def extend(self, lengths: Rows[int]) -> None:
        """Maps every row for so many tokens, after giving back what left the window.

        In every group, or in none.
        """
        done: list[list[Sequence]] = []
        try:
            for number, group in enumerate(self.engine.groups):
                rows = self._rows[number]
                if group.window is not None:
                    below = group.front_slack_tokens + _KEPT_TOKENS
                    self._release(number, group.window + below)
                group.kv.step(dict(zip(rows, lengths, strict=True)))
                done.append(rows)
        except BaseException:
            self._trim(done)
            raise

    def finish(self, lengths: Rows[int], seen: int) -> None:
        """The tokens have been written: a prefill."""
        self._is_open = False
        self.decoded = 0
        self._set(list(lengths), seen)

    def advance(self) -> None:
        """Every row has one more: a decode step."""
        self.lengths = [length + 1 for length in self.lengths]
        self.seen += 1
        self.decoded += 1

    def slots(self, group: int) -> list[int]:
        """The slot of each row."""
        return [row.slot for row in self._rows[group]]

    def undo_begin(self, lengths: Rows[int]) -> None:
        """Takes back what `begin` made for tokens that were not written after all."""
        self._is_open = False
        if not lengths:
            self.reset()
            return
        self._trim(self._rows)
        self.stamp = next(_stamps)

    def _release(self, number: int, kept_tokens: int) -> None:
        needed = max(0, min(self.lengths, default=0) - kept_tokens)
        if needed - self._released[number] >= _MIN_TRIM_TOKENS:
            self._released[number] = needed
            for row in self._rows[number]:
                row.trim_front(needed)

    def _trim(self, rows_of_groups: Rows[Rows[Sequence]]) -> None:
        for rows in rows_of_groups:
            for row, length in zip(rows, self.lengths, strict=True):
                row.trim(length)

    def _set(self, lengths: list[int], seen: int) -> None:
        self.lengths, self.seen = lengths, seen
        self.stamp = next(_stamps)

    def __repr__(self) -> str:
        """What it holds."""
        return f"RaggedCache(rows={len(self.lengths)}, lengths={self.lengths})"


def _free_rows(rows_of_groups: list[list[Sequence]], order: StreamOrder) -> None:
    """Frees and forgets; also when the cache is collected, perhaps after its allocators closed."""
    if any(rows_of_groups):
        order.follow()  # wherever it is collected
    for rows in rows_of_groups:
        while rows:
            with contextlib.suppress(Closed, StaleSequence):
                rows.pop().free()
