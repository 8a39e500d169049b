"""`enable(model)`: `generate()` as before, in the memory of the tokens; `disable` undoes it all."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import vattention as va  # noqa: E402
from vattention.integrations.transformers import (  # noqa: E402
    VAttentionCache,
    disable,
    enable,
    fuse,
    new_cache,
    operator,
    release,
    views,
)
from vattention.integrations.transformers.ragged import RaggedCache  # noqa: E402
from vattention.integrations.transformers.versions import CACHE, CACHE_NAMES  # noqa: E402

PAGE_BYTES = 4096  # of the host backend here: 16 tokens of two layers' K
WINDOW = 16
VOCAB = 97
PAD = 0

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    # Far larger than in trained models, so that each token depends on all that went before.
    initializer_range=0.4,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
    tie_word_embeddings=False,
)
FULL, SLIDING = "full_attention", "sliding_attention"
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    # Fused projections: there is nothing to merge.
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(sliding_window=WINDOW, **SMALL),
    "gemma2": lambda: transformers.Gemma2Config(
        sliding_window=WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, **SMALL
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL],
        **{**SMALL, "num_hidden_layers": 3},
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2, **SMALL
    ),
    # Frequencies that depend on the longest row.
    "dynamic": lambda: transformers.LlamaConfig(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        **{**SMALL, "max_position_embeddings": 24},
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=512, **{**SMALL, "head_dim": None}
    ),
}
NAMES = tuple(CONFIGS)
EAGER = ("gemma2", "gpt_oss")  # what the default attention lacks: softcap, sinks
GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
# In float32 a GPU has no kernel for windows, softcap and sinks.
CASES = [(name, "cpu") for name in NAMES] + [
    pytest.param(name, "cuda", marks=GPU) for name in ("llama", "qwen2", "qwen3", "phi3")
]


@pytest.fixture(autouse=True)
def exact_arithmetic():
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def make_model(
    name: str, device: str = "cpu", attention: str | None = None, seed: int = 0, **changes: Any
) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.update(changes)
    config._attn_implementation = attention or ("eager" if name in EAGER else "sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(device, torch.float32).eval()


build = functools.cache(make_model)


def small(seed: int = 0) -> Any:
    """A model of one layer, which is compiled in less time."""
    return make_model("llama", seed=seed, num_hidden_layers=1)


def page_bytes(device: str) -> int:
    return PAGE_BYTES if device == "cpu" else 2 << 20


def make_pool(device: str, memory: int | str = "512MiB", **options: Any) -> va.Pool:
    if device == "cpu":
        options["page_bytes"] = PAGE_BYTES
    return va.Pool(memory, device, **options)


def exact_pool(device: str, pages: int = 4096) -> va.Pool:
    """A pool that rounds nothing up to large extents and maps nothing ahead."""
    size = page_bytes(device)
    return make_pool(device, pages * size, max_extent=size, background=False)


@contextlib.contextmanager
def enabled(model: Any, **options: Any) -> Iterator[Any]:
    """The engine of a model while it is enabled."""
    options = {"max_batch_size": 8, "max_seq_len": 512, "compile": False, **options}
    if "pool" not in options:
        options["pool"] = make_pool(model.device.type)
    assert enable(model, **options) is model
    try:
        yield model._vattention_engine
    finally:
        disable(model)


def prompts(lengths: list[int], device: str, width: int = 0, seed: int = 3) -> dict[str, Any]:
    """Random prompts of these lengths, padded on the left."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = PAD
        mask[row, width - length :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": 40, "do_sample": False, **options}
    torch.manual_seed(7)
    return model.generate(**inputs, **options)


def assert_as_before(
    model: Any, inputs: dict[str, Any], *, served: bool = True, assistant: Any = None, **options
) -> None:
    """That `generate()` returns the same tokens, and whether it was the engine that ran."""
    before = generate(model, inputs, **options)
    with enabled(model) as engine:
        ours = generate(model, inputs, **options)
        assert (engine.pool.stats().creates > 0) is served
        assert live_tokens(engine) == 0
    assert ours.tolist() == before.tolist()


def live_tokens(engine: Any) -> int:
    return sum(group.kv.stats().live_tokens for group in engine.groups)


def mapped_bytes(engine: Any) -> int:
    return sum(group.kv.stats().mapped_bytes for group in engine.groups)


def token_bytes(engine: Any) -> int:
    return sum(group.kv.layout.token_bytes for group in engine.groups)


@torch.no_grad()
def start(model: Any, engine: Any, inputs: dict[str, Any]) -> tuple[RaggedCache, Any]:
    """A cache that holds a prompt, and the next token of each row."""
    cache = RaggedCache(engine)
    logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
    return cache, logits.argmax(-1)


@torch.no_grad()
def decode(model: Any, cache: Any, token: Any, steps: int, **inputs: Any) -> list[Any]:
    """The tokens that follow, greedily; also those from before an exception: it is a list."""
    tokens = []
    for _ in range(steps):
        token = model(input_ids=token, past_key_values=cache, **inputs).logits.argmax(-1)
        tokens.append(token)
    return tokens


def joined(*tokens: Any) -> list[list[int]]:
    return torch.cat(tokens, dim=1).tolist()


# The same tokens


@pytest.mark.parametrize(("name", "device"), CASES)
def test_tokens_logits_and_scores_equal_before(name, device):
    model = build(name, device)
    inputs = prompts([21, 14, 1], device)
    options = dict(return_dict_in_generate=True, output_logits=True, output_scores=True)
    options |= dict(max_new_tokens=70, repetition_penalty=1.2)
    before = generate(model, inputs, **options)
    with enabled(model) as engine:
        ours = generate(model, inputs, **options)
        assert engine.groups[0].kv.stats().steps > 60
        assert isinstance(ours.past_key_values, RaggedCache)
        assert ours.past_key_values.lengths == [90, 83, 70]
    assert ours.sequences.tolist() == before.sequences.tolist()
    for kind in ("logits", "scores"):
        torch.testing.assert_close(
            torch.stack(ours[kind]), torch.stack(before[kind]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_equal_before_without_mask(name):
    inputs = {"input_ids": prompts([20, 20], "cpu")["input_ids"]}
    assert_as_before(build(name, "cpu"), inputs)


def test_tokens_equal_before_where_the_mask_has_holes(device):
    inputs = prompts([20, 15], device)
    inputs["attention_mask"][0, 4:7] = 0
    inputs["attention_mask"][1, 12] = 0
    assert_as_before(build("llama", device), inputs)
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    assert_as_before(build("llama", device), inputs)


def test_inference_mode_comes_and_goes(device):
    model = build("llama", device)
    inputs = prompts([20, 5], device)
    before = generate(model, inputs).tolist()
    with enabled(model):
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                assert generate(model, inputs).tolist() == before


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("llama", "cpu"),
        ("gemma3", "cpu"),
        ("dynamic", "cpu"),
        pytest.param("llama", "cuda", marks=GPU),
    ],
)
def test_batches_one_after_another_equal_before(name, device):
    model = build(name, device)
    batches = [[9], [30, 2, 17], [3, 40], [5] * 8, [60, 1, 1, 7], [2, 20, 3], [33], [1] * 5]
    batches = [prompts(lengths, device, seed=seed) for seed, lengths in enumerate(batches)]
    before = [generate(model, inputs, max_new_tokens=20).tolist() for inputs in batches]
    with enabled(model) as engine:
        ours = [generate(model, inputs, max_new_tokens=20).tolist() for inputs in batches]
        assert ours == before
        assert {rows for rows, _ in engine._decoders} == {1, 2, 4, 8}
        made = list(engine._decoders.values())
        assert generate(model, batches[1], max_new_tokens=20).tolist() == before[1]
        assert list(engine._decoders.values()) == made


def test_long_text_equals_before(device):
    assert_as_before(build("llama", device), prompts([40, 3], device), max_new_tokens=400)


def test_sampled_tokens_equal_before_same_seed(device):
    inputs = prompts([12, 5], device)
    options = dict(do_sample=True, num_return_sequences=3, top_k=20, temperature=1.3)
    assert_as_before(build("llama", device), inputs, **options)


def test_sampling_leaves_the_generator_as_before():
    model = build("llama", "cpu")
    inputs = prompts([12, 5], "cpu")
    generate(model, inputs, do_sample=True)
    before = torch.get_rng_state()
    with enabled(model):
        torch.manual_seed(0)
        generate(model, inputs, do_sample=True)
        assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_end_at_different_times_equal_before(device):
    model = build("llama", device)
    inputs = prompts([12, 5, 9], device)
    free = generate(model, inputs, max_new_tokens=60)[:, 12:].tolist()
    ends = [free[0][5], free[1][17], free[2][31]]
    options = dict(eos_token_id=ends, max_new_tokens=60)
    before = generate(model, inputs, **options)
    lengths = (before[:, 12:] != PAD).sum(1).tolist()
    assert len(set(lengths)) > 1 and max(lengths) < 60
    assert_as_before(model, inputs, **options)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    with enabled(model):
        ours = generate(model, inputs, **options)
        assert ours.sequences.tolist() == before.tolist()
        assert len(ours.logits) == max(lengths)
        assert ours.past_key_values.get_seq_length() == before.shape[1] - 1


class Notes(transformers.generation.streamers.BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def test_streamer_gets_what_it_got_before(device):
    model = build("llama", device)
    inputs = prompts([12], device)
    end = generate(model, inputs)[0, 30].item()
    for options in ({}, {"eos_token_id": end}):
        before, ours = Notes(), Notes()
        generate(model, inputs, streamer=before, **options)
        with enabled(model):
            generate(model, inputs, streamer=ours, **options)
        assert ours.got == before.got


class StopAt(transformers.StoppingCriteria):
    """Ends a row of so many tokens, counted differently for each."""

    def __call__(self, input_ids, scores, **_):
        row = torch.arange(input_ids.shape[0], device=input_ids.device)
        return input_ids.shape[1] >= 20 + 7 * row


def test_stopping_criteria_and_limits_equal_before(device):
    model = build("llama", device)
    inputs = prompts([12, 5, 9], device)
    for options in (
        {"stopping_criteria": [StopAt()], "eos_token_id": VOCAB - 1},
        {"max_new_tokens": None, "max_length": 31},
        {"min_new_tokens": 10, "eos_token_id": list(range(2, 50))},
        {"max_new_tokens": 1},
    ):
        assert_as_before(model, inputs, **options)


def test_max_length_may_be_all_of_max_seq_len(device):
    model = build("llama", device)
    inputs = prompts([12, 5], device)
    options = {"max_new_tokens": None, "max_length": 32}
    before = generate(model, inputs, **options)
    # The last token is not fed.
    with enabled(model, max_seq_len=31) as engine:
        assert generate(model, inputs, **options).tolist() == before.tolist()
        assert engine.pool.stats().creates > 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("size", [1, 7])
def test_prefill_in_chunks_equals_before(name, size):
    # Of the second row whole chunks are padding.
    model = build(name, "cpu")
    assert_as_before(model, prompts([40, 9, 33], "cpu"), prefill_chunk_size=size)


def test_prefill_in_chunks_that_are_all_padding_equals_before():
    inputs = prompts([9, 5], "cpu", width=20)
    assert_as_before(build("llama", "cpu"), inputs, prefill_chunk_size=4)


@pytest.mark.parametrize(
    ("name", "device"),
    [("llama", "cpu"), ("gemma3", "cpu"), pytest.param("llama", "cuda", marks=GPU)],
)
def test_continued_chat_equals_before(name, device):
    model = build(name, device)
    before = chat(model, device)
    with enabled(model) as engine:
        assert chat(model, device) == before
        assert live_tokens(engine) == 0


def chat(model: Any, device: str) -> list[list[int]]:
    """Three turns, each over the cache that the turn before has returned."""
    inputs, cache = prompts([12, 7], device), None
    for turn in range(3):
        answer = generate(
            model,
            inputs,
            past_key_values=cache,
            max_new_tokens=30 + turn,
            return_dict_in_generate=True,
        )
        ids, cache = answer.sequences, answer.past_key_values
        mask = torch.ones_like(ids)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        more = prompts([11 - 10 * (turn == 1)] * 2, device, seed=turn)["input_ids"]
        inputs = {
            "input_ids": torch.cat([ids, more], dim=1),
            "attention_mask": torch.cat([mask, torch.ones_like(more)], dim=1),
        }
    assert cache.get_seq_length() > 100
    return ids.tolist()


def test_checkpoints_that_ask_for_a_hybrid_cache_are_served():
    model = make_model("gemma3")
    model.generation_config.cache_implementation = "hybrid"
    assert_as_before(model, prompts([12, 5], "cpu"))


# A mask on the right


def test_right_padding_equals_before_where_tokens_are(device):
    model = build("llama", device)
    inputs = prompts([12, 12, 12], device)
    inputs["attention_mask"][1, 5:] = 0
    inputs["attention_mask"][2, 11:] = 0
    real = inputs["attention_mask"].bool()
    token = torch.tensor([[5], [6], [7]], device=device)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    positions = mask.cumsum(1) - 1
    reference = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), enabled(model) as engine:
        cache = RaggedCache(engine)
        logits = [model(**inputs, past_key_values=each).logits for each in (cache, reference)]
        torch.testing.assert_close(logits[0][real], logits[1][real], rtol=1e-4, atol=1e-4)
        assert not logits[0][~real].any()
        assert cache.lengths == [12, 5, 11]
        more = dict(input_ids=token, attention_mask=mask, position_ids=positions[:, -1:])
        logits = [model(**more, past_key_values=each).logits for each in (cache, reference)]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_after_padding_on_the_right_the_next_token_is_that_of_the_last_real_one(device):
    model = build("llama", device)
    inputs = prompts([12, 12], device)
    inputs["attention_mask"][1, 5:] = 0
    shorter = {name: tensor[1:, :5] for name, tensor in inputs.items()}
    with enabled(model):
        # Of more than one, transformers gets the positions wrong.
        padded = generate(model, inputs, max_new_tokens=1).tolist()
        assert padded[1][12:] == generate(model, shorter, max_new_tokens=1).tolist()[0][5:]


def test_rows_of_padding_alone_begin_with_what_comes_next():
    model = build("llama", "cpu")
    inputs = prompts([12, 0], "cpu")
    with enabled(model) as engine:
        cache, _ = start(model, engine, inputs)
        assert cache.lengths == [12, 0]
        tokens = decode(model, cache, torch.tensor([[5], [6]]), 10)
        assert cache.lengths == [22, 10]
        alone, _ = start(model, engine, {"input_ids": torch.tensor([[6]])})
        # The row took its tokens as the others took theirs.
        expected = decode(model, alone, tokens[0][1:], 9)
    assert joined(*tokens[1:])[1:] == joined(*expected)


# Calls of the model itself


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
        with pytest.raises(va.ConfigError, match=r"\[50, 36, 31\].*cannot lose 32"):
            cache.crop(-32)
        assert cache.lengths == [50, 36, 31]


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


def test_reset_ends_all_rows_and_rows_cannot_be_rearranged():
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
        cache.reset()
        assert (cache.lengths, cache.get_seq_length(), live_tokens(engine)) == ([], 0, 0)
        with torch.no_grad():
            model(**prompts([20, 6, 1], "cpu"), past_key_values=cache)
        assert joined(*decode(model, cache, token, 5)) == joined(*first)


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


# What is not served runs as before


@pytest.mark.parametrize("kind", ["too_long", "too_many"])
def test_generate_beyond_the_limits_runs_as_before(kind):
    model = build("llama", "cpu")
    inputs = prompts([20, 6], "cpu")
    before = generate(model, inputs)
    limits = {"max_seq_len": 58} if kind == "too_long" else {"max_batch_size": 1}
    with enabled(model, **limits) as engine:
        assert generate(model, inputs).tolist() == before.tolist()
        assert engine.pool.stats().creates == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": "other"},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_hidden_states": True},
    ],
    ids=str,
)
def test_other_ways_of_generating_run_as_before(options):
    inputs = prompts([12], "cpu")
    if options.get("assistant_model") == "other":
        options = {"assistant_model": build("qwen2", "cpu")}
    assert_as_before(build("llama", "cpu"), inputs, served=False, **options)


