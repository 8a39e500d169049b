"""One conformance suite for the seam to physical memory: every line of backend.h's contract.

What only the host can be asked about, because a driver leaves it open or faults, is in
test_host_backend.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vattention as va
from vattention import _core

HOST_PAGE_BYTES = 64 << 10
MiB = 1 << 20
TiB = 1 << 40

CUDA_ERROR_OUT_OF_MEMORY = 2


class Memory:
    """A backend, which also remembers what a test made with it and can look at it from outside.

    Everything that is not below is the backend's own.
    """

    kind: str
    out_of_memory: tuple[int, str]
    """A code of the backend's system, and words that belong to its meaning."""

    def __init__(self, backend: _core.Backend) -> None:
        self._backend = backend
        self._reservations: dict[int, int] = {}
        self._handles: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def reserve(self, bytes: int) -> int:
        address = self._backend.reserve(bytes)
        self._reservations[address] = bytes
        return address

    def unreserve(self, address: int, bytes: int) -> None:
        # Forgotten first: as soon as it is done, another thread may be given the same address.
        known = self._reservations.pop(address, None)
        try:
            self._backend.unreserve(address, bytes)
        except va.BackendError:
            if known is not None:
                self._reservations[address] = known
            raise

    def create(self, bytes: int) -> int:
        handle = self._backend.create(bytes)
        self._handles.add(handle)
        return handle

    def destroy(self, handle: int) -> None:
        known = handle in self._handles
        self._handles.discard(handle)
        try:
            self._backend.destroy(handle)
        except va.BackendError:
            if known:
                self._handles.add(handle)
            raise

    def back(self, address: int, bytes: int, access: str = "read_write") -> int:
        """Puts a new handle there and returns it."""
        handle = self.create(bytes)
        self.map(address, bytes, handle)
        self.set_access(address, bytes, access)
        return handle

    def fill(self, address: int, bytes: int, value: int) -> None:
        self.view(address, bytes).fill_(value)
        self.synchronize_device()

    def holds(self, address: int, bytes: int, value: int) -> bool:
        return bool((self.view(address, bytes).cpu() == value).all())

    def close(self) -> None:
        self.synchronize_device()
        for address, bytes in self._reservations.items():
            # Whether nothing may be unmapped too is not for the teardown to say.
            with contextlib.suppress(va.BackendError):
                self._backend.unmap(address, bytes)
            self._backend.unreserve(address, bytes)
        for handle in self._handles:
            self._backend.destroy(handle)

    def view(self, address: int, bytes: int) -> torch.Tensor:
        """The bytes there, without a copy."""
        raise NotImplementedError

    def access(self, address: int) -> str:
        """What the system says about access to the page there."""
        raise NotImplementedError

    def held_bytes(self) -> int:
        """Physical memory in use, as the system counts it."""
        raise NotImplementedError

    def total_bytes(self) -> int:
        raise NotImplementedError

    def too_many_bytes(self) -> int:
        """More physical memory than one handle can have."""
        raise NotImplementedError


class HostMemory(Memory):
    kind = "host"
    out_of_memory = errno.ENOMEM, os.strerror(errno.ENOMEM)

    def __init__(self, wrap: Callable[[_core.Backend], _core.Backend] = lambda backend: backend):
        others = self._memory_files()
        super().__init__(wrap(_core.host_backend(HOST_PAGE_BYTES)))
        (new,) = self._memory_files().keys() - others.keys()
        self._file = self._memory_files()[new]

    @staticmethod
    def _memory_files() -> dict[int, Path]:
        files = {}
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
                if path.readlink().name.startswith("memfd:vattention"):
                    files[path.stat().st_ino] = path
        return files

    def view(self, address: int, bytes: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_uint8 * bytes).from_address(address), dtype=torch.uint8)

    def access(self, address: int) -> str:
        for line in Path("/proc/self/maps").read_text().splitlines():
            range_, flags = line.split()[:2]
            start, end = (int(limit, 16) for limit in range_.split("-"))
            if start <= address < end:
                return {"---": "none", "r--": "read", "rw-": "read_write"}[flags[:3]]
        return "none"

    def held_bytes(self) -> int:
        return self._file.stat().st_blocks * 512

    def total_bytes(self) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def too_many_bytes(self) -> int:
        return 1 << 63


