"""A step with nothing to map: its time in each form of lengths, the claim, the calls it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import vattention as va
from vattention import _core

from ..common import (
    Context,
    alternate,
    clock_us,
    heading,
    print_table,
    quantile,
    show_us,
    summarize,
    summarize_all,
)
from .allocators import (
    SEQUENCES,
    backend_for,
    close_allocator,
    layout_for,
    new_allocator,
    settle,
    wait_until,
)
from .busy import Busy, named, warn_if_idle

CLAIM_US = 5.0


def run_idle(context: Context, busy: Busy | None) -> dict[str, Any]:
    tokens = context.pick(1024, 1024, 256)
    first = 16
    kv, sequences = _fully_mapped(context, tokens, first)
    maps = kv.stats().pool.maps
    forms = _forms(sequences)
    raw: dict[str, list[float]] = {}
    took_us: dict[str, float] = {}

    def run_pass(form: str, busy: Busy | None) -> dict[str, float]:
        make = forms[form]
        began = clock_us()
        if busy is not None:
            busy.start(2 * took_us[form] + 20e3)
        for sequence in sequences:
            sequence.trim(first)
        times = []
        for length in range(first + 1, tokens + 1):
            lengths = make(length)
            started = clock_us()
            kv.step(lengths)
            times.append(clock_us() - started)
        result = {"pass_median_us": quantile(times, 0.5), "pass_p99_us": quantile(times, 0.99)}
        if busy is None:
            took_us[form] = max(took_us.get(form, 0.0), clock_us() - began)
        else:
            result["still_busy"] = float(busy.running())
            busy.wait()
        raw.setdefault(named(form, busy), []).extend(times)
        return result

    modes = (None,) if busy is None else (None, busy)
    for form in forms:  # to warm up, and to know how long a pass takes
        run_pass(form, None)
    raw.clear()
    passes = alternate(
        {
            named(form, mode): lambda form=form, mode=mode: run_pass(form, mode)
            for form in forms
            for mode in modes
        },
        repetitions=context.pick(5, 5, 2),
        warmup=0,
    )
    stats = kv.stats()
    assert stats.waited_steps == 0 and stats.pool.maps == maps, "an idle step mapped something"
    close_allocator(kv)

    timer = []
    for _ in range(10_000):
        started = clock_us()
        timer.append(clock_us() - started)
    distributions = {name: summarize(raw[name], keep=False) for name in passes}
    claimed = distributions["numpy"]
    result = {
        "calls": _count_calls(context),
        "timer_us": summarize(timer, keep=False),
        "steps": distributions,
        "passes": summarize_all(passes),
        "claim": {
            "what": f"a step of {SEQUENCES} sequences in array form, nothing to map",
            "limit_us": CLAIM_US,
            "median_us": claimed["median"],
            "p99_us": claimed["p99"],
            "median_within_limit": claimed["median"] <= CLAIM_US,
        },
    }
    heading(context, f"step: idle, up to {SEQUENCES} sequences")
    print_table(
        ("", "median", "p90", "p99", "max"),
        [
            (
                name,
                *(show_us(summary[key]) for key in ("median", "p90", "p99", "max")),
            )
            for name, summary in distributions.items()
        ],
    )
    warn_if_idle(passes)
    print(
        f"claim, at most {CLAIM_US:g} us: "
        f"{'holds' if result['claim']['median_within_limit'] else 'DOES NOT HOLD'}; two readings "
        f"of the clock take {show_us(result['timer_us']['median'])} of each.\n"
        f"backend calls in {result['calls']['steps']} steps: {result['calls']['made']}"
    )
    return result


def _fully_mapped(
    context: Context, tokens: int, first: int, backend: _core.Backend | None = None
) -> tuple[va.KVAllocator, list[va.Sequence]]:
    """All slots mapped to their end, with sequences that are short."""
    layout, page_bytes = layout_for(context), backend_for(context).page_bytes
    full = SEQUENCES * layout.mapped_bytes(tokens, page_bytes)
    kv = new_allocator(
        context, max_seq_len=tokens, memory=full, lookahead_tokens=tokens, backend=backend
    )
    sequences = kv.allocate_batch(SEQUENCES, first)
    wait_until(lambda: kv.stats().mapped_bytes == full, "all slots are mapped to their end")
    settle(kv)
    return kv, sequences


def _forms(sequences: list[va.Sequence]) -> dict[str, Callable[[int], Any]]:
    """What makes the argument of a step in which every sequence has a length."""
    array = np.zeros(SEQUENCES, np.int64)
    tensor = torch.zeros(SEQUENCES, dtype=torch.int64)

    def fill_array(length: int, count: int) -> np.ndarray:
        array[:] = length
        return array[:count]

    return {
        "numpy": lambda length: fill_array(length, SEQUENCES),
        "torch": lambda length: tensor.fill_(length),
        "mapping": lambda length: dict.fromkeys(sequences, length),
        "numpy, first 64": lambda length: fill_array(length, 64),
        "numpy, first 1": lambda length: fill_array(length, 1),
    }


def _count_calls(context: Context) -> dict[str, Any]:
    """The backend's calls during idle steps: there must be none, and the counter must count."""
    backend = _core.FaultyBackend(backend_for(context))
    tokens, first = 64, 16
    kv, sequences = _fully_mapped(context, tokens, first, backend)
    context.synchronize()
    kv.step(dict.fromkeys(sequences, first))  # sees that what was allocated has been cleared
    before = backend.calls()
    assert before["map"] > 0 and before["set_access"] > 0
    steps = 0
    for form, make in _forms(sequences).items():
        for length in range(first + 1, tokens + 1):
            kv.step(make(length))
            steps += 1
        after = backend.calls()
        made = {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name)}
        assert not made, f"idle steps of {form} made backend calls: {made}"
        for sequence in sequences:
            sequence.trim(first)
        before = backend.calls()
    close_allocator(kv)
    return {"steps": steps, "made": 0, "made_before_to_map": sum(before.values())}
