"""`generate()` of an enabled model returns what it returned before."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from enabled_models import (  # noqa: E402
    CASES,
    GPU,
    Notes,
    assert_as_before,
    build,
    decode,
    enabled,
    generate,
    joined,
    live_tokens,
    make_model,
    prompts,
    start,
)
from small_models import PAD, SMALL, VOCAB  # noqa: E402

from vattention.integrations.transformers.ragged import RaggedCache  # noqa: E402

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
        assert {rows for rows, *_ in engine._decoders} == {1, 2, 4, 8}
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


def test_frequencies_that_change_with_the_length_are_computed_anew():
    """The model forgets its cache where it begins to use other frequencies."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"short_factor": [1 + n / 10 for n in range(8)]}
    rope |= {"long_factor": [2 + n / 2 for n in range(8)], "original_max_position_embeddings": 50}
    config = transformers.Phi3Config(
        **SMALL | {"hidden_size": 64, "original_max_position_embeddings": 50},
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    assert_as_before(model, prompts([40], "cpu"), max_new_tokens=20)


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


def qwen2_vl() -> Any:
    """It counts positions in time, height and width, of text alone too."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 10000.0,
        },
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1}
    numbers = dict(
        zip(("image", "video", "vision_start", "vision_end"), range(90, 94), strict=True)
    )
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        **{f"{name}_token_id": number for name, number in numbers.items()},
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def test_tokens_equal_before_where_positions_have_several_axes(device):
    model = qwen2_vl().to(device)
    assert_as_before(model, prompts([12, 5], device))
    assert_as_before(model, prompts([7], device), do_sample=True)
