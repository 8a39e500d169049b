"""Steady decode: its scenarios, the model's stand-in, and what the background thread saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import vattention as va

from ..common import (
    Context,
    Samples,
    clock_us,
    heading,
    paired_ratio,
    print_table,
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
    synchronize_stream,
    trim_all,
)


def run_decode(context: Context) -> list[dict[str, Any]]:
    return [_run_scenario(context, scenario) for scenario in _scenarios(context)]


@dataclass(frozen=True)
class _Scenario:
    spread: bool
    model_us: float
    steps: int
    repetitions: int

    @property
    def name(self) -> str:
        how = "spread" if self.spread else "together"
        return f"{how}, model {show_us(self.model_us)}"


def _scenarios(context: Context) -> list[_Scenario]:
    if not context.cuda:
        steps = context.pick(0, 300, 60)
        return [_Scenario(True, 200, steps, 2), _Scenario(False, 200, min(steps, 64), 2)]
    quick = context.quick
    return [
        _Scenario(True, 1_000, 100 if quick else 500, 2 if quick else 4),
        _Scenario(True, 5_000, 50 if quick else 150, 1),
        _Scenario(False, 1_000, 64 if quick else 128, 2 if quick else 3),
    ]


def _run_scenario(context: Context, scenario: _Scenario) -> dict[str, Any]:
    model = _Model(context, scenario.model_us)
    raw: dict[str, dict[str, list[float]]] = {}
    samples: Samples = {}
    counts: dict[str, list[dict[str, int]]] = {}
    # Not warmed up: each allocator is new in any case, and every state is its own warm-up.
    for repetition in range(scenario.repetitions):
        for background in (True, False) if repetition % 2 == 0 else (False, True):
            name = "background" if background else "no background"
            for state, segment in _decode(context, scenario, model, background, repetition):
                key = f"{name}, {state}"
                for metric in ("step_us", "model_us"):
                    raw.setdefault(key, {}).setdefault(metric, []).extend(segment[metric])
                per_segment = samples.setdefault(key, {})
                per_segment.setdefault("steps_total_us", []).append(sum(segment["step_us"]))
                per_segment.setdefault("all_total_us", []).append(
                    sum(segment["step_us"]) + sum(segment["model_us"])
                )
                counts.setdefault(key, []).append(segment["counts"])
    ratios = {
        f"no_background_over_background, {state}": paired_ratio(
            samples[f"no background, {state}"]["steps_total_us"],
            samples[f"background, {state}"]["steps_total_us"],
        )
        for state in ("cold", "warm")
    }
    result = {
        "name": scenario.name,
        "spread": scenario.spread,
        "model_us": scenario.model_us,
        "steps": scenario.steps * scenario.repetitions,
        "times": {
            key: {metric: summarize(us, keep=False) for metric, us in metrics.items()}
            for key, metrics in raw.items()
        },
        "segments": summarize_all(samples),
        "counts": counts,
        "ratios_of_step_time": ratios,
    }
    heading(
        context, f"step: decode, {scenario.name}, {scenario.steps * scenario.repetitions} steps"
    )
    print_table(
        ("", "median", "p90", "p99", "max", "waited", "ahead", "created", "model (median)"),
        [
            (
                key,
                *(show_us(times["step_us"][share]) for share in ("median", "p90", "p99", "max")),
                *(
                    sum(segment[what] for segment in counts[key])
                    for what in ("waited_steps", "ahead_mappings", "creates")
                ),
                show_us(times["model_us"]["median"]),
            )
            for key, times in result["times"].items()
        ],
    )
    return result


def _decode(
    context: Context, scenario: _Scenario, model: _Model, background: bool, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One allocator, two runs over the same lengths: pages are created, then come from the pool."""
    layout, page_bytes = layout_for(context), backend_for(context).page_bytes
    if scenario.spread:
        starts = np.random.default_rng(seed).integers(64, 320, SEQUENCES)
    else:
        starts = np.full(SEQUENCES, 192)
    longest = int(starts.max()) + scenario.steps
    per_sequence = [
        # A sequence that grows is given up to 1/64 more, and pages ahead of its length.
        layout.mapped_bytes(int(n) + scenario.steps + longest // 32 + 64, page_bytes)
        for n in starts
    ]
    kv = new_allocator(
        context, max_seq_len=2 * longest, memory=sum(per_sequence), background=background
    )
    sequences = [kv.allocate(int(n)) for n in starts]
    lengths = _lengths_by_slot(sequences, starts)
    for state in ("cold", "warm"):
        if state == "warm":
            trim_all(context, kv, sequences, 0)
            assert kv.stats().mapped_bytes == 0
            lengths = _lengths_by_slot(sequences, starts)
            kv.step(lengths)
        if background:
            settle(kv)
        context.synchronize()
        before = kv.stats()
        steps: list[float] = []
        models: list[float] = []
        for _ in range(scenario.steps):
            lengths += 1
            started = clock_us()
            kv.step(lengths)
            stepped = clock_us()
            model.run()
            steps.append(stepped - started)
            models.append(clock_us() - stepped)
        after = kv.stats()
        assert after.live_tokens == int(lengths.sum())
        figures = ("steps", "waited_steps", "ahead_mappings", "ahead_failures")
        counts = {name: getattr(after, name) - getattr(before, name) for name in figures}
        for name in ("creates", "maps"):
            counts[name] = getattr(after.pool, name) - getattr(before.pool, name)
        yield state, {"step_us": steps, "model_us": models, "counts": counts}
    kv.check()
    close_allocator(kv)


class _Model:
    """Stands for the model: a kernel of a fixed time, and the wait for what it sampled."""

    def __init__(self, context: Context, us: float) -> None:
        self.context = context
        self.us = us
        self.cycles = 0
        if context.cuda:
            torch.cuda._sleep(300_000_000)  # until the clocks are up
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(50_000_000)
            end.record()
            end.synchronize()
            self.cycles = int(50_000_000 * us / (start.elapsed_time(end) * 1e3))

    def run(self) -> None:
        if self.context.cuda:
            torch.cuda._sleep(self.cycles)
            synchronize_stream(self.context)
        else:
            time.sleep(self.us / 1e6)


def _lengths_by_slot(sequences: list[va.Sequence], tokens: np.ndarray) -> np.ndarray:
    lengths = np.zeros(SEQUENCES, np.int64)
    lengths[[sequence.slot for sequence in sequences]] = tokens
    return lengths