class CudaMemory(Memory):
    kind = "cuda"
    out_of_memory = CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"

    class _Location(ctypes.Structure):
        _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))

    class _Array:
        """Bytes on the device, to a library that understands the CUDA array interface."""

        def __init__(self, address: int, bytes: int) -> None:
            self.__cuda_array_interface__ = {
                "shape": (bytes,),
                "typestr": "|u1",
                "data": (address, False),
                "version": 2,
            }

    def __init__(self) -> None:
        # Makes the context current on this thread, and loads the kernel that fill() needs: later
        # on that would look as if a test had taken memory.
        torch.empty(1, dtype=torch.uint8, device="cuda:0").fill_(1)
        super().__init__(_core.cuda_backend(0))
        self._driver = ctypes.CDLL("libcuda.so.1")

    def view(self, address: int, bytes: int) -> torch.Tensor:
        return torch.as_tensor(self._Array(address, bytes), device="cuda:0")

    def access(self, address: int) -> str:
        flags = ctypes.c_ulonglong(0)
        location = self._Location(1, 0)  # CU_MEM_LOCATION_TYPE_DEVICE
        code = self._driver.cuMemGetAccess(
            ctypes.byref(flags), ctypes.byref(location), ctypes.c_ulonglong(address)
        )
        return {0: "none", 1: "read", 3: "read_write"}[flags.value] if code == 0 else "none"

    def held_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(0)
        return total - free

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(0)[1]

    def too_many_bytes(self) -> int:
        pages = 2 * self.total_bytes() // self.page_bytes
        return pages * self.page_bytes


MEMORIES: dict[str, Callable[[], Memory]] = {
    "host": HostMemory,
    "faulty": lambda: HostMemory(
        _core.FaultyBackend
    ),  # which passes on what it is not told to fail
    "cuda": CudaMemory,
}


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["host", "faulty", CUDA])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    memory = MEMORIES[request.param]()
    yield memory
    memory.close()


@contextlib.contextmanager
def refused(memory: Memory, why_on_the_host: str) -> Iterator[None]:
    """Something is refused; on the host, whose reasons are ours, for the reason given."""
    with pytest.raises(va.BackendError) as caught:
        yield
    assert caught.value.code != 0
    if memory.kind == "host":
        assert why_on_the_host in str(caught.value)


NOT_WHOLE_PAGES = "not whole pages"
MAPPED_ALREADY = "something is mapped there already"
WRONG_SIZE = "a handle is mapped whole"
PART_OF_MAPPING = "ends within a mapping"
HOLE = "nothing is mapped in part of the range"
STILL_MAPPED = "something is still mapped"
NOT_RESERVED = "not within one reservation"


# ---- what a backend says of itself ----


def test_a_backend_names_itself_and_its_device(memory: Memory) -> None:
    assert memory.name.split()[-1] == memory.kind
    assert memory.device_index == 0
    assert memory.max_mappings > 10_000


def test_the_page_is_what_the_system_maps_by(memory: Memory) -> None:
    assert memory.page_bytes == {"host": HOST_PAGE_BYTES, "cuda": 2 * MiB}[memory.kind]


def test_memory_info_tells_what_is_free_and_what_there_is(memory: Memory) -> None:
    free, total = memory.memory_info()
    assert total == memory.total_bytes()
    assert 0 < free < total


def test_a_code_is_described_by_its_meaning(memory: Memory) -> None:
    code, words = memory.out_of_memory
    assert words in memory.describe(code)


def test_a_code_nobody_knows_is_described_by_its_number(memory: Memory) -> None:
    assert "123456" in memory.describe(123_456)


def test_an_error_says_which_call_failed_where_and_why(memory: Memory) -> None:
    with pytest.raises(va.BackendError) as caught:
        memory.create(memory.page_bytes + 1)
    error = caught.value
    assert error.call == {"host": "create", "cuda": "cuMemCreate"}[memory.kind]
    for part in (error.call, memory.name, memory.describe(error.code)):
        assert part in str(error)


# ---- reserve and unreserve ----


def test_reservations_are_whole_pages_apart_from_one_another(memory: Memory) -> None:
    bytes = 3 * memory.page_bytes
    starts = sorted(memory.reserve(bytes) for _ in range(4))
    assert all(start % memory.page_bytes == 0 for start in starts)
    assert all(b - a >= bytes for a, b in itertools.pairwise(starts))


def test_reserving_takes_addresses_and_no_memory(memory: Memory) -> None:
    before = memory.held_bytes()
    memory.reserve(4 * TiB)
    assert memory.held_bytes() - before < 64 * MiB


def test_reserving_part_of_a_page_is_refused(memory: Memory) -> None:
    with refused(memory, NOT_WHOLE_PAGES):
        memory.reserve(memory.page_bytes + 1)


