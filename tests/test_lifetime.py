"""Who keeps what alive: tensors, sequences, pools; the end of the interpreter; and fork."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vattention as va
from vattention import _core

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
HOST_PAGE_BYTES = 4096
TOKENS = 100
LAYOUT = va.KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def make_backend(device: str) -> _core.FaultyBackend:
    """The device's backend, which counts its calls."""
    if device == "cpu":
        return _core.FaultyBackend(_core.host_backend(HOST_PAGE_BYTES))
    return _core.FaultyBackend(_core.cuda_backend(torch.cuda.current_device()))


def make(device: str, backend: _core.Backend | None = None, **options: Any) -> va.KVAllocator:
    pool = va.Pool("128MiB", device, backend=backend or make_backend(device), background=False)
    settings: dict[str, Any] = {"max_sequences": 2, "max_seq_len": 100_000}
    return va.KVAllocator(LAYOUT, pool=pool, **(settings | options))


def left(backend: _core.FaultyBackend) -> dict[str, int]:
    """Of what the backend was asked for, how much it has not been given back."""
    calls = backend.calls()
    return {
        "reservations": calls.get("reserve", 0) - calls.get("unreserve", 0),
        "extents": calls.get("create", 0) - calls.get("destroy", 0),
        "fences": calls.get("create_fence", 0) - calls.get("destroy_fence", 0),
    }


NOTHING = {"reservations": 0, "extents": 0, "fences": 0}


def test_another_thread_may_close_it_meanwhile() -> None:
    kv = make("cpu")
    kv.allocate(3)

    class Meanwhile(dict):
        """What `close` empties first."""

        def clear(self) -> None:
            super().clear()
            kv._layers = {}
            thread = threading.Thread(target=kv.close)
            thread.start()
            thread.join()

    kv._layers = Meanwhile()
    kv.close()
    assert kv.closed


# ---- tensors ----


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("end", ["close", "del"])
def test_tensors_stay_readable_after_their_allocator(device: str, end: str, freed: bool) -> None:
    backend = make_backend(device)
    kv = make(device, backend)
    pool = kv.pool
    # More than a page: a budget below what is held is then still one.
    seq = kv.allocate(TOKENS + kv.layout.tokens_per_page(pool.page_bytes))
    k, v = kv.layer(1)
    k[seq.slot, :TOKENS] = 3
    v[seq.slot, :TOKENS] = 4
    held = pool.stats().held_bytes
    if freed:
        seq.free()
    if end == "close":
        kv.close()
    del kv, seq

    mapped = pool.stats()
    assert mapped.mappings > 0
    assert mapped.free_bytes == 0
    # Nobody else gets what the tensors can still read.
    with pytest.raises(va.OutOfPages):
        pool.set_budget(held - 1)
    pool.reclaim()
    assert bool((k[0, :TOKENS] == 3).all())
    assert bool((v[0, :TOKENS] == 4).all())

    del k
    assert bool((v[0, :TOKENS] == 4).all())
    del v
    assert pool.stats().mappings == 0
    assert pool.stats().free_bytes == held
    pool.check()
    del pool
    assert left(backend) == NOTHING


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda k: k[0, 10:20],
    "transposed": lambda k: k.transpose(1, 2)[0, :, 10:20],
    "other-dtype": lambda k: k.view(torch.int16)[0, 10:20],
    "detached": lambda k: k.detach()[0, 10:20],
    "exported-again": lambda k: torch.from_dlpack(k[0, 10:20]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_keeps_the_memory(device: str, view: str) -> None:
    backend = make_backend(device)
    kv = make(device, backend)
    seq = kv.allocate(TOKENS)
    kv.layer(1)[0][seq.slot, :TOKENS] = 3
    part = VIEWS[view](kv.layer(1)[0])
    before = part.clone()
    assert bool(before.all())
    kv.close()
    del kv, seq
    assert bool((part == before).all())
    assert left(backend)["reservations"] == 1
    del part
    assert left(backend) == NOTHING


def test_a_numpy_view_keeps_the_memory() -> None:
    backend = make_backend("cpu")
    kv = make("cpu", backend)
    kv.allocate(TOKENS)
    k = kv.layer(0)[0]
    k[0, :TOKENS] = 1
    array = k.view(torch.int16)[0, :TOKENS].numpy()
    del kv, k
    assert (array == 0x3F80).all()  # 1 as a bfloat16
    del array
    assert left(backend) == NOTHING


def test_an_allocator_without_tensors_is_gone_with_its_last_name(device: str) -> None:
    backend = make_backend(device)
    gc.disable()  # references alone must do
    try:
        kv = make(device, backend)
        pool = kv.pool
        kv.allocate(TOKENS)
        kv.allocate(TOKENS).free()
        kv.layer(0)
        del kv
        assert pool.stats().mappings == 0
        assert pool.stats().free_bytes == pool.stats().held_bytes
        del pool
        assert left(backend) == NOTHING
    finally:
        gc.enable()


def test_the_last_tensor_may_go_on_another_thread(device: str) -> None:
    backend = make_backend(device)
    kv = make(device, backend)
    kv.allocate(TOKENS)
    tensors = list(kv.layer(0))
    kv.close()
    del kv
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert left(backend) == NOTHING


def test_a_sequence_keeps_its_allocator(device: str) -> None:
    backend = make_backend(device)
    kv = make(device, backend)
    seq = kv.allocate(TOKENS)
    del kv
    seq.trim(10)
    assert seq.alive
    assert seq.length == 10
    seq.free()
    del seq
    assert left(backend) == NOTHING


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_seq_len": 2**40}, va.BackendError),  # more than the system reserves
        ({"tail_slack_tokens": 2**22}, va.OutOfPages),  # the guard is larger than the budget
        ({"max_extent": "1MB"}, va.ConfigError),
    ],
    ids=["addresses", "guard", "settings"],
)
def test_an_allocator_that_could_not_be_made_leaves_nothing(
    options: dict[str, Any], error: type[Exception]
) -> None:
    backend = make_backend("cpu")
    if error is va.BackendError:
        backend.arm("reserve")
    with pytest.raises(error):
        make("cpu", backend, **options)
    calls = backend.calls()
    # The one that was made to fail has reserved nothing.
    failed = 1 if error is va.BackendError else 0
    assert calls.get("reserve", 0) - failed == calls.get("unreserve", 0)
    assert calls.get("create", 0) == calls.get("destroy", 0)


