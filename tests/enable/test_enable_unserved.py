"""What `enable` does not serve runs as before, and `disable` leaves nothing behind."""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from enabled_models import (  # noqa: E402
    assert_as_before,
    build,
    enabled,
    generate,
    make_model,
    make_pool,
    prompts,
    start,
    state_of,
)
from small_models import FULL, PAD, SMALL, VOCAB, deepseek_v3  # noqa: E402

import vattention as va  # noqa: E402
from vattention.integrations.transformers import (  # noqa: E402
    VAttentionCache,
    disable,
    enable,
    fuse,
    operator,
    release,
)

# What is not served runs as before


@pytest.mark.parametrize("kind", ["too_long", "too_many"])
def test_generate_beyond_the_limits_runs_as_before(kind):
    model = build("llama", "cpu")
    inputs = prompts([20, 6], "cpu")
    before = generate(model, inputs)
    limits = {"max_seq_len": 58} if kind == "too_long" else {"max_batch_size": 1}
    with enabled(model, **limits) as engine:
        with pytest.warns(UserWarning, match="do not fit the model as it was enabled"):
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
    return transformers.DeepseekV3ForCausalLM(deepseek_v3())


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
    state, merged = state_of(model), fuse.Merged
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    done = []

    def fail_late(*given: Any) -> Any:
        if len(done) == 2:
            raise torch.OutOfMemoryError("no memory")
        done.append(merged(*given))
        return done[-1]

    monkeypatch.setattr(fuse, "Merged", fail_late)
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
