"""In which order calls on several streams run, and what gives memory up beside them.

Without a GPU: with streams that only note what they wait for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from enabled_models import GPU, build, decode, enabled, exact_pool, prompts, start  # noqa: E402

from vattention.integrations.transformers import streams  # noqa: E402
from vattention.integrations.transformers.streams import StreamOrder  # noqa: E402


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other.name)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Makes a stream the one in use."""
    monkeypatch.setattr(streams, "on", lambda device: nullcontext())

    def use(stream: FakeStream) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    return use


def test_a_call_waits_for_the_last_one_and_for_no_other(use):
    first, second = FakeStream("first"), FakeStream("second")
    order = StreamOrder(torch.device("cuda:0"))
    for stream in (first, first, second, second, first):
        use(stream)
        order.lead()
    assert (first.waited, second.waited) == (["second"], ["first"])


def test_who_gives_up_memory_waits_but_is_not_waited_for(use, monkeypatch):
    first, second = FakeStream("first"), FakeStream("second")
    order = StreamOrder(torch.device("cuda:0"))
    use(second)
    order.follow()  # there has been no call
    use(first)
    order.lead()
    use(second)
    order.follow()  # beside the call, which goes on
    assert second.waited == ["first"]
    order.lead()
    assert second.waited == ["first", "first"]
    assert first.waited == []
    use(first)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    order.follow()
    assert first.waited == []


def test_on_a_cpu_there_are_no_streams(monkeypatch):
    def fail(device):
        raise AssertionError("there are none")

    monkeypatch.setattr(torch.cuda, "current_stream", fail)
    order = StreamOrder(torch.device("cpu"))
    order.lead()
    order.follow()


def give_up(end: str, model: Any, token: Any, caches: list[Any]) -> None:
    """Lets go of memory of the only cache, or of all of it; "disabled": later."""
    if end == "call":
        model(input_ids=token, past_key_values=caches[0])
    elif end == "crop":
        caches[0].crop(-1)
    elif end == "reset":
        caches[0].reset()
    elif end == "collected":
        caches.clear()


@pytest.mark.parametrize("end", ["call", "crop", "reset", "collected", "disabled"])
def test_what_gives_memory_up_follows_the_last_call(use, monkeypatch, end):
    model = build("llama", "cpu")
    first, second = FakeStream("first"), FakeStream("second")
    with torch.no_grad(), enabled(model) as engine:
        cache, token = start(model, engine, prompts([9, 4], "cpu"))
        caches = [cache]
        del cache
        # The order of a GPU, over memory of a CPU.
        monkeypatch.setattr(engine.order, "_device", torch.device("cuda:0"))
        use(first)
        model(input_ids=token, past_key_values=caches[0])
        use(second)
        give_up(end, model, token, caches)
        if end != "disabled":
            assert second.waited == ["first"]
    assert second.waited[0] == "first"
    assert first.waited == []


@GPU
@pytest.mark.parametrize("end", ["call", "crop", "reset", "collected"])
def test_what_gives_memory_up_waits_for_a_call_that_runs(apart, spin, end):
    model = build("llama", "cuda")
    with torch.no_grad(), enabled(model, pool=exact_pool("cuda")) as engine:
        cache, token = start(model, engine, prompts([9, 4], "cuda"))
        decode(model, cache, token, 2)  # everything is loaded and captured
        caches = [cache]
        del cache
        torch.cuda.synchronize()
        running, given_up = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.stream(apart):
            spin(300)
            model(input_ids=token, past_key_values=caches[0])
            running.record()
        give_up(end, model, token, caches)
        assert not running.query()  # the host has not waited
        given_up.record()
        given_up.synchronize()
        assert running.query()
        if end in ("reset", "collected"):
            assert engine.release() > 0
