"""`VAttentionCache` in `generate()`: the tokens of the default cache, less memory, no copies."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import weakref
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import (  # noqa: E402
    FULL,
    PAD,
    SLIDING,
    SMALL,
    VOCAB,
    WINDOW,
    deepseek_v3,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import vattention as va  # noqa: E402
from vattention.integrations.transformers import VAttentionCache  # noqa: E402

PAGE_BYTES = 4096
MIN_TRIM_TOKENS = 64  # what the cache waits for
TRIM_MARGIN_TOKENS = 16  # what an allocator leaves mapped

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(sliding_window=WINDOW, **SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL],
        **{**SMALL, "num_hidden_layers": 3},
    ),
    "deepseek_v3": deepseek_v3,
    # Its two layer types differ in shape, and its last layers read the keys and values of earlier
    # ones and have no cache of their own.
    "gemma4": lambda: transformers.Gemma4TextConfig(
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        global_head_dim=32,
        num_global_key_value_heads=1,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        **{**SMALL, "num_hidden_layers": 4},
    ),
}
NAMES = tuple(CONFIGS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def exact_arithmetic():
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@functools.cache
def build(
    name: str, device: str, attention: str = "sdpa", window: int = WINDOW, seed: int = 0
) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config._attn_implementation = attention
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = window
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(device, torch.float32).eval()


def prompts(batch: int, length: int, device: str, seed: int = 3) -> dict[str, Any]:
    """Random prompts, padded on the left to one length: row i by 3 i tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, : 3 * row] = PAD
        mask[row, : 3 * row] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def make_cache(config: Any, device: str, **options: Any) -> VAttentionCache:
    options = {"max_batch_size": 4, "max_seq_len": 512, "memory": "512MiB", **options}
    if device == "cpu" and "pool" not in options:
        options["page_bytes"] = PAGE_BYTES
    return VAttentionCache(config, **options)


def default_cache(config: Any) -> Any:
    return transformers.DynamicCache(config=config)


def generate(model: Any, inputs: dict[str, Any], cache: Any, **options: Any) -> Any:
    options = {"max_new_tokens": 40, "do_sample": False, **options}
    torch.manual_seed(7)
    return model.generate(**inputs, past_key_values=cache, **options)


def assert_same_tokens(name: str, device: str, inputs: dict[str, Any], **options: Any) -> None:
    model = build(name, device)
    with make_cache(model.config, device) as cache:
        ours = generate(model, inputs, cache, **options)
        assert cache.get_seq_length() > WINDOW
    reference = generate(model, inputs, default_cache(model.config), **options)
    assert ours.tolist() == reference.tolist()


# The same tokens


