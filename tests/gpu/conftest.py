"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _collect_only_what_tests_make() -> Iterator[None]:
    """torch alone has 300,000 objects to look at: a fifth of a second after each test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _leave_the_gpu_idle() -> Iterator[None]:
    """What one test leaves running, or keeps alive, is not the next one's business."""
    yield
    gc.collect()
    torch.cuda.synchronize()


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Waits for a condition, and fails where it does not come true."""

    def wait(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
            time.sleep(0.001)

    return wait
