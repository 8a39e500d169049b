"""The memory of an enabled model: that of its tokens, and what happens when it is used up."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from enabled_models import (  # noqa: E402
    PAGE_BYTES,
    Notes,
    build,
    configs_of,
    decode,
    enabled,
    exact_pool,
    generate,
    joined,
    live_tokens,
    make_model,
    make_pool,
    mapped_bytes,
    page_bytes,
    prompts,
    start,
    token_bytes,
)
from small_models import WINDOW  # noqa: E402

import vattention as va  # noqa: E402
from vattention.integrations.transformers import (  # noqa: E402
    enable,
    release,
)
from vattention.integrations.transformers.ragged import RaggedCache  # noqa: E402

# Memory


def test_padding_takes_no_memory(device):
    model = build("llama", device)
    with enabled(model, pool=exact_pool(device)) as engine:
        kv = engine.groups[0].kv
        cache, _ = start(model, engine, prompts([300, 1, 1, 2], device))
        assert cache.lengths == [300, 1, 1, 2]
        stats = kv.stats()
        assert (stats.live_sequences, stats.live_tokens) == (4, 304)
        assert stats.used_bytes == 304 * token_bytes(engine)
        pages = sum(sum(kv.layout.pages(n, page_bytes(device))) for n in (300, 1, 1, 2))
        assert stats.mapped_bytes == pages * page_bytes(device)


class Watch(transformers.LogitsProcessor):
    """Notes what is mapped and what tokens need after each forward pass of `generate()`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.bytes: list[tuple[int, int]] = []

    def __call__(self, input_ids, scores):
        stats = [group.kv.stats() for group in self.engine.groups]
        self.bytes.append((sum(s.mapped_bytes for s in stats), sum(s.used_bytes for s in stats)))
        return scores


@pytest.mark.parametrize(("order", "regions"), [("balanced", 2), ("token", 1), ("layer", 4)])
def test_memory_is_the_tokens_own_and_a_page_for_each_sequence_and_region(device, order, regions):
    model = build("llama", device)
    inputs = prompts([100, 3, 40], device)
    before = generate(model, inputs, max_new_tokens=20).tolist()
    with enabled(model, pool=exact_pool(device), order=order) as engine:
        watch = Watch(engine)
        generate(model, inputs, max_new_tokens=300, logits_processor=[watch])
        assert generate(model, inputs, max_new_tokens=20).tolist() == before
        assert engine.groups[0].kv.layout.num_regions == regions
        pages = 3 * regions
    assert len(watch.bytes) == 300
    for step, (mapped, used) in enumerate(watch.bytes):
        assert used == (143 + 3 * step) * token_bytes(engine)
        assert used <= mapped <= 1.05 * used + pages * page_bytes(device)


def test_memory_below_windows_is_returned():
    model = build("mistral", "cpu")
    with enabled(model, pool=exact_pool("cpu"), max_seq_len=2048) as engine:
        watch = Watch(engine)
        inputs = prompts([20, 5], "cpu")
        generate(model, inputs, max_new_tokens=1000, logits_processor=[watch])
        layout = engine.groups[0].kv.layout
        kept = 15 + WINDOW + 256 + 256 + 16  # of the longer row, to what the shorter one sees
        bound = 2 * (kept * layout.token_bytes + 2 * layout.num_regions * PAGE_BYTES)
        assert max(mapped for mapped, _ in watch.bytes) <= bound
        assert 2 * 1000 * layout.token_bytes > 1.5 * bound


def test_layers_of_two_kinds_share_a_pool_and_the_window_is_returned():
    model = build("gemma3", "cpu")
    with enabled(model, pool=exact_pool("cpu"), max_seq_len=1024) as engine:
        cache, token = start(model, engine, prompts([900], "cpu"))
        decode(model, cache, token, 2)
        by_window = {group.window: group.kv.stats() for group in engine.groups}
        assert set(by_window) == {None, WINDOW}
        assert by_window[None].mapped_bytes >= by_window[None].used_bytes
        assert by_window[WINDOW].mapped_bytes < 0.5 * by_window[WINDOW].used_bytes
        held = engine.pool.stats().held_bytes
        assert held >= sum(stats.mapped_bytes for stats in by_window.values())


def test_sequences_end_with_generate_and_the_next_adopts_them(device):
    model = build("llama", device)
    with enabled(model, pool=exact_pool(device)) as engine:
        kv = engine.groups[0].kv
        first = generate(model, prompts([30, 30], device)).tolist()
        stats = kv.stats()
        assert (stats.live_sequences, stats.live_tokens, stats.used_bytes) == (0, 0, 0)
        assert stats.cached_bytes > 0
        creates = engine.pool.stats().creates
        assert generate(model, prompts([30, 30], device)).tolist() == first
        assert kv.stats().adoptions == 2
        assert engine.pool.stats().creates == creates


