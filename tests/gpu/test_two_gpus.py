"""Two GPUs: what runs, runs on the one that has the memory, whichever is the current one."""

from __future__ import annotations

import pytest
import torch

import vattention as va
from vattention.attention import (
    BACKENDS,
    Batch,
    Options,
    append,
    attend,
    backends,
    tail_slack_tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU"),
]
OTHER = "cuda:1"


@pytest.fixture(autouse=True)
def first_is_current():
    with torch.cuda.device(0):
        yield


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if b.needs.device == "cuda"])
def test_attention_runs_where_its_memory_is(name: str) -> None:
    layout = va.KVLayout(num_layers=2, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    slack = tail_slack_tokens(device=OTHER)
    with va.KVAllocator(
        layout,
        max_sequences=4,
        max_seq_len=4096,
        memory="2GiB",
        device=OTHER,
        tail_slack_tokens=slack,
    ) as kv:
        if why := backends(kv, Options(num_heads=32))[name]:
            pytest.skip("; ".join(why))
        lengths = [300, 1, 1_000]
        sequences = [kv.allocate(length) for length in lengths]
        torch.manual_seed(1)
        k, v = torch.randn(2, sum(lengths), 8, 128, device=OTHER, dtype=torch.bfloat16)
        whole = Batch.of(dict(zip(sequences, lengths, strict=True)))
        append(k, v, 1, whole)
        q = torch.randn(sum(lengths), 32, 128, device=OTHER, dtype=torch.bfloat16)
        out = attend(q, kv, 1, whole, backend=name)
        assert not whole.is_captured
        parts = zip(*(x.split(lengths) for x in (out, q, k, v)), strict=True)
        for got, queries, keys, values in parts:
            want = torch.nn.functional.scaled_dot_product_attention(
                *(x.float().transpose(0, 1)[None] for x in (queries, keys, values)),
                is_causal=True,
                enable_gqa=True,
            )[0].transpose(0, 1)
            torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
        assert torch.cuda.current_device() == 0


def test_an_enabled_model_generates_where_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    from small_models import SMALL, VOCAB

    from vattention.integrations.transformers import disable, enable

    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config).to(OTHER, torch.float32).eval()
    prompt = torch.randint(3, VOCAB, (2, 12), device=OTHER)
    options = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    before = model.generate(prompt, **options)
    enable(model, max_batch_size=2, max_seq_len=256, memory="1GiB")
    try:
        assert model.generate(prompt, **options).tolist() == before.tolist()
        assert model._vattention_engine.pool.stats().creates > 0
    finally:
        disable(model)
