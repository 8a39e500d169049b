"""What keeping 256 sequences mapped costs the host at each step of an engine.

- idle: a step with nothing to map. lengths is an array (NumPy, or a torch tensor on the CPU) or a
  mapping of sequences; every step makes each sequence one token longer, and making lengths is not
  timed. That no backend call is made is counted in a run of its own, through a wrapper.
- decode: each step makes all sequences one token longer, and a stand-in for the model follows: a
  kernel of a fixed time on the current stream, and the host's wait for it. That is the time the
  background thread has between two steps. Most of it is measured with 1 ms, less than a model of
  this shape takes to read its weights, so that the thread has less time than in earnest.
  spread: random lengths, so that in every step some sequences reach a new page. together: all of
  one length, so that all reach it in the same step. cold: pages are created; warm: the pool has
  them. waited: steps that called the driver or waited for the thread.
- crossing: one step in which so many sequences reach a new page at once, without the background
  thread and with nothing mapped ahead.
- arrivals: 32 prompts, allocated one after the other beside 224 live sequences. adopt: their slots
  were freed and are still mapped.

call: until the function returns; ready: until the current stream has done what the call gave it
(new pages are cleared there). busy: kernels that read and write memory run all the while on another
stream. The floor is the driver's own time for the same pages, and does not count clearing them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import vattention as va
from vattention import _core

from .common import (
    GIB,
    Context,
    Samples,
    alternate,
    clock_us,
    describe_layout,
    heading,
    llama3_8b,
    paired_ratio,
    print_table,
    quantile,
    release_cache,
    show_us,
    small,
    summarize,
    summarize_all,
)

SEQUENCES = 256
PROMPTS = 32
CLAIM_US = 5.0
HOST_PAGE_BYTES = 8 << 10  # 16 tokens of the small shape: as many as a page holds on the GPU


def run(context: Context) -> dict[str, object]:
    layout = _layout(context)
    busy = _Busy(context) if context.cuda else None
    page_bytes = _backend(context).page_bytes
    with _no_garbage_collection():
        driver = _driver_costs(context, busy)
        idle = _run_idle(context, busy)
        crossing = _run_crossing(context, busy, driver)
        arrivals = _run_arrivals(context, busy)
        del busy
        release_cache(context)
        decode = [_run_decode(context, scenario) for scenario in _scenarios(context)]
    return {
        "what": __doc__,
        "sequences": SEQUENCES,
        "layout": describe_layout(layout),
        "page_bytes": page_bytes,
        "tokens_per_page": layout.tokens_per_page(page_bytes),
        "idle": idle,
        "driver_page": driver,
        "crossing": crossing,
        "arrivals": arrivals,
        "decode": decode,
    }


# ---- what the measurements stand on ----


def _layout(context: Context) -> va.KVLayout:
    return llama3_8b() if context.cuda else small()


def _backend(context: Context) -> _core.Backend:
    if context.cuda:
        return _core.cuda_backend(context.device.index)
    return _core.host_backend(HOST_PAGE_BYTES)


def _allocator(
    context: Context,
    *,
    max_seq_len: int,
    memory: int,
    lookahead_tokens: int = 16,
    background: bool = True,
    backend: _core.Backend | None = None,
) -> va.KVAllocator:
    pool = va.Pool(
        memory,
        context.device,
        background=background,
        backend=_backend(context) if backend is None else backend,
    )
    return va.KVAllocator(
        _layout(context),
        max_sequences=SEQUENCES,
        max_seq_len=max_seq_len,
        pool=pool,
        lookahead_tokens=lookahead_tokens,
    )


def _close(kv: va.KVAllocator) -> None:
    """Ends it and gives its memory back to the driver."""
    pool = kv.pool
    kv.close()
    pool.reclaim()
    assert pool.stats().held_bytes == 0


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited 30 s in vain until {what}")
        time.sleep(0.0005)


def _settle(kv: va.KVAllocator) -> None:
    """Until the background thread has had nothing to do for 20 ms."""
    seen, since = None, time.monotonic()
    while time.monotonic() - since < 0.02:
        stats = kv.stats()
        now = (stats.ahead_mappings, stats.ahead_failures, stats.pool.maps, stats.retired_bytes)
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.0005)


def _trim_all(
    context: Context, kv: va.KVAllocator, sequences: list[va.Sequence], tokens: int
) -> None:
    """Trims them, and does not return before the pool has what they gave up."""
    for sequence in sequences:
        sequence.trim(tokens)
    context.synchronize()

    def unmapped() -> bool:
        sequences[0].trim(tokens)  # looks at the fences, where no thread does
        return kv.stats().retired_bytes == 0

    _wait_until(unmapped, "what was trimmed is unmapped")


def _lengths_by_slot(sequences: list[va.Sequence], tokens: np.ndarray) -> np.ndarray:
    lengths = np.zeros(SEQUENCES, np.int64)
    lengths[[sequence.slot for sequence in sequences]] = tokens
    return lengths


def _synchronize_stream(context: Context) -> None:
    if context.cuda:
        torch.cuda.current_stream(context.device).synchronize()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _named(name: str, busy: _Busy | None) -> str:
    return name if busy is None else f"{name}, busy"


def _warn_if_idle(samples: Samples) -> None:
    """Says where the GPU was not busy to the end of what was to be measured beside it."""
    for name, metrics in samples.items():
        for metric, ends in metrics.items():
            if metric.endswith("still_busy") and not all(ends):
                print(f"{name}: {metric} only in {sum(ends):.0f} of {len(ends)} repetitions")


class _Busy:
    """Keeps the GPU busy from a stream of its own, with kernels that read and write its memory."""

    def __init__(self, context: Context) -> None:
        self._stream = torch.cuda.Stream(context.device)
        self._source = torch.randn(GIB // 8, device=context.device)
        self._target = torch.empty_like(self._source)
        self._end = torch.cuda.Event()
        torch.cuda.synchronize(context.device)
        self._launch(50)
        self._stream.synchronize()
        started = clock_us()
        self._launch(50)
        self._stream.synchronize()
        self._kernel_us = (clock_us() - started) / 50

    def _launch(self, count: int) -> None:
        with torch.cuda.stream(self._stream):
            for _ in range(count):
                torch.add(self._source, 1.0, out=self._target)

    def start(self, us: float) -> None:
        """Queues about so much work; more than fits the launch queue would wait here."""
        self._launch(min(900, int(us / self._kernel_us) + 5))
        self._end.record(self._stream)

    def running(self) -> bool:
        return not self._end.query()

    def wait(self) -> None:
        self._stream.synchronize()


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
            _synchronize_stream(self.context)
        else:
            time.sleep(self.us / 1e6)


def _driver_costs(context: Context, busy: _Busy | None) -> dict[str, Any]:
    """The driver's time for one page: calls from Python, less what a call that does little takes.

    No two pages are neighbours, so that none shares a call, as it is with pages of different
    sequences.
    """
    backend = _backend(context)
    page_bytes = backend.page_bytes
    count = 256
    base = backend.reserve(2 * count * page_bytes)
    addresses = [base + 2 * i * page_bytes for i in range(count)]
    handles: list[int] = []
    fence = backend.create_fence()

    def timed(work: Callable[[int], object]) -> float:
        started = clock_us()
        for i in range(count):
            work(i)
        return (clock_us() - started) / count

    def measure(busy: _Busy | None) -> dict[str, float]:
        handles.clear()
        context.synchronize()
        if busy is not None:
            busy.start(150e3)
        overhead = timed(lambda _: backend.query(fence))
        times = {
            "create_us": timed(lambda _: handles.append(backend.create(page_bytes))),
            "map_us": timed(lambda i: backend.map(addresses[i], page_bytes, handles[i])),
            "access_us": timed(
                lambda i: backend.set_access(addresses[i], page_bytes, "read_write")
            ),
        }
        still_busy = busy is not None and busy.running()
        context.synchronize()
        undone = {
            "unmap_us": timed(lambda i: backend.unmap(addresses[i], page_bytes)),
            "destroy_us": timed(lambda i: backend.destroy(handles[i])),
        }
        if busy is None:
            times |= undone
        times = {name: max(0.0, us - overhead) for name, us in times.items()}
        times["call_overhead_us"] = overhead
        if busy is not None:
            times["still_busy"] = float(still_busy)
        return times

    variants = {"alone": lambda: measure(None)}
    if busy is not None:
        variants["busy"] = lambda: measure(busy)
    samples = alternate(variants, repetitions=context.pick(5, 3, 3))
    backend.destroy_fence(fence)
    backend.unreserve(base, 2 * count * page_bytes)

    heading(context, "step: the driver's time for one page")
    metrics = ("create_us", "map_us", "access_us", "unmap_us", "destroy_us")
    print_table(
        ("", *(metric.removesuffix("_us") for metric in metrics)),
        [
            (
                name,
                *(
                    show_us(quantile(measured[metric], 0.5)) if metric in measured else ""
                    for metric in metrics
                ),
            )
            for name, measured in samples.items()
        ],
    )
    _warn_if_idle(samples)
    return summarize_all(samples)


# ---- a step with nothing to map ----


def _run_idle(context: Context, busy: _Busy | None) -> dict[str, Any]:
    tokens = context.pick(1024, 1024, 256)
    first = 16
    kv, sequences = _fully_mapped(context, tokens, first)
    maps = kv.stats().pool.maps
    forms = _forms(sequences)
    raw: dict[str, list[float]] = {}
    took_us: dict[str, float] = {}

    def run_pass(form: str, busy: _Busy | None) -> dict[str, float]:
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
        raw.setdefault(_named(form, busy), []).extend(times)
        return result

    modes = (None,) if busy is None else (None, busy)
    for form in forms:  # to warm up, and to know how long a pass takes
        run_pass(form, None)
    raw.clear()
    passes = alternate(
        {
            _named(form, mode): lambda form=form, mode=mode: run_pass(form, mode)
            for form in forms
            for mode in modes
        },
        repetitions=context.pick(5, 5, 2),
        warmup=0,
    )
    stats = kv.stats()
    assert stats.waited_steps == 0 and stats.pool.maps == maps, "an idle step mapped something"
    _close(kv)

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
    _warn_if_idle(passes)
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
    layout, page_bytes = _layout(context), _backend(context).page_bytes
    full = SEQUENCES * layout.mapped_bytes(tokens, page_bytes)
    kv = _allocator(
        context, max_seq_len=tokens, memory=full, lookahead_tokens=tokens, backend=backend
    )
    sequences = kv.allocate_batch(SEQUENCES, first)
    _wait_until(lambda: kv.stats().mapped_bytes == full, "all slots are mapped to their end")
    _settle(kv)
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
    backend = _core.FaultyBackend(_backend(context))
    tokens, first = 64, 16
    kv, sequences = _fully_mapped(context, tokens, first, backend)
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
    _close(kv)
    return {"steps": steps, "made": 0, "made_before_to_map": sum(before.values())}


# ---- steps that map, at once ----


def _run_crossing(context: Context, busy: _Busy | None, driver: dict[str, Any]) -> dict[str, Any]:
    layout, page_bytes = _layout(context), _backend(context).page_bytes
    tokens = 16 * layout.tokens_per_page(page_bytes)
    kv = _allocator(
        context,
        max_seq_len=2 * tokens,
        memory=SEQUENCES * layout.mapped_bytes(2 * tokens, page_bytes),
        lookahead_tokens=0,
        background=False,
    )
    sequences = kv.allocate_batch(SEQUENCES, tokens)
    pages = layout.num_regions  # of one sequence that reaches a new page

    def run_once(count: int, busy: _Busy | None) -> dict[str, float]:
        lengths = np.zeros(SEQUENCES, np.int64)
        lengths[:count] = tokens + 1
        times: dict[str, float] = {}
        for state in ("cold", "warm"):
            before = kv.stats()
            context.synchronize()
            if busy is not None:
                busy.start(10e3 + 300 * count)
            started = clock_us()
            kv.step(lengths)
            times[f"{state}_call_us"] = clock_us() - started
            _synchronize_stream(context)
            times[f"{state}_ready_us"] = clock_us() - started
            if busy is not None:
                times[f"{state}_still_busy"] = float(busy.running())
                busy.wait()
            after = kv.stats()
            assert after.pool.maps - before.pool.maps == count * pages
            created = after.pool.creates - before.pool.creates
            assert created == (count * pages if state == "cold" else 0)
            _trim_all(context, kv, sequences, tokens)
        kv.reclaim()
        assert kv.stats().free_bytes == 0
        return times

    counts = (1, 16, 64, SEQUENCES)
    variants = {
        _named(f"{count} of {SEQUENCES}", mode): (
            lambda count=count, mode=mode: run_once(count, mode)
        )
        for count in counts
        for mode in ((None,) if busy is None else (None, busy))
    }
    samples = alternate(variants, repetitions=context.pick(7, 5, 3))
    _close(kv)

    floors = {}
    for count in counts:
        for name, costs in driver.items():
            create, mapping, access = (
                costs[f"{call}_us"]["median"] for call in ("create", "map", "access")
            )
            floors[_named(f"{count} of {SEQUENCES}", busy if name == "busy" else None)] = {
                "cold_us": count * pages * (create + mapping + access),
                "warm_us": count * pages * (mapping + access),
            }
    heading(context, "step: so many sequences reach a new page at once, nothing mapped ahead")
    print_table(
        ("", "cold: call", "ready", "floor", "warm: call", "ready", "floor"),
        [
            (
                name,
                *(
                    show_us(us)
                    for state in ("cold", "warm")
                    for us in (
                        quantile(metrics[f"{state}_call_us"], 0.5),
                        quantile(metrics[f"{state}_ready_us"], 0.5),
                        floors[name][f"{state}_us"],
                    )
                ),
            )
            for name, metrics in samples.items()
        ],
    )
    _warn_if_idle(samples)
    return {
        "tokens_before": tokens,
        "pages_of_a_sequence": pages,
        "floors": floors,
        "times": summarize_all(samples),
    }


# ---- prompts that arrive ----


def _run_arrivals(context: Context, busy: _Busy | None) -> dict[str, Any]:
    layout, page_bytes = _layout(context), _backend(context).page_bytes
    live_tokens = 256
    prompts = np.geomspace(64, 8192, PROMPTS).astype(int).tolist()
    needed = sum(layout.mapped_bytes(n, page_bytes) for n in prompts)
    kv = _allocator(
        context,
        max_seq_len=2 * max(prompts),
        memory=2 * needed + 2 * SEQUENCES * layout.mapped_bytes(live_tokens, page_bytes),
    )
    for _ in range(SEQUENCES - PROMPTS):
        kv.allocate(live_tokens)
    _settle(kv)
    order = np.random.default_rng(0)
    by_prompt: dict[str, dict[int, list[float]]] = {}
    made: dict[str, list[dict[str, int]]] = {}

    def allocate(state: str, times: dict[str, float], busy: _Busy | None) -> list[va.Sequence]:
        name = _named(state, busy)
        arriving = order.permutation(prompts).tolist()
        before = kv.stats()
        context.synchronize()
        if busy is not None:
            busy.start(120e3 if state == "cold" else 60e3)
        sequences, calls = [], []
        began = clock_us()
        for tokens in arriving:
            started = clock_us()
            sequences.append(kv.allocate(tokens))
            calls.append(clock_us() - started)
        times[f"{state}_call_us"] = clock_us() - began
        _synchronize_stream(context)
        times[f"{state}_ready_us"] = clock_us() - began
        times[f"{state}_longest_call_us"] = max(calls)
        if busy is not None:
            times[f"{state}_still_busy"] = float(busy.running())
            busy.wait()
        _settle(kv)
        after = kv.stats()
        for tokens, us in zip(arriving, calls, strict=True):
            by_prompt.setdefault(name, {}).setdefault(tokens, []).append(us)
        made.setdefault(name, []).append(
            {
                "creates": after.pool.creates - before.pool.creates,
                "maps": after.pool.maps - before.pool.maps,
                "adoptions": after.adoptions - before.adoptions,
            }
        )
        return sequences

    def run_once(busy: _Busy | None) -> dict[str, float]:
        times: dict[str, float] = {}
        sequences = allocate("cold", times, busy)
        adopted = kv.stats().adoptions
        for sequence in sequences:
            sequence.free()
        sequences = allocate("adopt", times, busy)
        assert kv.stats().adoptions == adopted + PROMPTS
        _trim_all(context, kv, sequences, 0)
        for sequence in sequences:
            sequence.free()
        sequences = allocate("warm", times, busy)
        for sequence in sequences:
            sequence.free()
        context.synchronize()
        kv.reclaim()
        stats = kv.stats()
        assert stats.free_bytes == stats.cached_bytes == 0
        return times

    variants: dict[str, Callable[[], Mapping[str, float]]] = {"alone": lambda: run_once(None)}
    if busy is not None:
        variants["busy"] = lambda: run_once(busy)
    run_once(None)  # to warm up
    by_prompt.clear()
    made.clear()
    samples = alternate(variants, repetitions=context.pick(7, 5, 3), warmup=0)
    _close(kv)
    heading(
        context,
        f"step: {PROMPTS} prompts of {min(prompts):,} to {max(prompts):,} tokens arrive "
        f"beside {SEQUENCES - PROMPTS} sequences",
    )
    print_table(
        ("", "all calls", "all ready", "longest call", "created", "mapped"),
        [
            (
                f"{state}{'' if name == 'alone' else ', busy'}",
                *(
                    show_us(quantile(metrics[f"{state}_{metric}_us"], 0.5))
                    for metric in ("call", "ready", "longest_call")
                ),
                *(
                    f"{quantile([one[what] for one in runs], 0.5):g}"
                    for what in ("creates", "maps")
                    for runs in (made[state if name == "alone" else f"{state}, busy"],)
                ),
            )
            for name, metrics in samples.items()
            for state in ("cold", "warm", "adopt")
        ],
    )
    _warn_if_idle(samples)
    return {
        "prompts": prompts,
        "prompts_bytes": needed,
        "live_sequences": SEQUENCES - PROMPTS,
        "live_tokens_each": live_tokens,
        "times": summarize_all(samples),
        "made": made,
        "call_us_by_prompt": {
            name: [
                {"tokens": tokens, "median": quantile(us, 0.5), "max": max(us)}
                for tokens, us in sorted(prompt.items())
            ]
            for name, prompt in by_prompt.items()
        },
    }


# ---- steady decode ----


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


def _run_decode(context: Context, scenario: _Scenario) -> dict[str, Any]:
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
    layout, page_bytes = _layout(context), _backend(context).page_bytes
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
    kv = _allocator(
        context, max_seq_len=2 * longest, memory=sum(per_sequence), background=background
    )
    sequences = [kv.allocate(int(n)) for n in starts]
    lengths = _lengths_by_slot(sequences, starts)
    for state in ("cold", "warm"):
        if state == "warm":
            _trim_all(context, kv, sequences, 0)
            assert kv.stats().mapped_bytes == 0
            lengths = _lengths_by_slot(sequences, starts)
            kv.step(lengths)
        if background:
            _settle(kv)
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
    _close(kv)