def test_attentions_are_returned_as_before():
    model = make_model("llama", attention="eager")
    inputs = prompts([12, 5], "cpu")
    options = dict(max_new_tokens=5, output_attentions=True, return_dict_in_generate=True)
    before = generate(model, inputs, **options)
    with enabled(model) as engine:
        ours = generate(model, inputs, **options)
        assert engine.pool.stats().creates == 0
    assert ours.sequences.tolist() == before.sequences.tolist()
    # To rounding: linears stay merged.
    torch.testing.assert_close(ours.attentions[4][1], before.attentions[4][1])


def test_embeddings_as_input_run_as_before():
    model = build("llama", "cpu")
    inputs = prompts([12, 5], "cpu")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_as_before(model, inputs, served=False)


@pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
def test_cache_of_the_caller_runs_as_before(kind):
    model = build("llama", "cpu")
    inputs = prompts([12, 5], "cpu")
    before = generate(model, inputs)
    make = {
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=64),
        "ours": lambda: VAttentionCache(
            model.config, max_batch_size=2, max_seq_len=64, memory="64MiB"
        ),
    }[kind]
    with enabled(model) as engine:
        cache = make()
        assert generate(model, inputs, past_key_values=cache).tolist() == before.tolist()
        assert int(cache.get_seq_length()) == 51
        assert engine.pool.stats().creates == 0


