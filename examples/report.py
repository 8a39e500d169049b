"""What the two parts found and how it is printed, and progress; imported by generate.py."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from memory_map import MIB, Recorder
from padded_batch import Batch, OurSize, Run, StockSize
from prompts import Text
from serving import Request

import vattention as va


@dataclass(frozen=True)
class Comparison:
    """What part 1 found."""

    batch: Batch
    runs: dict[str, list[Run]]
    """By contender, the stock cache's first."""
    stock_size: StockSize
    our_size: OurSize
    enabled_peak: int | None
    """Physical memory of an enabled model's cache, in bytes; None: it could not be enabled."""
    refusal: str | None
    """Why not."""

    def agrees(self, name: str) -> bool:
        """Whether every run of that contender gave what the stock cache's first one did."""
        expected = next(iter(self.runs.values()))[0].tokens
        return all(torch.equal(run.tokens, expected) for run in self.runs[name])

    @property
    def agree(self) -> bool:
        return all(map(self.agrees, self.runs))


@dataclass(frozen=True)
class Service:
    """What part 2 found."""

    requests: list[Request]
    answers: list[list[int]]
    num_agreeing: int
    recorder: Recorder
    stats: va.PoolStats
    adoptions: int
    seconds: float

    @property
    def agree(self) -> bool:
        return self.num_agreeing == len(self.requests)


class Progress:
    """A line that is rewritten on a terminal, and now and then a new line elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._last = 0.0

    def show(self, text: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if not always and now - self._last < (0.1 if self._is_terminal else 5.0):
            return
        self._last = now
        if self._is_terminal:
            print(f"\r\x1b[K  {text}", end="", flush=True)
        else:
            print(f"  {text}", flush=True)

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", flush=True)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f}"


def print_header(
    name: str, model: Any, max_seq_len: int, prompts: list[list[int]], new_tokens: int
) -> None:
    device = (
        torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"{name}: {model.num_parameters() / 1e6:,.1f} M parameters, {dtype}, on {device}\n"
        f"{len(prompts)} prompts of {', '.join(f'{len(p):,}' for p in prompts)} tokens; "
        f"{new_tokens} new tokens each; room for {max_seq_len:,}\n",
        flush=True,
    )


def print_comparison(found: Comparison) -> None:
    rows, width = found.batch.input_ids.shape
    stock, *others = found.runs

    def prefill(runs: list[Run]) -> str:
        rate = found.batch.num_tokens / statistics.median(run.prefill_s for run in runs)
        return f"{rate:,.0f}"

    def decode(runs: list[Run]) -> str:
        steps = [seconds for run in runs for seconds in run.steps_s]
        return f"{rows / statistics.median(steps):,.0f}" if steps else "nan"

    def verdict(name: str) -> str:
        if not found.agrees(name):
            return "DIFFER"
        return "" if name == stock else "agree"

    size = found.stock_size
    _print_table(
        f"{rows} prompts, padded to one batch",
        list(found.runs),
        [
            ("prefill, prompt tokens/s", *map(prefill, found.runs.values())),
            ("decode, tokens/s", *map(decode, found.runs.values())),
            ("old K and V copied per step, MiB", mib(size.held), *(mib(0) for _ in others)),
            ("tokens", *map(verdict, found.runs)),
        ],
    )
    if found.refusal is not None:
        print(f"  without enable(model): {' '.join(found.refusal.split())}\n")
    old_tokens = found.runs[stock][0].tokens.shape[1] - 1  # the last K and V are never computed
    own = (found.batch.num_tokens + rows * old_tokens) * size.token
    padded = rows * (width + old_tokens) * size.token
    ours = [
        ("VAttentionCache: addresses reserved", mib(found.our_size.reserved)),
        ("VAttentionCache: physical memory, peak", mib(found.our_size.peak)),
    ]
    if found.enabled_peak is not None:
        ours.append(("enable(model): physical memory, peak", mib(found.enabled_peak)))
    _print_table(
        "memory of that batch",
        ("MiB",),
        [
            ("the tokens' own K and V", mib(own)),
            ("  with the left padding of generate()", mib(padded)),
            *ours,
            ("DynamicCache: tensors", mib(size.held)),
            ("DynamicCache: while it concatenates", mib(size.held + size.largest_tensor)),
            ("StaticCache: preallocated", mib(rows * size.static_row)),
        ],
    )


def print_service(found: Service, size: StockSize) -> None:
    moments, stats = found.recorder.moments, found.stats
    lanes, count = len(found.recorder.caches), len(found.requests)
    padded = max(lanes * max(moment.tokens) for moment in moments) * size.token
    _print_table(
        f"{count} requests, {lanes} at a time, one pool",
        ("MiB",),
        [
            ("the tokens' own K and V, peak", mib(max(m.used for m in moments))),
            ("physical memory held, peak", mib(stats.peak_held_bytes)),
            ("DynamicCache, as one padded batch, peak", mib(padded)),
            (f"preallocated, {lanes} lanes", mib(lanes * size.static_row)),
        ],
    )
    differing = "" if found.agree else f", {count - found.num_agreeing} DIFFER"
    print(
        f"  {sum(map(len, found.answers)):,} tokens in {found.seconds:.1f} s; "
        f"{found.num_agreeing} of {count} answers agree{differing}\n"
        f"  {found.adoptions} began in memory that an earlier request left mapped\n"
        f"  {stats.creates} extents created, {stats.destroys} given back, {stats.maps} mappings\n"
    )


def print_text(text: Text, found: Service) -> None:
    """A few lines of the answer that repeats itself least, after the end of its prompt."""
    answers = [text.decode(answer).splitlines() for answer in found.answers]
    index = max(range(len(answers)), key=lambda i: len(set(answers[i])))
    prompt = text.decode(found.requests[index].prompt).splitlines()
    print("One of the texts (> prompt, | generated):\n")
    for mark, lines in ((">", prompt[-2:]), ("|", answers[index][:6])):
        for line in lines:
            print(f"    {mark} {line.rstrip()[:88]}")
    print()


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of a label and right-aligned cells under `columns`."""
    label = max(len(title), *(len(row[0]) for row in rows))
    widths = [
        max(map(len, cells)) for cells in zip(columns, *(row[1:] for row in rows), strict=True)
    ]
    for first, *cells in ((title, *columns), *rows):
        line = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"  {first:<{label}}{line}".rstrip())
    print()
