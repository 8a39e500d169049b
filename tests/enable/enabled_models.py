"""Small models, enabled or not, and what the tests of `enable` ask of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import FULL, PAD, SLIDING, SMALL, VOCAB, WINDOW  # noqa: E402

import vattention as va  # noqa: E402
from vattention.integrations.transformers import (  # noqa: E402
    disable,
    enable,
)
from vattention.integrations.transformers.ragged import RaggedCache  # noqa: E402

PAGE_BYTES = 4096  # of the host backend here: 16 tokens of two layers' K
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
# In float32 a GPU has no kernel for windows, softcap and sinks.
CASES = [(name, "cpu") for name in NAMES] + [
    pytest.param(name, "cuda", marks=GPU) for name in ("llama", "qwen2", "qwen3", "phi3")
]


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


class Notes(transformers.generation.streamers.BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def configs_of(model: Any) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


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