def test_assistant_that_is_enabled_assists_as_before():
    model, assistant = build("llama", "cpu"), make_model("llama", seed=1)
    before = generate(model, prompts([12], "cpu"))
    with enabled(assistant) as theirs, enabled(model) as engine:
        ours = generate(model, prompts([12], "cpu"), assistant_model=assistant)
        assert engine.pool.stats().creates == theirs.pool.stats().creates == 0
        generate(assistant, prompts([12], "cpu"))
        assert theirs.pool.stats().creates > 0
    assert ours.tolist() == before.tolist()


def test_training_runs_as_before(device):
    ids = prompts([20, 20], device)["input_ids"]
    model, plain = make_model("qwen2", device), make_model("qwen2", device)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain)]
    inputs = prompts([12, 5], device)
    first = generate(plain, inputs).tolist()
    with enabled(model):
        assert generate(model, inputs).tolist() == first
        for _ in range(2):
            for each, optimizer in zip((model, plain), optimizers, strict=True):
                optimizer.zero_grad()
                each.train()
                each(input_ids=ids, labels=ids).loss.backward()
                each.eval()
            for (name, ours), theirs in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                assert ours.grad is not None and ours.grad.abs().max() > 0, name
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
            for optimizer in optimizers:
                optimizer.step()
            # By the new weights, which the optimizer has changed in place.
            trained = generate(plain, inputs).tolist()
            assert trained != first
            assert generate(model, inputs).tolist() == trained
            assert release(model) > 0
    assert generate(model, inputs).tolist() == trained


def test_direct_calls_with_other_caches_run_as_before():
    model = build("qwen2", "cpu")
    inputs = prompts([12, 12], "cpu")
    before = model(**inputs).logits
    with enabled(model) as engine:
        outputs = model(**inputs, use_cache=True, output_hidden_states=True)
        assert isinstance(outputs.past_key_values, transformers.DynamicCache)
        assert len(outputs.hidden_states) == 3
        assert outputs.logits.requires_grad
        torch.testing.assert_close(outputs.logits, before)
        torch.testing.assert_close(model(inputs["input_ids"]).logits, before)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, before)
        assert engine.pool.stats().creates == 0


# What cannot be enabled


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        decoder_start_token_id=PAD,
        eos_token_id=None,
    )
    return transformers.T5ForConditionalGeneration(config)


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        kv_lora_rank=24,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        **{**SMALL, "num_key_value_heads": 4, "head_dim": 8},
    )
    return transformers.DeepseekV3ForCausalLM(config)


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=None
    )
    return transformers.MambaForCausalLM(config)


def lfm2() -> Any:
    config = transformers.Lfm2Config(
        layer_types=["conv", FULL], **{**SMALL, "tie_word_embeddings": True}
    )
    return transformers.Lfm2ForCausalLM(config)


