"""How fast `generate()` is: our cache and steps as graphs, and the caches of transformers.

A causal model of Llama-3-8B's shape in bf16 with random weights; greedy, no end token. Variants run
in turn: each generates from the same prompts. A step is the time from one call of a logits
processor to the next, as the device's own events say, so it holds all that is between two tokens:
the model, the choice of a token, and whatever the device waits for the host. The first step after
the prompt is left out.

- ours: `enable(model)`; steps as graphs.
- ours, not compiled: the same, `compile=False`: what the matrix products are surrounded by runs as
  the model has it.
- dynamic: transformers' default cache.
- static: its static cache of exactly the length that is needed, not compiled; and compiled, which
  transformers does by itself.

The floor of a step: weights (without the table of embeddings, of which a row a token is read) and K
and V of all tokens, read once, at the faster of the measured rates of a copy and of reading.

kv_bytes: what K and V take while a batch is generated: the pool's peak for ours, for others what
torch's allocator had at most, over what it had before and over what the same forward pass has
without any cache. (`dynamic` holds two copies of a layer while it appends.)

Logits are compared with those of the same model in float32, over a shorter prompt.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vattention import Pool
from vattention.config import format_bytes

from .bandwidth import measure_read
from .common import (
    Context,
    heading,
    measure_bandwidth,
    print_table,
    quantile,
    release_cache,
    show_us,
    summarize,
)

# What a decode step over the floor may be, at these shapes.
CLAIM_SHAPES = {(8, 8192), (1, 32768)}
CLAIM_FLOORS = 1.4
CLAIM_BYTES = 1.05


def run(context: Context) -> dict[str, object]:
    rates = measure_bandwidth(context)
    rates["read_bytes_per_s"] = measure_read(context)
    release_cache(context)
    fastest = max(rates["copy_bytes_per_s"], rates["read_bytes_per_s"])
    model = _make_model(context)
    shapes = context.pick(
        [(8, 8_192), (1, 32_768), (16, 4_096), (32, 1_024)],
        [(2, 64)],
        [(8, 1_024), (1, 4_096)] if context.cuda else [(2, 64)],
    )
    report: dict[str, Any] = {"what": __doc__, **rates, "model": _describe(model), "shapes": []}
    for shape in shapes:
        report["shapes"].append(_run_shape(context, model, *shape, fastest))
        context.write_so_far(report)
    _show_claims(report["shapes"])
    return report | {"logits": _compare_logits(context, model)}


# ---- the model ----


def _make_model(context: Context) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = context.pick(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 1024,
        },
    )
    config = LlamaConfig(**shape, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    with torch.device(context.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _describe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "dtype": str(model.dtype),
        "weight_bytes_of_a_step": _weight_bytes(model),
        "token_bytes": _token_bytes(model),
    }


def _weight_bytes(model: Any) -> int:
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    return sum(
        weight.numel() * weight.itemsize
        for weight in model.parameters()
        if tied or weight is not table
    )


def _token_bytes(model: Any) -> int:
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


# ---- variants ----


@contextmanager
def _enabled(model: Any, **options: Any) -> Iterator[Any]:
    from vattention.integrations.transformers import disable, enable

    pool = Pool(device=model.device)
    enable(model, pool=pool, **options)
    try:
        yield pool
    finally:
        disable(model)


@contextmanager
def _stock(model: Any, **options: Any) -> Iterator[None]:
    yield None


def _variants(context: Context, batch: int, length: int) -> dict[str, dict[str, Any]]:
    ours = {"max_batch_size": batch}
    found: dict[str, dict[str, Any]] = {"ours": {"enable": ours}}
    if context.cuda:
        found["ours, not compiled"] = {"enable": ours | {"compile": False}}
    found["dynamic"] = {"generate": {}}
    static = {"cache_implementation": "static"}
    found["static"] = {"generate": static | {"disable_compile": True}}
    wanted = context.compiled and not context.quick
    if context.cuda and wanted and (batch, length) in CLAIM_SHAPES:
        found["static, compiled"] = {"generate": static}
    return found


class _Clock:
    """A logits processor that changes nothing and notes when it is called."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._marks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._context.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter_ns())
        return scores

    def steps_us(self) -> list[float]:
        """Between the second call and the third, and so on."""
        self._context.synchronize()
        pairs = list(itertools.pairwise(self._marks))[1:]
        if self._context.cuda:
            return [before.elapsed_time(after) * 1e3 for before, after in pairs]
        return [(after - before) / 1e3 for before, after in pairs]


def _generate(
    context: Context, model: Any, prompts: torch.Tensor, new_tokens: int, **options: Any
) -> tuple[list[float], torch.Tensor]:
    clock = _Clock(context)
    tokens = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=[clock],
        **options,
    )
    return clock.steps_us(), tokens


# ---- measuring ----