def test_tokens_under_autocast_equal_default(device):
    """K comes in float32 from its rotation there, and V in what is cast to."""
    with torch.autocast(device, torch.bfloat16):
        assert_same_tokens("llama", device, prompts(2, 12, device))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_equal_default_left_padded(name, device, attention):
    model = build(name, device, attention)
    inputs = prompts(3, 12, device)
    with make_cache(model.config, device) as cache:
        ours = generate(model, inputs, cache)
    reference = generate(model, inputs, default_cache(model.config))
    assert ours.tolist() == reference.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_default_layer_order(name, device):
    model = build(name, device)
    inputs = prompts(2, 12, device)
    with make_cache(model.config, device, order="layer") as cache:
        ours = generate(model, inputs, cache)
    reference = generate(model, inputs, default_cache(model.config))
    assert ours.tolist() == reference.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_sampled_tokens_equal_default_same_seed(name, device):
    inputs = prompts(2, 12, device)
    assert_same_tokens(name, device, inputs, do_sample=True, num_return_sequences=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_beam_tokens_equal_default(name, device, do_sample):
    inputs = prompts(2, 12, device)
    options = {"num_beams": 4, "num_return_sequences": 2, "do_sample": do_sample}
    assert_same_tokens(name, device, inputs, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accepted", ["mostly", "rarely"])
def test_assisted_tokens_equal_default(name, device, accepted):
    if accepted == "mostly":
        # The same weights. The default cache of an assistant cannot go past a sliding window.
        assistant = build(name, device, window=512)
    else:
        assistant = build("llama", device, seed=1)
    assert_same_tokens(name, device, prompts(1, 12, device), assistant_model=assistant)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_tokens_equal_default(name, device):
    inputs = prompts(1, 8, device)
    inputs = {key: value.repeat(1, 4) for key, value in inputs.items()}
    assert_same_tokens(name, device, inputs, prompt_lookup_num_tokens=5)


@pytest.mark.parametrize("name", NAMES)
def test_chunked_prefill_tokens_equal_default(name, device):
    assert_same_tokens(name, device, prompts(3, 40, device), prefill_chunk_size=7)


@pytest.mark.parametrize("name", NAMES)
def test_continued_chat_tokens_equal_default(name, device):
    model = build(name, device)
    with make_cache(model.config, device) as cache:
        transcripts = [chat(model, device, each) for each in (cache, default_cache(model.config))]
    assert transcripts[0] == transcripts[1]


def chat(model: Any, device: str, cache: Any) -> list[list[int]]:
    inputs = prompts(2, 12, device)
    for turn in range(3):
        ids = generate(model, inputs, cache, max_new_tokens=9 + turn)
        mask = torch.ones_like(ids)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        more = prompts(2, 11, device, seed=turn)["input_ids"].clamp(min=2)
        inputs = {
            "input_ids": torch.cat([ids, more], dim=1),
            "attention_mask": torch.cat([mask, torch.ones_like(more)], dim=1),
        }
    return ids.tolist()


def test_chat_after_assisted_turn_equals_fresh_cache(device):
    model = build("mistral", device)
    inputs = prompts(1, 12, device)
    with make_cache(model.config, device) as cache:
        ids = generate(model, inputs, cache, prompt_lookup_num_tokens=5)
        ours = generate(model, {"input_ids": ids}, cache)
    reference = generate(model, {"input_ids": ids}, default_cache(model.config))
    assert ours.tolist() == reference.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_repeated_and_selected_batch_continues_as_default(name, device):
    model = build(name, device)
    rows = torch.tensor([4, 0, 3], device=device)
    with make_cache(model.config, device, max_batch_size=6) as cache:
        outputs = []
        for each in (cache, default_cache(model.config)):
            inputs = prompts(2, 30, device)
            with torch.no_grad():
                model(**inputs, past_key_values=each)
            each.batch_repeat_interleave(3)
            each.batch_select_indices(rows)
            ids = inputs["input_ids"].repeat_interleave(3, dim=0)[rows]
            mask = inputs["attention_mask"].repeat_interleave(3, dim=0)[rows]
            new = torch.tensor([[5], [6], [7]], device=device)
            inputs = {
                "input_ids": torch.cat([ids, new], dim=1),
                "attention_mask": torch.cat([mask, torch.ones_like(new)], dim=1),
            }
            outputs.append(generate(model, inputs, each).tolist())
    assert outputs[0] == outputs[1]


def test_cache_filled_in_inference_mode_continues_outside_of_it(device):
    model = build("llama", device)
    inputs = prompts(2, 12, device)
    with make_cache(model.config, device) as cache:
        with torch.inference_mode():
            ids = generate(model, inputs, cache, max_new_tokens=5)
        mask = torch.ones_like(ids)
        mask[:, :12] = inputs["attention_mask"]
        ours = generate(model, {"input_ids": ids.clone(), "attention_mask": mask}, cache)
    reference = generate(model, inputs, default_cache(model.config), max_new_tokens=45)
    assert ours.tolist() == reference.tolist()


# The cache by itself, beside the default cache: heads 2, dim 16, two sliding layers and a full one


def states(batch: int, tokens: int, device: str, generator: Any) -> tuple[Any, Any]:
    shape = (2, batch, 2, tokens, 16)
    keys, values = torch.randn(shape, generator=generator).to(device)
    return keys, values


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3, recording"])
@pytest.mark.parametrize("case", range(4))
def test_random_operations_equal_default(name, device, case, seed):
    chance = random.Random(f"{seed} {name} {case}")
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    name, _, recording = name.partition(", ")
    config = CONFIGS[name]()
    reference, batch = default_cache(config), 2
    with make_cache(config, device, max_batch_size=5) as cache:
        for each in (cache, reference):
            if recording:
                each.activate_past_recording()
        while cache.get_seq_length() < 450:
            tokens = chance.choice([1, 1, 1, 2, 5, 19, 40])
            for layer in range(len(cache.layers)):
                sizes = cache.get_mask_sizes(tokens, layer)
                assert sizes == reference.get_mask_sizes(tokens, layer)
                new = states(batch, tokens, device, generator)
                ours = cache.update(*new, layer)
                for mine, other in zip(ours, reference.update(*new, layer), strict=True):
                    assert mine.shape[2] == sizes[0]
                    assert torch.equal(mine, other)
            removed = 0
            if recording:
                # What the window needs is kept as of the last crop, so not more than was added.
                removed = chance.randrange(tokens)
            elif name == "llama" and chance.random() < 0.3:
                removed = min(chance.randrange(30), cache.get_seq_length() - 1)
            if recording or removed:
                for each in (cache, reference):
                    each.crop(-removed)
            match chance.randrange(6):
                case 0 | 1 | 2:
                    rows = torch.tensor([chance.randrange(batch) for _ in range(batch)])
                    for each in (cache, reference):
                        each.reorder_cache(rows.to(device))
                case 3:
                    rows = torch.tensor(chance.sample(range(batch), max(1, batch - 1)))
                    for each in (cache, reference):
                        each.batch_select_indices(rows.to(device))
                case 4 if 2 * batch <= 5:
                    for each in (cache, reference):
                        each.batch_repeat_interleave(2)
            batch = cache.batch_size
            assert cache.get_seq_length() == reference.get_seq_length()
            for mine, other in zip(cache.layers, reference.layers, strict=True):
                assert torch.equal(mine.keys, other.keys)
                assert torch.equal(mine.values, other.values)
                assert mine.is_sliding == other.is_sliding


class CountOperations(TorchDispatchMode):
    """Counts calls, and the elements that were written by copies."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()
        self.copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket] += 1
        if function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.clone):
            self.copied += result.numel()
        return result


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_update_copies_only_new_tokens_and_keys_stay_in_place(name, device):
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS[name](), device) as cache:
        first, _ = cache.update(*states(2, 30, device, generator), 0)
        cache.update(*states(2, 30, device, generator), 1)
        for step in range(100):
            new = states(2, 1, device, generator)
            with CountOperations() as count:
                keys, _ = cache.update(*new, 0)
            cache.update(*new, 1)
            assert torch.ops.aten.cat not in count.calls
            assert count.copied == 2 * new[0].numel()
            skipped = max(0, 30 + step - WINDOW + 1) if name == "mistral" else 0
            skipped_bytes = skipped * keys.stride(2) * keys.element_size()
            assert keys.data_ptr() == first.data_ptr() + skipped_bytes
            assert torch.equal(keys[:, :, -1:], new[0])


def test_reorder_copies_only_what_differs(device):
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["llama"](), device) as cache:

        def append(tokens: int) -> None:
            for layer in range(2):
                cache.update(*states(3, tokens, device, generator), layer)

        def elements_copied(*beams: int) -> int:
            with CountOperations() as count:
                cache.reorder_cache(torch.tensor(beams, device=device))
            return count.copied

        row_token = 2 * 2 * 2 * 16  # layers, keys and values, heads, dim
        append(100)
        assert elements_copied(0, 1, 2) == 0
        assert elements_copied(0, 0, 0) == 2 * 100 * row_token
        append(3)
        assert elements_copied(0, 0, 2) == 3 * row_token
        append(2)
        # Rows 0 and 1 parted 2 tokens ago, row 2 from both 5 tokens ago. Of a cycle, each is saved.
        assert elements_copied(1, 2, 0) == 2 * (2 + 5 + 5) * row_token


# Memory


def token_bytes(num_layers: int) -> int:
    return num_layers * 2 * 2 * 16 * 4  # keys and values, heads, dim, fp32


def page_bytes(device: str) -> int:
    return PAGE_BYTES if device == "cpu" else 2 << 20


def exact_cache(config: Any, device: str, pages: int | None = None, **options: Any) -> Any:
    """A cache on a pool that rounds nothing up to large extents and maps nothing ahead."""
    memory = "512MiB" if pages is None else pages * page_bytes(device)
    host_options = {"page_bytes": PAGE_BYTES} if device == "cpu" else {}
    pool = va.Pool(memory, device, max_extent=page_bytes(device), background=False, **host_options)
    return make_cache(config, device, memory=None, pool=pool, **options)


def bytes_at_most(rows: int, tokens: int, num_layers: int, device: str) -> int:
    """The memory of rows of so many tokens, and of what a trim leaves for growing again."""
    begun_pages = 2  # one at either end
    own_bytes = (tokens + TRIM_MARGIN_TOKENS) * token_bytes(num_layers)
    return rows * (own_bytes + begun_pages * page_bytes(device))


class Watch(transformers.LogitsProcessor):
    """Notes how much memory the cache has mapped after each forward pass of `generate()`."""

    def __init__(self, cache: VAttentionCache) -> None:
        self.cache = cache
        self.mapped_bytes: list[int] = []

    def __call__(self, input_ids, scores):
        self.mapped_bytes.append(self.cache.stats().mapped_bytes)
        return scores


def test_memory_follows_lengths(device):
    model = build("llama", device)
    with exact_cache(model.config, device) as cache:
        assert cache.stats().reserved_bytes == 0
        watch = Watch(cache)
        generate(model, prompts(2, 20, device), cache, max_new_tokens=200, logits_processor=[watch])
        stats = cache.stats()
        assert stats.reserved_bytes >= 4 * 512 * token_bytes(2)
        assert (stats.batch_size, stats.num_tokens) == (2, 219)
    for tokens, mapped_bytes in enumerate(watch.mapped_bytes, start=20):
        needed_bytes = 2 * tokens * token_bytes(2)
        assert needed_bytes <= mapped_bytes <= bytes_at_most(2, tokens, 2, device)


@pytest.mark.parametrize("candidates", [None, 10])
def test_memory_below_window_is_returned(device, candidates):
    model = build("mistral", device)
    options = {"max_new_tokens": 500, "prompt_lookup_num_tokens": candidates}
    with exact_cache(model.config, device, max_seq_len=2048) as cache:
        watch = Watch(cache)
        generate(model, prompts(1, 20, device), cache, logits_processor=[watch], **options)
        tokens = WINDOW + MIN_TRIM_TOKENS + (candidates or 0)
        bound = bytes_at_most(1, tokens, 2, device)
        assert max(watch.mapped_bytes) <= bound
        if device == "cpu":
            assert 519 * token_bytes(2) > 3 * bound
        cache.batch_repeat_interleave(3)
        assert cache.stats().mapped_bytes <= 3 * bound


def test_memory_of_unselected_rows_is_returned(device):
    generator = torch.Generator().manual_seed(0)
    with exact_cache(CONFIGS["llama"](), device) as cache:
        for layer in range(2):
            cache.update(*states(4, 100, device, generator), layer)
        cache.batch_select_indices(torch.tensor([False, False, True, False]))
        assert cache.batch_size == 1
        kept_bytes = bytes_at_most(1, 100, 2, device) + bytes_at_most(3, 0, 2, device)
        assert cache.stats().mapped_bytes <= kept_bytes


def test_memory_of_a_long_prompt_shrinks_to_the_window(device):
    generator = torch.Generator().manual_seed(0)
    with exact_cache(CONFIGS["mistral"](), device) as cache:
        for tokens in (400, 1):
            for layer in range(2):
                keys, _ = cache.update(*states(2, tokens, device, generator), layer)
        assert keys.shape[2] == WINDOW
        assert cache.stats().mapped_bytes <= bytes_at_most(2, WINDOW, 2, device)


def test_hybrid_model_keeps_one_allocator_per_layer_type_on_one_pool(device):
    model = build("gemma3", device)
    with exact_cache(model.config, device) as cache:
        generate(model, prompts(2, 20, device), cache, max_new_tokens=300)
        types = cache.stats().layer_types
        assert set(types) == {FULL, SLIDING}
        assert types[FULL].mapped_bytes >= 2 * 319 * token_bytes(1)
        bound = bytes_at_most(2, WINDOW + MIN_TRIM_TOKENS, 2, device)
        assert types[SLIDING].mapped_bytes <= bound
        assert types[FULL].budget_bytes == types[SLIDING].budget_bytes


def test_reset_returns_memory_and_keeps_addresses(device):
    model = build("gemma3", device)
    inputs = prompts(2, 100, device)
    with make_cache(model.config, device) as cache:
        first = generate(model, inputs, cache)
        addresses = [layer.keys.untyped_storage().data_ptr() for layer in cache.layers]
        reserved = cache.stats().reserved_bytes
        cache.reset()
        assert (cache.get_seq_length(), cache.batch_size) == (0, -1)
        assert cache.stats().mapped_bytes == 0
        assert generate(model, inputs, cache).tolist() == first.tolist()
        assert cache.stats().reserved_bytes == reserved
        assert [layer.keys.untyped_storage().data_ptr() for layer in cache.layers] == addresses


def test_reset_cache_takes_a_larger_batch(device):
    model = build("llama", device)
    with make_cache(model.config, device, max_batch_size=1) as cache:
        generate(model, prompts(1, 12, device), cache)
        cache.reset()
        ours = generate(model, prompts(2, 12, device), cache, num_beams=3)
        assert cache.batch_size == 6
    reference = generate(model, prompts(2, 12, device), default_cache(model.config), num_beams=3)
    assert ours.tolist() == reference.tolist()


def test_large_crop_returns_memory(device):
    generator = torch.Generator().manual_seed(0)
    with exact_cache(CONFIGS["llama"](), device) as cache:
        for layer in range(2):
            cache.update(*states(2, 400, device, generator), layer)
        cache.crop(-390)
        assert cache.get_seq_length() == 10
        assert cache.stats().mapped_bytes <= bytes_at_most(2, 10, 2, device)
        cache.crop(4)
        assert cache.get_seq_length() == 4
        cache.crop(-9)
        assert cache.get_seq_length() == 0
        assert cache.stats().mapped_bytes == 0


def test_two_caches_draw_on_one_pool(device):
    options = {"page_bytes": PAGE_BYTES} if device == "cpu" else {}
    pool = va.Pool(memory="512MiB", device=device, **options)
    inputs = prompts(2, 12, device)
    for name in ("llama", "mistral"):
        model = build(name, device)
        with make_cache(model.config, device, memory=None, pool=pool) as cache:
            ours = generate(model, inputs, cache)
        reference = generate(model, inputs, default_cache(model.config))
        assert ours.tolist() == reference.tolist()


def test_dropped_cache_is_freed_at_once():
    cache = make_cache(CONFIGS["gemma3"](), "cpu")
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        cache.update(*states(2, 5, "cpu", generator), layer)
    held = [weakref.ref(cache), weakref.ref(cache.layers[0]._group)]
    del cache
    assert [each() for each in held] == [None, None]


def test_closed_cache_lets_go_of_its_own_pool(monkeypatch):
    pools = []

    def make_pool(*args: Any, **options: Any) -> va.Pool:
        pool = va.Pool(*args, **options)
        pools.append(weakref.ref(pool))
        return pool

    monkeypatch.setattr("vattention.integrations.transformers.cache.Pool", make_pool)
    generator = torch.Generator().manual_seed(0)
    cache = make_cache(CONFIGS["llama"](), "cpu")
    for layer in range(2):
        cache.update(*states(2, 5, "cpu", generator), layer)
    assert len(pools) == 1
    cache.close()
    assert pools[0]() is None
    assert cache.stats().reserved_bytes == 0


# Errors


def test_sequence_longer_than_max_seq_len_raises_and_changes_nothing(device):
    model = build("gemma3", device)
    inputs = prompts(2, 12, device)
    with make_cache(model.config, device, max_seq_len=30) as cache:
        with pytest.raises(va.SequenceTooLong, match="max_seq_len=30.*larger max_seq_len"):
            generate(model, inputs, cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [30, 30, 30]


@pytest.mark.parametrize("before", [0, 16])
def test_running_out_of_memory_leaves_no_trace_of_the_forward_pass(before):
    generator = torch.Generator().manual_seed(0)
    # 130 more tokens: up to 19 pages for the two sliding layers, which come first, then 10.
    with exact_cache(CONFIGS["gemma3"](), "cpu", pages=20) as cache:

        def append(tokens: int) -> None:
            for layer in range(3):
                cache.update(*states(1, tokens, "cpu", generator), layer)

        if before:
            append(before)
        held = [layer.keys.clone() for layer in cache.layers if before]
        with pytest.raises(va.OutOfPages):
            append(130)
        assert cache.batch_size == (1 if before else -1)
        assert [layer.get_seq_length() for layer in cache.layers] == [before] * 3
        for layer, keys in zip(cache.layers, held, strict=bool(before)):
            assert torch.equal(layer.keys, keys)
        append(16)
        assert cache.get_seq_length() == before + 16


def test_running_out_of_memory_in_rearrangement_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    # A row takes 13 pages for the sliding layers, which come first, and 7 for the full one.
    with exact_cache(CONFIGS["gemma3"](), "cpu", pages=36) as cache:
        for layer in range(3):
            cache.update(*states(1, 100, "cpu", generator), layer)
        mapped_bytes = cache.stats().mapped_bytes
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(va.OutOfPages):
            cache.batch_repeat_interleave(2)
        assert cache.batch_size == 1
        assert cache.stats().mapped_bytes <= mapped_bytes + bytes_at_most(1, 0, 3, "cpu")
        for layer, keys in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)


def test_crop_of_full_window_raises_unless_recorded(device):
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["gemma3"](), device) as cache:
        assert cache.is_croppable

        def append(tokens: int) -> None:
            for layer in range(3):
                cache.update(*states(1, tokens, device, generator), layer)

        append(WINDOW - 1)
        cache.crop(-1)
        append(200)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)
        cache.activate_past_recording()
        append(1)
        cache.crop(-1)
        with pytest.raises(RuntimeError, match="negative"):
            cache.crop(5)
        append(200)
        cache.crop(0)
        append(1)
        with pytest.raises(RuntimeError, match="given back"):
            cache.crop(-300)
        assert [layer.get_seq_length() for layer in cache.layers] == [WINDOW - 2 + 401] * 3


def test_crop_goes_back_to_the_last_crop_while_recording(device):
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["mistral"](), device) as cache:
        cache.activate_past_recording()
        written = []
        for tokens in [40] + [1] * 100:
            new = states(1, tokens, device, generator)
            for layer in range(2):
                cache.update(*new, layer)
            written.append(new[0])
        cache.crop(-100)
        assert torch.equal(cache.layers[1].keys, written[0][:, :, -WINDOW + 1 :])


def test_more_rows_than_reserved_raises_naming_max_batch_size():
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["llama"](), "cpu") as cache:
        for layer in range(2):
            cache.update(*states(2, 5, "cpu", generator), layer)
        with pytest.raises(va.ConfigError, match="max_batch_size=6"):
            cache.batch_repeat_interleave(3)
        with pytest.raises(va.ConfigError, match=r"batch of 2.*reset\(\)"):
            cache.update(*states(3, 1, "cpu", generator), 0)
        with pytest.raises(va.ConfigError, match="rows are named by"):
            cache.reorder_cache(torch.tensor([0, 2]))
        assert cache.batch_size == 2


def test_tensors_that_do_not_fit_raise():
    generator = torch.Generator().manual_seed(0)
    keys, values = states(2, 5, "cpu", generator)
    with make_cache(CONFIGS["llama"](), "cpu") as cache:
        with pytest.raises(va.ConfigError, match="no_grad"):
            cache.update(keys.clone().requires_grad_(), values, 0)
        with pytest.raises(va.ConfigError, match="same batch, heads and tokens"):
            cache.update(keys, values[:, :1], 0)
        cache.update(keys, values, 0)
        with pytest.raises(va.ConfigError, match="float64"):
            cache.update(keys.double(), values.double(), 1)
        assert cache.get_seq_length() == 0
    with pytest.raises(va.ConfigError, match="closed"):
        cache.update(keys, values, 0)
    cache.close()


def test_layer_of_another_model_raises():
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["llama"](), "cpu") as cache:
        for layer in (2, -1):
            with pytest.raises(va.ConfigError, match="has 2 layers.*another model's config"):
                cache.update(*states(2, 5, "cpu", generator), layer)
        keys, values = states(2, 5, "cpu", generator)
        with pytest.raises(va.ConfigError, match=r"\[batch, heads, tokens, dim\]"):
            cache.update(keys[0], values[0], 0)
        assert cache.get_seq_length() == 0


def test_repeating_or_cropping_by_no_number_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["llama"](), "cpu") as cache:
        for layer in range(2):
            cache.update(*states(2, 5, "cpu", generator), layer)
        for repeats in (0, -1, 1.5):
            with pytest.raises(va.ConfigError, match="repeats must be"):
                cache.batch_repeat_interleave(repeats)
        for count in (1.5, "2", None):
            with pytest.raises(va.ConfigError, match="tokens_to_remove must be"):
                cache.crop(count)
        assert (cache.batch_size, cache.get_seq_length()) == (2, 5)


def test_rows_that_are_none_change_nothing():
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["llama"](), "cpu") as cache:
        for layer in range(2):
            cache.update(*states(2, 5, "cpu", generator), layer)
        for rows in ("1", None, [0.5], [2], torch.tensor([True]), torch.tensor([0.5, 1.0])):
            with pytest.raises(va.ConfigError, match="rows are named by"):
                cache.batch_select_indices(rows)
            with pytest.raises(va.ConfigError, match="rows are named by"):
                cache.reorder_cache(rows)
        assert (cache.batch_size, cache.get_seq_length()) == (2, 5)
        cache.batch_select_indices(torch.tensor([False, True]))
        assert cache.batch_size == 1


def test_neither_the_cache_nor_a_layer_is_copied():
    generator = torch.Generator().manual_seed(0)
    with make_cache(CONFIGS["llama"](), "cpu") as cache:
        for layer in range(2):
            cache.update(*states(2, 5, "cpu", generator), layer)
        for copied in (cache, cache.layers[0]):
            for copying in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(va.ConfigError, match="is not copied.*DynamicCache"):
                    copying(copied)
        assert (cache.batch_size, cache.get_seq_length()) == (2, 5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: None, "config must be a model's config"),
        (lambda: transformers.T5Config(), "encoder"),
        (lambda: transformers.MambaConfig(num_hidden_layers=2), "linear_attention"),
        (lambda: transformers.Qwen3NextConfig(num_hidden_layers=4), "linear_attention"),
    ],
)
def test_unsupported_model_raises_naming_what_is_not(config, named):
    with pytest.raises(va.ConfigError, match=named):
        VAttentionCache(config())


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 0},
        {"max_seq_len": 0},
        {"order": "heads"},
        {"memory": "1GiB", "pool": "a pool"},
        {"pool": "a pool"},
        {"memory": "lots"},
        {"page_bytes": -1},
    ],
)
def test_bad_argument_raises(options):
    with pytest.raises(va.ConfigError):
        VAttentionCache(CONFIGS["llama"](), **options)
