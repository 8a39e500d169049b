"""What `enable` changes in modules: merged weights, views of configs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from enabled_models import (  # noqa: E402
    CONFIGS,
    assert_as_before,
    configs_of,
    enabled,
    generate,
    last,
    loop,
    make_model,
    prompts,
    small,
    state_of,
)
from small_models import SMALL, VOCAB  # noqa: E402

from vattention.integrations.transformers import (  # noqa: E402
    new_cache,
    views,
)

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
                assert len(engine.parts.merged) == merged * merge
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
        assert len(engine.parts.merged) == 3
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
