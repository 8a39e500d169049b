"""Random events, the same for a naive model and for the real allocator, compared after each.

A failure says its seed, which ``--seed`` repeats, and the last operations. Where a run dies instead
of failing, ``VATTENTION_DEBUG=1`` and ``-s`` show what was done last. With a background thread not
everything repeats.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from model import (
    CacheSetup,
    Disagreement,
    Ghost,
    HostWitness,
    ModelCache,
    ModelSequence,
    Setup,
    covers,
    merged,
)

import vattention as va
from vattention import _core

INJECTED = 999  # the code of a failure that FaultyBackend made
LOG_LENGTH = 20
STRUCTURE_EVERY = 50  # operations between two looks at every mapping
CONTENTS_EVERY = 500  # operations between two readings of everything

# What may fail again and again without keeping an undo from working.
LASTING_FAULTS = ("create", "destroy", "zero", "record", "query", "create_fence")
SINGLE_FAULTS = (
    *LASTING_FAULTS,
    "",  # any call
    "",
    "map",
    "map",
    "set_access",
    "unmap",
    "unmap",
    "synchronize",
    "synchronize_device",
)


class Trial:
    """Random events, the same for the model and the real thing, which are compared after each.

    Canaries override some of its methods: a wrong variant has to be noticed.
    """

    def __init__(self, name: str, setup: Setup, seed: object) -> None:
        self.name = name
        self.setup = setup
        self.seed = seed
        self.rng = random.Random(f"{seed} {name}")
        self.index = 0
        self.log: deque[str] = deque(maxlen=LOG_LENGTH)
        self.counts: dict[str, int] = {}  # how often each event, and each error, came
        self.stamp = 0
        self.held = False  # fences do not pass
        self.armed = False  # the driver may say no in the present operation
        self.synchronized = 0
        if setup.device == "cpu":
            self.witness: HostWitness | None = HostWitness()
            self.backend = _core.FaultyBackend(self.witness.backend)
        else:
            self.witness = None
            self.backend = _core.FaultyBackend(
                _core.cuda_backend(torch.device(setup.device).index or 0)
            )
        self.page_bytes = self.backend.page_bytes
        self.budget_pages = setup.budget_pages
        self.high_bytes: int | None = None
        self.pool = self._make_pool()
        self.caches = [
            ModelCache(cache, f"kv{i}", self.page_bytes) for i, cache in enumerate(setup.caches)
        ]
        for cache in self.caches:
            cache.open(self.pool, setup)
        self.events: list[tuple[Callable[[], None], float]] = [
            (self.step_all, 26),
            (self.step_some, 22),
            (self.allocate, 14),
            (self.allocate_batch, 3),
            (self.free, 11),
            (self.trim, 7),
            (self.trim_front, 6),
            (self.write_again, 3),
            (self.invalid_call, 5),
            (self.set_budget, 2.5),
            (self.reclaim, 1.5),
            (self.reopen, 0.2),
        ]
        if setup.holds:
            self.events += [(self.hold_or_release, 6)]
        if setup.watermarks:
            self.events += [(self.set_watermarks, 2)]

    # What a canary replaces.

    def _make_pool(self) -> va.Pool:
        return va.Pool(
            self.budget_pages * self.page_bytes,
            self.setup.device,
            max_extent=self.setup.max_extent_pages * self.page_bytes,
            zero=self.setup.zero,
            background=self.setup.background,
            backend=self.backend,
        )

    def _hold_fences(self) -> None:
        self.backend.hold_fences()

    def _write(self, cache: ModelCache, slot: int, start: int, stop: int) -> None:
        cache.memory.write(slot, start, stop, self.stamp)

    def _really_set_budget(self, pages: int) -> None:
        self.pool.set_budget(pages * self.page_bytes)

    def _freed(self, cache: ModelCache, sequence: ModelSequence) -> None:
        """Nothing more to do: the sequence is gone."""

    # ---- running ----

    def run(self, operations: int) -> None:
        """Does so many operations, compares after each, and puts everything back.

        Raises:
            Disagreement: with the seed, the operation and the last ones before it.
        """
        try:
            draws = self.rng.choices(*zip(*self.events, strict=True), k=operations)
            for self.index, event in enumerate(draws):
                self._operate(event)
            self.index = operations
            self._note("finish")
            self._finish()
        except Exception as error:
            last = "\n  ".join(self.log)
            raise Disagreement(
                f"{error}\nseed {self.seed!r}, setup {self.name}, operation {self.index}; the last "
                f"operations:\n  {last}"
            ) from error

    def _operate(self, event: Callable[[], None]) -> None:
        arms = self.setup.faults and self.rng.random() < 0.08 and event != self.reopen
        if arms:
            lasting = self.rng.random() < 0.2
            call = self.rng.choice(LASTING_FAULTS if lasting else SINGLE_FAULTS)
            nth = self.rng.choice((1, 1, 1, 2, 2, 3, 5, 9))
            kind = self.rng.choice(("failed", "failed", "out_of_memory"))
            self._note(f"arm {call!r}, {nth}, {kind!r}, {'lasting' if lasting else 'once'}")
            self.backend.arm(call, nth, kind, lasting)
            self.armed = True
        self.counts[event.__name__] = self.counts.get(event.__name__, 0) + 1
        event()
        if arms:
            self.backend.disarm()
            self.armed = False
        self._compare()

    def _note(self, text: str) -> None:
        self.log.append(f"{self.index}: {text}")

    def _attempt(
        self,
        call: Callable[[], Any],
        *,
        must: tuple[type[Exception], ...] = (),
        may: tuple[type[Exception], ...] = (),
    ) -> tuple[Any, va.VAttentionError | None]:
        """Calls; returns its result, or the error that it must or may raise."""
        # A refusal that is not about the arguments may have waited for the driver first.
        if self.armed and (not must or {va.OutOfPages, va.OutOfSlots} & set(must)):
            may = (*may, *must, va.BackendError, va.OutOfPages)
            must = (*must, va.BackendError) if must else ()
        try:
            result = call()
        except va.VAttentionError as error:
            self.log[-1] += f" -> {type(error).__name__}: {str(error)[:90]}"
            self.counts[type(error).__name__] = self.counts.get(type(error).__name__, 0) + 1
            if type(error) not in (must or may):
                raise
            if isinstance(error, va.OutOfPages):
                assert error.budget == self.budget_pages * self.page_bytes
            if isinstance(error, va.BackendError):
                assert error.code == INJECTED and error.call
            # Its traceback would keep frames alive, and with them an allocator that is closed.
            return None, error.with_traceback(None)
        if must:
            raise Disagreement(f"it should have raised one of {[e.__name__ for e in must]}")
        return result, None

    # ---- what memory there must be ----

    @property
    def relaxed(self) -> bool:
        """Whether memory that is given up may be out of reach."""
        return self.held or self.armed

    def _total(self, kind: str, changed: dict[ModelSequence, tuple[int, int]] | None = None) -> int:
        """The least or most pages that all live sequences take, some at other (first, length)."""
        changed = changed or {}
        total = 0
        for cache in self.caches:
            pages = cache.least_pages if kind == "least" else cache.most_pages
            total += cache.guard_pages
            for sequence in cache.sequences:
                total += pages(*changed.get(sequence, (sequence.first, sequence.length)))
        return total

    def _verdict(self, least: int, most: int) -> dict[str, tuple[type[Exception], ...]]:
        """What a call may or must raise that needs between so many pages in all."""
        if least > self.budget_pages:
            return {"must": (va.OutOfPages,)}
        if most > self.budget_pages or self.held:
            return {"may": (va.OutOfPages,)}
        return {}

    def _withheld(self, changed: dict[ModelSequence, tuple[int, int]] | None = None) -> int:
        """The pages that cannot be had, by what is mapped now and nothing else.

        Each live sequence keeps the extents that touch what it needs; one that is changed lacks
        what is not mapped yet besides.
        """
        changed = changed or {}
        total = 0
        for cache in self.caches:
            total += cache.guard_pages
            extents: dict[tuple[int, int], list[tuple[int, int]]] = {}
            regions = self._regions(cache)
            for slot, region, address, size, _, access in cache.kv.mappings():
                if access == "read_write":
                    base, stride = regions[region]
                    page = (address - base - slot * stride) // self.page_bytes
                    extents.setdefault((slot, region), []).append((page, size // self.page_bytes))
            for sequence in cache.sequences:
                first, length = changed.get(sequence, (sequence.first, sequence.length))
                slack = cache.setup.tail_slack_tokens if length else 0
                for region, row in enumerate(cache.setup.layout.row_bytes):
                    begin, needed = cache.page_range(row, first, length)
                    reach = cache.page_range(row, first, length + slack)[1]
                    have = end = 0
                    for page, pages in extents.get((sequence.slot, region), ()):
                        last_kept = page + pages == begin and slack  # a guard needs it
                        if page < reach and (page + pages > begin or last_kept):
                            have += pages
                            end = max(end, page + pages)
                    total += have + max(0, needed - max(end, begin)) if length else 0
        return total

    def _judge(
        self,
        error: va.VAttentionError | None,
        changed: dict[ModelSequence, tuple[int, int]],
        more_pages: int = 0,
    ) -> None:
        """A refusal for want of pages has to be right about it."""
        if not isinstance(error, va.OutOfPages) or self.relaxed:
            return
        assert error.needed > error.free + error.reclaimable, vars(error)
        if not self.setup.background:
            needed = self._withheld(changed) + more_pages
            if needed <= self.budget_pages:
                raise Disagreement(f"{needed} of {self.budget_pages} pages were enough: {error}")

    # ---- events ----

    def _pick(self) -> tuple[ModelCache, ModelSequence | None]:
        cache = self.rng.choice(self.caches)
        return cache, self.rng.choice(cache.sequences) if cache.live else None

    def _some_length(self, cache: ModelCache) -> int:
        limit = cache.setup.max_seq_len
        row = self.rng.choice(cache.setup.layout.row_bytes)
        per_page = max(1, self.page_bytes // row)
        kind = self.rng.random()
        if kind < 0.15:
            return 0
        if kind < 0.40:
            return self.rng.randint(1, min(limit, 2 * per_page))
        if kind < 0.60:  # around the end of a page
            around = per_page * self.rng.randint(1, max(1, limit // per_page))
            return min(limit, max(0, around + self.rng.randint(-1, 1)))
        if kind < 0.95:
            return self.rng.randint(1, limit // 2)
        return self.rng.choice((limit, limit - 1, self.rng.randint(1, limit)))

    def allocate(self) -> None:
        cache = self.rng.choice(self.caches)
        tokens = self._some_length(cache)
        expected = self._some_length(cache) if self.rng.random() < 0.3 else 0
        self._note(f"{cache.name} allocate({tokens}, expected_tokens={expected})")
        self._allocate(
            cache, 1, tokens, lambda: [cache.kv.allocate(tokens, expected_tokens=expected)]
        )

    def allocate_batch(self) -> None:
        cache = self.rng.choice(self.caches)
        count = self.rng.choice((1, 2, 2, 3, cache.setup.max_sequences))
        tokens = self._some_length(cache) // (1 if self.rng.random() < 0.3 else 4)
        self._note(f"{cache.name} allocate_batch({count}, {tokens})")
        self._allocate(cache, count, tokens, lambda: cache.kv.allocate_batch(count, tokens))

    def _allocate(
        self, cache: ModelCache, count: int, tokens: int, call: Callable[[], list[va.Sequence]]
    ) -> None:
        least = self._total("least") + count * cache.least_pages(0, tokens)
        new_pages = count * cache.most_pages(0, tokens)
        most = self._total("most") + new_pages
        verdict = self._verdict(least, most)
        if cache.longest_free_run() < count:
            verdict = {"must": (va.OutOfSlots,)}
        elif self.relaxed:
            verdict = {
                kind: (*errors, va.OutOfSlots) for kind, errors in (verdict or {"may": ()}).items()
            }
        handles, error = self._attempt(call, **verdict)
        self._judge(error, {}, new_pages)
        if error is not None:
            return
        assert len(handles) == count
        slots = [handle.slot for handle in handles]
        self.log[-1] += f" -> slots {slots}"
        assert slots == list(range(slots[0], slots[0] + count)), "slots do not stand in a row"
        for handle in handles:
            assert handle.slot not in cache.live, "a live sequence's slot was given away"
            assert not any(g.slot == handle.slot and g.freed for g in self._ghosts(cache)), (
                "a slot was handed on before the GPU was done with it"
            )
            sequence = ModelSequence(handle, tokens, cache.setup.max_seq_len)
            cache.live[handle.slot] = sequence
            self._look(cache, sequence)
            self._write_some(cache, sequence, 0, tokens)

    def step_all(self) -> None:
        """A decode step: every sequence, or every other one, grows by a token."""
        cache = self.rng.choice(self.caches)
        limit = cache.setup.max_seq_len
        chosen = [s for s in cache.sequences if s.length < limit]
        if self.rng.random() < 0.3:
            chosen = [s for s in chosen if self.rng.random() < 0.5]
        self._step(cache, {s: s.length + 1 for s in chosen}, as_array=self.rng.random() < 0.8)

    def step_some(self) -> None:
        """Some grow by much, some by little, some not at all."""
        cache = self.rng.choice(self.caches)
        if not cache.live:
            return
        limit = cache.setup.max_seq_len
        lengths = {}
        count = self.rng.choice((1, 1, 1, 2, len(cache.live)))
        for sequence in self.rng.sample(cache.sequences, min(count, len(cache.live))):
            growth = self.rng.choice((0, 1, 7, 30, 100, limit // 4, limit))
            lengths[sequence] = min(limit, sequence.length + self.rng.randint(0, growth))
        self._step(cache, lengths, as_array=self.rng.random() < 0.4)

    def _step(
        self, cache: ModelCache, lengths: dict[ModelSequence, int], *, as_array: bool
    ) -> None:
        self._note(
            f"{cache.name} step({'array' if as_array else 'mapping'}, "
            f"{ {s.slot: n for s, n in lengths.items()} })"
        )
        argument: Any
        if as_array:
            top = max((s.slot for s in lengths), default=-1) + 1
            size = self.rng.choice((top, cache.setup.max_sequences))
            argument = np.zeros(size, np.int64)
            for sequence, length in lengths.items():
                argument[sequence.slot] = length
            if self.rng.random() < 0.3:
                argument = torch.from_numpy(argument)
        else:
            argument = {s.handle: length for s, length in lengths.items()}
        after = {s: (s.first, length) for s, length in lengths.items()}
        if all(length == s.length for s, length in lengths.items()):
            verdict: dict[str, tuple[type[Exception], ...]] = {}
        else:
            verdict = self._verdict(self._total("least", after), self._total("most", after))
        _, error = self._attempt(lambda: cache.kv.step(argument), **verdict)
        self._judge(error, after)
        if error is not None:
            return
        cache.steps += 1
        ones = []
        for sequence, length in lengths.items():
            before, sequence.length = sequence.length, length
            if length > before:
                cache.ghosts = [
                    g
                    for g in cache.ghosts
                    if g.slot != sequence.slot or g.freed or g.start < before
                ]
            if length == before + 1 and self.rng.random() < 0.9:
                ones.append(sequence)
            elif length > before:
                self._look(cache, sequence)
                self._write_some(cache, sequence, before, length)
        if ones:
            self.stamp += 1
            slots = np.array([s.slot for s in ones])
            places = np.array([s.length - 1 for s in ones])
            cache.memory.write_rows(slots, places, self.stamp)
            for sequence in ones:
                sequence.write(sequence.length - 1, sequence.length, self.stamp)

    def _write_some(
        self, cache: ModelCache, sequence: ModelSequence, start: int, stop: int
    ) -> None:
        """Mostly all of the tokens, else a part: the rest has to stay as it is."""
        if self.rng.random() < 0.25:
            start = self.rng.randint(start, stop)
            stop = self.rng.randint(start, stop)
        if start < stop:
            self.stamp += 1
            self._write(cache, sequence.slot, start, stop)
            sequence.write(start, stop, self.stamp)

    def write_again(self) -> None:
        cache, sequence = self._pick()
        if sequence is not None:
            self._note(f"{cache.name} write to {sequence.slot}")
            self._write_some(cache, sequence, sequence.first, sequence.length)

    def trim(self) -> None:
        cache, sequence = self._pick()
        if sequence is None:
            return
        room = sequence.length - sequence.first
        tokens = sequence.length - self.rng.choice((0, 1, room, self.rng.randint(0, room)))
        tokens = max(tokens, sequence.first)
        self._note(f"{cache.name} trim {sequence.slot} from {sequence.length} to {tokens}")
        _, error = self._attempt(lambda: sequence.handle.trim(tokens))
        if error is not None:
            return
        self._give_up(cache, sequence, tokens, sequence.length, freed=False)
        sequence.loose[tokens:] |= sequence.stamps[tokens:] != 0
        sequence.length = tokens

    def trim_front(self) -> None:
        cache, sequence = self._pick()
        if sequence is None:
            return
        first = self.rng.choice(
            (0, sequence.length, self.rng.randint(0, sequence.length), sequence.length * 3 // 4)
        )
        self._note(f"{cache.name} trim_front {sequence.slot} of {sequence.length} to {first}")
        _, error = self._attempt(lambda: sequence.handle.trim_front(first))
        if error is None and first > sequence.first:
            self._give_up(cache, sequence, sequence.first, first, freed=False)
            sequence.first = first

    def free(self) -> None:
        cache, sequence = self._pick()
        if sequence is None:
            return
        self._note(f"{cache.name} free {sequence.slot}")
        self._check_contents(cache, sequence, whole=self.rng.random() < 0.3)
        _, error = self._attempt(sequence.handle.free)
        if error is None:
            self._give_up(cache, sequence, sequence.first, sequence.length, freed=True)
            self._forget(cache, sequence)

    def _forget(self, cache: ModelCache, sequence: ModelSequence) -> None:
        del cache.live[sequence.slot]
        cache.stale.append(sequence.handle)
        self._freed(cache, sequence)

    def reclaim(self) -> None:
        through = self.rng.choice([self.pool, self.caches[0].kv])
        before = self.pool.stats().held_bytes
        self._note("reclaim()")
        given_back, error = self._attempt(through.reclaim)
        if error is not None or self.setup.background:
            return
        stats = self.pool.stats()
        assert given_back == before - stats.held_bytes
        if not self.relaxed:
            assert stats.free_bytes == 0
            for cache in self.caches:
                told = cache.kv.stats()
                assert told.cached_bytes == told.retired_bytes == 0, told

    def set_budget(self) -> None:
        pages = max(1, int(self.setup.budget_pages * self.rng.choice((0.02, 0.3, 0.7, 1, 1, 1.5))))
        self._note(f"set_budget({pages} pages)")
        least, most = self._total("least"), self._total("most")
        if least > pages:
            verdict: dict[str, tuple[type[Exception], ...]] = {"must": (va.OutOfPages,)}
        elif pages < self.budget_pages and (most > pages or self.held):
            verdict = {"may": (va.OutOfPages,)}
        else:
            verdict = {}
        _, error = self._attempt(lambda: self._really_set_budget(pages), **verdict)
        if error is None:
            self.budget_pages = pages
        elif isinstance(error, va.OutOfPages) and not self.relaxed and not self.setup.background:
            assert self._withheld() > pages, "live sequences hold less than that"

    def set_watermarks(self) -> None:
        high = self.rng.choice((None, 0, self.budget_pages // 8, self.budget_pages // 2))
        low = self.rng.choice((0, 0, 3, self.budget_pages // 8))
        self._note(f"set_watermarks({low} pages, {high} pages)")
        high_bytes = None if high is None else high * self.page_bytes
        must = (va.ConfigError,) if high is not None and low > high else ()
        _, error = self._attempt(
            lambda: self.pool.set_watermarks(low * self.page_bytes, high_bytes), must=must
        )
        if error is None:
            self.high_bytes = high_bytes
            if not self.setup.background and not self.relaxed and high_bytes is not None:
                idle = self.pool.stats().free_bytes + sum(
                    cache.kv.stats().cached_bytes for cache in self.caches
                )
                assert idle <= high_bytes, f"{idle} bytes are idle"

    def invalid_call(self) -> None:
        """Each has to raise its own error, whatever the driver does, and change nothing."""
        cache, sequence = self._pick()
        kv, limit = cache.kv, cache.setup.max_seq_len
        unused = [s for s in range(cache.setup.max_sequences) if s not in cache.live]
        array = np.zeros(cache.setup.max_sequences, np.int64)
        calls: list[tuple[str, Callable[[], object], type[Exception]]] = [
            ("allocate too long", lambda: kv.allocate(limit + 1), va.SequenceTooLong),
            ("allocate a negative length", lambda: kv.allocate(-1), va.ConfigError),
            ("allocate none", lambda: kv.allocate_batch(0, 5), va.ConfigError),
            (
                "allocate too many",
                lambda: kv.allocate_batch(cache.setup.max_sequences + 1),
                va.OutOfSlots,
            ),
            ("step with 32 bits", lambda: kv.step(np.zeros(1, np.int32)), va.ConfigError),
            (
                "step with too many slots",
                lambda: kv.step(np.zeros(cache.setup.max_sequences + 1, np.int64)),
                va.ConfigError,
            ),
            ("less than a page", lambda: self.pool.set_budget(1), va.ConfigError),
        ]
        if unused:
            array[unused[0]] = 1
            calls.append(("step of an unused slot", lambda: kv.step(array), va.StaleSequence))
        for stale in cache.stale:
            calls += [
                ("step of a stale one", lambda stale=stale: kv.step({stale: 1}), va.StaleSequence),
                ("trim of a stale one", lambda stale=stale: stale.trim(0), va.StaleSequence),
                ("trim_front of one", lambda stale=stale: stale.trim_front(0), va.StaleSequence),
                ("free of a stale one", stale.free, va.StaleSequence),
                ("length of a stale one", lambda stale=stale: stale.length, va.StaleSequence),
            ]
        if sequence is not None:
            handle, length, first = sequence.handle, sequence.length, sequence.first
            others = {s.handle: min(limit, s.length + 50) for s in cache.sequences}
            too_long = np.zeros(cache.setup.max_sequences, np.int64)
            too_long[sequence.slot] = limit + 1
            calls += [
                (
                    "step too long",
                    lambda: kv.step({**others, handle: limit + 1}),
                    va.SequenceTooLong,
                ),
                ("step too long, array", lambda: kv.step(too_long), va.SequenceTooLong),
                ("step to -1", lambda: kv.step({**others, handle: -1}), va.ConfigError),
                ("trim longer", lambda: handle.trim(min(limit, length + 1)), va.ConfigError),
                ("trim to -1", lambda: handle.trim(-1), va.ConfigError),
                ("trim_front beyond", lambda: handle.trim_front(length + 1), va.ConfigError),
                ("trim_front to -1", lambda: handle.trim_front(-1), va.ConfigError),
            ]
            if length == limit:
                calls = [call for call in calls if call[0] != "trim longer"]
            if length > 0:
                calls.append(
                    (
                        "shrink by step",
                        lambda: kv.step({**others, handle: length - 1}),
                        va.ConfigError,
                    )
                )
            if length > 1:
                shorter = np.zeros(cache.setup.max_sequences, np.int64)
                shorter[sequence.slot] = length - 1
                calls.append(("shrink by step, array", lambda: kv.step(shorter), va.ConfigError))
            if first > 0:
                calls.append(("trim below first", lambda: handle.trim(first - 1), va.ConfigError))
            for other in self.caches:
                if other is not cache:
                    calls.append(
                        (
                            "step of another's",
                            lambda o=other: o.kv.step({handle: 1}),
                            va.ConfigError,
                        )
                    )
        what, call, error_type = self.rng.choice(calls)
        self._note(f"{cache.name} invalid: {what}")
        self._attempt(call, must=(error_type,))

    # ---- the GPU that is not done ----

    def hold_or_release(self) -> None:
        if self.held:
            self._note("release fences")
            self._release()
        elif self.rng.random() < 0.35:
            self._note("hold fences")
            self._hold_fences()
            self.held = True
            self.synchronized = self._synchronizations()

    def _release(self) -> None:
        for cache in self.caches:
            for ghost in self._ghosts(cache):
                self._check_ghost(cache, ghost)
                if ghost.freed and ghost.stop > ghost.start:
                    # The kernel that the fence waits for writes last of all.
                    self.stamp += 1
                    cache.memory.write(ghost.slot, ghost.start, ghost.stop, self.stamp)
            cache.ghosts.clear()
            cache.memory.settle()  # the fences were recorded before all this
        self.backend.release_fences()
        self.held = False

    def _synchronizations(self) -> int:
        calls = self.backend.calls()
        return calls.get("synchronize", 0) + calls.get("synchronize_device", 0)

    def _ghosts(self, cache: ModelCache) -> list[Ghost]:
        """What the GPU may still touch: nothing, once something has waited for it."""
        if cache.ghosts and self._synchronizations() != self.synchronized:
            for each in self.caches:
                each.ghosts.clear()
            self.synchronized = self._synchronizations()
        return cache.ghosts

    def _give_up(
        self, cache: ModelCache, sequence: ModelSequence, start: int, stop: int, *, freed: bool
    ) -> None:
        """Remembers tokens that a kernel may still be using."""
        if not self.held or start >= stop:
            return
        if not any(each.ghosts for each in self.caches):
            self.synchronized = self._synchronizations()  # what was waited for before is settled
        cache.ghosts.append(
            Ghost(
                sequence.slot,
                start,
                stop,
                sequence.stamps[start:stop].copy(),
                sequence.loose[start:stop].copy(),
                freed,
            )
        )

    def _check_ghost(self, cache: ModelCache, ghost: Ghost) -> None:
        mapped = self._mapped(cache, "read_write", ghost.slot)
        for start, end in self._token_spans(cache, ghost.slot, ghost.start, ghost.stop):
            assert covers(mapped, start, end), (
                f"tokens {ghost.start} to {ghost.stop} of slot {ghost.slot} were unmapped before "
                "the GPU was done with them"
            )
        positions = self._sample(ghost.start, ghost.stop)
        at = positions - ghost.start
        cache.memory.check(ghost.slot, positions, ghost.stamps[at], ghost.loose[at])

    # ---- another allocator in the place of one ----

    def reopen(self) -> None:
        cache = self.rng.choice(self.caches)
        self._note(f"{cache.name} close, and make it anew")
        sequences = cache.sequences
        cache.kv.close()
        for sequence in sequences:
            assert not sequence.handle.alive
            self._check_contents(
                cache, sequence, whole=True
            )  # while a tensor lives, it can be read
        cache.memory.settle()
        cache.close()
        for sequence in sequences:
            self._freed(cache, sequence)
        cache.stale.clear()
        cache.guard_bytes, guard_pages = 0, cache.guard_pages
        most = self._total("most") + guard_pages
        may = {} if most <= self.budget_pages and not self.held else {"may": (va.OutOfPages,)}
        _, error = self._attempt(lambda: cache.open(self.pool, self.setup), **may)
        if error is not None:
            self._note("set_budget, to make room for the guard")
            self.pool.set_budget(4 * self.setup.budget_pages * self.page_bytes)
            self.budget_pages = 4 * self.setup.budget_pages
            cache.open(self.pool, self.setup)

    # ---- comparing ----

    def _compare(self) -> None:
        told = [cache.kv.stats() for cache in self.caches]
        for cache, stats in zip(self.caches, told, strict=True):
            lengths = [s.length for s in cache.sequences]
            assert [s.handle.length for s in cache.sequences] == lengths, (
                f"{cache.name}: lengths are not {lengths}"
            )
            assert stats.live_sequences == len(lengths), (
                f"{stats.live_sequences} sequences live, not {len(lengths)}"
            )
            assert stats.live_tokens == sum(lengths), stats
            assert stats.free_slots == cache.setup.max_sequences - len(lengths), stats
            assert stats.steps == cache.steps, stats
            assert stats.used_bytes == sum(lengths) * cache.setup.layout.token_bytes, stats
            if cache.stale:
                assert not self.rng.choice(cache.stale).alive
        self._check_sums(told)
        cache, sequence = self._pick()
        if sequence is not None:
            assert sequence.handle.alive
            self._check_contents(cache, sequence, whole=self.rng.random() < 0.02)
        if self.held:
            cache = self.rng.choice(self.caches)
            ghosts = self._ghosts(cache)
            if ghosts:
                self._check_ghost(cache, self.rng.choice(ghosts))
        if self.index % STRUCTURE_EVERY == 0:
            self._check_structure()
        if self.index % CONTENTS_EVERY == 0:
            for cache in self.caches:
                for sequence in cache.sequences:
                    self._check_contents(cache, sequence, whole=True)
            if self.witness is not None and not self.setup.background:
                assert self.witness.mapped_bytes() == sum(
                    size for cache in self.caches for _, _, _, size, _, _ in cache.kv.mappings()
                )

    def _check_sums(self, told: list[va.KVStats]) -> None:
        """No byte is beyond the budget, and each is in one place."""
        pool = told[0].pool
        budget = self.budget_pages * self.page_bytes
        assert pool.budget_bytes == budget, f"the budget is not {budget}: {pool}"
        for stats in told:
            assert stats.pool.held_bytes <= stats.pool.budget_bytes, "more is held than the budget"
        if self.setup.background:
            return  # some are on their way
        placed = sum(
            stats.mapped_bytes + stats.cached_bytes + stats.retired_bytes + stats.guard_bytes
            for stats in told
        )
        assert placed + pool.free_bytes == pool.held_bytes, told
        if self.witness is not None:
            assert self.witness.resident_bytes() <= pool.held_bytes

    def _sample(self, start: int, stop: int) -> np.ndarray:
        if stop - start <= 5:
            return np.arange(start, stop)
        inner = [start + int(self.rng.random() * (stop - start)) for _ in range(3)]
        return np.array([start, *inner, stop - 1])

    def _check_contents(
        self, cache: ModelCache, sequence: ModelSequence, *, whole: bool = False
    ) -> None:
        """Tokens are as they were written, and the slack behind them is zero, or their own past."""
        start, stop = sequence.first, sequence.length
        if start >= stop:
            return
        positions = np.arange(start, stop) if whole else self._sample(start, stop)
        end = min(stop + cache.setup.tail_slack_tokens, cache.setup.max_seq_len)
        if stop < end and not cache.kv.closed:
            slack = np.arange(stop, end) if whole else self._sample(stop, end)
            positions = np.concatenate([positions, slack])
        cache.memory.check(
            sequence.slot, positions, sequence.stamps[positions], sequence.loose[positions]
        )

    def _look(self, cache: ModelCache, sequence: ModelSequence) -> None:
        """New tokens, before they are written."""
        self._check_mapped(cache, sequence)  # where they are not, reading them would be the end
        self._check_contents(cache, sequence, whole=self.rng.random() < 0.2)

    def _check_mapped(self, cache: ModelCache, sequence: ModelSequence) -> None:
        """Every token has memory behind it that can be written, and slack that can be read."""
        slot, first, length = sequence.slot, sequence.first, sequence.length
        if first == length:
            return
        reach = min(length + cache.setup.tail_slack_tokens, cache.setup.max_seq_len)
        for access, stop in (("read_write", length), ("read", reach)):
            mapped = self._mapped(cache, access, slot)
            for start, end in self._token_spans(cache, slot, first, stop):
                assert covers(mapped, start, end), (
                    f"slot {slot}: not all of tokens {first} to {stop} is mapped to {access}"
                )

    # ---- mappings ----

    @staticmethod
    def _regions(cache: ModelCache) -> dict[int, tuple[int, int]]:
        """For each region its first address and the bytes between slots, as the tensors show."""
        found = {}
        for layer in range(cache.setup.layout.num_layers):
            place = cache.setup.layout.placement(layer)
            k, v = cache.kv.layer(layer)
            for tensor, region, offset in (
                (k, place.k_region, place.k_offset_bytes),
                (v, place.v_region, place.v_offset_bytes),
            ):
                if tensor.numel():
                    stride = tensor.stride(0) * tensor.element_size()
                    found[region] = (tensor.data_ptr() - offset, stride)
        return found

    @staticmethod
    def _token_spans(
        cache: ModelCache, slot: int, start: int, stop: int
    ) -> Iterator[tuple[int, int]]:
        """For K and V of each layer, the addresses that tokens [start, stop) take."""
        if start >= stop:
            return
        for layer in range(cache.setup.layout.num_layers):
            for tensor in cache.kv.layer(layer):
                if tensor.numel():
                    item = tensor.element_size()
                    own = tensor.shape[2] * tensor.shape[3] * item
                    base = tensor.data_ptr() + slot * tensor.stride(0) * item
                    row = tensor.stride(1) * item
                    yield base + start * row, base + (stop - 1) * row + own

    @staticmethod
    def _mapped(cache: ModelCache, access: str, slot: int) -> list[tuple[int, int]]:
        """The address ranges of a slot that can be written, or read, merged and in order."""
        return merged(
            (address, address + size)
            for owner, _, address, size, _, how in cache.kv.mappings()
            if owner == slot and (how == "read_write" or access == "read")
        )

    def _check_structure(self) -> None:
        owners: dict[int, str] = {}
        for cache in self.caches:
            if self.setup.background:  # which may move an extent on between two looks
                owners.clear()
            cache.kv.check()
            regions = self._regions(cache)
            guards = set()
            for slot, region, address, size, handle, access in cache.kv.mappings():
                base, stride = regions[region]
                start = base + slot * stride
                assert start <= address and address + size <= start + stride, "in another's slot"
                if access == "read":
                    guards.add(handle)
                else:
                    assert handle not in owners, f"{owners[handle]} has the extent of {slot} too"
                    owners[handle] = f"slot {slot} of {cache.name}"
            assert len(guards) <= (1 if cache.guard_bytes else 0)
            assert not guards & owners.keys(), "a guard can be written"
            for sequence in cache.sequences:
                self._check_mapped(cache, sequence)

    # ---- the end ----

    def _finish(self) -> None:
        """Gives everything back, and finds that nothing is left."""
        self._check_structure()
        for cache in self.caches:
            for sequence in cache.sequences:
                self._check_contents(cache, sequence, whole=True)
                sequence.handle.free()
                self._give_up(cache, sequence, sequence.first, sequence.length, freed=True)
                self._forget(cache, sequence)
            cache.memory.settle()
        self._release()
        self.pool.set_watermarks(0, 0)
        guard_bytes = sum(cache.guard_bytes for cache in self.caches)
        stats = self._reclaim_until(lambda stats: stats.held_bytes == guard_bytes)
        assert stats.mappings == 0, stats
        assert self.witness is None or self.witness.mapped_bytes() == 0
        for cache in self.caches:
            cache.kv.check()
            cache.close()
        stats = self._reclaim_until(
            lambda stats: stats.held_bytes == 0 and stats.creates == stats.destroys
        )
        assert stats.free_bytes == stats.mappings == 0, stats
        if self.witness is not None:
            assert self.witness.resident_bytes() == self.witness.mapped_bytes() == 0
        if not self.setup.faults:
            calls = self.backend.calls()
            assert calls["create"] == calls["destroy"] == stats.creates, calls
        self.pool.check()

    def _reclaim_until(self, reached: Callable[[va.PoolStats], bool]) -> va.PoolStats:
        """Once is enough, unless the background thread has some of it in hand."""
        self.pool.reclaim()
        deadline = time.monotonic() + 10
        while self.setup.background and not reached(self.pool.stats()):
            assert time.monotonic() < deadline, self.pool.stats()
            time.sleep(0.001)
            self.pool.reclaim()
        stats = self.pool.stats()
        assert reached(stats), stats
        return stats


# ---- the tests ----


def layout(**options: object) -> va.KVLayout:
    shape = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 16, "dtype": torch.float32}
    return va.KVLayout(**{**shape, "order": "token", **options})


TOKEN = layout()  # 256 bytes a row: 16 tokens fill a page
PADDED = layout(row_padding_bytes=16, num_kv_heads=2, head_dim=10)  # rows do not divide a page
LAYER = layout(order="layer", head_dim=32, v_head_dim=16)  # regions of two sizes
SPLIT = layout(num_layers=3, layers_per_row=2)  # two layers in one region, one in another
SMALL = layout(order="layer", num_layers=1, head_dim=24, dtype=torch.int16)
LATENT = va.KVLayout.latent(num_layers=2, latent_dim=72, dtype=torch.bfloat16)

SETUPS = {
    "token": Setup(caches=(CacheSetup(layout=TOKEN),), budget_pages=300),
    "layer": Setup(
        caches=(CacheSetup(layout=LAYER, max_extent_pages=4, lookahead_tokens=40),),
        budget_pages=200,
    ),
    # Extents of one page: what fits is known to the page.
    "latent": Setup(
        caches=(CacheSetup(layout=LATENT, max_extent_pages=1, max_sequences=5),),
        budget_pages=120,
    ),
    "guard": Setup(
        caches=(
            CacheSetup(layout=PADDED, tail_slack_tokens=64, max_extent_pages=8, max_sequences=6),
        ),
        budget_pages=400,
    ),
    "tight": Setup(
        caches=(CacheSetup(layout=SPLIT, max_extent_pages=2, max_sequences=12),),
        budget_pages=60,
        faults=False,
        watermarks=True,
    ),
    "tight_guard": Setup(
        caches=(CacheSetup(layout=LAYER, tail_slack_tokens=100, max_extent_pages=4),),
        budget_pages=80,
    ),
    "two": Setup(
        caches=(
            CacheSetup(layout=TOKEN, max_extent_pages=32, max_sequences=5),
            CacheSetup(layout=SMALL, max_extent_pages=1, tail_slack_tokens=32, lookahead_tokens=0),
        ),
        budget_pages=250,
        watermarks=True,
    ),
    "not_zeroed": Setup(
        caches=(CacheSetup(layout=SPLIT, tail_slack_tokens=20),), budget_pages=300, zero=False
    ),
    "background": Setup(
        caches=(CacheSetup(layout=TOKEN, lookahead_tokens=64),),
        budget_pages=300,
        background=True,
        watermarks=True,
    ),
    "two_in_background": Setup(
        caches=(
            CacheSetup(layout=PADDED, tail_slack_tokens=64, max_sequences=5),
            CacheSetup(layout=LAYER, max_extent_pages=2, lookahead_tokens=128, max_sequences=5),
        ),
        budget_pages=350,
        background=True,
        watermarks=True,
    ),
}


@pytest.mark.parametrize(
    "operations", [1_000, pytest.param(9_000, marks=pytest.mark.slow)], ids=["short", "long"]
)
@pytest.mark.parametrize("name", SETUPS)
def test_model_agrees_after_each_operation(name: str, operations: int, seed: int) -> None:
    trial = Trial(name, SETUPS[name], f"{seed} {operations}")
    trial.run(operations)
    if operations > 1_000:
        errors = [va.ConfigError, va.OutOfPages, va.OutOfSlots, va.SequenceTooLong]
        errors += [va.StaleSequence, *([va.BackendError] if trial.setup.faults else [])]
        events = [event.__name__ for event, _ in trial.events]
        assert not {*events, *(error.__name__ for error in errors)} - trial.counts.keys()


# Rows of 4 KiB: 512 tokens fill a page of the device.
WIDE = {"num_kv_heads": 4, "head_dim": 128, "dtype": torch.bfloat16}
DEVICE = {"device": "cuda", "fence_timeout_s": 0.05}
DEVICE_SETUPS = {
    "device_guard": Setup(
        caches=(
            CacheSetup(
                layout=layout(**WIDE),
                max_seq_len=6_000,
                tail_slack_tokens=256,
                max_extent_pages=4,
            ),
        ),
        budget_pages=45,
        **DEVICE,
    ),
    "two_on_a_device": Setup(
        caches=(
            CacheSetup(layout=layout(**WIDE), max_seq_len=6_000, max_sequences=5),
            CacheSetup(
                layout=layout(order="layer", v_head_dim=64, num_kv_heads=8, head_dim=128),
                max_seq_len=3_000,
                max_extent_pages=1,
                max_sequences=5,
                lookahead_tokens=300,
            ),
        ),
        budget_pages=70,
        background=True,
        watermarks=True,
        **DEVICE,
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE_SETUPS)
def test_model_agrees_on_a_device(name: str, seed: int) -> None:
    BusyDevice(name, DEVICE_SETUPS[name], seed).run(2_000)


@pytest.mark.parametrize("name", DEVICE_SETUPS)
def test_model_agrees_where_waits_take_as_long_as_on_a_device(name: str, seed: int) -> None:
    """Long enough for the background thread to undo what is waited for, over and over."""
    setup = dataclasses.replace(DEVICE_SETUPS[name], device="cpu")
    Trial(name, setup, seed).run(2_000)


class BusyDevice(Trial):
    """Kernels that take a while, so that fences pass late without anybody holding them."""

    def _compare(self) -> None:
        if self.rng.random() < 0.1:
            torch.cuda._sleep(1_000_000)
        super()._compare()


# ---- canaries: each of these is wrong, and has to be found out ----


class SkipsAWrite(Trial):
    def _write(self, cache: ModelCache, slot: int, start: int, stop: int) -> None:
        if self.rng.random() < 0.95:
            super()._write(cache, slot, start, stop)


class WritesToAFreedSlot(Trial):
    """The owner before last goes on writing, and the slot has a new one."""

    def _freed(self, cache: ModelCache, sequence: ModelSequence) -> None:
        self.writer = cache, sequence.slot

    def _compare(self) -> None:
        if hasattr(self, "writer"):
            cache, slot = self.writer
            owner = cache.live.get(slot)
            if owner is not None and owner.first < owner.length:
                cache.memory.write(slot, owner.first, owner.first + 1, self.stamp + 1)
        super()._compare()


class MiscountsTokens(Trial):
    def trim_front(self) -> None:
        super().trim_front()
        _, sequence = self._pick()
        if sequence is not None and sequence.length > sequence.first:
            sequence.length -= 1


class NeverClears(Trial):
    def _make_pool(self) -> va.Pool:
        honest = self.setup
        self.setup = dataclasses.replace(honest, zero=False)
        pool = super()._make_pool()
        self.setup = honest
        return pool


class DoesNotWaitForTheDevice(Trial):
    """Fences pass at once: memory is handed on while the model's GPU still uses it."""

    def _hold_fences(self) -> None:
        pass


class IgnoresTheBudget(Trial):
    def _really_set_budget(self, pages: int) -> None:
        pass


class KeepsWhatWasFreed(Trial):
    """One sequence more than the model knows."""

    def free(self) -> None:
        super().free()
        cache = self.rng.choice(self.caches)
        if len(cache.live) < cache.setup.max_sequences:
            cache.kv.allocate(0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SkipsAWrite, "holds"),
        (WritesToAFreedSlot, "holds"),
        (MiscountsTokens, "lengths are not"),
        (NeverClears, "holds"),
        (DoesNotWaitForTheDevice, "before the GPU was done|holds"),
        (IgnoresTheBudget, "the budget is not|should have raised"),
        (KeepsWhatWasFreed, "sequences live, not"),
    ],
)
def test_model_disagrees_with_a_canary(wrong: type[Trial], message: str, seed: int) -> None:
    setup = dataclasses.replace(
        SETUPS["latent"], faults=False, holds=wrong is DoesNotWaitForTheDevice
    )
    with pytest.raises(Disagreement, match=message) as failure:
        wrong("canary", setup, seed).run(2_000)
    assert f"seed {seed!r}, setup canary, operation " in str(failure.value)
    assert "the last operations:\n" in str(failure.value)
