"""What its owner does to a model while it is enabled: the model does what it would do without."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from enabled_models import (  # noqa: E402
    GPU,
    build,
    decode,
    enabled,
    generate,
    joined,
    make_model,
    make_pool,
    prompts,
    start,
)
from small_models import PAD  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402

import vattention as va  # noqa: E402
from vattention.integrations.transformers import disable, enable, fuse, release  # noqa: E402
from vattention.integrations.transformers.parts import Parts  # noqa: E402
from vattention.integrations.transformers.views import Override  # noqa: E402

INPUTS = [12, 5]


def load(model: Any) -> None:
    other = make_model("llama", model.device.type, seed=1)
    model.load_state_dict(other.state_dict(), assign=True)


def average(model: Any) -> None:
    """As who keeps averages of weights swaps them in."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


def pruned(model: Any) -> None:
    for layer in model.model.layers:
        for linear in (layer.self_attn.v_proj, layer.mlp.up_proj):
            prune.l1_unstructured(linear, "weight", 0.6)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrized(model: Any) -> None:
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.self_attn.k_proj, "weight", Doubled())


def steered(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


def hooked(model: Any) -> None:
    """On a linear that is merged, with a look at the host, which no graph may take."""

    def hook(module, args, output):
        return output * (2.0 if output.abs().sum().item() > 0 else 1.0)

    model.model.layers[0].self_attn.k_proj.register_forward_hook(hook)


def other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def other_frequencies(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0.5


def wrapped(model: Any) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    inner = linear.forward
    linear.forward = lambda x: inner(x) * 2


def adapted(model: Any) -> None:
    """As an adapter does it: the linear is inside, and is called by its forward."""

    class Adapter(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x) + x.mean(-1, keepdim=True)

    mlp = model.model.layers[0].mlp
    mlp.gate_proj = Adapter(mlp.gate_proj)


def fewer_layers(model: Any) -> None:
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1


CHANGES = [
    load,
    average,
    pruned,
    parametrized,
    steered,
    hooked,
    other_activation,
    other_frequencies,
    wrapped,
    adapted,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("look", ["generate", "logits", "beams", "inner"])
def test_changed_model_computes_as_without(change, look, device):
    """Whatever is called first: also what is not served."""
    model, plain = make_model("llama", device), make_model("llama", device)
    inputs = prompts(INPUTS, device)

    @torch.no_grad()
    def ask(of: Any) -> Any:
        if look == "logits":
            return of(**inputs).logits
        if look == "inner":
            return of.model(**inputs).last_hidden_state
        return generate(of, inputs, num_beams=3 if look == "beams" else 1, max_new_tokens=12)

    before = ask(plain)
    change(plain)
    with enabled(model):
        torch.testing.assert_close(ask(model), before)
        change(model)
        after = ask(plain)
        assert not torch.equal(after, before)
        for _ in range(2):
            torch.testing.assert_close(ask(model), after)
        if look != "generate":
            look = "generate"
            torch.testing.assert_close(ask(model), ask(plain))


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_of_a_model_is_known_to_be_old(change):
    """Also what only graphs hold."""
    model = make_model("llama")
    parts = Parts(model, Override(), merge=True, compile=True, graphs=True)
    assert parts.is_current()
    change(model)
    assert not parts.is_current()
    parts.end(own_weights=True)


@pytest.mark.parametrize("name", ["training", "_active_adapter", "merged_adapters"])
def test_modules_that_are_set_differently_are_noticed(name):
    model = make_model("llama")
    module = model.model.layers[0].mlp
    values = (True, False) if name == "training" else (["one"], ["two"])
    setattr(module, name, values[0])
    parts = Parts(model, Override(), merge=False, compile=False, graphs=True)
    assert parts.is_current()
    setattr(module, name, values[1])
    assert not parts.is_current()
    setattr(module, name, values[0])
    assert parts.is_current()


def test_hooks_that_collect_outputs_are_nobodys():
    """transformers puts them on for good when it is first asked for hidden states."""
    model = make_model("llama")
    with torch.no_grad():
        model(**prompts(INPUTS, "cpu"), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert not Parts(model, Override(), merge=False, compile=False, graphs=True).has_hooks
    steered(model)
    assert Parts(model, Override(), merge=False, compile=False, graphs=True).has_hooks


def test_nothing_is_made_anew_while_nothing_changes(device):
    model = make_model("llama", device)
    with enabled(model) as engine:
        parts = engine.parts
        for lengths in ([12, 5], [7]):
            generate(model, prompts(lengths, device))
        decoders = dict(engine._decoders)
        with torch.no_grad():
            model(**prompts(INPUTS, device), output_hidden_states=True)
        generate(model, prompts([3], device), num_beams=2)
        generate(model, prompts([12, 5], device))
        assert engine.parts is parts
        assert engine._decoders == decoders


def test_layers_that_are_gone_are_not_missed():
    model, plain = make_model("llama"), make_model("llama")
    inputs = prompts(INPUTS, "cpu")
    fewer_layers(plain)
    with enabled(model):
        generate(model, inputs)
        fewer_layers(model)
        assert generate(model, inputs).tolist() == generate(plain, inputs).tolist()


@pytest.mark.parametrize("other", ["attention", "layer"])
def test_attention_that_is_another_is_refused_until_it_is_enabled(other):
    model, plain = make_model("llama"), make_model("llama", seed=1)
    inputs = prompts(INPUTS, "cpu")
    with enabled(model):
        generate(model, inputs)
        if other == "attention":
            model.model.layers[0].self_attn = plain.model.layers[0].self_attn
        else:
            model.model.layers[0] = plain.model.layers[0]
        for _ in range(2):
            with pytest.raises(va.ConfigError, match=r"layers\.0\.self_attn is another module"):
                generate(model, inputs)
    before = generate(model, inputs).tolist()
    with enabled(model):
        assert generate(model, inputs).tolist() == before


@pytest.mark.parametrize("copies", [copy.deepcopy, pickle.dumps])
def test_parts_of_an_enabled_model_are_not_copied(copies):
    model = make_model("llama")
    with enabled(model):
        for part in (model.model, model.model.layers[0].self_attn, model.model.layers[0].mlp):
            with pytest.raises(va.ConfigError, match="copied: disable"):
                copies(part)
    copies(model.model)


def test_forwards_that_others_put_on_stay():
    model = make_model("llama")
    inputs = prompts(INPUTS, "cpu")
    before = generate(model, inputs).tolist()
    calls = []

    def wrap(module: Any) -> Callable[..., Any]:
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return inner(*args, **kwargs)

        module.forward = forward
        return forward

    linear = model.model.layers[0].self_attn.q_proj
    with enabled(model):
        wrappers = [wrap(model), wrap(linear)]
        assert generate(model, inputs).tolist() == before
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
        assert generate(model, inputs).tolist() == before
        assert vars(linear)["forward"] is wrappers[1]
    assert [vars(model)["forward"], vars(linear)["forward"]] == wrappers
    del calls[:]
    assert generate(model, inputs).tolist() == before
    assert {id(module) for module in calls} == {id(model), id(linear)}


def test_forwards_that_others_took_off_are_not_missed():
    model = make_model("llama")
    inputs = prompts(INPUTS, "cpu")
    before = generate(model, inputs).tolist()
    with enabled(model):
        del model.model.layers[0].self_attn.q_proj.forward
        assert generate(model, inputs).tolist() == before
        del model.model.layers[0].self_attn.q_proj.forward
    assert generate(model, inputs).tolist() == before


@pytest.mark.parametrize("within", ["enable", "disable", "generate"])
def test_weights_can_be_trained_whatever_inference_mode_they_met(within):
    def mode(step: str) -> Any:
        return torch.inference_mode() if step == within else contextlib.nullcontext()

    model = make_model("qwen2")
    inputs = prompts(INPUTS, "cpu")
    with mode("enable"):
        enable(model, pool=make_pool("cpu"), max_batch_size=2, max_seq_len=64, compile=False)
    average(model)
    with mode("generate"):
        generate(model, inputs)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    with mode("disable"):
        disable(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_memory_for_merging_anew_leaves_the_model_usable(monkeypatch):
    model, plain = make_model("llama"), make_model("llama")
    inputs = prompts(INPUTS, "cpu")
    average(plain)
    after = generate(plain, inputs).tolist()
    merged = fuse.Merged
    alive = []

    def fail(*given: Any) -> Any:
        alive.append(sum(each.weight is not None for each in old))
        raise torch.OutOfMemoryError("no memory")

    with enabled(model) as engine:
        generate(model, inputs)
        old = list(engine.parts.merged)
        average(model)
        monkeypatch.setattr(fuse, "Merged", fail)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, inputs)
        assert alive == [0]  # the old matrices have gone before
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
        monkeypatch.setattr(fuse, "Merged", merged)
        assert generate(model, inputs).tolist() == after
        assert len(engine.parts.merged) == len(old)
        average(model)
        monkeypatch.setattr(fuse, "Merged", fail)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, inputs)
    average(plain)
    assert generate(model, inputs).tolist() == generate(plain, inputs).tolist()


def test_release_lets_go_of_weights_that_the_model_has_no_more():
    model = make_model("llama")
    inputs = prompts(INPUTS, "cpu")
    with enabled(model) as engine:
        generate(model, inputs)
        model.to(torch.float64).to(torch.float32)
        release(model)
        assert engine.parts.merged == []
        generate(model, inputs)
        assert len(engine.parts.merged) == 4
        merged = list(engine.parts.merged)
        release(model)
        assert engine.parts.merged == merged


def test_tokens_elsewhere_are_refused():
    model = make_model("llama")
    with torch.no_grad(), enabled(model) as engine:
        cache, token = start(model, engine, prompts(INPUTS, "cpu"))
        with pytest.raises(va.ConfigError, match="input_ids must be on cpu, .*; they are on meta"):
            model(input_ids=token.to("meta"), past_key_values=cache)
        decode(model, cache, token, 1)


@GPU
def test_model_that_was_moved_runs_as_before_until_it_is_back():
    model = make_model("llama", "cuda")
    before = generate(model, prompts(INPUTS, "cuda")).tolist()
    with enabled(model) as engine:
        assert generate(model, prompts(INPUTS, "cuda")).tolist() == before
        model.to("cpu")
        release(model)
        assert engine.pool.stats().held_bytes == 0
        assert generate(model, prompts(INPUTS, "cpu")).tolist() == before
        assert engine.pool.stats().held_bytes == 0
        model.to("cuda")
        assert generate(model, prompts(INPUTS, "cuda")).tolist() == before
        assert engine.pool.stats().held_bytes > 0


def test_next_turn_of_one_token_sees_weights_that_changed():
    model = make_model("llama")
    inputs = prompts([12, 9], "cpu")
    with torch.no_grad(), enabled(model) as engine:
        cache, token = start(model, engine, inputs)
        first = decode(model, cache, token, 3)
        average(model)
        ids = torch.cat([inputs["input_ids"], token, *first], dim=1)
        mask = torch.ones_like(ids)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        decoders = list(engine._decoders.values())
        output = generate(
            model,
            {"input_ids": ids, "attention_mask": mask},
            past_key_values=cache,
            max_new_tokens=3,
        )
        assert output.shape[1] == ids.shape[1] + 3
        assert not set(decoders) & set(engine._decoders.values())


def test_attention_is_chosen_between_calls_of_other_threads():
    model = make_model("llama")
    with enabled(model) as engine:
        thread = threading.Thread(target=model.set_attn_implementation, args=("eager",))
        with engine._lock:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
            assert engine._views
        thread.join()


def test_models_are_enabled_by_several_threads_at_once():
    models = [make_model("llama", num_hidden_layers=8, seed=seed) for seed in range(4)]
    failed = []

    def run(model: Any) -> None:
        try:
            with enabled(model):
                pass
        except BaseException as error:
            failed.append(error)

    for _ in range(3):
        threads = [threading.Thread(target=run, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


def test_steps_under_autocast_are_not_those_without(device):
    model = make_model("llama", device)
    inputs = prompts(INPUTS, device)

    def both(of: Any) -> list[list[list[int]]]:
        found = []
        for cast in (False, True, False):
            with torch.autocast(device, torch.bfloat16, enabled=cast):
                found.append(generate(of, inputs, max_new_tokens=12).tolist())
        return found

    before = both(model)
    with enabled(model) as engine:
        ours = both(model)
        assert len(engine._decoders) == 2
    assert [ours[0], ours[2]] == [before[0], before[2]]


def test_chat_goes_on_though_its_rows_ended_at_different_times(device):
    """What ended rows were given until the last one ended is padding in the next turn."""
    model = build("llama", device)
    inputs = prompts([9, 6], device)
    with torch.no_grad():

        def talk(cache: Any) -> list[list[int]]:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            for turn, (ended, new) in enumerate([((0, 3), 4), ((2, 0), 2), ((0, 1), 3)]):
                output = model(
                    input_ids=ids[:, cache.get_seq_length() :],
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, cache.get_seq_length() :],
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                for step in range(4):
                    token = output.logits[:, -1:].argmax(-1)
                    for row, steps in enumerate(ended):
                        if step >= 4 - steps:
                            token[row] = PAD
                    ids = torch.cat([ids, token], dim=1)
                    mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                    positions = (mask.cumsum(1) - 1)[:, -1:]
                    output = model(
                        input_ids=token,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=cache,
                    )
                for row, steps in enumerate(ended):
                    mask[row, mask.shape[1] - steps :] = 0
                more = prompts([new] * 2, device, seed=turn)["input_ids"]
                ids = torch.cat([ids, more], dim=1)
                mask = torch.cat([mask, torch.ones_like(more)], dim=1)
            return ids.tolist()

        expected = talk(transformers.DynamicCache(config=model.config))
        with enabled(model) as engine:
            cache, token = start(model, engine, inputs)
            cache.reset()
            assert talk(cache) == expected
            # The decode steps alone are meant.
            before = list(cache.lengths)
            mask = torch.ones(2, cache.seen + 2, dtype=torch.long, device=device)
            mask[0, cache.seen - 5 : cache.seen] = 0
            with pytest.raises(va.ConfigError, match="cannot be masked afterwards"):
                model(input_ids=token.expand(2, 2), attention_mask=mask, past_key_values=cache)
            assert cache.lengths == before
            assert joined(*decode(model, cache, token, 2))


@pytest.mark.parametrize("new", [1, 3])
def test_chat_by_generate_goes_on_though_its_rows_ended_at_different_times(new, device):
    model = build("llama", device)
    inputs = prompts([9, 6], device)
    free = generate(model, inputs, max_new_tokens=8)[:, 9:].tolist()
    end = next(token for token in free[1][2:5] if token not in free[0] and token not in free[1][:2])

    def talk(cache: Any) -> list[list[int]]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for turn in range(3):
            given = {"input_ids": ids, "attention_mask": mask}
            options = {"max_new_tokens": 8, "eos_token_id": end, "past_key_values": cache}
            out = generate(model, given, **options)
            answer = out[:, ids.shape[1] :]
            more = prompts([new] * 2, device, seed=turn)["input_ids"]
            mask = torch.cat([mask, (answer != PAD).to(mask.dtype), torch.ones_like(more)], dim=1)
            ids = torch.cat([out, more], dim=1)
        return ids.tolist()

    expected = talk(transformers.DynamicCache(config=model.config))
    assert PAD in expected[1][9:17]
    with torch.no_grad(), enabled(model) as engine:
        cache, _ = start(model, engine, inputs)
        cache.reset()
        assert talk(cache) == expected
