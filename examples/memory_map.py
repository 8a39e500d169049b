"""Record what memory is mapped while a server runs, and draw it; imported by generate.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

import vattention as va
from vattention.integrations.transformers import VAttentionCache

MIB = 1 << 20

INK, MUTED, GRID = "#1c2430", "#66707d", "#e4e8ed"
TOKENS, ROUNDING, KEPT, FREE = "#1f6fb4", "#8fc1e9", "#f0b45b", "#d5dae0"
PADDED, PREALLOCATED = "#c0392b", "#7d3c98"
EXTENT_MAP = "viridis"


@dataclass(frozen=True)
class Moment:
    """The pool and all lanes after one step; sizes in bytes."""

    step: int
    held: int
    mapped: int
    kept: int
    used: int
    tokens: tuple[int, ...]


@dataclass
class Extent:
    """Physical memory behind the tokens [start, stop) of a lane, from step `born` to `died`."""

    lane: int
    start: float
    stop: float
    num_bytes: int
    born: int
    died: int


def main_allocator(cache: VAttentionCache) -> va.KVAllocator | None:
    """The allocator of a cache's full-attention layers, or of its first type; None before use."""
    allocators = cache.allocators
    return allocators.get("full_attention") or next(iter(allocators.values()), None)


@dataclass
class Recorder:
    """Call `sample` after each step."""

    pool: va.Pool
    caches: Sequence[VAttentionCache]
    moments: list[Moment] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    _live: dict[tuple[int, int, int], Extent] = field(default_factory=dict)
    _bases: dict[tuple[int, int], int] = field(default_factory=dict)

    def sample(self, step: int) -> None:
        stats = [list(cache.stats().layer_types.values()) for cache in self.caches]
        everything = [kv for lane in stats for kv in lane]
        self.moments.append(
            Moment(
                step=step,
                held=self.pool.stats().held_bytes,
                mapped=sum(kv.mapped_bytes for kv in everything),
                kept=sum(kv.cached_bytes + kv.retired_bytes for kv in everything),
                used=sum(kv.used_bytes for kv in everything),
                tokens=tuple(max((kv.live_tokens for kv in lane), default=0) for lane in stats),
            )
        )
        self._sample_extents(step)

    def finish(self) -> None:
        """Sample the end: what is left for a next request, then nothing, after `reclaim`."""
        step = self.moments[-1].step + 1
        idle = max(2, step // 40)
        for offset in range(idle):
            self.sample(step + offset)
        self.pool.reclaim()
        for offset in range(idle):
            self.sample(step + idle + offset)

    def _sample_extents(self, step: int) -> None:
        """Follow each extent of region 0 of each lane by its address, size and handle."""
        seen: dict[tuple[int, int, int], Extent] = {}
        for lane, cache in enumerate(self.caches):
            kv = main_allocator(cache)
            if kv is None:
                continue
            row_bytes = kv.layout.row_bytes[0]
            for slot, region, address, num_bytes, handle, _ in kv.mappings():
                if region:
                    continue
                # A sequence's first mapping is at its slot's start.
                base = self._bases.setdefault((lane, slot), address)
                start, stop = address - base, address - base + num_bytes
                key = (lane, address, handle)
                seen[key] = self._live.get(key) or Extent(
                    lane, start / row_bytes, stop / row_bytes, num_bytes, step, step
                )
                seen[key].died = step + 1
        self.extents += [extent for key, extent in seen.items() if key not in self._live]
        self._live = seen


@dataclass(frozen=True)
class Figures:
    """What the picture compares with, in bytes, and what its title says."""

    title: str
    token_bytes: int
    preallocated: int


def draw(recorder: Recorder, figures: Figures, folder: Path) -> Path:
    """Write memory_map.png (2400 pixels wide) and memory_map_1200.png; return the former."""
    lanes = len(recorder.caches)
    figure, axes = plt.subplots(
        lanes + 1,
        1,
        figsize=(12, 4.6 + 1.55 * lanes),
        sharex=True,
        gridspec_kw={"height_ratios": [2.6] + [1] * lanes, "hspace": 0.16},
    )
    _draw_totals(axes[0], recorder.moments, figures)
    _draw_lanes(axes[1:], recorder)
    figure.suptitle(figures.title, x=0.07, y=0.985, ha="left", size=15, weight="bold", color=INK)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.935, bottom=0.06)
    folder.mkdir(parents=True, exist_ok=True)
    large = folder / "memory_map.png"
    figure.savefig(large, dpi=200)
    figure.savefig(folder / "memory_map_1200.png", dpi=100)
    plt.close(figure)
    return large


