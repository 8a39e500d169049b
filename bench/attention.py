"""Attention over slots, against the same kernels over packed tensors and against paged caches.

One layer of Llama-3-8B's shape, bf16, random data, all sequences of one length; calls rotate over
several layers. Decode: one query a sequence. Prefill: all tokens of one prompt, causal.

- ours: `vattention.attention` over an allocator in its default order of rows (balanced), in layer
  order and in token order with all layers of a model in a row. Slots have addresses for twice the
  length. `auto` is what a user gets who asks for nothing.
- packed: the same backends over tensors [batch, length, heads, dim] without a gap.
- paged: see bench/paged.py. The FlashAttention-3 of vLLM is the same binary in all three.

Before anything is timed, the output of every arm is compared with that of the first one, and that
with a reference in float64. A measurement is in two parts:

- sweep: every arm, in turn. The times of ours over the default order are what `auto` chooses by
  (`--save`). Arms that are far behind the fastest are timed in turn among themselves, and those
  close to it again and more often: in prefill, at the power limit, a few calls scatter by more
  than two kernels differ.
- contest: of ours, packed and paged the fastest of the sweep, and `auto`, all in turn again, so
  that what is compared was timed in the same repetitions. Ratios are of those pairs; the best of a
  kind is the one with the lowest median here. Which physical pages memory is made of alone moves
  bandwidth by a per cent, so all of it is given back and made again several times, elsewhere:
  samples are of one placement after another, `by_placement` is the median of each.

sustained: in prefill, each arm of the contest by itself for a while, with the device's clock and
power meanwhile. In turns, each runs at the clock that the power of all of them has left.

host: how long a call takes to return. Where that is more than the time on the device, a gap may be
part of the time. The floor is, in decode, the bytes of K and V over the faster of a copy (read and
written) and of reading; in prefill, the operations below the diagonal over the rate of a large
matrix product.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import vattention as va
from vattention.attention import BACKENDS, Attention, Batch, Options

from . import measured
from .bandwidth import measure_read
from .common import (
    GIB,
    MIB,
    Context,
    Samples,
    alternate,
    clock_us,
    describe_layout,
    device_state,
    heading,
    in_turn,
    llama3_8b,
    measure_bandwidth,
    paired_ratio,
    print_table,
    quantile,
    release_cache,
    show_bytes,
    show_spread,
    show_us,
    small,
    summarize,
    time_device_us,
)
from .paged import NO_PLAN, OUR_PLAN, Absent, Call, Pages, Peer, Queries, peers

LAYERS = 4  # rotated over: several times the L2 in any shape of decode
GROUP = 4  # query heads of one KV head
TOLERANCE = 1e-2  # of a row's norm
FAR_BEHIND = 2.5  # times the fastest
CLOSE = 1.15  # times the fastest
KEPT = 2  # of each kind for the contest
PLACEMENTS = 4  # of everything in physical memory, in the contest
HELD_BACK_BYTES = 3 * GIB + 42 * MIB  # and again as much at each further one
SUSTAINED_US = 300e3  # after which clocks are where power and heat let them be

DEFAULT = "balanced"
ORDERS = (DEFAULT, "layer", "token")
OURS, PACKED, PAGED = "ours", "packed", "paged"
STOCK = "paged, called as engines do"

# What is claimed, as the least ratio of times.
DECODE_OF_PACKED = 0.985
PREFILL_LENGTH = 32_768
PREFILL_OF_PACKED = 0.99
PREFILL_OF_PAGED_16 = 1.15
OF_PAGED = 1.0


def run(context: Context) -> dict[str, object]:
    floors = measure_bandwidth(context)
    floors["read_bytes_per_s"] = measure_read(context)
    floors["matmul_flop_per_s"] = _measure_matmul(context)
    release_cache(context)
    report = _Report(context, floors)
    shapes = [_run_shape(report, shape) for shape in _shapes(context)]
    claims = [claim for shape in shapes for claim in shape["claims"]]
    claims.append(
        {"claim": "outputs of all arms agree", "holds": not report.wrong, "wrong": report.wrong}
    )
    _show_claims(context, claims)
    for name, reason in report.absent.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    return {
        "what": __doc__,
        **floors,
        "query_heads": _layout(context, DEFAULT).num_kv_heads * GROUP,
        "layers_rotated_over": LAYERS,
        "capability": report.capability,
        "backends": report.versions,
        "layouts": {order: _describe(_layout(context, order)) for order in ORDERS},
        "absent": report.absent,
        "shapes": shapes,
        "claims": claims,
        "measured": report.measured,
    }


@dataclass(frozen=True)
class _Shape:
    rows: int
    length: int
    queries: int  # of each row

    @property
    def phase(self) -> str:
        return "decode" if self.queries == 1 else "prefill"

    def __str__(self) -> str:
        return f"{self.phase}, {self.rows} x {self.length:,}"


def _shapes(context: Context) -> list[_Shape]:
    decode = context.pick(
        [(32, 4_096), (8, 32_768), (128, 1_024), (1, 131_072)],
        [(4, 512), (1, 1_024)],
        [(32, 4_096), (1, 131_072)] if context.cuda else [(4, 512)],
    )
    prefill = context.pick([8_192, 32_768], [512], [8_192] if context.cuda else [256])
    return [
        *(_Shape(rows, length, 1) for rows, length in decode),
        *(_Shape(1, length, length) for length in prefill),
    ]


@dataclass
class _Report:
    """What shapes add to."""

    context: Context
    floors: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)

    @property
    def capability(self) -> list[int] | None:
        if not self.context.cuda:
            return None
        return list(torch.cuda.get_device_capability(self.context.device))


def _measure_matmul(context: Context) -> float:
    """Operations a second of a large matrix product."""
    size = context.pick(8_192, 256)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=context.device) for _ in range(2))
    samples = alternate(
        {"matmul": lambda: {"us": time_device_us(context, lambda: a @ b)}},
        repetitions=context.pick(20, 5, 5),
        warmup=3,
    )
    return 2 * size**3 / quantile(samples["matmul"]["us"], 0.5) * 1e6


# ---- where K and V lie ----


def _layout(context: Context, order: str) -> va.KVLayout:
    # Any four layers lie in balanced order as these do; in token order a row grows with them.
    many = context.pick(32, 16) if order == "token" else LAYERS
    return (llama3_8b if context.cuda else small)(order, num_layers=many)


def _describe(layout: va.KVLayout) -> dict[str, Any]:
    return describe_layout(layout) | {
        "row_bytes": layout.row_bytes[0],
        "layers_read": _layers_read(layout),
    }


def _layers_read(layout: va.KVLayout) -> list[int]:
    """From the first to the last, evenly spaced."""
    return [round(i * (layout.num_layers - 1) / (LAYERS - 1)) for i in range(LAYERS)]


def _place(order: str) -> str:
    return f"{order} order"


Layers = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Key:
    """Which arm: a kernel over one place."""

    kind: str
    kernel: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.place}"

    @property
    def has_our_plan(self) -> bool:
        return self.kernel.endswith(OUR_PLAN)


class _Arm:
    """One kernel over one place, called for one layer after another."""

    def __init__(self, key: _Key, version: str, calls: list[Call]) -> None:
        self.key, self.version, self.calls = key, version, calls
        self.error = math.nan
        self._in_turn = in_turn(calls)
        self._host_us: list[float] = []

    @property
    def name(self) -> str:
        return self.key.name

    def work(self) -> None:
        started = clock_us()
        next(self._in_turn)()
        self._host_us.append(clock_us() - started)

    def take_host_us(self) -> list[float]:
        """Since it was asked last."""
        taken, self._host_us = self._host_us, []
        return taken


class _Slots:
    """K and V in an allocator of ours, in one order of rows."""

    def __init__(self, context: Context, shape: _Shape, order: str, packed: Layers) -> None:
        layout = _layout(context, order)
        self._layers = _layers_read(layout)
        page_bytes = va.Pool(GIB, context.device, background=False).page_bytes
        self._pool = va.Pool(
            shape.rows * layout.mapped_bytes(shape.length, page_bytes),
            context.device,
            background=False,
        )
        self._kv = va.KVAllocator(
            layout,
            max_sequences=shape.rows,
            max_seq_len=2 * shape.length,
            pool=self._pool,
            lookahead_tokens=0,
        )
        sequences = self._kv.allocate_batch(shape.rows, shape.length)
        for layer, sources in zip(self._layers, packed, strict=True):
            for tensor, source in zip(self._kv.layer(layer), sources, strict=True):
                tensor[:, : shape.length].copy_(source)
        self._batch = Batch.of(dict.fromkeys(sequences, shape.queries))
        # As the rows of the packed tensors, which the same batch is for.
        assert self._batch.host_slots == list(range(shape.rows))
        self._options = Options(num_heads=layout.num_kv_heads * GROUP)
        self._attentions: dict[str, Attention] = {}

    def attention(self, backend: str) -> Attention:
        found = self._attentions.get(backend)
        if found is None:
            found = self._attentions[backend] = Attention(self._kv, self._options, backend)
        return found

    def chosen(self, backend: str) -> Any:
        """The backend that computes this batch."""
        return self.attention(backend).backend_for(self._batch)

    def calls(self, backend: str, q: torch.Tensor) -> list[Call]:
        attention = self.attention(backend)
        return [lambda layer=layer: attention(q, layer, self._batch) for layer in self._layers]

    def calls_over_packed(self, backend: str, q: torch.Tensor, packed: Layers) -> list[Call]:
        kernel, batch = self.chosen(backend), self._batch
        return [
            lambda k=k, v=v: kernel.attend(q, k, v, batch, sinks=None, scales=None)
            for k, v in packed
        ]

    def plan_of_fa3(self) -> tuple[int, int]:
        """What our backend asks the plan of FlashAttention-3 for, so that pages can have it too."""
        try:
            splits = getattr(self.chosen("fa3_vllm"), "_splits", None)
        except (va.ConfigError, va.BackendUnavailable):
            return NO_PLAN
        return NO_PLAN if splits is None else splits(self._batch)

    def close(self) -> None:
        self._attentions.clear()
        self._kv.close()
        self._pool.reclaim()


class _Rig:
    """The same K, V and queries each time, wherever an arm reads them.

    Another rig has them in other memory: it holds back some of its own first. Arms made by it are
    to be dropped before it is closed.
    """

    def __init__(self, report: _Report, shape: _Shape, number: int = 0) -> None:
        self._report, self._shape = report, shape
        context = self._context = report.context
        self.held_back_bytes = number * context.pick(HELD_BACK_BYTES, 0)
        self._held_back = torch.empty(
            self.held_back_bytes, dtype=torch.uint8, device=context.device
        )
        layout = _layout(context, DEFAULT)
        kv_size = (shape.rows, shape.length, layout.num_kv_heads, layout.head_dim)
        heads = layout.num_kv_heads * GROUP
        generator = torch.Generator(context.device).manual_seed(0)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=layout.dtype, device=context.device, generator=generator)

        self.packed: Layers = [(random(*kv_size), random(*kv_size)) for _ in range(LAYERS)]
        self.q = random(shape.rows * shape.queries, heads, layout.head_dim)
        self._slots: dict[str, _Slots] = {}
        self._pages: dict[int, Pages] = {}
        plan = self._slots_at(_place(DEFAULT)).plan_of_fa3()
        self._queries = Queries(self.q, shape.rows, shape.queries, shape.length, plan)
        self.peers: dict[_Key, Peer] = {
            _Key(PAGED, peer.kernel, peer.place): peer for peer in peers(context, self._queries)
        }

    def arms(self, keys: Iterable[_Key]) -> list[_Arm]:
        """Those that run; of others it is noted why not."""
        return [arm for arm in map(self._try, keys) if arm is not None]

    def close(self) -> None:
        for slots in self._slots.values():
            slots.close()
        self.packed.clear()
        self._pages.clear()
        self._slots.clear()
        del self.q, self._queries, self._held_back
        release_cache(self._context)

    def _slots_at(self, place: str) -> _Slots:
        if place not in self._slots:
            order = next(order for order in ORDERS if _place(order) == place)
            self._slots[place] = _Slots(self._context, self._shape, order, self.packed)
        return self._slots[place]

    def _try(self, key: _Key) -> _Arm | None:
        absent = self._report.absent
        # Why a library cannot be used is the same for all places.
        name = key.kernel if key.kind == OURS and key.place == _place(DEFAULT) else key.name
        try:
            arm = self._make(key)
            arm.calls[0]()
            self._context.synchronize()
            return arm
        except (Absent, va.ConfigError, va.BackendUnavailable) as reason:
            absent[name] = str(reason)
        except ModuleNotFoundError as error:
            absent[name] = f"the module {error.name} is not installed"
        except Exception as error:
            # Shown whole, but what it says may name paths, which are nobody's business.
            traceback.print_exc()
            absent[f"{name}; {self._shape}"] = f"failed: {type(error).__name__}"
        return None

    def _make(self, key: _Key) -> _Arm:
        if key.kind == PAGED:
            peer = self.peers[key]
            tokens = peer.page_tokens
            if tokens not in self._pages:
                self._pages[tokens] = Pages(self._context, self.packed, tokens)
            return _Arm(key, *peer.bind(self._queries, self._pages[tokens]))
        if key.kind == PACKED:
            slots = self._slots_at(_place(DEFAULT))
            calls = slots.calls_over_packed(key.kernel, self.q, self.packed)
        else:
            slots = self._slots_at(key.place)
            calls = slots.calls(key.kernel, self.q)
        chosen = slots.chosen(key.kernel)
        self._report.versions[chosen.name] = chosen.version
        auto = f"{chosen.name} " if key.kernel == "auto" else ""
        return _Arm(key, auto + chosen.version, calls)


# ---- are they right? ----


class _Expected:
    """The first arm's outputs, which are held against a reference."""

    def __init__(self, shape: _Shape, rig: _Rig, first: _Arm) -> None:
        self._outputs = [call() for call in first.calls]
        q = rig.q
        at = sorted({round(i * (q.shape[0] - 1) / 7) for i in range(8)})
        for (k, v), output in zip(rig.packed, self._outputs, strict=True):
            reference = torch.stack([_reference(shape, q, k, v, i) for i in at])
            error = _row_error(output[at], reference)
            assert error <= TOLERANCE, f"{first.name} is off by {error:.2g} from the reference"

    def agree(self, report: _Report, shape: _Shape, arms: list[_Arm]) -> list[_Arm]:
        """Those whose outputs are the same as the first one's; of others it is noted."""
        right = []
        for arm in arms:
            arm.error = _largest(
                _row_error(call(), expected)
                for call, expected in zip(arm.calls, self._outputs, strict=True)
            )
            if arm.error <= TOLERANCE:
                right.append(arm)
            else:
                report.wrong.append(f"{arm.name}; {shape}")
                report.absent[f"{arm.name}; {shape}"] = f"WRONG: off by {arm.error:.2g}"
        return right


