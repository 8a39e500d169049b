"""What the benchmarks share: shapes, timing, statistics, tables, and the file that is written.

Conventions: times are in microseconds (`_us`); a sample is one number; a metric is the list of its
samples, one a repetition. What is compared runs in turn within each repetition.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import vattention as va

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
MIB = 1 << 20
HELD_BACK_CYCLES = 1_000_000  # half a millisecond

T = TypeVar("T")

# By variant, then by metric: samples in the order they were taken, so that those with the same
# index belong to the same repetition.
Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Context:
    """One run of one benchmark."""

    name: str
    device: torch.device
    quick: bool
    command: str
    commit: str | None
    save: bool = False  # what was measured is what `auto` chooses by from now on
    compiled: bool = True  # also what takes a minute to compile
    write_so_far: Callable[[Mapping[str, object]], None] = field(default=lambda so_far: None)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, cuda: Any, cpu: Any, quick: Any = None) -> Any:
        """A setting: the GPU's, the host's, or with --quick (if given) that one."""
        if self.quick and quick is not None:
            return quick
        return cuda if self.cuda else cpu

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    @property
    def label(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        return "host backend at small sizes: tries the code, says nothing about a GPU"


# ---- timing ----


def clock_us() -> float:
    return time.perf_counter_ns() / 1e3


def alternate(
    variants: Mapping[str, Callable[[], Mapping[str, float]]], *, repetitions: int, warmup: int = 1
) -> Samples:
    """Runs the variants in turn, in another order each time.

    What ran before has a say in how fast a device is: where power is the limit, by some per cent.
    """
    samples: Samples = {name: {} for name in variants}
    order = random.Random(0)
    for repetition in range(-warmup, repetitions):
        for name in order.sample(list(variants), len(variants)):
            for metric, value in variants[name]().items():
                if repetition >= 0:
                    samples[name].setdefault(metric, []).append(value)
    return samples


def time_device_us(context: Context, work: Callable[[], object]) -> float:
    """The time of work on the device, with one like it queued before: no launch gap counts.

    The device is held back until both are queued, since a host may take longer than they do.
    """
    if not context.cuda:
        started = clock_us()
        work()
        return clock_us() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HELD_BACK_CYCLES)
    work()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def in_turn(calls: Sequence[T]) -> Iterator[T]:
    """One call after another, for ever, each of them as often as any.

    It starts one later in every round: whoever times every second call times all of them.
    """
    for start in itertools.count():
        for i in range(len(calls)):
            yield calls[(start + i) % len(calls)]


def measure_bandwidth(context: Context) -> dict[str, float]:
    """Bytes a second of a copy (read plus written) and of clearing memory: the floors."""
    try:
        return _measure_bandwidth(context)
    finally:
        release_cache(context)


def _measure_bandwidth(context: Context) -> dict[str, float]:
    nbytes = context.pick(2 * GIB, 32 * MIB)
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    samples = alternate(
        {
            "copy": lambda: {"us": time_device_us(context, lambda: target.copy_(source))},
            "clear": lambda: {"us": time_device_us(context, lambda: target.zero_())},
        },
        repetitions=context.pick(20, 5, 5),
        warmup=2,
    )
    copy_us = statistics.median(samples["copy"]["us"])
    clear_us = statistics.median(samples["clear"]["us"])
    return {
        "copy_bytes_per_s": 2 * nbytes / copy_us * 1e6,
        "clear_bytes_per_s": nbytes / clear_us * 1e6,
    }


def release_cache(context: Context) -> None:
    """Gives what torch holds for later back to the device."""
    if context.cuda:
        torch.cuda.synchronize(context.device)
        torch.cuda.empty_cache()


# ---- statistics ----


def quantile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Sequence[float], *, keep: bool = True) -> dict[str, Any]:
    """Median and spread; with `keep` the samples too."""
    summary: dict[str, Any] = {
        "median": quantile(samples, 0.5),
        "p10": quantile(samples, 0.1),
        "p90": quantile(samples, 0.9),
        "p99": quantile(samples, 0.99),
        "min": min(samples),
        "max": max(samples),
        "repetitions": len(samples),
    }
    if keep:
        summary["samples"] = list(samples)
    return summary


def summarize_all(samples: Samples) -> dict[str, dict[str, Any]]:
    return {
        name: {metric: summarize(values) for metric, values in metrics.items()}
        for name, metrics in samples.items()
    }


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Of samples taken in the same repetitions, the ratio of each pair."""
    return summarize([a / b for a, b in zip(numerator, denominator, strict=True)])


