"""Physical memory under one budget, for one or several allocators."""

from __future__ import annotations

import atexit
import weakref

import torch

from vattention import _core
from vattention.config import MAX_BYTES, check_bool, parse_bytes
from vattention.errors import ConfigError
from vattention.stats import PoolStats

#: The page size of the host backend unless another is asked for. Small, so that short sequences on
#: a CPU take little; the GPU's is what the driver says (2 MiB).
HOST_PAGE_BYTES = 64 << 10

#: The largest extent unless another is asked for: large enough that mapping costs little for each
#: byte, small enough that what trim and reclaim can give back is not coarse. Kernels read memory of
#: such extents and of smaller ones alike (bench/results, bandwidth).
MAX_EXTENT_BYTES = 512 << 20

_DEVICES = "device must be 'cuda', 'cuda:N' or 'cpu'"

_open_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _stop_background_threads() -> None:
    for pool in list(_open_pools):
        pool._core.stop()


atexit.register(_stop_background_threads)


def _make_backend(device: torch.device, page_bytes: int | str | None) -> _core.Backend:
    kind = str(device.type)
    if kind == "cpu":
        wanted = HOST_PAGE_BYTES if page_bytes is None else page_bytes
        return _core.host_backend(parse_bytes(wanted, name="page_bytes"))
    if kind != "cuda":
        raise ConfigError(f"{_DEVICES}, not {str(device)!r}")
    if page_bytes is not None:
        raise ConfigError("page_bytes can be set on the host backend only: CUDA's is the driver's")
    if str(device) == "cuda":  # no index: torch's current device
        return _core.cuda_backend(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return _core.cuda_backend(device.index)


class Pool:
    """Physical memory under one budget, on one device.

    An allocator makes a pool of its own unless it is given one; give several allocators the same
    pool to let two models, or full and sliding layers, share a budget. May be used from any
    thread.

    Args:
        memory: the budget, in bytes or as text such as ``"60GiB"``; by default what is free on the
            device now. It is a limit: nothing is taken before it is needed.
        device: ``"cuda"``, ``"cuda:N"`` or ``"cpu"`` (the host backend).
        page_bytes: the page size, on the host backend only; a power of two, at least the system's;
            64 KiB by default.
        max_extent: the largest physical allocation, in bytes or as text; a power of two times the
            page size; 512 MiB by default.
        low_watermark: the background thread keeps this many bytes created and free.
        high_watermark: idle memory above this many bytes goes back to the driver; by default none
            does until :meth:`reclaim`.
        zero: clear memory before its first, and before another, owner can read it. Turning this
            off lets a sequence see another's bytes and kernels see NaN in what they read beyond a
            length.
        background: run the thread that maps ahead of growing sequences. With it off, memory is
            mapped only inside calls.

    Raises:
        BackendUnavailable: there is no such device; the message says why.
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        memory: int | str | None = None,
        device: str | torch.device = "cuda",
        *,
        page_bytes: int | str | None = None,
        max_extent: int | str | None = None,
        low_watermark: int | str = 0,
        high_watermark: int | str | None = None,
        zero: bool = True,
        background: bool = True,
        backend: _core.Backend | None = None,
    ) -> None:
        """Opens the device; takes no memory yet. `backend` replaces the device's, for tests."""
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"{_DEVICES}, not {device!r}") from error
        if backend is None:
            backend = _make_backend(self.device, page_bytes)
        else:
            self.device = torch.device("cpu" if backend.name.endswith("host") else self.device)
        # cpu:0 is the CPU, and cuda the current device: whatever was written, one name for each.
        on_host = self.device.type == "cpu"
        self.device = torch.device("cpu") if on_host else torch.device("cuda", backend.device_index)
        self._backend = backend
        self.page_bytes: int = backend.page_bytes
        budget = backend.memory_info()[0] if memory is None else parse_bytes(memory, name="memory")
        self.max_extent_bytes: int = (
            max(MAX_EXTENT_BYTES, self.page_bytes)
            if max_extent is None
            else parse_bytes(max_extent, name="max_extent")
        )
        self.zero = check_bool(zero, name="zero")
        self._core = _core.Pool(
            backend=backend,
            budget_bytes=budget,
            low_bytes=_watermark(low_watermark, "low_watermark"),
            high_bytes=_watermark(high_watermark, "high_watermark"),
            max_extent_bytes=self.max_extent_bytes,
            zero=self.zero,
            background=check_bool(background, name="background"),
        )
        _open_pools.add(self)

    @property
    def budget_bytes(self) -> int:
        """The most physical memory the pool may hold."""
        return self.stats().budget_bytes

    def set_budget(self, memory: int | str) -> None:
        """Changes the budget, also while sequences are live.

        Lowering it gives idle memory back to the driver at once, waiting for the GPU where that
        has to be.

        Raises:
            OutOfPages: live sequences hold more than that; nothing has changed but caches.
            ConfigError: it is no size, or less than a page.
            BackendError: the driver refused; the budget is as it was.
        """
        self._core.set_budget(parse_bytes(memory, name="memory"))

    def set_watermarks(self, low: int | str = 0, high: int | str | None = None) -> None:
        """Sets between what amounts the background thread keeps idle memory: both of them.

        Args:
            low: the thread keeps so many bytes created and free; 0 if it is left out.
            high: idle memory above this goes back to the driver; none does if it is left out.

        Raises:
            ConfigError: `low` is above `high`.
        """
        self._core.set_watermarks(_watermark(low, "low"), _watermark(high, "high"))

    def reclaim(self) -> int:
        """Gives all idle memory back to the driver, and returns how many bytes that was.

        Idle is what is free and what freed sequences left mapped; addresses stay. Waits for the
        GPU to pass the last use of it.

        Raises:
            BackendError: the driver refused; what it had not taken by then is still held.
        """
        return self._core.reclaim()

    def stats(self) -> PoolStats:
        """What the pool holds now, and what it has done."""
        return PoolStats(**self._core.stats())

    def check(self) -> None:
        """Recomputes everything that must always be true; for tests and debugging.

        Raises:
            AssertionError: something is not.
        """
        self._core.check()

    def __repr__(self) -> str:
        """The device, and held of budget."""
        stats = self.stats()
        return f"Pool({self.device}, {stats.held_bytes} of {stats.budget_bytes} bytes held)"


def _watermark(value: int | str | None, name: str) -> int:
    if value is None:
        return MAX_BYTES * 2  # above any budget
    return parse_bytes(value, name=name, minimum=0)