def _reference(
    shape: _Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, number: int
) -> torch.Tensor:
    """The output of one query, in float64."""
    row, query = divmod(number, shape.queries)
    seen = shape.length - shape.queries + query + 1
    keys, values = k[row, :seen].double(), v[row, :seen].double()
    heads, dim = keys.shape[1:]
    grouped = q[number].double().view(heads, GROUP, dim)
    scores = torch.einsum("hgd,shd->hgs", grouped, keys) / math.sqrt(dim)
    return torch.einsum("hgs,shd->hgd", scores.softmax(-1), values).reshape(heads * GROUP, dim)


def _row_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of any row, relative to its norm; NaN where there is NaN."""
    if output.shape != expected.shape:
        return math.nan
    output, expected = output.double().flatten(1), expected.double().flatten(1)
    return float(((output - expected).norm(dim=1) / expected.norm(dim=1)).max())


def _largest(numbers: Iterable[float]) -> float:
    """Python's own forgets a NaN that comes later."""
    return float(torch.tensor(list(numbers), dtype=torch.float64).max())


# ---- measuring ----


def _run_shape(report: _Report, shape: _Shape) -> dict[str, Any]:
    context = report.context
    result = _about(report, shape, _layout(context, DEFAULT))

    rig = _Rig(report, shape)
    # In prefill, one sequence, another order takes little memory.
    places = [_place(DEFAULT), *([_place("token")] if shape.phase == "prefill" else [])]
    ours = rig.arms(_Key(OURS, backend, places[0]) for backend in BACKENDS)
    kernels = [arm.key.kernel for arm in ours]
    arms = rig.arms(_Key(PACKED, kernel, PACKED) for kernel in kernels) + ours
    for place in places[1:]:
        arms += rig.arms(_Key(OURS, kernel, place) for kernel in kernels)
    arms += rig.arms(rig.peers)
    expected = _Expected(shape, rig, arms[0])
    arms = expected.agree(report, shape, arms)
    sweep = result["sweep"] = _sweep(context, shape, result, arms)
    report.measured.append(
        {
            "phase": shape.phase,
            "rows": shape.rows,
            "length": shape.length,
            "us": {
                arm.key.kernel: round(sweep[arm.name]["us"]["median"], 1)
                for arm in arms
                if arm.key.place == _place(DEFAULT)
            },
        }
    )
    if context.save:
        assert report.capability is not None
        name = torch.cuda.get_device_name(context.device)
        measured.save(name, report.capability, report.measured, {"date": "a run not at its end"})
    keys = _finalists(shape, sweep, arms)
    arms.clear()
    ours.clear()
    rig.close()

    _contest(report, shape, result, keys, expected)
    return result


