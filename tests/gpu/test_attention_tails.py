"""Attention kernels that know nothing of paging, over slots whose tails are not mapped.

Nothing lies behind a sequence's last page, so a kernel that reads further faults, and the fault
takes its CUDA context with it. That is why they run in processes of their own: each kernel that is
called by hand with each layout, and groups of cases of each backend of `vattention.attention`. The
processes, which spend most of their time on importing torch, run beside each other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import attend_by_backend as by_backend
import attend_in_a_process as attend
import pytest

pytestmark = pytest.mark.gpu

AT_ONCE = max(4, 3 * (os.cpu_count() or 4) // 4)
TIMEOUT_S = 180
COMPILE_S = {"flashinfer": 1_200}
"""More for those that compile, once on a machine, the kernels that they do not come with."""

Outcome = subprocess.CompletedProcess[str]

_running: set[subprocess.Popen[str]] = set()


def _run(script: object, case: str) -> Outcome:
    # The same packages as here, however they have been found.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script.__file__), case]
    timeout_s = TIMEOUT_S + COMPILE_S.get(case.split(".")[0], 0)
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        _running.add(process)
        late = ""
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            output, _ = process.communicate()
            late = f"\nno end after {timeout_s} s"
        finally:
            _running.discard(process)
    return Outcome(command, process.returncode, output + late, None)


def _kill(process: subprocess.Popen[str]) -> None:
    """And what it has started, such as compilers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _missing() -> dict[str, str]:
    """Backends that cannot be used here, and why; what cannot be found out, their cases show."""
    lines = _run(by_backend, "missing").stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        return {}


def _run_group(group: str, missing: Future[dict[str, str]]) -> Outcome:
    why = missing.result().get(group.split(".")[0])
    if why:
        return Outcome([], attend.SKIPPED, f"skipped: {why}", None)
    return _run(by_backend, group)


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Outcome]]:
    """What came of a process. All that were selected start when the first is asked for."""
    selected = [
        item.callspec.params["process"]
        for item in request.session.items
        if item.path == request.path and not item.get_closest_marker("skip")
    ]
    with ThreadPoolExecutor(AT_ONCE) as executor:
        missing = executor.submit(_missing)
        futures: dict[str, Future[Outcome]] = {
            name: executor.submit(_run, attend, name)
            if name in attend.CASES
            else executor.submit(_run_group, name, missing)
            for name in dict.fromkeys(selected)
        }
        yield lambda name: futures[name].result()
        executor.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            _kill(process)


def _by_hand(kind: str) -> list[object]:
    absent = {}
    if importlib.util.find_spec("flash_attn") is None:
        absent["fa2_append"] = "flash_attn is not installed"
    cases = []
    for case in attend.CASES:
        its_kind, kernel, layout = case.split("-", 2)
        if its_kind == kind:
            marks = [pytest.mark.skip(reason=absent[kernel])] if kernel in absent else []
            cases.append(pytest.param(case, id=f"{kernel}-{layout}", marks=marks))
    return cases


def _by_backend(beyond: bool) -> list[object]:
    return [
        pytest.param(group, case, id=f"{group}-{case}")
        for group, cases in by_backend.all_groups().items()
        if (group.split(".")[1] == by_backend.BEYOND) is beyond
        for case in cases
    ]


def _skip_if_it_was(result: Outcome) -> None:
    if result.returncode == attend.SKIPPED:
        pytest.skip(result.stdout.strip().splitlines()[-1].removeprefix("skipped: "))


@pytest.mark.parametrize("process", _by_hand("tails"))
def test_the_answer_is_right_where_tails_are_not_mapped(
    process: str, outcome: Callable[[str], Outcome]
) -> None:
    result = outcome(process)
    print(result.stdout)
    _skip_if_it_was(result)
    assert result.returncode == attend.PASSED, "see what the process has printed"


@pytest.mark.parametrize(("process", "case"), _by_backend(beyond=False))
def test_a_backend_is_right_where_tails_are_not_mapped(
    process: str, case: str, outcome: Callable[[str], Outcome]
) -> None:
    result = outcome(process)
    _skip_if_it_was(result)
    its_own = _of_case(result.stdout, case)
    if its_own is None:
        print(result.stdout[-5_000:])
        pytest.fail(f"the process ended, with {result.returncode}, before it came to this case")
    print(its_own)
    verdict = its_own.splitlines()[-1]
    if verdict.startswith(f"== {case} skipped: "):
        pytest.skip(verdict.removeprefix(f"== {case} skipped: "))
    assert verdict == f"== {case} passed", f"the process ended with {result.returncode}"


@pytest.mark.parametrize("process", _by_hand("beyond"))
def test_a_fault_is_seen_where_a_kernel_reads_beyond_what_is_mapped(
    process: str, outcome: Callable[[str], Outcome]
) -> None:
    """Without this the tests above would say nothing."""
    _expect_fault(outcome(process))


@pytest.mark.parametrize(("process", "case"), _by_backend(beyond=True))
def test_a_fault_is_seen_where_a_backend_reads_beyond_what_is_mapped(
    process: str, case: str, outcome: Callable[[str], Outcome]
) -> None:
    _expect_fault(outcome(process))


def _expect_fault(result: Outcome) -> None:
    print(result.stdout)
    _skip_if_it_was(result)
    assert attend.ABOUT_TO_FAULT in result.stdout, "it did not come so far"
    # It may also die of what it has broken, while it ends.
    assert result.returncode in (attend.FAULTED, -signal.SIGABRT, -signal.SIGSEGV)


def _of_case(output: str, case: str) -> str | None:
    """What a process printed about one case, to its end; None if it never began."""
    lines = output.splitlines()
    if f">> {case}" not in lines:
        return None
    start = lines.index(f">> {case}")
    rest = lines[start + 1 :]
    end = next((i for i, line in enumerate(rest, start + 1) if line.startswith(">> ")), len(lines))
    return "\n".join(lines[start:end])
