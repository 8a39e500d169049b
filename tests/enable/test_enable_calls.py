"""An enabled model that is called by hand, over a cache of its own."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import threading

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from enabled_models import (  # noqa: E402
    build,
    decode,
    enabled,
    exact_pool,
    generate,
    joined,
    live_tokens,
    make_model,
    prompts,
    start,
)
from small_models import VOCAB, WINDOW  # noqa: E402

import vattention as va  # noqa: E402
from vattention.attention.reference import Torch  # noqa: E402
from vattention.integrations.transformers import new_cache  # noqa: E402
from vattention.integrations.transformers.ragged import RaggedCache  # noqa: E402
from vattention.integrations.transformers.versions import CACHE, CACHE_NAMES  # noqa: E402


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([2, -1, 11]), torch.tensor([19])])
@pytest.mark.parametrize("padded", [True, False])
def test_logits_to_keep_equal_before(keep, padded):
    model = build("qwen2", "cpu")
    inputs = prompts([20, 6, 1] if padded else [20, 20, 20], "cpu")
    # A tensor indexes columns, as the model itself has it.
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    real = inputs["attention_mask"].bool()[:, columns]
    with torch.no_grad():
        before = model(**inputs, logits_to_keep=keep).logits
        with enabled(model) as engine:
            cache = RaggedCache(engine)
            ours = model(**inputs, past_key_values=cache, logits_to_keep=keep)
            assert ours.past_key_values is cache
    assert ours.logits.shape == before.shape
    torch.testing.assert_close(ours.logits[real], before[real], rtol=1e-4, atol=1e-4)
    assert not ours.logits[~real].any()


def test_more_tokens_than_a_row_can_have_are_not_expected():
    model = build("llama", "cpu")
    with enabled(model, max_seq_len=64):
        assert new_cache(model, expected_tokens=64).lengths == []
        with pytest.raises(va.ConfigError, match="expected_tokens must be an int from 0 to 64"):
            new_cache(model, expected_tokens=65)


def test_default_device_is_for_others():
    """Numbers that the host reads stay on the host."""
    model = make_model("llama")
    inputs = prompts([9, 4], "cpu")
    before = generate(model, inputs).tolist()
    with torch.device("meta"), enabled(model):
        assert generate(model, inputs).tolist() == before


def test_what_says_nothing_is_taken():
    model = build("llama", "cpu")
    inputs = prompts([9, 4], "cpu")
    with torch.no_grad(), enabled(model):
        wanted = model(**inputs, past_key_values=new_cache(model)).logits
        nothing = {"token_type_ids": None, "output_attentions": False, "mm_encoder_outputs": {}}
        logits = model(**inputs, **nothing, past_key_values=new_cache(model)).logits
        assert torch.equal(logits, wanted)
        with pytest.raises(va.ConfigError, match="does not take mm_encoder_outputs"):
            model(**inputs, mm_encoder_outputs={"image": 1}, past_key_values=new_cache(model))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_cache_is_taken_by_either_name(name):
    model = build("llama", "cpu")
    inputs = prompts([9, 4], "cpu")
    with torch.no_grad():
        before = model(**inputs, logits_to_keep=1).logits
        with enabled(model) as engine:
            cache = RaggedCache(engine)
            ours = model(**inputs, **{name: cache}, logits_to_keep=1)
            assert ours[CACHE] is cache
            assert cache.lengths == [9, 4]
            assert model(**inputs, **{name: RaggedCache(engine)}, return_dict=False)[1].seen == 9
    torch.testing.assert_close(ours.logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_decode_by_hand_equals_generate_before(device, masks, positions):
    model = build("llama", device)
    inputs = prompts([20, 6, 1], device)
    before = generate(model, inputs, max_new_tokens=21)[:, 20:]
    with torch.no_grad(), enabled(model) as engine:
        cache = RaggedCache(engine)
        mask = inputs["attention_mask"]
        where = (mask.cumsum(1) - 1).clamp(min=0)
        more = {"position_ids": where} if positions else {}
        output = model(**inputs, **more, past_key_values=cache)
        tokens = [output.logits[:, -1:].argmax(-1)]
        for _ in range(20):
            mask = torch.cat([mask, torch.ones_like(tokens[0])], dim=1)
            where = where[:, -1:] + 1
            more = {"position_ids": where} if positions else {}
            if masks:
                more["attention_mask"] = mask
            output = model(input_ids=tokens[-1], past_key_values=cache, **more)
            assert output.logits.shape == (3, 1, VOCAB)
            tokens.append(output.logits.argmax(-1))
        assert cache.lengths == [40, 26, 21]
    assert joined(*tokens) == before.tolist()


def test_positions_that_are_not_given_are_those_of_the_rows(device):
    model = build("llama", device)
    with torch.no_grad(), enabled(model) as engine:
        cache, token = start(model, engine, prompts([17], device))
        far = torch.tensor([[100]], device=device)
        model(input_ids=token, past_key_values=cache, position_ids=far)
        ours = model(input_ids=token, past_key_values=cache).logits
        cache.crop(-1)
        near = torch.tensor([[18]], device=device)
        same = model(input_ids=token, past_key_values=cache, position_ids=near).logits
        torch.testing.assert_close(ours, same)


def test_threads_generate_with_one_model(device):
    model = build("llama", device)
    inputs = [prompts([length], device, seed=length) for length in (5, 9, 9, 20)]
    before = [generate(model, each, max_new_tokens=20).tolist() for each in inputs]
    ready = threading.Barrier(len(inputs))

    def run(each):
        ready.wait()
        return [generate(model, each, max_new_tokens=20).tolist() for _ in range(3)]

    with enabled(model), concurrent.futures.ThreadPoolExecutor(len(inputs)) as executor:
        found = list(executor.map(run, inputs))
    assert found == [[tokens] * 3 for tokens in before]


def test_other_caches_are_served_while_another_thread_generates():
    model = build("llama", "cpu")
    inputs = prompts([9, 4], "cpu")
    before = generate(model, inputs).tolist()
    with torch.no_grad():
        logits = model(**inputs).logits
    with enabled(model), concurrent.futures.ThreadPoolExecutor(1) as executor, torch.no_grad():
        ours = executor.submit(generate, model, inputs)
        calls = 0
        while not ours.done() or calls < 10:
            found = model(**inputs).logits
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
            calls += 1
        assert ours.result().tolist() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": [[1, 2]]}, "needs input_ids"),
        ({"attention_mask": [[1, 1]]}, "attention_mask must be a tensor; got a list"),
        ({"position_ids": torch.zeros(2, 3, dtype=torch.long)}, r"position_ids must be \[1, 2\]"),
        ({"position_ids": [[0, 1]]}, "position_ids must be.* got a list"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(arguments, words):
    model = build("llama", "cpu")
    with torch.no_grad(), enabled(model) as engine:
        cache = RaggedCache(engine)
        given = {"input_ids": torch.tensor([[1, 2]]), **arguments}
        with pytest.raises(va.ConfigError, match=words):
            model(**given, past_key_values=cache)
        assert cache.lengths == []


def test_logits_of_a_step_outlive_the_next(device):
    model = build("llama", device)
    with torch.no_grad(), enabled(model) as engine:
        cache, token = start(model, engine, prompts([20, 6, 1], device))
        first = model(input_ids=token, past_key_values=cache).logits
        copy = first.clone()
        model(input_ids=token, past_key_values=cache)
        assert torch.equal(first, copy)


@torch.no_grad()
def test_arguments_may_be_positional_and_outputs_tuples():
    model = build("llama", "cpu")
    inputs = prompts([20, 6], "cpu")
    before = model(**inputs).logits
    with enabled(model) as engine:
        cache = RaggedCache(engine)
        args = (inputs["input_ids"], inputs["attention_mask"], None, cache)
        logits, returned = model(*args, return_dict=False, labels=None, output_attentions=False)
        assert returned is cache
    torch.testing.assert_close(logits[:, -1], before[:, -1], rtol=1e-4, atol=1e-4)


def test_several_tokens_may_be_added_at_once(device):
    model = build("llama", device)
    inputs = prompts([20, 6], device)
    ids = inputs["input_ids"]
    with torch.no_grad(), enabled(model) as engine:
        whole, token = start(model, engine, inputs)
        parts, _ = start(model, engine, {key: value[:, :17] for key, value in inputs.items()})
        last = model(input_ids=ids[:, 17:], past_key_values=parts).logits[:, -1:]
        assert parts.lengths == whole.lengths == [20, 6]
        assert last.argmax(-1).tolist() == token.tolist()
        tokens = [decode(model, cache, token, 10) for cache in (whole, parts)]
    assert joined(*tokens[0]) == joined(*tokens[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 3)}, "labels"),
        ({"inputs_embeds": torch.zeros(2, 3, 32), "input_ids": None}, "inputs_embeds"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": torch.tensor([3, 4])}, "input_ids"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.tensor([[3], [4], [5]])}, "2 rows, input_ids 3"),
        ({"input_ids": torch.tensor([[3]])}, "2 rows, input_ids 1"),
        ({"attention_mask": torch.ones(2, 3)}, r"\[2, 11\].*got \[2, 3\]"),
        ({"attention_mask": torch.ones(2, 1, 3, 11)}, "attention_mask must be"),
        ({"attention_mask": torch.ones(2, 11)}, "cannot be masked afterwards"),
        (
            {"input_ids": torch.tensor([[3], [4]]), "attention_mask": torch.ones(2, 1)},
            r"\[2, 9\].*got \[2, 1\]",
        ),
    ],
)
def test_calls_that_make_no_sense_are_refused_and_change_nothing(change, message):
    model = build("llama", "cpu")
    inputs = prompts([8, 5], "cpu")
    with enabled(model) as engine:
        cache, token = start(model, engine, inputs)
        call = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "past_key_values": cache}
        with torch.no_grad(), pytest.raises(va.ConfigError, match=message):
            model(**call | change)
        assert (cache.lengths, cache.seen) == ([8, 5], 8)
        other, _ = start(model, engine, inputs)
        tokens = [decode(model, each, token, 5) for each in (cache, other)]
        assert joined(*tokens[0]) == joined(*tokens[1])


def test_gradients_are_refused():
    model = build("llama", "cpu")
    with enabled(model) as engine, pytest.raises(va.ConfigError, match="no_grad"):
        model(**prompts([8], "cpu"), past_key_values=RaggedCache(engine))


def test_generations_by_turns_equal_generations_alone(device):
    model = build("llama", device)
    batches = [prompts([20, 6, 1], device), prompts([3, 30, 9], device, seed=4)]
    with enabled(model, max_batch_size=9) as engine:
        alone = []
        for inputs in batches:
            cache, token = start(model, engine, inputs)
            alone.append(joined(*decode(model, cache, token, 20)))
        caches, last = zip(*(start(model, engine, inputs) for inputs in batches), strict=True)
        last = list(last)
        tokens = [[], []]
        for step in range(20):
            for turn in (0, 1) if step % 3 else (1, 0):
                last[turn] = decode(model, caches[turn], last[turn], 1)[0]
                tokens[turn].append(last[turn])
        assert len(engine._decoders) == 1
    assert [joined(*each) for each in tokens] == alone


def test_crop_takes_tokens_back(device):
    model = build("llama", device)
    with enabled(model) as engine:
        cache, token = start(model, engine, prompts([20, 6, 1], device))
        first = decode(model, cache, token, 30)
        cache.crop(-30)
        assert (cache.lengths, cache.seen) == ([20, 6, 1], 20)
        assert joined(*decode(model, cache, token, 30)) == joined(*first)
        cache.crop(40)
        assert cache.lengths == [40, 26, 21]
        again = decode(model, cache, first[19], 10)
        assert joined(*again) == joined(*first[20:])
        with pytest.raises(va.ConfigError, match=r"\[50, 36, 31\].*cannot lose \[32, 32, 32\]"):
            cache.crop(-32)
        assert cache.lengths == [50, 36, 31]


def test_crop_leaves_what_kernels_load_below_a_window(monkeypatch):
    needs = dataclasses.replace(Torch.needs, front_slack_tokens=64)
    monkeypatch.setattr(Torch, "needs", needs)
    model = build("mistral", "cpu")
    with enabled(model, max_seq_len=2048, pool=exact_pool("cpu")) as engine:
        cache, token = start(model, engine, prompts([1000], "cpu"))
        decode(model, cache, token, 300)
        cache.crop(-256)
        (slot,) = cache.slots(0)
        kv = engine.groups[0].kv
        k, _ = kv.layer(0)
        row_bytes = k.stride(1) * k.element_size()
        begin = k[slot].data_ptr()
        mapped = [
            (info.address - begin) // row_bytes
            for info in kv.mappings()
            if begin <= info.address < begin + k.stride(0) * k.element_size()
        ]
        oldest_needed = cache.lengths[0] - WINDOW + 1 - 64
        assert 0 < min(mapped) <= oldest_needed
        with pytest.raises(va.ConfigError, match="window"):
            cache.crop(min(mapped) + WINDOW + 63)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_crop_below_what_a_window_gave_back_is_refused(name):
    model = build(name, "cpu")
    ids = prompts([900], "cpu")["input_ids"]
    with enabled(model, max_seq_len=1024) as engine, torch.no_grad():
        cache, token = start(model, engine, {"input_ids": ids})
        decode(model, cache, token, 1)
        cache.crop(-1)
        for count in (300, 400, 890):
            with pytest.raises(va.ConfigError, match="window"):
                cache.crop(-count)
        assert cache.lengths == [900]
        cache.crop(-200)
        logits = model(input_ids=ids[:, 700:], past_key_values=cache).logits
        assert logits[:, -1:].argmax(-1).tolist() == token.tolist()


def test_reset_ends_all_rows_which_are_neither_rearranged_nor_copied():
    model = build("llama", "cpu")
    with enabled(model) as engine:
        cache, token = start(model, engine, prompts([20, 6, 1], "cpu"))
        first = decode(model, cache, token, 5)
        for call in (
            functools.partial(cache.reorder_cache, torch.tensor([0, 0, 0])),
            functools.partial(cache.batch_repeat_interleave, 2),
            functools.partial(cache.batch_select_indices, [0]),
        ):
            with pytest.raises(NotImplementedError, match="DynamicCache"):
                call()
        for copying in (copy.copy, copy.deepcopy):
            with pytest.raises(va.ConfigError, match="a RaggedCache is not copied"):
                copying(cache)
        cache.reset()
        assert (cache.lengths, cache.get_seq_length(), live_tokens(engine)) == ([], 0, 0)
        with torch.no_grad():
            model(**prompts([20, 6, 1], "cpu"), past_key_values=cache)
        assert joined(*decode(model, cache, token, 5)) == joined(*first)