def _about(report: _Report, shape: _Shape, layout: va.KVLayout) -> dict[str, Any]:
    floors = report.floors
    nbytes = shape.rows * shape.length * (layout.k_bytes + layout.v_bytes)
    flop = 0.0
    if shape.phase == "decode":
        fastest = max(floors["copy_bytes_per_s"], floors["read_bytes_per_s"])
        floor_us = nbytes / fastest * 1e6
    else:
        heads = layout.num_kv_heads * GROUP
        flop = 4 * heads * layout.head_dim * shape.length**2 / 2
        floor_us = flop / floors["matmul_flop_per_s"] * 1e6
    return {
        "phase": shape.phase,
        "batch": shape.rows,
        "length": shape.length,
        "bytes_of_a_layer": nbytes,
        "flop": flop,
        "floor_us": floor_us,
        "unit": "GB/s" if shape.phase == "decode" else "TFLOP/s",
        "floor_rate": nbytes / floor_us / 1e3 if shape.phase == "decode" else flop / floor_us / 1e6,
    }


def _rate(result: Mapping[str, Any], us: float) -> float:
    """In the unit of the shape."""
    if result["phase"] == "decode":
        return float(result["bytes_of_a_layer"] / us / 1e3)
    return float(result["flop"] / us / 1e6)