# ---- leaks ----


@dataclass(frozen=True)
class Resources:
    files: int
    threads: int
    memfd_mappings: int
    virtual_bytes: int

    @classmethod
    def now(cls) -> Resources:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return cls(
            files=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            memfd_mappings=sum("memfd:vattention" in line for line in maps),
            virtual_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        )


def test_allocators_that_come_and_go_leak_nothing(device: str) -> None:
    reserved = 0

    def cycle(how: int) -> None:
        nonlocal reserved
        kv = va.KVAllocator(
            LAYOUT,
            max_sequences=8,
            max_seq_len=100_000,
            memory="256MiB",
            device=device,
            tail_slack_tokens=64 if how % 2 else 0,
        )
        reserved += kv.stats().reserved_bytes
        sequences = [kv.allocate(n) for n in (0, 1, TOKENS, 10 * TOKENS)]
        k, _ = kv.layer(0)
        kv.step(dict.fromkeys(sequences, 11 * TOKENS))
        sequences[1].trim(TOKENS)
        sequences[2].trim_front(5 * TOKENS)
        sequences[3].free()
        if how % 3 == 0:
            kv.close()
        if how % 3 == 1:
            kv.itself = kv  # a cycle, which the collector finds
        assert k.shape[0] == 8

    for how in range(3):  # whatever is made once
        cycle(how)
    before = Resources.now()
    reserved = 0
    for how in range(60):
        cycle(how)
    after = Resources.now()
    deadline = time.monotonic() + 10
    while after.threads != before.threads and time.monotonic() < deadline:
        after = Resources.now()  # a thread that was joined may be listed a little longer
    assert after.threads == before.threads
    assert after.files == before.files
    assert after.memfd_mappings == before.memfd_mappings
    assert reserved > 8 << 30
    assert after.virtual_bytes - before.virtual_bytes < reserved // 8


# ---- the end of the interpreter ----

