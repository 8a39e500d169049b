"""Every family of causal models that transformers has, small, with random weights: as before?

    PYTHONPATH=tests python tests/enable/families.py [NAME ...]

or `make test-families`, which takes several minutes.

A family is "equal" where the tokens of `generate()` (padded batch, sampling, a continued chat) are
the same with `enable` as before and after it, "refused" where `enable` raises ConfigError, and
"different" or "failed" otherwise, with which this exits with 1. A family of which no small model
can be made from the settings here is counted as "not made".
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections import Counter
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
from enabled_models import enabled, prompts
from small_models import SMALL, WINDOW
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import vattention as va
from vattention.integrations.transformers.versions import CACHE

SECONDS = 60  # for a family
MOST_PARAMETERS = 10_000_000

# What families call their sizes; each takes those that it has.
SIZES = SMALL | dict(
    num_hidden_layers=3,
    sliding_window=WINDOW,
    attention_chunk_size=WINDOW,
    # GPT-2, OPT, MPT and their like
    n_embd=32,
    n_head=4,
    n_layer=3,
    n_positions=512,
    n_inner=48,
    rotary_dim=8,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    multi_query=False,
    ffn_dim=48,
    ffn_hidden_size=48,
    word_embed_proj_dim=32,
    embedding_size=32,
    # experts
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # latent attention
    kv_lora_rank=24,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
)
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "head_dim": 8},  # heads of latent attention, or all alike
    {"layer_types": None},
)


class TooLong(Exception):
    """A family has had its time."""


class NotMade(Exception):
    """There is no small model of a family."""


def settings(name: str) -> tuple[type, list[dict[str, Any]]]:
    """The class of a family's config, and what to try it with, one after another."""
    of_text = AutoConfig.for_model(name).get_text_config(decoder=True)
    kind = type(of_text)
    sizes = {
        key: value
        for key, value in SIZES.items()
        if hasattr(of_text, key) and not isinstance(getattr(kind, key, None), property)
    }
    layer_types = list(dict.fromkeys(getattr(of_text, "layer_types", None) or ()))
    if layer_types and not isinstance(getattr(kind, "layer_types", None), property):
        # One of each kind, and three at least.
        sizes["layer_types"] = (layer_types * 3)[: max(3, len(layer_types))]
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return kind, [
        sizes | {key: value for key, value in change.items() if key in sizes} for change in CHANGES
    ]


def make(name: str) -> Any:
    """A small model whose tokens are the same each time."""
    kind, tries = settings(name)
    reasons = []
    for sizes in tries:
        try:
            config = kind(**{key: value for key, value in sizes.items() if value is not None})
            torch.manual_seed(0)
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config)
            if sum(weights.numel() for weights in model.parameters()) > MOST_PARAMETERS:
                raise NotMade("it would not be small")
            model = model.float().eval()
            if generated(model) != generated(model):
                raise NotMade("its tokens differ each time")
        except TooLong:
            raise
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
        else:
            return model
    raise NotMade(reasons[0])


def generate(model: Any, inputs: dict[str, Any], **how: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**inputs, **{"max_new_tokens": 30, "do_sample": False, **how})


def generated(model: Any) -> list[list[list[int]]]:
    """Greedy tokens, sampled ones, and those of a second turn over the first one's cache."""
    inputs = prompts([40, 33, 7], "cpu")
    greedy = generate(model, inputs)
    first = generate(model, inputs, do_sample=True, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, inputs["input_ids"][:, 33:]], dim=1)
    more = torch.ones_like(ids[:, inputs["attention_mask"].shape[1] :])
    mask = torch.cat([inputs["attention_mask"], more], dim=1)
    cache = first.get(CACHE)
    turn = {} if cache is None else {CACHE: cache}
    second = generate(model, {"input_ids": ids, "attention_mask": mask, **turn})
    return [tokens.tolist() for tokens in (greedy, first.sequences, second)]


def verdict(name: str) -> str:
    """What becomes of a family, and why."""
    try:
        try:
            model = make(name)
        except TooLong:
            raise
        except Exception as why:
            return f"not made: {why}"
        before = generated(model)
        try:
            with enabled(model, max_seq_len=256) as engine:
                ours, served = generated(model), engine.pool.stats().creates > 0
        except va.ConfigError as why:
            return f"refused: {why}"
        if not served:
            return "failed: another cache was used"
        return "equal" if ours == before == generated(model) else "different"
    except TooLong:
        return "not made: it takes too long"
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    counts: Counter[str] = Counter()
    for name in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        signal.alarm(SECONDS)
        try:
            told = verdict(name)
        finally:
            signal.alarm(0)
        gc.collect()
        counts[told.split(":")[0]] += 1
        print(f"{name:28} {told[:160]}", flush=True)
    print(f"transformers {transformers.__version__}: {dict(counts.most_common())}")
    return 1 if counts["different"] or counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