def _time(context: Context, arms: list[_Arm], repetitions: int, warmup: int) -> Samples:
    return alternate(
        {arm.name: (lambda arm=arm: {"us": time_device_us(context, arm.work)}) for arm in arms},
        repetitions=repetitions,
        warmup=warmup,
    )


def _sweep(
    context: Context, shape: _Shape, result: Mapping[str, Any], arms: list[_Arm]
) -> dict[str, dict[str, Any]]:
    once = {arm.name: time_device_us(context, arm.work) for arm in arms}
    limit = FAR_BEHIND * min(once.values())
    near = [arm for arm in arms if once[arm.name] <= limit]
    far = [arm for arm in arms if once[arm.name] > limit]
    samples = _time(context, near, context.pick(6, 3, 3), warmup=2)
    us = {arm.name: quantile(samples[arm.name]["us"], 0.5) for arm in near}
    close = [arm for arm in near if us[arm.name] <= CLOSE * min(us.values())]
    samples |= _time(context, close, context.pick(20, 3, 8 if context.cuda else 3), warmup=3)
    samples |= _time(context, far, 3, warmup=1)
    found = {
        arm.name: {
            **_describe_arm(arm),
            "us": summarize(samples[arm.name]["us"], keep=False),
            "rate": _rate(result, quantile(samples[arm.name]["us"], 0.5)),
            "host_us": quantile(arm.take_host_us(), 0.5),
            "close": arm in close,
            "far_behind": arm in far,
        }
        for arm in arms
    }
    _show(
        context,
        shape,
        result,
        "all",
        ("of floor", "host"),
        {
            name: (
                row["us"],
                f"{result['floor_us'] / row['us']['median']:.3f}",
                show_us(row["host_us"]),
            )
            for name, row in found.items()
        },
    )
    return found