# Starting an interpreter and importing torch takes seconds, so one is started that is ready, and
# each script runs in a child of it that ends as any interpreter does.
READY = """
import atexit, faulthandler, gc, json, os, signal, sys, time

def last():  # what a script puts in its place runs after this package's own exit handler
    pass

atexit.register(lambda: last())

import torch

import vattention as va

faulthandler.enable()
torch.set_num_threads(1)  # its threads would be missing in what is forked


def wait_for(pid, timeout_s):
    # The code it ends with, or None where it has to be ended, and then says where it was.
    for patience_s, signal_number in ((timeout_s, signal.SIGABRT), (2.0, signal.SIGKILL)):
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return None if code == -signal.SIGABRT and signal_number == signal.SIGKILL else code
            time.sleep(0.002)
        os.kill(pid, signal_number)
    os.waitpid(pid, 0)
    return None


def next_job():
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return job
        print(json.dumps(wait_for(pid, job["timeout_s"])), flush=True)
    return None


gc.freeze()  # what is there now need not be looked through at every end
job = next_job()
if job is not None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT, 0o600), stream)
    device = job["device"]
    exec(compile(job["script"], "<script>", "exec"))
"""

PREAMBLE = f"""
import threading

LAYOUT = va.KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)

def make(**options):
    return va.KVAllocator(
        LAYOUT,
        **(dict(max_sequences=4, max_seq_len=100_000, memory="256MiB", device=device,
                page_bytes={HOST_PAGE_BYTES} if device == "cpu" else None) | options),
    )
"""


@dataclass(frozen=True)
class Ended:
    code: int | None  # None where it did not end in time
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a script in an interpreter of its own, and says how that ended."""
    folder = tmp_path_factory.mktemp("interpreters")
    ready = subprocess.Popen(
        [sys.executable, "-c", READY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    count = 0

    def run_script(script: str, *, device: str = "cpu", timeout_s: float = 20.0) -> Ended:
        nonlocal count
        count += 1
        files = {name: str(folder / f"{count}.{name}") for name in ("out", "err")}
        job = {
            "script": PREAMBLE + textwrap.dedent(script),
            "device": device,
            "timeout_s": timeout_s,
            **files,
        }
        assert ready.stdin is not None
        assert ready.stdout is not None
        ready.stdin.write(json.dumps(job) + "\n")
        ready.stdin.flush()
        code = json.loads(ready.stdout.readline())
        return Ended(code, **{name: Path(path).read_text() for name, path in files.items()})

    yield run_script
    assert ready.stdin is not None
    ready.stdin.close()
    assert ready.wait(20) == 0


def ended_well(ended: Ended) -> bool:
    """As pytest shows the rest, what was written is part of the failure's message."""
    print(ended.out, ended.err, sep="\n")
    return ended.code == 0 and ended.err == ""


LIVE = """
kv = make(lookahead_tokens=64, tail_slack_tokens=64)
closed = make()
sequences = [kv.allocate(100), closed.allocate(100)]
tensors = [*kv.layer(0), *closed.layer(0)]
for length in range(100, 2_000, 16):
    kv.step({sequences[0]: length})  # the background thread is at work
sequences[0].trim(100)
kv.allocate(1_000).free()
closed.close()
"""


def test_the_interpreter_ends_with_everything_alive(device: str, run: Run) -> None:
    assert ended_well(run(LIVE, device=device))


def test_the_interpreter_ends_with_cycles_that_nobody_collected(device: str, run: Run) -> None:
    script = LIVE + "kv.itself = kv; kv.tensors = tensors; del kv, closed, sequences, tensors"
    assert ended_well(run(script, device=device))


def test_the_interpreter_ends_during_an_exception(device: str, run: Run) -> None:
    ended = run(LIVE + "\nwith kv:\n    raise RuntimeError('enough')", device=device)
    assert ended.code == 1
    # The traceback and nothing behind it.
    assert ended.err.startswith("Traceback")
    assert ended.err.splitlines()[-1] == "RuntimeError: enough"


def test_the_interpreter_ends_with_calls_of_its_main_thread(device: str, run: Run) -> None:
    script = (
        LIVE
        + """
class Engine:
    def __init__(self):
        self.kv, self.seq = kv, kv.allocate(5)

    def __del__(self):  # the interpreter is ending then
        self.seq.free()
        self.kv.close()

engine = Engine()
"""
    )
    assert ended_well(run(script, device=device))