def test_short_prompts_with_long_answers_do_not_take_more_every_time(device):
    model = build("llama", device)
    with enabled(model, pool=exact_pool(device)) as engine:
        held = []
        for _ in range(4):
            generate(model, prompts([3], device), max_new_tokens=120)
            held.append(engine.pool.stats().held_bytes)
        assert held == held[:1] * 4
        assert engine.groups[0].kv.stats().adoptions == 3


def replace_weights(model: Any, other: Any) -> None:
    """By other tensors, and not what the tensors hold."""
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.data = new.data.clone()


def test_weights_that_are_replaced_are_the_ones_that_count(device):
    model, other = make_model("qwen2", device), build("qwen2", device)
    replace_weights(model, make_model("qwen2", device, seed=1))
    inputs = prompts([9, 4], device)
    wanted = generate(model, inputs).tolist()
    assert wanted != generate(other, inputs).tolist()
    replace_weights(model, other)
    with enabled(model):
        generate(model, inputs)  # with the others: graphs and merged matrices hold them
        replace_weights(model, make_model("qwen2", device, seed=1))
        assert generate(model, inputs).tolist() == wanted
    assert generate(model, inputs).tolist() == wanted


def test_an_enabled_model_is_not_copied():
    model = make_model("llama")
    with enabled(model), pytest.raises(va.ConfigError, match="disable"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_release_returns_memory_and_keeps_addresses(device):
    model = build("llama", device)
    with enabled(model) as engine:
        kv = engine.groups[0].kv
        first = generate(model, prompts([20, 6], device)).tolist()
        address = kv.layer(0)[0].data_ptr()
        decoders = list(engine._decoders.values())
        held = engine.pool.stats().held_bytes
        assert release(model) == held - kv.stats().guard_bytes > 0
        assert engine.pool.stats().held_bytes == kv.stats().guard_bytes
        assert generate(model, prompts([20, 6], device)).tolist() == first
        assert kv.layer(0)[0].data_ptr() == address
        assert list(engine._decoders.values()) == decoders


def test_release_leaves_live_caches_alone(device):
    model = build("llama", device)
    with enabled(model) as engine:
        cache, token = start(model, engine, prompts([20, 6], device))
        first = decode(model, cache, token, 10)
        cache.crop(-10)
        generate(model, prompts([9, 9], device))
        release(model)
        assert joined(*decode(model, cache, token, 10)) == joined(*first)
        del cache
        assert live_tokens(engine) == 0


# Errors


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_generate_that_runs_out_of_memory_leaves_the_model_enabled(name, step):
    model = build(name, "cpu")
    small = prompts([20, 6], "cpu")
    before = generate(model, small, max_new_tokens=20).tolist()
    large = prompts([300, 200], "cpu") if step == "prefill" else small
    notes = Notes()
    with enabled(model, pool=exact_pool("cpu", pages=24)) as engine:
        with pytest.raises(va.OutOfPages) as caught:
            generate(model, large, max_new_tokens=200, streamer=notes)
        assert (len(notes.got) > 10) is (step == "decode")
        assert caught.value.budget == 24 * PAGE_BYTES
        del caught
        gc.collect()
        assert live_tokens(engine) == 0
        assert model._vattention_engine is engine
        assert generate(model, small, max_new_tokens=20).tolist() == before
        engine.pool.check()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_decode_goes_on_after_memory_has_come_back(name):
    model = build(name, "cpu")
    inputs = prompts([30, 17], "cpu")
    with enabled(model, pool=exact_pool("cpu")) as engine:
        cache, token = start(model, engine, inputs)
        expected = joined(*decode(model, cache, token, 60))
        del cache
        release(model)
        cache, token = start(model, engine, inputs)
        other, _ = start(model, engine, prompts([100], "cpu"))
        engine.pool.set_budget(engine.pool.stats().held_bytes)
        tokens = []
        with pytest.raises(va.OutOfPages):
            for _ in range(60):
                tokens += decode(model, cache, tokens[-1] if tokens else token, 1)
        assert cache.lengths == [30 + len(tokens), 17 + len(tokens)]
        assert cache.seen == 30 + len(tokens)
        lengths = [row.length for rows in cache._rows for row in rows]
        assert lengths == cache.lengths * len(engine.groups)
        del other
        while len(tokens) < 60:
            tokens += decode(model, cache, tokens[-1], 1)
        assert joined(*tokens) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prefill_that_runs_out_of_memory_leaves_the_cache_as_it_was(name):
    model = build(name, "cpu")
    inputs = prompts([30, 17], "cpu")
    more = prompts([150, 150], "cpu")["input_ids"]
    pages = {"llama": 40, "gemma3": 60}[name]  # of gemma3 it is the second group that finds none
    with enabled(model, pool=exact_pool("cpu", pages)) as engine, torch.no_grad():
        cache, token = start(model, engine, inputs)
        expected = joined(*decode(model, cache, token, 10))
        cache.crop(-10)
        mapped = mapped_bytes(engine)
        with pytest.raises(va.OutOfPages):
            model(input_ids=more, past_key_values=cache)
        assert (cache.lengths, cache.seen) == ([30, 17], 30)
        assert live_tokens(engine) == 47 * len(engine.groups)
        margin = sum(2 * group.kv.layout.num_regions for group in engine.groups)
        assert mapped_bytes(engine) <= mapped + margin * PAGE_BYTES
        assert joined(*decode(model, cache, token, 10)) == expected
        with pytest.raises(va.OutOfPages):
            start(model, engine, prompts([400, 400], "cpu"))
        assert live_tokens(engine) == 67 * len(engine.groups)


def test_model_that_fails_leaves_the_cache_as_it_was():
    model = make_model("gemma3")
    more = prompts([50, 50], "cpu")["input_ids"]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with enabled(model) as engine, torch.no_grad():
        cache, token = start(model, engine, prompts([30, 17], "cpu"))
        expected = joined(*decode(model, cache, token, 10))
        cache.crop(-10)
        handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        for ids, each in ((more, cache), (more, RaggedCache(engine)), (token, cache)):
            before = list(each.lengths)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(input_ids=ids, past_key_values=each)
            assert each.lengths == before
        handle.remove()
        assert joined(*decode(model, cache, token, 10)) == expected
        assert live_tokens(engine) == 67 * len(engine.groups)


def test_rows_that_are_too_long_are_refused_and_change_nothing(device):
    model = build("llama", device)
    with enabled(model, max_seq_len=32) as engine:
        with pytest.raises(va.SequenceTooLong, match="33 tokens do not fit max_seq_len=32"):
            start(model, engine, prompts([33, 2], device))
        assert live_tokens(engine) == 0
        cache, token = start(model, engine, prompts([20, 6], device, width=40))
        with pytest.raises(va.SequenceTooLong, match="33 tokens"):
            decode(model, cache, token, 20)
        assert cache.lengths == [32, 18]
        with torch.no_grad(), pytest.raises(va.SequenceTooLong, match="34 tokens"):
            model(input_ids=token.expand(2, 2), past_key_values=cache)
        assert cache.lengths == [32, 18]
        cache.crop(-12)
        assert len(decode(model, cache, token, 12)) == 12


def test_more_rows_than_there_is_room_for_are_refused():
    model = build("llama", "cpu")
    with enabled(model, max_batch_size=3) as engine:
        with pytest.raises(va.ConfigError, match="4 rows do not fit max_batch_size=3"):
            start(model, engine, prompts([5] * 4, "cpu"))
        cache, _ = start(model, engine, prompts([5, 6], "cpu"))
        with pytest.raises(va.OutOfSlots):
            generate(model, prompts([5, 6], "cpu"))
        assert live_tokens(engine) == 11
        del cache
        generate(model, prompts([5, 6], "cpu"))


# Nothing is left behind


def test_engine_is_collected_after_disable(device):
    model = make_model("gemma3" if device == "cpu" else "llama", device)
    with enabled(model) as engine:
        generate(model, prompts([12, 5], device))
        held = [weakref.ref(engine), weakref.ref(engine.pool)]
        held += [weakref.ref(group.kv) for group in engine.groups]
    del engine
    gc.collect()
    assert [each() for each in held] == [None] * len(held)
    generate(model, prompts([12, 5], device))


def test_enabled_model_is_collected(device):
    model = make_model("llama", device)
    enable(model, max_batch_size=4, max_seq_len=256, pool=make_pool(device), compile=False)
    generate(model, prompts([12, 5], device))
    engine = model._vattention_engine
    held = [weakref.ref(each) for each in (model, engine, engine.pool, engine.groups[0].kv)]
    configs = configs_of(model)  # hold none of it
    del model, engine
    gc.collect()
    assert [each() for each in held] == [None] * len(held)
    assert configs[0] == configs[-1]


def test_ended_generation_needs_no_collection():
    model = build("llama", "cpu")
    gc.collect()
    gc.disable()
    try:
        with enabled(model) as engine:
            output = generate(model, prompts([12, 5], "cpu"), return_dict_in_generate=True)
            assert live_tokens(engine) == 51 + 44
            del output
            assert live_tokens(engine) == 0
    finally:
        gc.enable()