def _finalists(
    shape: _Shape, sweep: Mapping[str, Mapping[str, Any]], arms: list[_Arm]
) -> list[_Key]:
    """The fastest of each kind; of ours those over the default order, `auto`, and other orders.

    And of pages the fastest without our plan, in prefill FA3 with pages of 16.
    """
    by_time = sorted((arm.key for arm in arms), key=lambda key: sweep[key.name]["us"]["median"])
    chosen: list[_Key] = []
    for kind in (OURS, PACKED, PAGED):
        of_kind = [
            key
            for key in by_time
            if key.kind == kind and (kind != OURS or key.place == _place(DEFAULT))
        ]
        chosen += of_kind[:KEPT]
        if kind == PAGED:
            chosen += [key for key in of_kind if not key.has_our_plan][:1]
        if shape.phase == "prefill":
            chosen += [key for key in of_kind if key.name == "FA3, paged 16"]
    kernels = [key.kernel for key in chosen if key.kind == OURS]
    chosen.append(_Key(OURS, "auto", _place(DEFAULT)))
    for order in ORDERS[1:]:
        chosen += [_Key(OURS, kernel, _place(order)) for kernel in kernels]
    return list(dict.fromkeys(chosen))


def _contest(
    report: _Report,
    shape: _Shape,
    result: dict[str, Any],
    keys: list[_Key],
    expected: _Expected,
) -> None:
    """Times them in turn, several times over, each time in other memory."""
    context = report.context
    decode = shape.phase == "decode"
    repetitions = context.pick(30 if decode else 8, 3, 4 if context.cuda else 3)
    us: dict[str, list[float]] = {}
    host_us: dict[str, list[float]] = {}
    about: dict[str, dict[str, Any]] = {}
    in_use = 0
    for number in range(PLACEMENTS):
        rig = _Rig(report, shape, number)
        arms = expected.agree(report, shape, rig.arms(keys))
        if context.cuda:
            free, total = torch.cuda.mem_get_info(context.device)
            in_use = max(in_use, total - free - rig.held_back_bytes)
        samples = _time(context, arms, repetitions, warmup=3)
        for arm in arms:
            us.setdefault(arm.name, []).extend(samples[arm.name]["us"])
            host_us.setdefault(arm.name, []).extend(arm.take_host_us())
            known = about.setdefault(arm.name, _describe_arm(arm))
            known["largest_error"] = max(known["largest_error"], arm.error)
        if context.cuda and not decode and number == PLACEMENTS - 1:
            result["sustained"] = {arm.name: _sustain(context, result, arm) for arm in arms}
        arms.clear()
        rig.close()
    if context.cuda:
        result["device_bytes_in_use"] = in_use
    # What was wrong, or failed, in one of them is not compared.
    whole = [key for key in keys if len(us.get(key.name, ())) == PLACEMENTS * repetitions]
    median = {key.name: quantile(us[key.name], 0.5) for key in whole}

    def best(of: Iterable[_Key]) -> str | None:
        return min((key.name for key in of), key=lambda name: median[name], default=None)

    def over(name: str | None, other: str | None) -> dict[str, Any] | None:
        """How many times as fast, of each pair; and the median of each placement."""
        if name not in median or other not in median:
            return None
        ratio = paired_ratio(us[other], us[name])
        pairs = ratio.pop("samples")
        ratio["by_placement"] = [
            quantile(pairs[start : start + repetitions], 0.5)
            for start in range(0, len(pairs), repetitions)
        ]
        return ratio

    # What users have who choose no order.
    default = [key for key in whole if key.kind == OURS and key.place == _place(DEFAULT)]
    found = {
        OURS: best(default),
        PACKED: best(key for key in whole if key.kind == PACKED),
        PAGED: best(key for key in whole if key.kind == PAGED),
        STOCK: best(key for key in whole if key.kind == PAGED and not key.has_our_plan),
    }
    result["best"] = found
    result["contest"] = {
        key.name: {
            **about[key.name],
            "us": summarize(us[key.name]),
            "rate": _rate(result, median[key.name]),
            "host_us": quantile(host_us[key.name], 0.5),
            "over_best_packed": over(key.name, found[PACKED]),
            "over_best_paged": over(key.name, found[PAGED]),
        }
        for key in whole
    }
    auto = next((key.name for key in whole if key.kernel == "auto"), None)
    result["auto"] = auto and about[auto]["version"]
    result["claims"] = [
        {
            "claim": what,
            "shape": str(shape),
            "ours": name,
            "other": other,
            "least": least,
            "ratio": ratio,
            "holds": None if ratio is None else ratio["median"] >= least,
        }
        for what, name, other, least in _claimed(context, shape, auto, found)
        for ratio in (over(name, other),)
    ]
    _show(
        context,
        shape,
        result,
        "the fastest again",
        ("over packed", "over paged"),
        {
            name: (
                row["us"],
                *(
                    "" if ratio is None else f"{ratio['median']:.3f}"
                    for ratio in (row["over_best_packed"], row["over_best_paged"])
                ),
            )
            for name, row in result["contest"].items()
        },
    )
    print(f"auto: {result['auto']}; " + "; ".join(f"best {of}: {n}" for of, n in found.items()))