def llama4() -> Any:
    config = transformers.Llama4TextConfig(
        attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=48, **SMALL
    )
    return transformers.Llama4ForCausalLM(config)


def hrm() -> Any:
    if not hasattr(transformers, "HrmTextConfig"):
        pytest.skip("this transformers has no HRM")
    return transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**SMALL))


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
        eos_token_id=None,
    )
    return transformers.BertLMHeadModel(config)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (t5, "T5ForConditionalGeneration has an encoder"),
        (deepseek, "DeepseekV3ForCausalLM: K and V are changed"),
        (mamba, "MambaForCausalLM's cannot"),
        (lfm2, "Lfm2ForCausalLM"),
        (llama4, "Llama4ForCausalLM: it has chunked_attention layers"),
        (hrm, "HrmTextForCausalLM: one attention module serves several layers"),
        (bert, "BertLMHeadModel: its attention is not causal"),
    ],
)
def test_model_that_cannot_be_served_says_why_and_is_as_it_was(make, why):
    torch.manual_seed(0)
    model = make().eval()
    inputs = prompts([12, 12], "cpu")
    before, state = generate(model, inputs, max_new_tokens=10), state_of(model)
    with pytest.raises(va.ConfigError, match=why):
        enable(model, memory="64MiB")
    assert state_of(model) == state
    assert generate(model, inputs, max_new_tokens=10).tolist() == before.tolist()
    with pytest.raises(va.ConfigError, match="not enabled"):
        disable(model)


def state_of(model: Any) -> dict[str, Any]:
    """All that `enable` might change of a model's modules and configs."""
    modules = {
        name: (sorted(vars(module)), id(vars(module).get("forward")), list(module._buffers))
        for name, module in model.named_modules()
    }
    parameters = {name: id(value) for name, value in model.named_parameters()}
    implementations = [
        module.config._attn_implementation
        for module in model.modules()
        if hasattr(module, "config")
    ]
    return {"modules": modules, "parameters": parameters, "implementations": implementations}


@pytest.mark.parametrize(
    "model", [None, "llama", torch.nn.Linear(2, 2), transformers.LlamaConfig()], ids=str
)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(va.ConfigError, match="causal models"):
        enable(model)
    for undo in (disable, release):
        with pytest.raises(va.ConfigError, match="not enabled"):
            undo(model)


def test_model_without_a_head_is_refused():
    with pytest.raises(va.ConfigError, match="LlamaModel is none"):
        enable(build("llama", "cpu").model, memory="64MiB")


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 0},
        {"max_batch_size": 1.5},
        {"max_seq_len": 0},
        {"max_seq_len": "long"},
        {"memory": "lots"},
        {"memory": "64MiB", "pool": "a pool"},
        {"pool": "a pool"},
        {"order": "sideways"},
        {"backend": "fast"},
        {"backend": "torch_efficient"},
        {"graphs": 1},
        {"compile": None},
        {"merge": "yes"},
    ],
    ids=str,
)
def test_bad_argument_raises_and_changes_nothing(options):
    model = build("llama", "cpu")
    state = state_of(model)
    with pytest.raises(va.ConfigError):
        enable(model, **{"memory": "64MiB"} | options if "pool" not in options else options)
    assert state_of(model) == state


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_attention_that_no_kernel_computes_is_refused(name):
    model = build(name, "cuda")
    state, before = state_of(model), generate(model, prompts([12, 5], "cuda"))
    with pytest.raises(va.ConfigError, match="no attention backend can run here"):
        enable(model, memory="64MiB")
    assert state_of(model) == state
    assert generate(model, prompts([12, 5], "cuda")).tolist() == before.tolist()


@pytest.mark.gpu
def test_pool_of_another_device_is_refused():
    with pytest.raises(va.ConfigError, match="on cuda:0, the pool on cpu"):
        enable(build("llama", "cuda"), pool=make_pool("cpu"))


def test_failure_while_linears_are_merged_changes_nothing(monkeypatch):
    model = make_model("llama")
    state, merged = state_of(model), fuse._Merged
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    done = []

    def fail_late(linears: list[Any]) -> Any:
        if len(done) == 2:
            raise torch.OutOfMemoryError("no memory")
        done.append(merged(linears))
        return done[-1]

    monkeypatch.setattr(fuse, "_Merged", fail_late)
    with pytest.raises(torch.OutOfMemoryError):
        enable(model, memory="64MiB")
    assert len(done) == 2
    assert state_of(model) == state
    assert_weights_are_their_own(model, weights)


def test_enabling_twice_and_disabling_twice_are_refused():
    model = make_model("llama")
    with enabled(model) as engine:
        with pytest.raises(va.ConfigError, match="enabled already"):
            enable(model, memory="64MiB")
        assert model._vattention_engine is engine
        generate(model, prompts([12], "cpu"))
    for undo in (disable, release):
        with pytest.raises(va.ConfigError, match="not enabled"):
            undo(model)
    with enabled(model):
        generate(model, prompts([12], "cpu"))


def test_models_are_enabled_independently_and_may_share_a_pool(device):
    models = [make_model(name, device) for name in ("llama", "qwen2")]
    inputs = prompts([12, 5], device)
    before = [generate(model, inputs).tolist() for model in models]
    pool = make_pool(device)
    with enabled(models[0], pool=pool) as first:
        with enabled(models[1], pool=pool):
            assert [generate(model, inputs).tolist() for model in models] == before
            cache, _ = start(models[0], first, inputs)
            with torch.no_grad(), pytest.raises(va.ConfigError, match="another model"):
                models[1](**inputs, past_key_values=cache)
        assert [generate(model, inputs).tolist() for model in models] == before
    assert generate(models[0], inputs).tolist() == before[0]


# disable() undoes everything


