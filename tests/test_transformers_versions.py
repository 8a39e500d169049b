"""What configs say of layers, in the words of every version of transformers that is served."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import cache_utils  # noqa: E402

from vattention.integrations.transformers import VAttentionCache, cache, versions  # noqa: E402
from vattention.integrations.transformers.versions import LayerKind  # noqa: E402

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(([SLIDING, FULL], {"sliding_window": 16}), id="for-all-layers"),
        pytest.param(([SLIDING, FULL], [{"sliding_window": 16}, {}]), id="for-each-layer"),
    ],
)
def test_windows_are_those_of_their_layers(monkeypatch, told):
    monkeypatch.setattr(cache_utils, "get_layer_types_and_kwargs", lambda config: told)
    assert versions.layer_kinds(None) == [LayerKind(SLIDING, 16), LayerKind(FULL, None)]


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (transformers.LlamaConfig(num_hidden_layers=2), [LayerKind(FULL, None)] * 2),
        (
            transformers.MistralConfig(num_hidden_layers=2, sliding_window=16),
            [LayerKind(SLIDING, 16)] * 2,
        ),
        (
            transformers.Llama4TextConfig(num_hidden_layers=4, attention_chunk_size=32),
            [LayerKind(CHUNKED, 32)] * 3 + [LayerKind(FULL, None)],
        ),
    ],
    ids=["full", "sliding", "chunked"],
)
def test_kinds_of_layers_are_those_of_the_config(config, kinds):
    assert versions.layer_kinds(config) == kinds


def test_cache_has_the_name_that_the_model_gives_it():
    assert versions.cache_parameter(["input_ids", "past_key_values"]) == "past_key_values"
    assert versions.cache_parameter(["input_ids", "cache"]) == "cache"
    # A forward of `*args, **kwargs` gets what `generate()` would pass.
    assert versions.cache_parameter(["args", "kwargs"]) == versions.CACHE


def make_cache(monkeypatch: pytest.MonkeyPatch, kinds: list[LayerKind]) -> VAttentionCache:
    monkeypatch.setattr(cache, "layer_kinds", lambda config: kinds)
    return VAttentionCache(transformers.LlamaConfig(), 2, 256, memory="64MiB", page_bytes=4096)


def feed(caches: list[Any], layers: list[int], lengths: list[int]) -> None:
    """The same updates for all; what they return must be equal."""
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        for layer in layers:
            k, v = torch.randn(2, 2, 2, length, 8, generator=generator)
            first, *others = [each.update(k, v, layer) for each in caches]
            for other in others:
                torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_layers_of_one_type_with_several_windows_keep_their_own(monkeypatch):
    windows = [8, 24, 8, None]
    kinds = [LayerKind(SLIDING if window else FULL, window) for window in windows]
    reference = transformers.DynamicCache()
    reference.layers = [
        cache_utils.DynamicSlidingWindowLayer(window) if window else cache_utils.DynamicLayer()
        for window in windows
    ]
    with make_cache(monkeypatch, kinds) as ours:
        feed([ours, reference], [0, 1, 2, 3], [20, 1, 1, 30, 5])
        assert set(ours.allocators) == {f"{SLIDING}:8", f"{SLIDING}:24", FULL}
        assert [layer.is_sliding for layer in ours.layers] == [True, True, True, False]


@pytest.mark.skipif(
    not hasattr(cache_utils, "DummyLayer"), reason="this version knows no layers without a cache"
)
def test_layers_without_a_cache_take_no_memory(monkeypatch):
    nothing = LayerKind("dummy", None)
    kinds = [nothing, LayerKind(FULL, None), nothing, LayerKind(FULL, None), nothing]
    reference = transformers.DynamicCache()
    reference.layers = [
        cache_utils.DummyLayer() if kind is nothing else cache_utils.DynamicLayer()
        for kind in kinds
    ]
    with make_cache(monkeypatch, kinds) as ours:
        feed([ours, reference], [1, 3], [20, 1, 1])
        assert ours.get_seq_length() == reference.get_seq_length() == 22
        (kv,) = ours.allocators.values()
        assert kv.layout.num_layers == 2
        with pytest.raises(NotImplementedError):
            ours.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 2)
        for each in (ours, reference):
            each.reorder_cache(torch.tensor([1, 0]))
            each.crop(-2)
        feed([ours, reference], [1, 3], [3])
        ours.reset()
        assert ours.get_seq_length() == 0