def _run_shape(
    context: Context, model: Any, batch: int, length: int, bytes_per_s: float
) -> dict[str, Any]:
    new_tokens = context.pick(64, 8, 16)
    torch.manual_seed(1)
    prompts = torch.randint(
        3, model.config.vocab_size, (batch, length), device=context.device, dtype=torch.long
    )
    tokens_held = batch * (length + new_tokens)
    own_bytes = tokens_held * _token_bytes(model)
    middle = batch * (length + new_tokens // 2) * _token_bytes(model)
    floor_us = (_weight_bytes(model) + middle) / bytes_per_s * 1e6
    pass_bytes = _pass_bytes(context, model, prompts)
    rows: dict[str, dict[str, Any]] = {}
    outputs: dict[str, torch.Tensor] = {}
    page_bytes = 0
    for name, variant in _variants(context, batch, length).items():
        print(f"{batch} x {length}: {name}", flush=True)
        enable = variant.get("enable")
        options = variant.get("generate", {})
        make: Callable[..., Any] = _stock if enable is None else _enabled
        with make(model, **(enable or {})) as pool:
            started = time.perf_counter()
            _generate(context, model, prompts, 3, **options)
            first_s = time.perf_counter() - started
            _release(context)
            before = torch.cuda.memory_allocated() if context.cuda else 0
            if context.cuda:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            steps, outputs[name] = _generate(context, model, prompts, new_tokens, **options)
            whole_s = time.perf_counter() - started
            row = summarize(steps) | {
                "first_generate_s": first_s,
                "generate_s": whole_s,
                "floors": quantile(steps, 0.5) / floor_us,
            }
            if pool is not None:
                stats = pool.stats()
                row["kv_bytes"] = stats.peak_held_bytes
                row["mappings"] = stats.mappings
                page_bytes = pool.page_bytes
            elif context.cuda:
                peak = torch.cuda.max_memory_allocated()
                row["kv_bytes"] = max(0, peak - before - pass_bytes)
            rows[name] = row
        # The next static cache would be as long as this one.
        vars(model).pop("_previous_max_cache_length", None)
        _release(context)
    agree = {
        name: float((tokens == outputs["ours"]).float().mean()) for name, tokens in outputs.items()
    }
    shape = {
        "batch": batch,
        "length": length,
        "new_tokens": new_tokens,
        "floor_us": floor_us,
        "own_bytes": own_bytes,
        "page_bytes": page_bytes,
        "variants": rows,
        # Random weights: the best logits lie close to each other, so tokens part in bf16.
        "tokens_as_ours": agree,
    }
    _show(context, shape)
    return shape


def _pass_bytes(context: Context, model: Any, prompts: torch.Tensor) -> int:
    """What torch's allocator has at most in a forward pass over the prompts without a cache."""
    if not context.cuda:
        return 0
    _release(context)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(prompts, use_cache=False, logits_to_keep=1)
    peak = torch.cuda.max_memory_allocated()
    _release(context)
    return peak - before


def _release(context: Context) -> None:
    gc.collect()
    release_cache(context)


def _compare_logits(context: Context, model: Any) -> dict[str, Any]:
    """How far logits are from float32's: ours, and those of the model as it was, both in bf16."""
    from vattention.integrations.transformers import new_cache
    from vattention.integrations.transformers.versions import CACHE

    torch.manual_seed(2)
    batch, length, steps = context.pick((2, 2_048, 8), (2, 48, 4))
    vocabulary = model.config.vocab_size
    prompts = torch.randint(3, vocabulary, (batch, length), device=context.device)
    forced = torch.randint(3, vocabulary, (batch, steps), device=context.device)

    def logits(**cache: Any) -> torch.Tensor:
        """Of the prompt's end, and of each forced token."""
        parts = []
        with torch.no_grad():
            output = model(prompts, use_cache=True, logits_to_keep=1, **cache)
            for step in range(steps):
                parts.append(output.logits[:, -1].float())
                output = model(
                    forced[:, step : step + 1],
                    use_cache=True,
                    **{CACHE: output[CACHE]},
                )
            parts.append(output.logits[:, -1].float())
        return torch.stack(parts)

    stock = logits()
    with _enabled(model, max_batch_size=batch):
        ours = logits(**{CACHE: new_cache(model)})
    model.float()
    exact = logits()
    model.bfloat16()
    errors = {
        name: float((found - exact).norm() / exact.norm())
        for name, found in (("ours", ours), ("stock", stock))
    }
    errors["ratio"] = errors["ours"] / errors["stock"]
    heading(context, "generate: logits in bf16 against float32, relative error")
    print_table(("ours", "as it was", "ratio"), [[f"{error:.4f}" for error in errors.values()]])
    assert errors["ratio"] < 1.5, "logits are further from float32's than rounding explains"
    return {"batch": batch, "length": length, "steps": steps, "relative_error": errors}


# ---- showing ----


def _show(context: Context, shape: dict[str, Any]) -> None:
    heading(
        context,
        f"generate: {shape['batch']} x {shape['length']:,} tokens, {shape['new_tokens']} new; "
        f"floor {show_us(shape['floor_us'])}, tokens' own {format_bytes(shape['own_bytes'])}",
    )
    print_table(
        ("a step", "median", "p10 - p90", "of the floor", "K and V", "first generate"),
        [
            (
                name,
                show_us(row["median"]),
                f"{show_us(row['p10'])} - {show_us(row['p90'])}",
                f"{row['floors']:.2f}x",
                format_bytes(row["kv_bytes"]) if "kv_bytes" in row else "",
                f"{row['first_generate_s']:.1f} s",
            )
            for name, row in shape["variants"].items()
        ],
    )


def _show_claims(shapes: list[dict[str, Any]]) -> None:
    for shape in shapes:
        if (shape["batch"], shape["length"]) not in CLAIM_SHAPES:
            continue
        ours = shape["variants"]["ours"]
        claims = {
            f"a step takes at most {CLAIM_FLOORS} floors": ours["floors"] <= CLAIM_FLOORS,
            "K and V take at most 5% over the tokens' own bytes, and a page a sequence": (
                ours["kv_bytes"]
                <= CLAIM_BYTES * shape["own_bytes"] + shape["batch"] * shape["page_bytes"]
            ),
        }
        shape["claims"] = claims
        for claim, holds in claims.items():
            verdict = "holds" if holds else "DOES NOT HOLD"
            print(f"claim, {shape['batch']} x {shape['length']:,}: {claim}: {verdict}", flush=True)