def assert_weights_are_their_own(model: Any, weights: dict[str, Any]) -> None:
    assert list(model.state_dict()) == list(weights)
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name]), name
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "gpt_oss"])
def test_disable_leaves_the_model_as_it_was(name):
    model = make_model(name)
    inputs = prompts([12, 5], "cpu")
    before, state = generate(model, inputs), state_of(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    pool = make_pool("cpu")
    enable(model, pool=pool, max_batch_size=4, max_seq_len=256)
    generate(model, inputs)
    assert list(model.state_dict()) == list(weights)
    assert model.config.to_dict() == config
    assert disable(model) is model
    assert pool.stats().held_bytes == 0
    assert state_of(model) == state
    assert_weights_are_their_own(model, weights)
    assert "forward" not in vars(model)
    assert generate(model, inputs).tolist() == before.tolist()


def test_disable_gives_back_a_forward_of_another(device):
    model = make_model("llama", device)
    before = generate(model, prompts([12, 5], device))
    calls, original = [], model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = forward
    with enabled(model):
        assert model.forward is not forward
        del calls[:]
        assert generate(model, prompts([12, 5], device)).tolist() == before.tolist()
        assert calls
    assert vars(model)["forward"] is forward


def test_cache_from_before_disable_is_refused_afterwards():
    model = make_model("llama")
    inputs = prompts([12, 5], "cpu")
    with enabled(model) as engine:
        cache, token = start(model, engine, inputs)
    with torch.no_grad():
        with pytest.raises(va.ConfigError, match="disabled"):
            model(input_ids=token, past_key_values=cache)
        with pytest.raises(va.ConfigError, match="disabled"):
            generate(model, inputs, past_key_values=cache)
        with enabled(model):
            for call in (
                functools.partial(model, input_ids=token),
                functools.partial(generate, model, inputs),
            ):
                with pytest.raises(va.ConfigError, match="disabled"):
                    call(past_key_values=cache)
        with pytest.raises(va.Closed):
            cache.crop(-1)


def test_layers_called_by_hand_say_whose_they_are():
    query = torch.zeros(1, 4, 1, 16)
    which = operator.handle(operator.register(torch.nn.Identity()), 0)
    with pytest.raises(RuntimeError, match="call the model, not its layers"):
        torch.ops.vattention.append_and_attend(query, query, query, which, None)


def test_saved_while_enabled_loads_as_before(tmp_path):
    model = make_model("qwen2")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with enabled(model):
        model.save_pretrained(tmp_path / "model")
        torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    state = torch.load(tmp_path / "state.pt")
    for found in (loaded.state_dict(), state):
        assert list(found) == list(weights)
        assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert "vattention" not in (tmp_path / "model" / "config.json").read_text()


def test_weights_loaded_while_enabled_are_used():
    model, other = make_model("qwen2"), build("qwen2", "cpu", seed=1)
    inputs = prompts([12, 5], "cpu")
    expected = generate(other, inputs).tolist()
    with enabled(model):
        assert generate(model, inputs).tolist() != expected
        model.load_state_dict(other.state_dict())
        assert generate(model, inputs).tolist() == expected
    assert generate(model, inputs).tolist() == expected


# Merged linears


def storage_bytes(model: Any) -> int:
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in model.parameters()
    }
    return sum(storages.values())


@pytest.mark.parametrize(("name", "merged"), [("llama", 4), ("qwen2", 4), ("phi3", 0)])
def test_merged_linears_take_no_memory_and_compute_the_same(name, merged):
    model = make_model(name)
    inputs = prompts([20, 20], "cpu")
    before = storage_bytes(model)
    with torch.no_grad():
        logits = model(**inputs).logits
        for merge in (True, False):
            with enabled(model, merge=merge) as engine:
                changed = [m for m in model.modules() if "forward" in vars(m) and m is not model]
                assert len(engine._merged) == merged * merge
                assert len(changed) == 5 * merged * merge // 2
                assert all(type(module) is torch.nn.Linear for module in changed)
                assert storage_bytes(model) == before
                torch.testing.assert_close(model(**inputs).logits, logits)


@torch.no_grad()
def test_merged_linears_may_be_called_in_any_order_and_with_other_inputs():
    model = make_model("qwen2")
    attention = model.model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, y = torch.randn(2, 3, 5, 32)
    expected = [[linear(z) for z in (x, y)] for linear in linears]
    with enabled(model):
        for calls in ([(0, 0), (1, 0), (2, 0)], [(0, 0), (0, 1), (1, 1), (1, 0), (2, 1), (2, 0)]):
            for which, z in calls + calls[::-1]:
                output = linears[which]((x, y)[z])
                torch.testing.assert_close(output, expected[which][z])


def hook(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, y: y * 2)


def prehook(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, x: (x[0] * 2,))


def subclass(model: Any) -> None:
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum(-1, keepdim=True)

    model.model.layers[0].self_attn.q_proj.__class__ = Adapted


def wrapped(model: Any) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(linear, torch.nn.Tanh())


def own_forward(model: Any) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    original = linear.forward
    linear.forward = lambda x: original(x).tanh()


def other_dtype_of_parameter(model: Any) -> None:
    class Quantized(torch.nn.Parameter):
        pass

    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = Quantized(linear.weight.data * 2)


@pytest.mark.parametrize(
    "adapt", [hook, prehook, subclass, wrapped, own_forward, other_dtype_of_parameter]
)
def test_linears_that_are_more_than_linears_are_left_alone(adapt):
    model = make_model("llama")
    plain = generate(model, prompts([12, 5], "cpu")).tolist()
    adapt(model)
    before, state = generate(model, prompts([12, 5], "cpu")).tolist(), state_of(model)
    assert before != plain
    with enabled(model) as engine:
        assert len(engine._merged) == 3
        attention = model.model.layers[0].self_attn
        assert "forward" not in vars(attention.k_proj)
        assert generate(model, prompts([12, 5], "cpu")).tolist() == before
    assert state_of(model) == state


# The configs of its modules


def llava() -> Any:
    """A model with a part beside the text's that attends, and has a config of its own."""
    torch.manual_seed(0)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1}),
        vision_config=transformers.CLIPVisionConfig(intermediate_size=48, patch_size=14, **vision),
        image_token_index=VOCAB - 1,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def configs_of(model: Any) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def assert_same_objects(found: list[Any], wanted: list[Any]) -> None:
    assert [id(each) for each in found] == [id(each) for each in wanted]


def test_configs_are_as_before_while_enabled():
    model = make_model("gpt2")  # some of its attributes have two names
    config, before = model.config, configs_of(model)
    text, size = repr(config), config.hidden_size
    with enabled(model):
        assert model.config is config and type(config) is transformers.GPT2Config
        inner = model.transformer.config
        assert inner is model.transformer.h[0].attn.config is not config
        assert isinstance(inner, transformers.GPT2Config)
        assert inner == config and config == inner and inner != transformers.GPT2Config()
        assert repr(inner) == repr(config) == text and list(inner) == list(config)
        assert inner.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
        assert inner._attn_implementation == config._attn_implementation == "sdpa"
        assert inner.hidden_size == inner.n_embd == size
        for one, other in ((inner, config), (config, inner)):
            one.hidden_size, one.anything = 7, 3
            assert other.hidden_size == other.n_embd == one.n_embd == 7 and other.anything == 3
            other.n_embd = size
            del other.anything
            assert one.hidden_size == size and not hasattr(one, "anything")
            with pytest.raises(Exception, match="vocab_size"):
                one.vocab_size = "many"
        for made in (copy.copy(inner), copy.deepcopy(inner), pickle.loads(pickle.dumps(inner))):
            assert type(made) is transformers.GPT2Config and made == config
            made.n_embd = 5
            assert config.n_embd == inner.n_embd == size
    assert_same_objects(configs_of(model), before)
    assert repr(config) == text