def _describe_arm(arm: _Arm) -> dict[str, Any]:
    return {
        "kind": arm.key.kind,
        "kernel": arm.key.kernel,
        "place": arm.key.place,
        "version": arm.version,
        "largest_error": arm.error,
    }


def _sustain(context: Context, result: Mapping[str, Any], arm: _Arm) -> dict[str, Any]:
    """One arm again and again, and what the device's clock and power are meanwhile."""
    once_us = time_device_us(context, arm.work)
    for _ in range(math.ceil(SUSTAINED_US / once_us)):
        arm.work()
    context.synchronize()
    samples = [time_device_us(context, arm.work) for _ in range(5)]
    for _ in range(math.ceil(2 * SUSTAINED_US / once_us)):
        arm.work()
    end = torch.cuda.Event()
    end.record()
    state = device_state()
    if end.query():
        state = None  # of an idle device
    context.synchronize()
    us = quantile(samples, 0.5)
    return {"us": us, "rate": _rate(result, us)} | (state or {})


def _claimed(
    context: Context, shape: _Shape, auto: str | None, best: Mapping[str, str | None]
) -> list[tuple[str, str | None, str | None, float]]:
    """What is claimed of a shape: the words, which arm, over which other, at least how much."""
    ours, packed, paged = best[OURS], best[PACKED], best[PAGED]
    if shape.phase == "decode":
        found = [
            ("auto over the best kernel over packed tensors", auto, packed, DECODE_OF_PACKED),
            ("the best of ours over the best paged", ours, paged, OF_PAGED),
        ]
        stock = best[STOCK]
        if stock != paged:
            what = "the best of ours over the best paged, called as engines do"
            found.append((what, ours, stock, OF_PAGED))
        return found
    if context.cuda and shape.length != PREFILL_LENGTH:
        return []
    return [
        ("the best of ours over FA3 paged 16", ours, "FA3, paged 16", PREFILL_OF_PAGED_16),
        ("the best of ours over the best paged", ours, paged, OF_PAGED),
        ("the best of ours over the best packed", ours, packed, PREFILL_OF_PACKED),
    ]