# ---- shapes ----


def llama3_8b(order: str = "token", *, num_layers: int = 32) -> va.KVLayout:
    return va.KVLayout(
        num_layers=num_layers, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, order=order
    )


def small(order: str = "token", *, num_layers: int = 2) -> va.KVLayout:
    """For the host: 512 bytes a token at 2 layers."""
    return va.KVLayout(
        num_layers=num_layers, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16, order=order
    )


def describe_layout(layout: va.KVLayout) -> dict[str, Any]:
    return {
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "dtype": str(layout.dtype),
        "order": layout.order,
        "token_bytes": layout.token_bytes,
    }


# ---- printing ----


def heading(context: Context, text: str) -> None:
    print(f"\n## {text} ({context.label})", flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        aligned = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(aligned).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    print(flush=True)


def show_us(us: float) -> str:
    if us >= 1e4:
        return f"{us / 1e3:.1f} ms"
    if us >= 1e3:
        return f"{us / 1e3:.2f} ms"
    return f"{us:.1f} us" if us >= 10 else f"{us:.2f} us"


def show_bytes(nbytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def show_spread(summary: Mapping[str, Any]) -> str:
    return f"{show_us(summary['p10'])} - {show_us(summary['p90'])}"


# ---- the file ----


def write_report(
    context: Context, measurements: Mapping[str, object], directory: Path, took_s: float
) -> Path:
    report = {
        "benchmark": context.name,
        "label": context.label,
        "quick": context.quick,
        "command": context.command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "took_s": round(took_s, 1),
        "environment": _environment(context),
        "measurements": measurements,
    }
    slug = "host"
    if context.cuda:
        name = torch.cuda.get_device_name(context.device)
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{context.name}-{slug}{'-quick' if context.quick else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _environment(context: Context) -> dict[str, Any]:
    commit, dirty = _git_state()
    return {
        "device": torch.cuda.get_device_name(context.device) if context.cuda else _cpu_name(),
        "driver": _driver_version() if context.cuda else None,
        "cuda": torch.version.cuda if context.cuda else None,
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "numpy": _version_of("numpy"),
        "transformers": _version_of("transformers"),
        "python": platform.python_version(),
        "kernel": platform.release().partition("-")[0],
        "vattention": va.__version__,
        "commit": context.commit or commit,
        # Not known of a commit that is told; source_sha256 says whether it is that.
        "dirty": None if context.commit else dirty,
        "source_sha256": _source_digest(),
    }


def _version_of(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git_state() -> tuple[str | None, bool | None]:
    """The commit and whether tracked or new files differ from it; None where there is no git."""
    # Another repository may lie around a copy that has none of its own.
    if not (ROOT / ".git").exists():
        return None, None
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit is None:
        return None, None
    # The lock would get into the way of somebody who works in the same tree. Results do not count:
    # one benchmark's file is no change to what the next one measures.
    changes = _output_of(
        "git", "--no-optional-locks", "status", "--porcelain", "--", ":!bench/results"
    )
    return commit, None if changes is None else bool(changes)


def _source_digest() -> str:
    """Of csrc/, vattention/ and bench/ as they are here: names what ran, also without git."""
    digest = hashlib.sha256()
    files = [
        path
        for folder in ("csrc", "vattention", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".h", ".py"}
    ]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def device_state() -> dict[str, Any] | None:
    """The GPU's clock, power, and whether that is what holds the clock back, at this moment."""
    names = ("clocks.sm", "power.draw", "clocks_event_reasons.sw_power_cap")
    found = _output_of(
        "nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"
    )
    try:
        clock, power, capped = (found or "").splitlines()[0].split(", ")
        return {"sm_mhz": int(clock), "watts": float(power), "power_capped": capped == "Active"}
    except (IndexError, ValueError):  # no such program, or it does not know
        return None


def _driver_version() -> str | None:
    found = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if found:
        return found.splitlines()[0].strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match.group(0) if match else None


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match.group(1) if match else platform.machine()