def _draw_totals(axis: Any, moments: Sequence[Moment], figures: Figures) -> None:
    steps = [moment.step for moment in moments]
    layers = {
        "tokens' own K and V": (TOKENS, [m.used for m in moments]),
        "mapped beyond them: rounding, map-ahead": (ROUNDING, [m.mapped - m.used for m in moments]),
        "behind freed slots, for the next to adopt": (KEPT, [m.kept for m in moments]),
        "held by the pool, mapped nowhere": (FREE, [m.held - m.mapped - m.kept for m in moments]),
    }
    below = [0.0] * len(steps)
    for label, (color, amounts) in layers.items():
        top = [b + max(0, amount) / MIB for b, amount in zip(below, amounts, strict=True)]
        axis.fill_between(steps, below, top, color=color, label=label, step="post", linewidth=0)
        below = top
    axis.step(steps, below, color=INK, linewidth=1.0, where="post", label="held in all")
    padded = [max(m.tokens) * len(m.tokens) * figures.token_bytes / MIB for m in moments]
    axis.step(
        steps, padded, color=PADDED, linestyle=(0, (4, 2)), linewidth=1.3, where="post",
        label="DynamicCache, one batch padded to the longest",
    )  # fmt: skip
    axis.axhline(
        figures.preallocated / MIB, color=PREALLOCATED, linestyle=(0, (4, 2)), linewidth=1.5,
        label="preallocated: the model's full length for every lane",
    )  # fmt: skip
    axis.set_ylim(0, 1.45 * max(figures.preallocated / MIB, *padded))  # the legend is on top
    axis.set_ylabel("physical memory, MiB", color=INK)
    axis.legend(
        loc="upper left", bbox_to_anchor=(0.0, 1.0), ncol=2, fontsize=9, framealpha=0.92,
        edgecolor="none", labelcolor=INK,
    )  # fmt: skip
    _tidy(axis)


def _draw_lanes(axes: Sequence[Any], recorder: Recorder) -> None:
    sizes = sorted({extent.num_bytes for extent in recorder.extents})
    colors = dict(zip(sizes, _palette(len(sizes)), strict=True))
    longest = max((extent.stop for extent in recorder.extents), default=1.0)
    steps = [moment.step for moment in recorder.moments]
    for lane, axis in enumerate(axes):
        tokens = [moment.tokens[lane] for moment in recorder.moments]
        for extent in recorder.extents:
            if extent.lane == lane:
                axis.add_patch(_rectangle(extent, colors[extent.num_bytes]))
        axis.fill_between(
            steps, tokens, longest * 1.1, step="post", color="white", alpha=0.55, lw=0
        )
        axis.step(steps, tokens, color=INK, linewidth=1.4, where="post")
        axis.set_ylim(0, longest * 1.06)
        axis.set_ylabel(f"lane {lane + 1}\naddress, in tokens", color=INK, size=9)
        _tidy(axis)
    axes[-1].set_xlabel("decode step (each lane generates one token in each)", color=INK)
    axes[-1].set_xlim(steps[0], steps[-1] + 1)
    handles = [Patch(color=colors[size], label=_size(size)) for size in sizes]
    axes[0].legend(
        handles=handles, title="extent mapped there", ncol=max(1, (len(handles) + 1) // 2),
        loc="upper right", fontsize=8, title_fontsize=8, framealpha=0.92, edgecolor="none",
    )  # fmt: skip


def _rectangle(extent: Extent, color: Any) -> Rectangle:
    return Rectangle(
        (extent.born, extent.start),
        extent.died - extent.born,
        extent.stop - extent.start,
        facecolor=color,
        edgecolor="white",
        linewidth=0.35,
    )


def _palette(count: int) -> list[Any]:
    colors = matplotlib.colormaps[EXTENT_MAP]
    return [to_rgba(colors(0.93 - 0.8 * i / max(1, count - 1))) for i in range(count)]


def _size(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes >> 10} KiB"


def _tidy(axis: Any) -> None:
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(MUTED)
    axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
    axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