# ---- showing ----


def _show(
    context: Context,
    shape: _Shape,
    result: Mapping[str, Any],
    which: str,
    columns: tuple[str, ...],
    rows: Mapping[str, tuple[Any, ...]],
) -> None:
    heading(
        context,
        f"attention: {shape} tokens, {which}; {show_bytes(result['bytes_of_a_layer'])} a layer",
    )
    unit = result["unit"]
    digits = 0 if context.cuda else 2
    floor = (
        "floor",
        show_us(result["floor_us"]),
        "",
        f"{result['floor_rate']:,.{digits}f}",
        *("" for _ in columns),
    )
    print_table(
        ("", "median", "p10 - p90", unit, *columns),
        [
            floor,
            *(
                (
                    name,
                    show_us(us["median"]),
                    show_spread(us),
                    f"{_rate(result, us['median']):,.{digits}f}",
                    *rest,
                )
                for name, (us, *rest) in sorted(rows.items(), key=lambda row: row[1][0]["median"])
            ),
        ],
    )


def _show_claims(context: Context, claims: list[dict[str, Any]]) -> None:
    heading(context, "attention: claims")
    verdicts = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}
    for claim in claims:
        text = f"claim, {claim['claim']}"
        if "least" in claim:
            ratio = claim["ratio"]
            shown = "" if ratio is None else f" {ratio['median']:.3f}"
            text = (
                f"claim, {claim['shape']}: {claim['claim']}, at least {claim['least']:g}:{shown} "
                f"({claim['ours']} / {claim['other']})"
            )
        print(f"{text}: {verdicts[claim['holds']]}", flush=True)
