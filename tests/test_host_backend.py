"""The host backend alone, the fault injector around it, and what is said where there is no GPU.

What every backend has to do is in test_backend.py. Here is what only the host can be asked: what
faults, what the process holds, and refusals that a driver leaves undefined.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import vattention as va
from vattention import _core

SYSTEM_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PAGE = 64 << 10
MiB = 1 << 20
INJECTED = 999  # the code of a failure that the fault injector makes


@pytest.fixture
def backend() -> _core.Backend:
    return _core.host_backend(PAGE)


def back(backend: _core.Backend, address: int, bytes: int, access: str = "read_write") -> int:
    """Puts a new handle there and returns it."""
    handle = backend.create(bytes)
    backend.map(address, bytes, handle)
    backend.set_access(address, bytes, access)
    return handle


def mapped_file_offset(address: int) -> int | None:
    """Where in its file the page there is; None where no file is mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        range_, _, offset, _, inode = line.split()[:5]
        start, end = (int(limit, 16) for limit in range_.split("-"))
        if start <= address < end:
            return None if inode == "0" else int(offset, 16) + address - start
    return None


def resident_bytes() -> int:
    """The shared memory that this process has in its page tables, the host's extents among it."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Pss_Shmem:\s+(\d+) kB", text, re.MULTILINE)[1]) << 10


# ---- the page size ----


@pytest.mark.parametrize("page_bytes", [SYSTEM_PAGE_BYTES, PAGE, 2 * MiB])
def test_page_size_is_the_one_asked_for(page_bytes: int) -> None:
    backend = _core.host_backend(page_bytes)
    assert backend.page_bytes == page_bytes
    assert backend.reserve(page_bytes) % page_bytes == 0
    backend.create(page_bytes)
    with pytest.raises(va.BackendError, match="whole pages"):
        backend.create(page_bytes // 2)


@pytest.mark.parametrize("page_bytes", [0, 1, SYSTEM_PAGE_BYTES // 2, 3 * SYSTEM_PAGE_BYTES])
def test_page_size_that_the_system_cannot_map_is_refused(page_bytes: int) -> None:
    with pytest.raises(
        va.ConfigError, match=rf"power of two.* {SYSTEM_PAGE_BYTES}, not {page_bytes}$"
    ):
        _core.host_backend(page_bytes)


# ---- memory ----


def test_resident_size_follows_what_is_written_and_destroyed(backend: _core.Backend) -> None:
    bytes = 32 * MiB
    base = backend.reserve(bytes)
    before = resident_bytes()
    handle = back(backend, base, bytes)
    assert resident_bytes() - before == pytest.approx(0, abs=MiB)
    ctypes.memset(base, 7, bytes)
    assert resident_bytes() - before == pytest.approx(bytes, abs=MiB)
    backend.destroy(handle)
    backend.unmap(base, bytes)
    assert resident_bytes() - before == pytest.approx(0, abs=MiB)


@pytest.mark.parametrize("first", ["destroy", "unmap"])
def test_recycled_memory_reads_as_zero(backend: _core.Backend, first: str) -> None:
    base = backend.reserve(2 * PAGE)
    handle = back(backend, base, PAGE)
    ctypes.memset(base, 7, PAGE)
    place = mapped_file_offset(base)
    if first == "destroy":
        backend.destroy(handle)
        backend.unmap(base, PAGE)
    else:
        backend.unmap(base, PAGE)
        backend.destroy(handle)
    back(backend, base + PAGE, PAGE)
    assert mapped_file_offset(base + PAGE) == place
    assert ctypes.string_at(base + PAGE, PAGE) == bytes(PAGE)


def test_memory_is_not_recycled_while_an_alias_is_mapped(backend: _core.Backend) -> None:
    base = backend.reserve(3 * PAGE)
    handle = back(backend, base, PAGE)
    backend.map(base + PAGE, PAGE, handle)
    backend.set_access(base + PAGE, PAGE, "read")
    ctypes.memset(base, 7, PAGE)
    backend.destroy(handle)
    backend.unmap(base, PAGE)
    back(backend, base + 2 * PAGE, PAGE)
    ctypes.memset(base + 2 * PAGE, 8, PAGE)
    assert ctypes.string_at(base + PAGE, PAGE) == b"\7" * PAGE


def test_a_backend_that_goes_leaves_nothing_mapped() -> None:
    backend = _core.host_backend(PAGE)
    base = backend.reserve(4 * PAGE)
    back(backend, base, PAGE)
    assert mapped_file_offset(base) is not None
    del backend
    assert mapped_file_offset(base) is None


def test_mappings_are_counted_below_the_systems_limit(backend: _core.Backend) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert limit // 2 < backend.max_mappings < limit


# ---- what faults ----

CHILD = """
import ctypes, importlib.util, resource, sys

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
# The extension alone: the package would import torch.
spec = importlib.util.spec_from_file_location("vattention._core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)

PAGE = 65536
backend = core.host_backend(PAGE)
base = backend.reserve(2 * PAGE)
handle = backend.create(PAGE)
for call in sys.argv[2].split():
    if call == "map":
        backend.map(base, PAGE, handle)
    elif call == "unmap":
        backend.unmap(base, PAGE)
    else:
        backend.set_access(base, PAGE, call)
print("before", flush=True)
if sys.argv[3] == "read":
    ctypes.string_at(base, 1)
else:
    ctypes.memset(base, 1, 1)
print("after", flush=True)
"""


def touch_in_a_child(calls: str, touch: str) -> tuple[str, int]:
    """Output and exit code of a process that makes the calls and then touches the page."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, _core.__file__, calls, touch],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return child.stdout, child.returncode


@pytest.mark.parametrize(
    ("calls", "touch"),
    [
        ("", "read"),
        ("map", "read"),
        ("map read", "write"),
        ("map read_write read", "write"),
        ("map read_write none", "read"),
        ("map read_write unmap", "read"),
        ("map read_write unmap map", "read"),
    ],
)
def test_touching_what_may_not_be_touched_kills_the_process(calls: str, touch: str) -> None:
    output, code = touch_in_a_child(calls, touch)
    assert output == "before\n"
    assert -code in (signal.SIGSEGV, signal.SIGBUS)


@pytest.mark.parametrize(("calls", "touch"), [("map read", "read"), ("map read_write", "write")])
def test_touching_what_may_be_touched_does_not(calls: str, touch: str) -> None:
    assert touch_in_a_child(calls, touch) == ("before\nafter\n", 0)


# ---- refusals that a driver leaves undefined, or has not been asked for ----


def refused(why: str, call: Callable[..., object], *arguments: int | str) -> None:
    with pytest.raises(va.BackendError, match=why):
        call(*arguments)


def test_a_size_of_zero_is_refused(backend: _core.Backend) -> None:
    base = backend.reserve(PAGE)
    handle = back(backend, base, PAGE)
    refused("is zero or", backend.reserve, 0)
    refused("is zero or", backend.create, 0)
    refused("is zero or", backend.map, base, 0, handle)
    refused("is zero or", backend.unmap, base, 0)
    refused("is zero or", backend.set_access, base, 0, "read")


def test_reserving_half_a_page_is_refused(backend: _core.Backend) -> None:
    refused("not whole pages", backend.reserve, PAGE // 2)


def test_access_to_part_of_a_mapping_is_refused(backend: _core.Backend) -> None:
    base = backend.reserve(4 * PAGE)
    for address in (base, base + 2 * PAGE):
        back(backend, address, 2 * PAGE, "read")
    for first, pages in ((0, 1), (1, 1), (1, 2), (0, 3)):
        start = base + first * PAGE
        refused("ends within", backend.set_access, start, pages * PAGE, "read_write")
    refused("not whole pages", backend.set_access, base + PAGE // 2, PAGE, "read_write")
    for address in (base, base + 2 * PAGE):  # are as they were
        refused("not mapped for writing", backend.zero, address, 2 * PAGE)


def test_access_over_a_hole_between_mappings_is_refused(backend: _core.Backend) -> None:
    page = backend.page_bytes
    base = backend.reserve(3 * page)
    for i in (0, 2):
        backend.map(base + i * page, page, backend.create(page))
    with pytest.raises(va.BackendError, match="nothing is mapped in part of the range"):
        backend.set_access(base, 3 * page, "read_write")
    backend.set_access(base, page, "read_write")


def test_mapping_across_the_end_of_a_reservation_is_refused(backend: _core.Backend) -> None:
    base = backend.reserve(3 * PAGE)
    handle = backend.create(2 * PAGE)
    refused("not within one reservation", backend.map, base + 2 * PAGE, 2 * PAGE, handle)
    refused("not within one reservation", backend.map, base - PAGE, 2 * PAGE, handle)
    backend.map(base + PAGE, 2 * PAGE, handle)


def test_unmapping_across_the_end_of_a_reservation_is_refused(backend: _core.Backend) -> None:
    base = backend.reserve(2 * PAGE)
    back(backend, base + PAGE, PAGE)
    refused("not within one reservation", backend.unmap, base + PAGE, 2 * PAGE)
    backend.zero(base + PAGE, PAGE)  # it is still there


def test_unmapping_again_changes_nothing(backend: _core.Backend) -> None:
    base = backend.reserve(2 * PAGE)
    handle = back(backend, base, PAGE)
    backend.map(base + PAGE, PAGE, handle)
    backend.destroy(handle)
    backend.unmap(base, PAGE)
    backend.unmap(base, PAGE)
    back(backend, base, PAGE)
    assert mapped_file_offset(base) != mapped_file_offset(base + PAGE)  # the alias has its memory


def test_unreserving_anything_but_a_whole_reservation_is_refused(backend: _core.Backend) -> None:
    base = backend.reserve(4 * PAGE)
    for address, bytes in ((base, 2 * PAGE), (base + 2 * PAGE, 2 * PAGE), (base, 8 * PAGE)):
        refused("not within one reservation", backend.unreserve, address, bytes)
    back(backend, base, 4 * PAGE)
    backend.unmap(base, 4 * PAGE)
    backend.unreserve(base, 4 * PAGE)
    refused("not within one reservation", backend.unreserve, base, 4 * PAGE)


def test_a_handle_that_was_destroyed_is_known_no_more(backend: _core.Backend) -> None:
    handle = backend.create(PAGE)
    backend.destroy(handle)
    refused("no such handle", backend.destroy, handle)
    refused("no such handle", backend.map, backend.reserve(PAGE), PAGE, handle)


def test_a_handle_that_was_destroyed_while_mapped_is_known_no_more(
    backend: _core.Backend,
) -> None:
    base = backend.reserve(2 * PAGE)
    handle = back(backend, base, PAGE)
    backend.destroy(handle)
    refused("no such handle", backend.destroy, handle)
    refused("no such handle", backend.map, base + PAGE, PAGE, handle)
    backend.unmap(base, PAGE)
    refused("no such handle", backend.destroy, handle)


def test_a_fence_that_was_destroyed_is_known_no_more(backend: _core.Backend) -> None:
    fence, other = backend.create_fence(), backend.create_fence()
    backend.destroy_fence(fence)
    for call in (backend.record, backend.query, backend.destroy_fence):
        refused("no such fence", call, fence)
    assert backend.query(other) is True


def test_zeroing_what_cannot_be_written_is_refused(backend: _core.Backend) -> None:
    base = backend.reserve(5 * PAGE)
    back(backend, base, PAGE)
    back(backend, base + PAGE, PAGE, "read")
    back(backend, base + 3 * PAGE, PAGE)
    ctypes.memset(base, 7, PAGE)
    refused("not mapped for writing", backend.zero, base, 2 * PAGE)
    refused("nothing is mapped in part", backend.zero, base + 2 * PAGE, 2 * PAGE)
    refused("nothing is mapped in part", backend.zero, base + 3 * PAGE, 2 * PAGE)
    assert ctypes.string_at(base, PAGE) == b"\7" * PAGE  # nor was the part that can be


def test_creating_is_refused_where_its_end_is_beyond_all_numbers(backend: _core.Backend) -> None:
    base = backend.reserve(PAGE)
    back(backend, base, PAGE)
    ctypes.memset(base, 7, PAGE)
    refused("host backend", backend.create, 2**64 - PAGE)
    assert ctypes.string_at(base, PAGE) == b"\7" * PAGE


ZERO_BEYOND_ALL_NUMBERS = f"""
import vattention as va
from vattention import _core

backend = _core.host_backend({PAGE})
base = backend.reserve({PAGE})
backend.map(base, {PAGE}, backend.create({PAGE}))
backend.set_access(base, {PAGE}, "read_write")
try:
    backend.zero(base, 2**64 - {PAGE})
except va.BackendError:
    print("refused")
"""


def test_zeroing_is_refused_where_its_end_is_beyond_all_numbers(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", ZERO_BEYOND_ALL_NUMBERS],
        cwd=tmp_path,  # so that what is imported is the installed package
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (child.stdout, child.returncode) == ("refused\n", 0)


# ---- the fault injector ----


@pytest.fixture
def faulty(backend: _core.Backend) -> _core.FaultyBackend:
    return _core.FaultyBackend(backend)


def fails(name: str, call: Callable[..., object], *arguments: int) -> None:
    with pytest.raises(va.BackendError, match="INJECTED: made to fail by a test") as caught:
        call(*arguments)
    assert (caught.value.call, caught.value.code) == (name, INJECTED)


def test_the_nth_call_of_that_name_fails_when_armed(faulty: _core.FaultyBackend) -> None:
    faulty.create(PAGE)
    faulty.arm("create", nth=3)
    for _ in range(2):
        faulty.create(PAGE)
        faulty.reserve(PAGE)  # does not count
    fails("create", faulty.create, PAGE)
    faulty.create(PAGE)


def test_the_nth_call_of_any_name_fails_when_armed_without_one(
    faulty: _core.FaultyBackend,
) -> None:
    faulty.arm("", nth=3)
    base = faulty.reserve(PAGE)
    handle = faulty.create(PAGE)
    fails("map", faulty.map, base, PAGE, handle)
    faulty.map(base, PAGE, handle)


def test_every_later_call_fails_too_when_armed_to_stick(faulty: _core.FaultyBackend) -> None:
    faulty.arm("create", nth=2, sticky=True)
    faulty.create(PAGE)
    for _ in range(3):
        fails("create", faulty.create, PAGE)
    faulty.reserve(PAGE)
    faulty.disarm()
    faulty.create(PAGE)


def test_a_call_that_is_made_to_fail_does_not_reach_the_backend(
    faulty: _core.FaultyBackend,
) -> None:
    handle = faulty.create(PAGE)
    faulty.arm("destroy")
    fails("destroy", faulty.destroy, handle)
    faulty.destroy(handle)  # which is refused if it is done already


@pytest.mark.parametrize(
    ("kind", "error"), [("out_of_memory", va.OutOfPages), ("failed", va.BackendError)]
)
def test_a_failure_is_of_the_kind_asked_for(
    faulty: _core.FaultyBackend, kind: str, error: type[Exception]
) -> None:
    layout = va.KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float16)
    pool = va.Pool("1MiB", backend=faulty, background=False)
    with va.KVAllocator(layout, max_sequences=1, max_seq_len=64, pool=pool) as kv:
        faulty.arm("create", kind=kind, sticky=True)
        with pytest.raises(error, match="INJECTED"):
            kv.allocate(1)
        faulty.disarm()


def test_a_kind_that_does_not_exist_is_a_configuration_error(faulty: _core.FaultyBackend) -> None:
    with pytest.raises(va.ConfigError, match="'gone'"):
        faulty.arm("create", kind="gone")
    faulty.create(PAGE)


def test_calls_are_counted_by_name_whether_they_fail_or_not(faulty: _core.FaultyBackend) -> None:
    assert faulty.calls() == {}
    faulty.create(PAGE)
    faulty.arm("create")
    fails("create", faulty.create, PAGE)
    with pytest.raises(va.BackendError):
        faulty.reserve(PAGE + 1)
    faulty.query(faulty.create_fence())
    assert faulty.calls() == {"create": 2, "reserve": 1, "create_fence": 1, "query": 1}


def test_fences_do_not_pass_while_they_are_held(faulty: _core.FaultyBackend) -> None:
    before, held, unrecorded = (faulty.create_fence() for _ in range(3))
    faulty.record(before)
    faulty.hold_fences()
    faulty.record(held)
    assert [faulty.query(fence) for fence in (before, held, unrecorded)] == [True, False, True]
    faulty.release_fences()
    assert faulty.query(held) is True
    faulty.record(held)
    assert faulty.query(held) is True


def test_fences_that_are_held_pass_when_their_stream_is_waited_for(
    faulty: _core.FaultyBackend,
) -> None:
    streams = [faulty.create_stream() for _ in range(2)]
    fences = [faulty.create_fence() for _ in streams]
    faulty.hold_fences()
    for fence, stream in zip(fences, streams, strict=True):
        faulty.record(fence, stream)
    faulty.synchronize(streams[0])
    assert [faulty.query(fence) for fence in fences] == [True, False]
    faulty.record(fences[0], streams[0])  # they are still being held
    assert faulty.query(fences[0]) is False
    faulty.synchronize_device()
    assert [faulty.query(fence) for fence in fences] == [True, True]


def test_a_fence_that_is_held_moves_to_the_stream_it_is_recorded_on_again(
    faulty: _core.FaultyBackend,
) -> None:
    first, second = faulty.create_stream(), faulty.create_stream()
    fence = faulty.create_fence()
    faulty.hold_fences()
    faulty.record(fence, first)
    faulty.record(fence, second)
    faulty.synchronize(first)
    assert faulty.query(fence) is False
    faulty.synchronize(second)
    assert faulty.query(fence) is True


def test_fences_that_are_held_stay_so_when_waiting_fails(faulty: _core.FaultyBackend) -> None:
    fence = faulty.create_fence()
    faulty.hold_fences()
    faulty.record(fence)
    faulty.arm("synchronize")
    fails("synchronize", faulty.synchronize, 0)
    assert faulty.query(fence) is False


@pytest.fixture
def blocked_create(faulty: _core.FaultyBackend) -> Iterator[threading.Thread]:
    """A thread that waits at the gate of create."""
    faulty.block("create")
    thread = threading.Thread(target=faulty.create, args=(PAGE,))
    thread.start()
    try:
        assert faulty.wait_blocked("create")
        yield thread
    finally:
        faulty.unblock("create")
        thread.join()


def test_a_blocked_call_waits_until_its_gate_is_opened(
    faulty: _core.FaultyBackend, blocked_create: threading.Thread
) -> None:
    faulty.reserve(PAGE)  # has no gate
    assert faulty.wait_blocked("create")
    assert blocked_create.is_alive()
    faulty.unblock("create")
    blocked_create.join(timeout=60)
    assert not blocked_create.is_alive()
    faulty.create(PAGE)  # the gate stays open
    assert not faulty.wait_blocked("create", timeout_s=0)


def test_a_blocked_call_has_not_reached_the_backend(
    faulty: _core.FaultyBackend, backend: _core.Backend, blocked_create: threading.Thread
) -> None:
    first = backend.create(PAGE)  # handles are numbered
    faulty.unblock("create")
    blocked_create.join(timeout=60)
    assert backend.create(PAGE) == first + 2


def test_waiting_for_a_blocked_call_ends_when_none_comes(faulty: _core.FaultyBackend) -> None:
    faulty.block("create")
    assert faulty.wait_blocked("create", timeout_s=0.01) is False


# ---- where there is no GPU ----


@pytest.fixture
def no_gpu() -> None:
    # Ask NVML, as conftest.py does: the driver itself must not be started here.
    with unittest.mock.patch.dict(os.environ, PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")


@pytest.mark.parametrize(
    "use",
    [
        lambda: _core.cuda_backend(0),
        lambda: va.Pool(),
        lambda: va.Pool("1GiB", "cuda:1"),
    ],
    ids=["backend", "pool", "second device"],
)
def test_cuda_without_a_gpu_is_unavailable_and_says_what_to_do(
    no_gpu: None, use: Callable[[], object]
) -> None:
    with pytest.raises(va.BackendUnavailable) as caught:
        use()
    message = str(caught.value)
    assert "libcuda.so.1" in message or "cuInit failed with CUDA_ERROR" in message  # why
    assert 'device="cpu"' in message  # what to do
    assert caught.value.call == ""
    assert (caught.value.code == 0) == ("libcuda.so.1" in message)
