"""Test options and fixtures: where GPU tests run, streams, and which seed random tests use."""

from __future__ import annotations

import functools
import os
import random
import unittest.mock
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

NO_DEVICE = "no CUDA device"
DEFAULT_SEED = 1
_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vattention")
    group.addoption(
        "--require-gpu",
        action="store_true",
        help="fail at once, instead of skipping the gpu tests, when there is no CUDA device",
    )
    group.addoption(
        "--seed",
        default=str(DEFAULT_SEED),
        help=f"seed of the random tests: a number (default {DEFAULT_SEED}), or 'random'",
    )


def pytest_configure(config: pytest.Config) -> None:
    text = config.getoption("--seed")
    try:
        config.stash[_SEED] = (
            random.SystemRandom().getrandbits(32) if text == "random" else int(text)
        )
    except ValueError:
        raise pytest.UsageError(f"--seed: a number or 'random', not {text!r}") from None
    if config.getoption("--require-gpu"):
        config.pluginmanager.register(_ShowFailures(config))


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--require-gpu") and (why := _missing_gpu()):
        raise pytest.UsageError(f"--require-gpu: {NO_DEVICE}: {why}")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.stash[_SEED]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and _missing_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))


class _ShowFailures:
    """Shows failures when they come: on a GPU, which is often lent for a time, a run may be cut."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:  # None: in a worker of xdist
            text = f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}"
            reporter.write_line(text, red=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = sum(
        "gpu" in report.keywords and NO_DEVICE in str(report.longrepr)
        for report in terminalreporter.stats.get("skipped", [])
    )
    if skipped:
        terminalreporter.write_line(f"{skipped} gpu tests skipped: {NO_DEVICE}", yellow=True)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed for a random test, printed so that a failure's report says how to repeat it."""
    value = request.config.stash[_SEED]
    print(f"seed {value}: repeat with --seed={value}")
    return value


@pytest.fixture(scope="session")
def spin() -> Callable[[float], None]:
    """Keeps the current stream busy for that many milliseconds, without using memory."""
    import torch

    torch.cuda._sleep(300_000_000)  # until the clocks are up
    torch.cuda.synchronize()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    cycles = 50_000_000
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    cycles_per_ms = cycles / start.elapsed_time(end)
    return lambda ms: torch.cuda._sleep(int(cycles_per_ms * ms))


@pytest.fixture(scope="session")
def apart(spin: Callable[[float], None]) -> torch.cuda.Stream:
    """A stream that does not wait for the default one, nor that for it.

    Streams share the few queues of the device, and those that share one may.
    """
    import torch

    tick = torch.zeros(1, device="cuda")
    tick.add_(1)

    def waits(one: torch.cuda.Stream, busy: torch.cuda.Stream) -> bool:
        torch.cuda.synchronize()
        with torch.cuda.stream(busy):
            spin(30)
            tick.add_(1)
            busy_done = torch.cuda.Event()
            busy_done.record()
        with torch.cuda.stream(one):
            spin(0)
        one.synchronize()
        return busy_done.query()

    default = torch.cuda.default_stream()
    for _ in range(32):
        stream = torch.cuda.Stream()
        if not waits(default, stream) and not waits(stream, default):
            torch.cuda.synchronize()
            return stream
    pytest.fail("no stream runs apart from the default one")


@functools.cache
def _missing_gpu() -> str:
    """Why gpu tests cannot run here, or '' if they can."""
    # Ask NVML: asking the CUDA driver would start it here, and no process forked from this one
    # could then use the GPU.
    with unittest.mock.patch.dict(os.environ, PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        import torch

        if torch.version.cuda is None:
            return "torch is built without CUDA"
        if not torch.cuda.is_available():
            return "torch finds no device or no driver"
    return ""
