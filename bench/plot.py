"""Draws what the benchmarks measured, for each device from the newest files.

- overview: up to two panels, of what there are results for: backing one prompt, decode bandwidth,
  steps.
- attention: decode and prefill, beside kernels over packed tensors and over pages.
- generate: a decode step of a model, and the memory of K and V, beside transformers' caches.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .common import show_bytes

Report = dict[str, Any]
Panel = tuple[Callable[[Axes, Report], None], Report]

INK, MUTED, GRID = "#1c2430", "#66707d", "#e4e8ed"
THEIRS, THEIRS_LIGHT = "#c0392b", "#e5a59e"
OURS, OURS_LIGHT, OURS_LIGHTEST = "#1f6fb4", "#6aaede", "#b5d6f0"
SERIES = ("#1f6fb4", "#e08e0b", "#2a9d6f", "#7d3c98")
MARKERS = "osD^"
# Of the kernels that ran, the first of these is drawn.
KERNELS = ("FA3", "FA2", "torch flash", "torch sdpa", "read")


def draw(results: Path, directory: Path) -> list[Path]:
    """Draws the figures into a directory and returns their paths; none where nothing was found."""
    paths = []
    for device, reports in _newest(results).items():
        figures: dict[str, list[Panel]] = {
            "overview": [(PANELS[name], reports[name]) for name in PANELS if name in reports][:2],
            "attention": [(panel, reports[name]) for name, panel in ATTENTION if name in reports],
            "generate": [(panel, reports[name]) for name, panel in GENERATE if name in reports],
        }
        for name, panels in figures.items():
            if panels:
                path = directory / f"{name}-{device}.png"
                _draw_figure(panels, path)
                paths.append(path)
    return paths


def _draw_figure(panels: list[Panel], path: Path) -> None:
    wide = len(panels) > 1
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(12, 4.8) if wide else (7, 4.8),
            squeeze=False,
            layout="constrained",
        )
        for axis, (panel, report) in zip(axes[0], panels, strict=True):
            panel(axis, report)
            axis.spines[["top", "right"]].set_visible(False)
        label = panels[0][1]["label"]
        quick = ", few repetitions" if any(report["quick"] for _, report in panels) else ""
        figure.supxlabel(f"{label}{quick}", fontsize=10, color=MUTED)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


_STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def _newest(results: Path) -> dict[str, dict[str, Report]]:
    """By device, then by benchmark: the newest report, a full one before a quick one."""
    found: dict[str, dict[str, Report]] = {}
    for path in sorted(results.glob("*.json")):
        report = json.loads(path.read_text())
        name = report.get("benchmark")
        if name not in PANELS and name not in dict(ATTENTION + GENERATE):
            continue
        device = path.stem.removeprefix(f"{name}-").removesuffix("-quick")
        other = found.setdefault(device, {}).get(name)
        if other is None or _rank(report) > _rank(other):
            found[device][name] = report
    # Host results only try the code: they are drawn where there is nothing else.
    return {device: of for device, of in found.items() if device != "host" or len(found) == 1}


def _rank(report: Report) -> tuple[bool, str]:
    return not report["quick"], report["date"]


def _draw_map(axis: Axes, report: Report) -> None:
    sizes = sorted(report["measurements"]["sizes"], key=lambda size: size["tokens"])
    bars = (
        ("a page at a time", THEIRS, "page_calls", "cold"),
        ("extents, new and cleared", OURS, "token, cleared", "cold"),
        ("extents, new, not cleared", OURS_LIGHT, "token, not cleared", "cold"),
        ("a freed sequence's, not cleared", OURS_LIGHTEST, "token, not cleared", "adopt"),
    )
    width = 0.8 / len(bars)
    for i, (name, color, variant, state) in enumerate(bars):
        times = [size["times"][variant][f"{state}_ready_us"] for size in sizes]
        places = [group + (i - (len(bars) - 1) / 2) * width for group in range(len(sizes))]
        medians = [time["median"] for time in times]
        axis.bar(places, medians, width * 0.92, label=name, color=color)
        for place, us in zip(places, medians, strict=True):
            axis.annotate(
                _show_short(us).replace(" ", "\n"),
                (place, us),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                linespacing=0.95,
            )
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    axis.yaxis.set_major_formatter(FuncFormatter(lambda us, _: _show_short(us)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(
        range(len(sizes)),
        [f"{size['tokens']:,} tokens\n{show_bytes(size['bytes'])}" for size in sizes],
    )
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y")
    axis.legend(loc="upper left", ncols=2)
    axis.set_ylabel("until a kernel can run, median")
    axis.set_title("Backing one prompt with memory")


def _draw_bandwidth(axis: Axes, report: Report) -> None:
    shapes = report["measurements"]["shapes"]
    ran = {result["kernel"] for shape in shapes for result in shape["results"]}
    kernel = next(name for name in KERNELS if name in ran)
    names = list(shapes[0]["about"])
    for i, shape in enumerate(shapes):
        by_variant = {
            result["variant"]: result["relative"]
            for result in shape["results"]
            if result["kernel"] == kernel
        }
        relative = [by_variant[name] for name in names]
        axis.errorbar(
            [of["median"] for of in relative],
            [row + (i - (len(shapes) - 1) / 2) * 0.17 for row in range(len(names))],
            xerr=(
                [of["median"] - of["p10"] for of in relative],
                [of["p90"] - of["median"] for of in relative],
            ),
            fmt=MARKERS[i % len(MARKERS)],
            color=SERIES[i % len(SERIES)],
            markersize=5,
            elinewidth=1,
            label=f"{shape['batch']} x {shape['length']:,}",
        )
    axis.axvline(1, color=MUTED, linewidth=1, zorder=1)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.9), max(high, 1.05))
    axis.set_yticks(range(len(names)), [textwrap.fill(name, 30) for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5 - 0.17 * len(names))  # room for the legend
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axis.grid(axis="x")
    axis.legend(
        loc="upper center",
        ncols=2,
        handletextpad=0.2,
        columnspacing=1,
        frameon=True,
        framealpha=1,
        edgecolor="none",
    )
    axis.set_xlabel("relative to packed tensors, median and p10 - p90")
    axis.set_title("Bandwidth of " + ("reading" if kernel == "read" else f"decode ({kernel})"))


def _draw_step(axis: Axes, report: Report) -> None:
    measured = report["measurements"]
    rows = [
        (f"idle, {name}", times)
        for name, times in measured["idle"]["steps"].items()
        if "first" not in name
    ]
    for scenario in measured["decode"]:
        rows.extend(
            (f"{scenario['name']}: {state}", times["step_us"])
            for state, times in scenario["times"].items()
        )
    names = [name for name, _ in rows]
    medians = [times["median"] for _, times in rows]
    colors = [
        THEIRS if "no background" in name else OURS if "background" in name else OURS_LIGHT
        for name in names
    ]
    axis.barh(range(len(rows)), medians, 0.7, color=colors)
    axis.scatter([times["p99"] for _, times in rows], range(len(rows)), marker="|", s=60, color=INK)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda us, _: _show_short(us)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.grid(axis="x")
    axis.set_xlabel("median, and p99 as a line")
    axis.set_title(f"A step of {measured['sequences']} sequences")


# Which row of the contest a bar is: a name of it, or by a name of `best`.
Bar = tuple[str, str, Callable[[Report], str | None]]
_OURS: Bar = ("ours, auto", OURS, lambda shape: "auto, balanced order")
_PACKED: Bar = ("best over packed tensors", OURS_LIGHT, lambda shape: shape["best"]["packed"])
_PAGED: Bar = ("best over pages", THEIRS, lambda shape: shape["best"]["paged"])
_PAGED_16: Bar = ("FlashAttention-3, pages of 16", THEIRS_LIGHT, lambda shape: "FA3, paged 16")


def _draw_decode(axis: Axes, report: Report) -> None:
    _draw_rates(axis, report, "decode", [_OURS, _PACKED, _PAGED])
    axis.set_title("Decode, one layer of attention")


def _draw_prefill(axis: Axes, report: Report) -> None:
    _draw_rates(axis, report, "prefill", [_OURS, _PACKED, _PAGED, _PAGED_16])
    axis.set_title("Prefill, one layer of attention")


def _draw_rates(axis: Axes, report: Report, phase: str, bars: list[Bar]) -> None:
    shapes = [shape for shape in report["measurements"]["shapes"] if shape["phase"] == phase]
    bars = [bar for bar in bars if any(bar[2](shape) in shape["contest"] for shape in shapes)]
    width = 0.8 / len(bars)
    for i, (name, color, pick) in enumerate(bars):
        found = [
            (group + (i - (len(bars) - 1) / 2) * width, shape["contest"][row], row)
            for group, shape in enumerate(shapes)
            for row in (pick(shape),)
            if row in shape["contest"]
        ]
        places, rates = [place for place, *_ in found], [of["rate"] for _, of, _ in found]
        axis.bar(places, rates, width * 0.92, label=name, color=color)
        for place, of, row in found:
            # What it is, where the legend does not say.
            kernel = of["version"].split()[0] if of["kernel"] == "auto" else row
            axis.annotate(
                kernel,
                (place, 0),
                (0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=8,
                color="white" if color in (OURS, THEIRS) else INK,
            )
            axis.annotate(
                f"{of['rate']:,.0f}" if of["rate"] >= 10 else f"{of['rate']:.2g}",
                (place, of["rate"]),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    _mark_shapes(axis, shapes, lambda shape: shape["floor_rate"], "floor")
    axis.legend(loc="upper left", ncols=2)
    axis.set_ylabel(f"{shapes[0]['unit']}, median")


def _mark_shapes(
    axis: Axes, shapes: list[Report], floor: Callable[[Report], float], floor_name: str
) -> None:
    """A group of bars for each shape: its name, and its floor."""
    for group, shape in enumerate(shapes):
        axis.hlines(
            floor(shape),
            group - 0.42,
            group + 0.42,
            color=INK,
            linewidth=1,
            linestyle="--",
            label=floor_name if group == 0 else None,
        )
    axis.set_ylim(0, axis.get_ylim()[1] * 1.25)  # room for the legend
    axis.set_xticks(
        range(len(shapes)), [f"{shape['batch']} x {shape['length']:,}" for shape in shapes]
    )
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y")


_VARIANTS = (
    ("ours", "ours", OURS),
    ("static, compiled", "static cache, compiled", OURS_LIGHT),
    ("static", "static cache", THEIRS_LIGHT),
    ("dynamic", "dynamic cache", THEIRS),
)


def _draw_generate(axis: Axes, report: Report) -> None:
    def ms(shape: Report, name: str) -> float:
        return float(shape["variants"][name]["median"]) / 1e3

    _draw_variants(axis, report, ms, lambda shape: shape["floor_us"] / 1e3, "floor")
    axis.set_title("A decode step of generate()")
    axis.set_ylabel("ms, median")


def _draw_kv_bytes(axis: Axes, report: Report) -> None:
    def gib(shape: Report, name: str) -> float | None:
        taken = shape["variants"][name].get("kv_bytes")
        return None if taken is None else taken / 2**30

    _draw_variants(axis, report, gib, lambda shape: shape["own_bytes"] / 2**30, "tokens' own")
    axis.set_title("Memory of K and V")
    axis.set_ylabel("GiB, most")


def _draw_variants(
    axis: Axes,
    report: Report,
    value: Callable[[Report, str], float | None],
    floor: Callable[[Report], float],
    floor_name: str,
) -> None:
    shapes = report["measurements"]["shapes"]
    used = [it for it in _VARIANTS if any(it[0] in shape["variants"] for shape in shapes)]
    width = 0.8 / len(used)
    for i, (name, label, color) in enumerate(used):
        found = [
            (group + (i - (len(used) - 1) / 2) * width, height)
            for group, shape in enumerate(shapes)
            if name in shape["variants"]
            for height in (value(shape, name),)
            if height is not None
        ]
        axis.bar(
            [x for x, _ in found], [y for _, y in found], width * 0.92, label=label, color=color
        )
        for x, y in found:
            axis.annotate(
                f"{y:.3g}", (x, y), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    _mark_shapes(axis, shapes, floor, floor_name)
    axis.legend(loc="upper right", ncols=2)


def _show_short(us: float) -> str:
    for unit_us, name in ((1e6, "s"), (1e3, "ms")):
        if us >= unit_us:
            return f"{us / unit_us:.3g} {name}"
    return f"{us:.3g} us"


PANELS: dict[str, Callable[[Axes, Report], None]] = {
    "map": _draw_map,
    "bandwidth": _draw_bandwidth,
    "step": _draw_step,
}
ATTENTION = [("attention", _draw_decode), ("attention", _draw_prefill)]
GENERATE = [("generate", _draw_generate), ("generate", _draw_kv_bytes)]