def test_configs_in_configs_are_told_of_too(compiler):
    model = llava()
    inputs, before = prompts([20, 5], "cpu"), configs_of(model)
    expected, text = generate(model, inputs, max_new_tokens=6).tolist(), repr(model.config)
    with enabled(model):
        inner, part = model.model.config, model.config.text_config
        assert inner.text_config is model.model.language_model.config is inner.get_text_config()
        assert inner.text_config is not part and inner.text_config == part
        assert repr(inner) == repr(model.config) == text
        call = torch.compile(model, backend=compiler, fullgraph=True)
        for each in (call, model):
            assert last(loop(each, new_cache(model), inputs, 6)) == expected
        inner.text_config = other = transformers.LlamaConfig()
        assert inner.text_config is model.config.text_config is other
        model.config.text_config = part
        assert inner.text_config is model.model.language_model.config
    assert_same_objects(configs_of(model), before)


def test_attributes_of_layers_are_not_read_from_all_of_them():
    if not hasattr(transformers.LlamaConfig, "per_layer_config"):
        pytest.skip("configs of this transformers are the same for all layers")
    model = torch.nn.Sequential(torch.nn.Identity())
    config = transformers.LlamaConfig(per_layer_config={0: {"intermediate_size": 24}})
    model[0].config = config
    replaced = views.replace_configs(model, views.Override("other"))
    assert model[0].config._attn_implementation == "other"
    with pytest.raises(RuntimeError, match="per-layer"):
        model[0].config.intermediate_size  # noqa: B018
    views.restore_configs(replaced)
    assert model[0].config is config


def test_config_that_somebody_gave_a_module_stays():
    model, other = make_model("llama"), CONFIGS["llama"]()
    config = model.config
    with enabled(model):
        model.model.layers[0].self_attn.config = other
    assert model.model.layers[0].self_attn.config is other
    assert model.model.layers[1].self_attn.config is model.model.config is config


@pytest.mark.parametrize("make", [small, llava])
def test_attention_may_be_chosen_while_enabled(make):
    model = make()
    text, inputs = repr(model.config), prompts([12, 5], "cpu")
    before = generate(model, inputs).tolist()
    parts, held = list(model.config.sub_configs), configs_of(model)
    with enabled(model):
        choose = model.set_attn_implementation
        for choice in ("eager", {"": "eager", **dict.fromkeys(parts, "sdpa")}):
            wanted = [choice] * 3 if isinstance(choice, str) else list(choice.values())
            choose(choice)
            configs = [model.config] + [getattr(model.config, part) for part in parts]
            found = [config._attn_implementation for config in configs]
            assert found == wanted[: len(found)]
            assert {config._attn_implementation for config in configs_of(model)} == set(found)
            assert last(loop(model, new_cache(model), inputs, 40)) == before
    assert "set_attn_implementation" not in vars(model)
    assert {config._attn_implementation for config in held} == set(found)
    choose("sdpa")  # kept by somebody
    assert_same_objects(configs_of(model), held)
    assert repr(model.config) == text


@torch.no_grad()
def test_other_model_of_the_same_config_runs_as_before_also_meanwhile():
    config = CONFIGS["llama"]()
    model, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    ids = prompts([12], "cpu")["input_ids"]
    expected, logits = generate(model, {"input_ids": ids}).tolist(), []
    before = other(input_ids=ids).logits
    hook = model.model.layers[0].register_forward_hook(
        lambda *_: logits.append(other(input_ids=ids).logits)
    )
    with enabled(model):
        assert generate(model, {"input_ids": ids}).tolist() == expected
        with enabled(other):
            assert generate(other, {"input_ids": ids}).shape == (1, 52)
            assert generate(model, {"input_ids": ids}).tolist() == expected
    hook.remove()
    assert len(logits) == 80 + 1
    for each in logits:
        torch.testing.assert_close(each, before)


def test_model_made_of_a_config_of_an_enabled_one_may_be_enabled():
    model, inputs = make_model("llama"), prompts([12, 5], "cpu")
    with enabled(model):
        torch.manual_seed(1)
        other = transformers.LlamaForCausalLM(model.model.config).eval()
        held = configs_of(other)
        assert_as_before(other, inputs)
        assert_same_objects(configs_of(other), held)
    assert_as_before(other, inputs)


# Compilers and graphs


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_layers_compile_to_one_graph_without_breaks(name):
    model = make_model(name)
    inputs = prompts([12, 5, 3], "cpu")
    before = generate(model, inputs, max_new_tokens=8).tolist()
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with enabled(model) as engine:
        cache, token = start(model, engine, inputs)
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
        tokens = decode(model, cache, token, 3)
        assert counters["stats"]["unique_graphs"] == 1
        other, again = start_again(model, engine, inputs)
        tokens_again = decode(model, other, again, 7)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        for layer in model.model.layers:
            del layer.forward
    assert joined(inputs["input_ids"], token, *tokens_again) == before
    assert joined(*tokens) == joined(*tokens_again[:3])
    torch._dynamo.reset()


def start_again(model: Any, engine: Any, inputs: dict[str, Any]) -> tuple[RaggedCache, Any]:
    """`start` by the code of the layers, not by what was compiled of it."""
    compiled = [layer.forward for layer in model.model.layers]
    for layer in model.model.layers:
        del layer.forward
    try:
        return start(model, engine, inputs)
    finally:
        for layer, forward in zip(model.model.layers, compiled, strict=True):
            layer.forward = forward


class Plain:
    """A step that attends to nothing but what it is given."""

    def attend(self, layer, q, k, v, sinks):
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return output.transpose(1, 2).contiguous()


@pytest.mark.parametrize("v_dim", [16, 8])
def test_operator_is_what_compilers_are_told(device, v_dim):
    owner = torch.nn.Identity()
    number = operator.register(owner)
    q = torch.randn(2, 4, 3, 16, device=device)
    k = torch.randn(2, 2, 3, 16, device=device)
    v = torch.randn(2, 2, 3, v_dim, device=device)
    operator.set_step(number, Plain())
    try:
        for sinks in (None, torch.zeros(4, device=device)):
            args = (q, k, v, operator.handle(number, 1), sinks)
            torch.library.opcheck(torch.ops.vattention.append_and_attend.default, args)
    finally:
        operator.set_step(number, None)


# The whole model compiled by the caller


@pytest.fixture
def compiler():
    """What compiles without breaks, and counts graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


@torch.no_grad()
def loop(call: Any, cache: Any, inputs: dict[str, Any], steps: int) -> Iterator[list[list[int]]]:
    """Prompt and tokens so far, after each call of a loop written by hand."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    token = ids
    for _ in range(steps):
        masked = {} if mask is None else {"attention_mask": mask}
        output = call(input_ids=token, past_key_values=cache, use_cache=True, **masked)
        assert output.past_key_values is cache
        token = output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        yield ids.tolist()


