"""Attention kernels that know nothing of paging, over slots whose tails are not mapped.

Nothing lies behind a sequence's last page, so a kernel that reads further faults, and the fault
takes its CUDA context with it. That is why each case runs in a process of its own; the processes,
which spend most of their time on importing torch, run beside each other.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attend_in_a_process as attend
import pytest

pytestmark = pytest.mark.gpu

SCRIPT = Path(attend.__file__)
AT_ONCE = 6
TIMEOUT_S = 120

Outcome = subprocess.CompletedProcess[str]


def _run(case: str) -> Outcome:
    # The same packages as here, however they have been found.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(SCRIPT), case]
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        return Outcome(command, -signal.SIGKILL, f"{output}\nno end after {TIMEOUT_S} s", None)


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Outcome]]:
    """What came of a case. All that were selected start when the first is asked for."""
    selected = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and not item.get_closest_marker("skip")
    ]
    with ThreadPoolExecutor(AT_ONCE) as executor:
        futures: dict[str, Future[Outcome]] = {
            case: executor.submit(_run, case) for case in dict.fromkeys(selected)
        }
        yield lambda case: futures[case].result()
        executor.shutdown(wait=False, cancel_futures=True)


def _cases(kind: str) -> list[object]:
    absent = {}
    if importlib.util.find_spec("flash_attn") is None:
        absent["fa2"] = absent["fa2_append"] = "flash_attn is not installed"
    library = os.environ.get(attend.FA3_LIBRARY)
    if not library:
        absent["fa3"] = f"{attend.FA3_LIBRARY} names no FlashAttention-3 library"
    elif not Path(library).is_file():
        absent["fa3"] = f"{attend.FA3_LIBRARY}: there is no {library}"
    cases = []
    for case in attend.CASES:
        its_kind, kernel, layout = case.split("-", 2)
        if its_kind == kind:
            marks = [pytest.mark.skip(reason=absent[kernel])] if kernel in absent else []
            cases.append(pytest.param(case, id=f"{kernel}-{layout}", marks=marks))
    return cases


@pytest.mark.parametrize("case", _cases("tails"))
def test_the_answer_is_right_where_tails_are_not_mapped(
    case: str, outcome: Callable[[str], Outcome]
) -> None:
    result = outcome(case)
    print(result.stdout)
    if result.returncode == attend.SKIPPED:
        pytest.skip(result.stdout.strip().splitlines()[-1])
    assert result.returncode == attend.PASSED, "see what the process has printed"


@pytest.mark.parametrize("case", _cases("beyond"))
def test_a_fault_is_seen_where_a_kernel_reads_beyond_what_is_mapped(
    case: str, outcome: Callable[[str], Outcome]
) -> None:
    """Without this the test above would say nothing."""
    result = outcome(case)
    print(result.stdout)
    if result.returncode == attend.SKIPPED:
        pytest.skip(result.stdout.strip().splitlines()[-1])
    assert attend.ABOUT_TO_FAULT in result.stdout, "it did not come so far"
    # It may also die of what it has broken, while it ends.
    assert result.returncode in (attend.FAULTED, -signal.SIGABRT, -signal.SIGSEGV)
