"""The GPU kept busy beside what is measured, and whether it was."""

from __future__ import annotations

import torch

from ..common import GIB, Context, Samples, clock_us


class Busy:
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


def named(name: str, busy: Busy | None) -> str:
    return name if busy is None else f"{name}, busy"


def warn_if_idle(samples: Samples) -> None:
    """Says where the GPU was not busy to the end of what was to be measured beside it."""
    for name, metrics in samples.items():
        for metric, ends in metrics.items():
            if metric.endswith("still_busy") and not all(ends):
                print(f"{name}: {metric} only in {sum(ends):.0f} of {len(ends)} repetitions")