def last(tokens: Iterator[list[list[int]]]) -> list[list[int]]:
    return list(tokens)[-1]


@pytest.mark.parametrize(("name", "masked"), [("llama", True), ("gemma2", False)])
def test_compiled_model_has_a_graph_for_prompts_and_one_for_steps(name, masked, compiler):
    model = build(name, "cpu")
    lengths = [20, 7, 1] if masked else [20, 20]
    inputs = prompts(lengths, "cpu")
    before = generate(model, inputs, max_new_tokens=90).tolist()
    if not masked:
        del inputs["attention_mask"]
    with enabled(model, pool=exact_pool("cpu")) as engine:
        call = torch.compile(model, backend=compiler, fullgraph=True)
        cache, mapped = new_cache(model), []
        for tokens in loop(call, cache, inputs, 90):  # noqa: B007
            mapped.append(mapped_bytes(engine))
            used = sum(cache.lengths) * token_bytes(engine)
            assert used <= mapped[-1] <= used + len(lengths) * 4 * PAGE_BYTES
        assert tokens == before
        assert cache.lengths == [length + 89 for length in lengths]
        assert mapped == sorted(mapped) and len(set(mapped)) > 3
        # By turns with the engine's own steps, on another cache.
        calls = itertools.cycle([call, model])
        turns = loop(lambda **inputs: next(calls)(**inputs), new_cache(model), inputs, 90)
        assert last(turns) == before
    assert compiler.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_prompts_of_all_lengths_are_one_graph_more(compiler):
    model = small()
    with enabled(model):
        call = torch.compile(model, backend=compiler, fullgraph=True)
        for width in (20, 9, 30, 14):
            ids = prompts([width] * 2, "cpu")["input_ids"]
            before = generate(model, {"input_ids": ids}, max_new_tokens=1)
            assert last(loop(call, new_cache(model), {"input_ids": ids}, 1)) == before.tolist()
    assert compiler.frame_count == 2


@pytest.mark.parametrize("how", ["in place", "forward"])
def test_model_may_be_compiled_in_place_and_by_its_forward(how, compiler):
    model = small()
    inputs = prompts([20, 5], "cpu")
    before = generate(model, inputs, max_new_tokens=6).tolist()
    with enabled(model):
        call = model
        if how == "in place":
            model.compile(backend=compiler, fullgraph=True)
        else:
            call = torch.compile(model.forward, backend=compiler, fullgraph=True)
            assert last(loop(call, new_cache(model), inputs, 6)) == before
        assert generate(model, inputs, max_new_tokens=6).tolist() == before
    assert compiler.frame_count >= 2


def test_models_with_breaks_of_their_own_compile_in_parts(compiler):
    model = make_model("dynamic", num_hidden_layers=1)
    inputs = prompts([20, 5], "cpu")
    before = generate(model, inputs, max_new_tokens=2).tolist()
    with enabled(model):
        calls = iter([model, torch.compile(model, backend=compiler)])
        tokens = loop(lambda **inputs: next(calls)(**inputs), new_cache(model), inputs, 2)
        assert last(tokens) == before
    assert compiler.frame_count > 1


def test_calls_without_its_cache_compile_as_before(compiler):
    model = small()
    ids = prompts([20, 20], "cpu")["input_ids"]
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with enabled(model) as engine:
        call = torch.compile(model, backend=compiler, fullgraph=True)
        output = call(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(model.lm_head.weight.grad, gradient)
        assert engine.pool.stats().creates == 0
    assert compiler.frame_count == 1


def test_compiled_steps_are_taken_in_order_though_nobody_reads_them():
    torch._dynamo.reset()
    model = small()
    ids = prompts([20, 20], "cpu")["input_ids"]
    before = generate(model, {"input_ids": ids}, max_new_tokens=1)[:, 20:]

    @torch.no_grad()
    def run(*caches: Any) -> list[Any]:
        for cache in caches:
            model(input_ids=ids[:, :12], past_key_values=cache)
        outputs = [model(input_ids=ids[:, 12:], past_key_values=cache) for cache in caches]
        return [output.logits[:, -1:].argmax(-1) for output in outputs]

    with enabled(model):
        caches = new_cache(model), new_cache(model)
        # This backend removes what is of no effect.
        for tokens in torch.compile(run, backend="aot_eager", fullgraph=True)(*caches):
            assert torch.equal(tokens, before)
        assert [cache.lengths for cache in caches] == [[20, 20]] * 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"max_seq_len": 40}, va.SequenceTooLong), ({"pages": 8}, va.OutOfPages)],
)
def test_compiled_call_that_fails_leaves_the_cache_as_it_was(options, error, compiler):
    model = small()
    inputs = {"input_ids": prompts([20, 20], "cpu")["input_ids"]}
    before = generate(model, inputs, max_new_tokens=60)
    if "pages" in options:
        options = {"pool": exact_pool("cpu", **options)}
    with enabled(model, **options) as engine, torch.no_grad():
        call = torch.compile(model, backend=compiler, fullgraph=True)
        cache = new_cache(model)
        with pytest.raises(error):
            last(loop(call, cache, inputs, 60))
        length, mapped = cache.seen, mapped_bytes(engine)
        assert cache.lengths == [length] * 2 and length > 30
        token = before[:, length : length + 1].clone()
        for each in (call, model):
            with pytest.raises(error):
                each(input_ids=token, past_key_values=cache, use_cache=True)
            assert cache.lengths == [length] * 2 and mapped_bytes(engine) == mapped
        cache.crop(-3)
        token = before[:, length - 3 : length - 2].clone()
        output = call(input_ids=token, past_key_values=cache, use_cache=True)
        assert torch.equal(output.logits.argmax(-1), before[:, length - 2 : length - 1])


def test_compiled_step_that_was_cut_off_is_taken_back(compiler, monkeypatch):
    model = small()
    ids = prompts([20, 20], "cpu")["input_ids"]
    before = generate(model, {"input_ids": ids}, max_new_tokens=5)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with enabled(model) as engine, torch.no_grad():
        call = torch.compile(model, backend=compiler, fullgraph=True)
        for held, then in itertools.product((0, 10), (call, model)):
            cache = new_cache(model)
            if held:
                model(input_ids=ids[:, :held], past_key_values=cache)
            inputs = {"input_ids": ids[:, held : held + 10].clone()}
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(engine, "attend", fail)
                call(**inputs, past_key_values=cache, use_cache=True)
            assert cache.lengths == [held] * 2 * bool(held)
            tokens = last(loop(then, cache, inputs, 5))
            assert cache.lengths == [held + 14] * 2
            if held:
                assert tokens == before[:, held:].tolist()