def test_the_interpreter_ends_by_sys_exit(device: str, run: Run) -> None:
    ended = run(LIVE + "\nwith kv:\n    sys.exit(7)", device=device)
    assert (ended.code, ended.err) == (7, "")


def test_an_allocator_works_in_an_exit_handler(device: str, run: Run) -> None:
    # Handlers run last in, first out: one runs before this package's own, one after it.
    script = """
        kv = make()

        def use():
            seq = kv.allocate(1_000)
            kv.step({seq: 2_000})
            kv.layer(0)[0][seq.slot, 1_999] = 3
            seq.trim(10)
            seq.free()
            kv.reclaim()
            kv.check()
            print("used")

        atexit.register(use)
        last = use
    """
    ended = run(script, device=device)
    assert ended_well(ended)
    assert ended.out == "used\nused\n"


def test_the_interpreter_ends_while_daemon_threads_are_at_work(device: str, run: Run) -> None:
    script = """
        kv = make(max_sequences=4)
        rounds = [0, 0, 0]

        def work(index):
            while True:
                seq = kv.allocate(10)
                for length in range(11, 1_000, 97):
                    kv.step({seq: length})
                seq.trim(3)
                seq.free()
                rounds[index] += 1

        for index in range(len(rounds)):
            threading.Thread(target=work, args=(index,), daemon=True).start()
        while min(rounds) < 3:
            pass
    """
    assert ended_well(run(script, device=device))


def test_the_interpreter_ends_while_daemon_threads_get_errors(device: str, run: Run) -> None:
    script = """
        kv = make(max_sequences=1)
        seq = kv.allocate(4)
        rounds = [0, 0]

        def work(index):
            while True:
                try:
                    kv.allocate(4)
                except va.OutOfSlots:
                    rounds[index] += 1

        for index in range(len(rounds)):
            threading.Thread(target=work, args=(index,), daemon=True).start()
        while min(rounds) < 100:
            pass
    """
    for _ in range(3):
        assert ended_well(run(script, device=device))


# ---- fork ----

# On the host only: a CUDA context does not survive a fork. `in_child` forks, calls the function
# there, ends the child as any process ends, or by no more than its exit handlers, and returns the
# code that it ended with.
FORKS = """
import warnings

warnings.simplefilter("ignore", DeprecationWarning)  # for forking while threads run

def in_child(function, timeout_s=5.0, handlers_only=False):
    pid = os.fork()
    if pid == 0:
        function()
        if handlers_only:
            atexit._run_exitfuncs()
            os._exit(0)
        sys.exit(0)
    return wait_for(pid, timeout_s)

kv = make(lookahead_tokens=64, tail_slack_tokens=64)
seq = kv.allocate(1_000)
freed = kv.allocate(1_000)
tensors = [tensor for layer in range(2) for tensor in kv.layer(layer)]
for tensor in tensors:
    tensor[seq.slot, :1_000] = 3
    tensor[freed.slot, :1_000] = 4
freed.free()

def unharmed():
    assert all(bool((t[seq.slot, :1_000] == 3).all()) for t in tensors)
    length = seq.length + 500
    kv.step({seq: length})
    assert all(not bool(t[seq.slot, 1_000:length].count_nonzero()) for t in tensors)
    again = kv.allocate(1_000)
    assert all(not bool(t[again.slot, :1_000].any()) for t in tensors)
    again.free()
    seq.trim(1_000)
    kv.reclaim()
    kv.check()
    kv.pool.check()
"""


def test_a_forked_child_ends_without_harm_to_its_parent(run: Run) -> None:
    script = """
        unharmed()
        assert in_child(lambda: None) == 0
        unharmed()
    """
    assert ended_well(run(FORKS + textwrap.dedent(script)))