def test_unreserving_is_refused_while_something_is_mapped(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    memory.back(base + 2 * page, page)
    memory.fill(base + 2 * page, page, 7)
    with refused(memory, STILL_MAPPED):
        memory.unreserve(base, 4 * page)
    assert memory.holds(base + 2 * page, page, 7)
    memory.unmap(base + 2 * page, page)
    memory.unreserve(base, 4 * page)


# ---- create and destroy ----


@pytest.mark.parametrize("pages", [0.5, 1.5])
def test_creating_part_of_a_page_is_refused(memory: Memory, pages: float) -> None:
    with refused(memory, NOT_WHOLE_PAGES):
        memory.create(int(pages * memory.page_bytes))


def test_creating_more_than_there_can_be_is_refused_and_takes_nothing(memory: Memory) -> None:
    page = memory.page_bytes
    before = memory.held_bytes()
    with refused(memory, memory.name):
        memory.create(memory.too_many_bytes())
    assert memory.held_bytes() - before < 64 * MiB
    base = memory.reserve(page)
    memory.back(base, page)
    memory.fill(base, page, 7)
    assert memory.holds(base, page, 7)


def test_handles_are_apart_from_one_another(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(3 * page)
    handles = [memory.back(base + i * page, page) for i in range(3)]
    for i in range(3):
        memory.fill(base + i * page, page, i + 1)
    assert len(set(handles)) == 3
    assert [memory.holds(base + i * page, page, i + 1) for i in range(3)] == [True] * 3


def test_destroying_gives_the_memory_back_where_nothing_is_mapped(memory: Memory) -> None:
    bytes = 64 * memory.page_bytes
    base = memory.reserve(bytes)
    before = memory.held_bytes()
    handle = memory.back(base, bytes)
    memory.fill(base, bytes, 7)
    memory.unmap(base, bytes)
    assert memory.held_bytes() - before >= bytes
    memory.destroy(handle)
    assert memory.held_bytes() - before < bytes // 2


def test_destroying_while_mapped_gives_the_memory_back_with_the_last_mapping(
    memory: Memory,
) -> None:
    bytes = 64 * memory.page_bytes
    base = memory.reserve(2 * bytes)
    before = memory.held_bytes()
    handle = memory.back(base, bytes)
    memory.map(base + bytes, bytes, handle)
    memory.set_access(base + bytes, bytes, "read")
    memory.fill(base, bytes, 7)

    memory.destroy(handle)
    assert memory.holds(base, bytes, 7)
    memory.unmap(base, bytes)
    assert memory.held_bytes() - before >= bytes
    assert memory.holds(base + bytes, bytes, 7)
    memory.unmap(base + bytes, bytes)
    assert memory.held_bytes() - before < bytes // 2


# ---- map ----


def test_mapping_over_a_mapping_is_refused(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    memory.back(base + page, 2 * page)
    memory.fill(base + page, 2 * page, 7)
    other = memory.create(2 * page)
    for first_page in (0, 1, 2):  # over its beginning, all of it, its end
        with refused(memory, MAPPED_ALREADY):
            memory.map(base + first_page * page, 2 * page, other)
    assert memory.holds(base + page, 2 * page, 7)
    memory.unmap(base + page, 2 * page)
    memory.map(base + page, 2 * page, other)


@pytest.mark.parametrize("pages", [1, 3])
def test_mapping_is_refused_at_a_size_that_is_not_the_handles(memory: Memory, pages: int) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    handle = memory.create(2 * page)
    with refused(memory, WRONG_SIZE):
        memory.map(base, pages * page, handle)
    memory.map(base, 2 * page, handle)


def test_mapping_is_refused_at_part_of_a_page(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    handle = memory.create(page)
    with refused(memory, NOT_WHOLE_PAGES):
        memory.map(base + page // 2, page, handle)
    memory.map(base, page, handle)
    memory.map(base + page, page, handle)


def test_mapping_is_refused_where_nothing_is_reserved(memory: Memory) -> None:
    page = memory.page_bytes
    handle = memory.create(page)
    base = memory.reserve(page)
    memory.unreserve(base, page)
    with refused(memory, NOT_RESERVED):
        memory.map(base, page, handle)


def test_aliases_see_the_same_bytes(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    handle = memory.back(base, page)
    memory.map(base + 2 * page, page, handle)
    memory.set_access(base + 2 * page, page, "read_write")
    memory.fill(base, page, 7)
    assert memory.holds(base + 2 * page, page, 7)
    memory.fill(base + 2 * page, page, 8)
    assert memory.holds(base, page, 8)
    memory.unmap(base, page)
    assert memory.holds(base + 2 * page, page, 8)


def test_bytes_stay_with_their_handle_when_it_is_mapped_elsewhere(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(2 * page)
    elsewhere = memory.reserve(2 * page)
    handle = memory.back(base, 2 * page)
    memory.fill(base, page, 7)
    memory.fill(base + page, page, 8)
    memory.unmap(base, 2 * page)
    memory.map(elsewhere, 2 * page, handle)
    memory.set_access(elsewhere, 2 * page, "read")
    assert memory.holds(elsewhere, page, 7)
    assert memory.holds(elsewhere + page, page, 8)


# ---- unmap ----


@pytest.mark.parametrize(("first_page", "pages"), [(0, 1), (1, 1), (1, 2), (0, 3)])
def test_unmapping_part_of_a_mapping_is_refused(
    memory: Memory, first_page: int, pages: int
) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    for address in (base, base + 2 * page):
        memory.back(address, 2 * page)
    memory.fill(base, 4 * page, 7)
    with refused(memory, PART_OF_MAPPING):
        memory.unmap(base + first_page * page, pages * page)
    assert memory.holds(base, 4 * page, 7)
    memory.unmap(base, 4 * page)


def test_unmapping_part_of_a_page_is_refused(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(2 * page)
    memory.back(base, page)
    memory.fill(base, page, 7)
    with refused(memory, NOT_WHOLE_PAGES):
        memory.unmap(base, page // 2)
    assert memory.holds(base, page, 7)
    memory.unmap(base, page)


def test_unmapping_over_holes_undoes_every_mapping_between_them(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(8 * page)
    for address, bytes in (
        (base + page, page),
        (base + 3 * page, 2 * page),
        (base + 6 * page, page),
    ):
        memory.destroy(memory.back(address, bytes))
    memory.unmap(base, 8 * page)
    memory.back(base, 8 * page)  # over a mapping it would be refused


def test_unmapping_leaves_what_lies_outside_the_range(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(3 * page)
    for i in range(3):
        memory.back(base + i * page, page)
    memory.fill(base, 3 * page, 7)
    memory.unmap(base + page, page)
    assert memory.holds(base, page, 7)
    assert memory.holds(base + 2 * page, page, 7)
    assert memory.access(base + page) == "none"


# ---- access ----


def test_a_mapping_starts_without_access(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(page)
    memory.map(base, page, memory.create(page))
    assert memory.access(base) == "none"


def test_a_mapping_made_anew_is_without_the_access_of_the_one_before(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(page)
    handle = memory.back(base, page)
    memory.unmap(base, page)
    memory.map(base, page, handle)
    assert memory.access(base) == "none"


@pytest.mark.parametrize("access", ["read", "read_write"])
def test_access_is_given_to_every_mapping_of_a_range(memory: Memory, access: str) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    for first_page, pages in ((0, 1), (1, 2), (3, 1)):
        memory.map(base + first_page * page, pages * page, memory.create(pages * page))
    memory.set_access(base, 3 * page, access)
    assert [memory.access(base + i * page) for i in range(4)] == [access] * 3 + ["none"]


def test_access_belongs_to_the_mapping_and_not_to_the_handle(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(2 * page)
    handle = memory.back(base, page)
    memory.map(base + page, page, handle)
    memory.set_access(base + page, page, "read")
    assert [memory.access(base), memory.access(base + page)] == ["read_write", "read"]
    memory.fill(base, page, 7)
    assert memory.holds(base + page, page, 7)


def test_access_can_be_lowered_and_raised_again(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(page)
    memory.back(base, page)
    memory.fill(base, page, 7)
    memory.set_access(base, page, "read")
    assert memory.access(base) == "read"
    assert memory.holds(base, page, 7)
    memory.set_access(base, page, "read_write")
    memory.fill(base, page, 8)
    assert memory.holds(base, page, 8)


# A hole in the middle: CUDA takes it, the host refuses it, and nobody here asks for it.
@pytest.mark.parametrize("hole", [0, 2])
def test_access_over_a_hole_is_refused_and_given_to_nothing(memory: Memory, hole: int) -> None:
    page = memory.page_bytes
    base = memory.reserve(3 * page)
    for i in {0, 1, 2} - {hole}:
        memory.map(base + i * page, page, memory.create(page))
    with refused(memory, HOLE):
        memory.set_access(base, 3 * page, "read_write")
    assert [memory.access(base + i * page) for i in range(3)] == ["none"] * 3
    memory.map(base + hole * page, page, memory.create(page))
    memory.set_access(base, 3 * page, "read_write")
    memory.fill(base, 3 * page, 7)
    assert memory.holds(base, 3 * page, 7)


def test_an_access_that_does_not_exist_is_a_configuration_error(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(page)
    memory.back(base, page, "read")
    with pytest.raises(va.ConfigError, match="'write'"):
        memory.set_access(base, page, "write")
    assert memory.access(base) == "read"


# ---- zero, streams and fences ----


def test_zero_clears_its_range_and_nothing_beside_it(memory: Memory) -> None:
    page = memory.page_bytes
    base = memory.reserve(4 * page)
    memory.back(base, 2 * page)  # of which the second half is cleared, with all of the next one
    memory.back(base + 2 * page, page)
    memory.back(base + 3 * page, page)
    memory.fill(base, 4 * page, 7)
    memory.zero(base + page, 2 * page)
    assert memory.holds(base, page, 7)
    assert memory.holds(base + page, 2 * page, 0)
    assert memory.holds(base + 3 * page, page, 7)


def test_zero_on_a_stream_is_done_when_the_stream_is_synchronized(memory: Memory) -> None:
    bytes = 16 * memory.page_bytes
    base = memory.reserve(bytes)
    memory.back(base, bytes)
    memory.fill(base, bytes, 7)
    stream = memory.create_stream()
    memory.zero(base, bytes, stream)
    memory.synchronize(stream)
    assert memory.holds(base, bytes, 0)


def test_streams_are_not_the_default_one_and_not_one_another(memory: Memory) -> None:
    streams = {memory.create_stream() for _ in range(3)}
    assert len(streams) == 3
    assert 0 not in streams


def test_a_fence_that_was_never_recorded_has_passed(memory: Memory) -> None:
    fence = memory.create_fence()
    assert memory.query(fence) is True
    memory.destroy_fence(fence)


@pytest.mark.parametrize("waits_for", ["stream", "device"])
def test_a_fence_has_passed_when_its_stream_has_been_waited_for(
    memory: Memory, waits_for: str
) -> None:
    page = memory.page_bytes
    base = memory.reserve(page)
    memory.back(base, page)
    stream = memory.create_stream()
    fences = [memory.create_fence() for _ in range(2)]
    for fence in fences:
        memory.zero(base, page, stream)
        memory.record(fence, stream)
    if waits_for == "stream":
        memory.synchronize(stream)
    else:
        memory.synchronize_device()
    assert [memory.query(fence) for fence in fences] == [True, True]
    for fence in fences:
        memory.destroy_fence(fence)


@pytest.mark.parametrize("memory", [CUDA], indirect=True)
@pytest.mark.parametrize("waits_for", ["stream", "device"])
def test_a_fence_has_not_passed_before_the_work_in_front_of_it(
    memory: Memory, waits_for: str
) -> None:
    busy = torch.cuda.Stream(device="cuda:0")
    idle = memory.create_stream()
    behind, beside = memory.create_fence(), memory.create_fence()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_000_000_000)  # about half a second
    memory.record(behind, busy.cuda_stream)
    memory.record(beside, idle)
    deadline = time.monotonic() + 10
    while not memory.query(beside):  # others on the GPU may hold it up
        assert time.monotonic() < deadline
    assert memory.query(behind) is False
    if waits_for == "stream":
        memory.synchronize(busy.cuda_stream)
    else:
        memory.synchronize_device()
    assert memory.query(behind) is True
    memory.destroy_fence(behind)
    memory.destroy_fence(beside)


# ---- threads ----


def test_threads_do_not_disturb_one_another(memory: Memory) -> None:
    page = memory.page_bytes
    failures: list[BaseException] = []

    def work(value: int) -> None:
        try:
            for _ in range(10):
                base = memory.reserve(4 * page)
                handle = memory.back(base, 2 * page)
                memory.map(base + 2 * page, 2 * page, handle)
                memory.set_access(base + 2 * page, 2 * page, "read")
                memory.fill(base, 2 * page, value)
                assert memory.holds(base + 2 * page, 2 * page, value)
                memory.unmap(base, 4 * page)
                memory.destroy(handle)
                memory.unreserve(base, 4 * page)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.gpu
def test_a_cuda_device_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(va.BackendUnavailable, match="no CUDA device 4095.*CUDA_VISIBLE_DEVICES"):
        _core.cuda_backend(4095)
