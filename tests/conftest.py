"""Test options and fixtures: where GPU tests run, and which seed random tests use."""

from __future__ import annotations

import functools
import os
import random
import unittest.mock

import pytest

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