def test_a_forked_child_may_drop_its_allocator_without_harm_to_its_parent(run: Run) -> None:
    script = """
        def tensors_last():
            global kv, seq, freed
            del kv, seq, freed
            tensors.clear()

        def allocator_last():
            global kv, tensors, seq, freed
            del tensors, seq, freed
            kv.__dict__.clear()
            del kv

        def pool_last():
            global kv, tensors, seq, freed
            pool = kv.pool
            del kv, tensors, seq, freed
            del pool

        def in_a_cycle():
            global kv, tensors, seq, freed
            kv.itself = kv
            del kv, tensors, seq, freed
            gc.collect()

        for drop in (tensors_last, allocator_last, pool_last, in_a_cycle):
            assert in_child(drop, handlers_only=True) == 0, drop
            unharmed()
    """
    assert ended_well(run(FORKS + textwrap.dedent(script)))


def test_a_forked_child_may_close_its_allocator_without_harm_to_its_parent(run: Run) -> None:
    script = """
        def close():
            try:
                kv.close()
            except va.VAttentionError as error:
                assert "fork" in str(error)

        assert in_child(close) == 0
        unharmed()
    """
    assert ended_well(run(FORKS + textwrap.dedent(script)))


def test_a_forked_child_is_told_that_its_allocator_was_made_before(run: Run) -> None:
    script = """
        uses = {
            "allocate": lambda: kv.allocate(1),
            "allocate_batch": lambda: kv.allocate_batch(2, 1),
            "step-idle": lambda: kv.step({seq: 1_000}),
            "step-growing": lambda: kv.step({seq: 5_000}),
            "step-array": lambda: kv.step(torch.tensor([1_000] + [0] * 3)),
            "trim": lambda: seq.trim(1),
            "trim_front": lambda: seq.trim_front(500),
            "free": lambda: seq.free(),
            "length": lambda: seq.length,
            "stats": lambda: kv.stats(),
            "mappings": lambda: kv.mappings(),
            "reclaim": lambda: kv.reclaim(),
            "check": lambda: kv.check(),
            "pool.stats": lambda: kv.pool.stats(),
            "pool.reclaim": lambda: kv.pool.reclaim(),
            "pool.set_budget": lambda: kv.pool.set_budget("1GiB"),
            "pool.set_watermarks": lambda: kv.pool.set_watermarks(low="1MiB"),
            "new allocator": lambda: va.KVAllocator(
                LAYOUT, max_sequences=1, max_seq_len=10, pool=kv.pool
            ),
        }

        def use():
            for name, call in uses.items():
                try:
                    call()
                except va.VAttentionError as error:
                    assert "fork" in str(error), (name, error)
                else:
                    raise AssertionError(name + " raised nothing")

        assert in_child(use) == 0
        unharmed()
    """
    assert ended_well(run(FORKS + textwrap.dedent(script)))


def test_a_forked_child_may_make_an_allocator_of_its_own(run: Run) -> None:
    script = """
        def work():
            own = make()
            mine = own.allocate(1_000)
            own.layer(0)[0][mine.slot, :1_000] = 5
            own.step({mine: 3_000})
            own.check()

            def grandchild():
                try:
                    own.allocate(1)
                except va.VAttentionError as error:
                    assert "fork" in str(error)
                else:
                    raise AssertionError("raised nothing")

            assert in_child(grandchild) == 0
            assert bool((own.layer(0)[0][mine.slot, :1_000] == 5).all())
            own.check()

        assert in_child(work) == 0
        unharmed()
    """
    assert ended_well(run(FORKS + textwrap.dedent(script)))


def test_a_fork_while_other_threads_are_in_calls_leaves_a_child_that_ends(run: Run) -> None:
    # Whatever lock another thread held at the fork is held for ever in the child.
    script = """
        stop = threading.Event()

        def work():
            while not stop.is_set():
                one = kv.allocate(100)
                kv.step({one: 3_000})
                one.free()
                kv.reclaim()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()

        def drop():
            global kv, tensors, seq, freed
            try:
                kv.stats()
            except va.VAttentionError as error:
                assert "fork" in str(error)
            else:
                raise AssertionError("raised nothing")
            del kv, tensors, seq, freed
            gc.collect()

        codes = [0]
        while codes[-1] == 0 and len(codes) < 10:
            codes.append(in_child(drop, handlers_only=True))
        stop.set()
        for thread in threads:
            thread.join()
        assert codes[-1] == 0, codes
        unharmed()
    """
    assert ended_well(run(FORKS + textwrap.dedent(script), timeout_s=60))