def test_compiled_calls_that_are_not_served_say_why(compiler):
    model = small()
    with pytest.raises(va.ConfigError, match="not enabled"):
        new_cache(model)
    ids = prompts([20, 20], "cpu")["input_ids"]
    with enabled(model):
        cache = new_cache(model)
        for fullgraph, error in ((True, torch._dynamo.exc.Unsupported), (False, va.ConfigError)):
            call = torch.compile(model, backend=compiler, fullgraph=fullgraph)
            with pytest.raises(error, match=r"torch\.no_grad"):
                call(input_ids=ids, past_key_values=cache)
            with torch.no_grad(), pytest.raises(error, match="output_attentions"):
                call(input_ids=ids, past_key_values=cache, output_attentions=True)
        with torch.no_grad(), pytest.raises(va.ConfigError, match="attention_mask must be"):
            call(input_ids=ids, past_key_values=cache, attention_mask=ids[:, 1:])
        assert cache.lengths == []


def test_weights_replaced_since_it_was_compiled_are_noticed(compiler):
    model, other = small(), small(seed=1)
    inputs = {"input_ids": prompts([20, 20], "cpu")["input_ids"]}
    expected = generate(other, inputs, max_new_tokens=1).tolist()
    with enabled(model):
        call = torch.compile(model, backend=compiler, fullgraph=True)
        assert last(loop(call, new_cache(model), inputs, 1)) != expected
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own.data = new.data.clone()
        cache = new_cache(model)
        with pytest.raises(va.ConfigError, match="call it again"):
            last(loop(call, cache, inputs, 1))
        assert last(loop(call, cache, inputs, 1)) == expected


def test_rows_of_caches_that_compilers_noted_are_free_when_they_are_needed(compiler):
    model = small()
    inputs = {"input_ids": prompts([20, 20], "cpu")["input_ids"]}
    gc.disable()
    try:
        with enabled(model, max_batch_size=2):
            call = torch.compile(model, backend=compiler, fullgraph=True)
            for _ in range(3):
                last(loop(call, new_cache(model), inputs, 1))
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_compiled_prompts_may_have_padding_anywhere(name, compiler):
    model = make_model(name, num_hidden_layers=1)
    inputs = prompts([12] * 4, "cpu")
    mask = inputs["attention_mask"]
    mask[0, 5:] = mask[1, :3] = mask[2, 4:6] = mask[2, 10:] = 0
    real = mask.bool()
    with enabled(model, max_batch_size=16):
        call = torch.compile(model, backend=compiler, fullgraph=True)
        for inputs["position_ids"] in (None, torch.arange(12)[None] + 3):
            expected = model(**inputs, past_key_values=new_cache(model)).logits
            of_last = dict(past_key_values=new_cache(model), logits_to_keep=1)
            expected_last = model(**inputs, **of_last).logits
            cache = new_cache(model)
            logits = call(**inputs, past_key_values=cache).logits
            torch.testing.assert_close(logits[real], expected[real])
            torch.testing.assert_close(logits[:, -1:], expected_last)
            assert cache.lengths == [5, 9, 8, 12]
        # All of it is padding: then the rows begin with what comes next.
        cache = new_cache(model)
        call(**inputs | {"attention_mask": mask * 0}, past_key_values=cache)
        assert cache.lengths == [0] * 4
        logits = model(**inputs | {"attention_mask": None}, past_key_values=cache).logits
        assert cache.lengths == [12] * 4
        torch.testing.assert_close(logits[3], expected[3])


def test_compiler_that_does_not_see_whose_attention_it_is_is_found_out(compiler, monkeypatch):
    model = small()
    inputs = prompts([9, 9], "cpu")
    before = generate(model, inputs).tolist()
    with enabled(model) as engine:
        cache = new_cache(model)
        # Its config says nothing, as where a compiler reads what it was before.
        monkeypatch.setattr(model.model.layers[0].self_attn, "config", model.config)
        call = torch.compile(model, backend=compiler, fullgraph=True)
        with torch.no_grad(), pytest.raises(va.ConfigError, match="do not compile it"):
            call(input_ids=inputs["input_ids"], past_key_values=cache)
        monkeypatch.undo()
        assert cache.lengths == []
        assert generate(model, inputs).tolist() == before
        assert live_tokens(engine) == 0


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_operator_that_begins_is_what_compilers_are_told(masked):
    model = small()
    with enabled(model) as engine:
        cache, inputs = new_cache(model), prompts([4, 2] if masked else [4, 4], "cpu")
        mask = inputs["attention_mask"] if masked else None
        positions = torch.arange(4)[None] if masked else None
        args = (inputs["input_ids"], positions, mask, cache.handle, engine.step_order)
        torch.library.opcheck(torch.ops.vattention.begin.default, args)
        assert cache.lengths == []


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model_on_a_gpu_equals_before(mode):
    torch._dynamo.reset()
    model = build("llama", "cuda")
    inputs = prompts([20, 5], "cuda")
    before = generate(model, inputs, max_new_tokens=30).tolist()
    with enabled(model):
        call = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(2):
            assert last(loop(call, new_cache(model), inputs, 30)) == before
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_decode_runs_as_a_graph_where_it_is_asked_for(graphs):
    model = build("llama", "cuda")
    inputs = prompts([12, 5, 3], "cuda")
    before = generate(model, inputs).tolist()
    with enabled(model, graphs=graphs) as engine:
        assert generate(model, inputs).tolist() == before
        assert [decoder._graph is not None for decoder in engine._decoders.values()] == [graphs]


@pytest.mark.gpu
def test_graph_sees_memory_grow_and_come_back():
    model = build("llama", "cuda")
    with enabled(model, pool=exact_pool("cuda"), max_seq_len=20_000) as engine:
        ids = prompts([8_190], "cuda")["input_ids"]
        cache, token = start(model, engine, {"input_ids": ids})
        mapped = mapped_bytes(engine)
        first = decode(model, cache, token, 10)
        assert mapped_bytes(engine) > mapped
        del cache
        release(model)
        assert mapped_bytes(engine) == 0
        cache, token = start(model, engine, {"input_ids": ids})
        assert joined(*decode(model, cache, token, 10)) == joined(*first)
        assert len(engine._decoders) == 1


@pytest.mark.gpu
def test_frequencies_that_depend_on_lengths_are_not_captured():
    model = build("dynamic", "cuda")
    inputs = prompts([30, 5], "cuda")
    before = generate(model, inputs).tolist()
    with enabled(model) as engine:
        assert not engine.graphs
        assert generate(model, inputs).tolist() == before


@pytest.mark.gpu
def test_compiled_decode_equals_before():
    model = make_model("qwen2", "cuda")
    batches = [prompts([12, 5, 3], "cuda"), prompts([7], "cuda")]
    before = [generate(model, inputs).tolist() for inputs in batches]
    state = state_of(model)
    with enabled(model, compile=True):
        assert [generate(model, inputs).tolist() for inputs in batches] == before
    assert state_of(model) == state
    assert [generate(model, inputs).tolist() for inputs in batches] == before


# What is left


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
