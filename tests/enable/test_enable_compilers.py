"""Enabled models under compilers, and as CUDA graphs."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from enabled_models import (  # noqa: E402
    PAGE_BYTES,
    build,
    decode,
    enabled,
    exact_pool,
    generate,
    joined,
    last,
    live_tokens,
    loop,
    make_model,
    mapped_bytes,
    prompts,
    small,
    start,
    state_of,
    token_bytes,
)

import vattention as va  # noqa: E402
from vattention.integrations.transformers import (  # noqa: E402
    new_cache,
    operator,
    release,
)
from vattention.integrations.transformers.ragged import RaggedCache  # noqa: E402

# Compilers and graphs


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_layers_compile_to_one_graph_without_breaks(name):
    model = make_model(name)
    inputs = prompts([12, 5, 3], "cpu")
    before = generate(model, inputs, max_new_tokens=8).tolist()
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with enabled(model) as engine:
        cache, token = start(model, engine, inputs)
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
        tokens = decode(model, cache, token, 3)
        assert counters["stats"]["unique_graphs"] == 1
        other, again = start_again(model, engine, inputs)
        tokens_again = decode(model, other, again, 7)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        for layer in model.model.layers:
            del layer.forward
    assert joined(inputs["input_ids"], token, *tokens_again) == before
    assert joined(*tokens) == joined(*tokens_again[:3])
    torch._dynamo.reset()


def start_again(model: Any, engine: Any, inputs: dict[str, Any]) -> tuple[RaggedCache, Any]:
    """`start` by the code of the layers, not by what was compiled of it."""
    compiled = [layer.forward for layer in model.model.layers]
    for layer in model.model.layers:
        del layer.forward
    try:
        return start(model, engine, inputs)
    finally:
        for layer, forward in zip(model.model.layers, compiled, strict=True):
            layer.forward = forward


class Plain:
    """A step that attends to nothing but what it is given."""

    def attend(self, layer, q, k, v, sinks):
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return output.transpose(1, 2).contiguous()


@pytest.mark.parametrize("v_dim", [16, 8])
def test_operator_is_what_compilers_are_told(device, v_dim):
    owner = torch.nn.Identity()
    number = operator.register(owner)
    q = torch.randn(2, 4, 3, 16, device=device)
    k = torch.randn(2, 2, 3, 16, device=device)
    v = torch.randn(2, 2, 3, v_dim, device=device)
    operator.set_step(number, Plain())
    try:
        for sinks in (None, torch.zeros(4, device=device)):
            args = (q, k, v, operator.handle(number, 1), sinks)
            torch.library.opcheck(torch.ops.vattention.append_and_attend.default, args)
    finally:
        operator.set_step(number, None)


# The whole model compiled by the caller


@pytest.mark.parametrize(("name", "masked"), [("llama", True), ("gemma2", False)])
def test_compiled_model_has_a_graph_for_prompts_and_one_for_steps(name, masked, compiler):
    model = build(name, "cpu")
    lengths = [20, 7, 1] if masked else [20, 20]
    inputs = prompts(lengths, "cpu")
    before = generate(model, inputs, max_new_tokens=90).tolist()
    if not masked:
        del inputs["attention_mask"]
    with enabled(model, pool=exact_pool("cpu")) as engine:
        call = torch.compile(model, backend=compiler, fullgraph=True)
        cache, mapped = new_cache(model), []
        for tokens in loop(call, cache, inputs, 90):  # noqa: B007
            mapped.append(mapped_bytes(engine))
            used = sum(cache.lengths) * token_bytes(engine)
            assert used <= mapped[-1] <= used + len(lengths) * 4 * PAGE_BYTES
        assert tokens == before
        assert cache.lengths == [length + 89 for length in lengths]
        assert mapped == sorted(mapped) and len(set(mapped)) > 3
        # By turns with the engine's own steps, on another cache.
        calls = itertools.cycle([call, model])
        turns = loop(lambda **inputs: next(calls)(**inputs), new_cache(model), inputs, 90)
        assert last(turns) == before
    assert compiler.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_prompts_of_all_lengths_are_one_graph_more(compiler):
    model = small()
    with enabled(model):
        call = torch.compile(model, backend=compiler, fullgraph=True)
        for width in (20, 9, 30, 14):
            ids = prompts([width] * 2, "cpu")["input_ids"]
            before = generate(model, {"input_ids": ids}, max_new_tokens=1)
            assert last(loop(call, new_cache(model), {"input_ids": ids}, 1)) == before.tolist()
    assert compiler.frame_count == 2


@pytest.mark.parametrize("how", ["in place", "forward"])
def test_model_may_be_compiled_in_place_and_by_its_forward(how, compiler):
    model = small()
    inputs = prompts([20, 5], "cpu")
    before = generate(model, inputs, max_new_tokens=6).tolist()
    with enabled(model):
        call = model
        if how == "in place":
            model.compile(backend=compiler, fullgraph=True)
        else:
            call = torch.compile(model.forward, backend=compiler, fullgraph=True)
            assert last(loop(call, new_cache(model), inputs, 6)) == before
        assert generate(model, inputs, max_new_tokens=6).tolist() == before
    assert compiler.frame_count >= 2


def test_models_with_breaks_of_their_own_compile_in_parts(compiler):
    model = make_model("dynamic", num_hidden_layers=1)
    inputs = prompts([20, 5], "cpu")
    before = generate(model, inputs, max_new_tokens=2).tolist()
    with enabled(model):
        calls = iter([model, torch.compile(model, backend=compiler)])
        tokens = loop(lambda **inputs: next(calls)(**inputs), new_cache(model), inputs, 2)
        assert last(tokens) == before
    assert compiler.frame_count > 1


def test_calls_without_its_cache_compile_as_before(compiler):
    model = small()
    ids = prompts([20, 20], "cpu")["input_ids"]
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with enabled(model) as engine:
        call = torch.compile(model, backend=compiler, fullgraph=True)
        output = call(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(model.lm_head.weight.grad, gradient)
        assert engine.pool.stats().creates == 0
    assert compiler.frame_count == 1


def test_compiled_steps_are_taken_in_order_though_nobody_reads_them():
    torch._dynamo.reset()
    model = small()
    ids = prompts([20, 20], "cpu")["input_ids"]
    before = generate(model, {"input_ids": ids}, max_new_tokens=1)[:, 20:]

    @torch.no_grad()
    def run(*caches: Any) -> list[Any]:
        for cache in caches:
            model(input_ids=ids[:, :12], past_key_values=cache)
        outputs = [model(input_ids=ids[:, 12:], past_key_values=cache) for cache in caches]
        return [output.logits[:, -1:].argmax(-1) for output in outputs]

    with enabled(model):
        caches = new_cache(model), new_cache(model)
        # This backend removes what is of no effect.
        for tokens in torch.compile(run, backend="aot_eager", fullgraph=True)(*caches):
            assert torch.equal(tokens, before)
        assert [cache.lengths for cache in caches] == [[20, 20]] * 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"max_seq_len": 40}, va.SequenceTooLong), ({"pages": 8}, va.OutOfPages)],
)
def test_compiled_call_that_fails_leaves_the_cache_as_it_was(options, error, compiler):
    model = small()
    inputs = {"input_ids": prompts([20, 20], "cpu")["input_ids"]}
    before = generate(model, inputs, max_new_tokens=60)
    if "pages" in options:
        options = {"pool": exact_pool("cpu", **options)}
    with enabled(model, **options) as engine, torch.no_grad():
        call = torch.compile(model, backend=compiler, fullgraph=True)
        cache = new_cache(model)
        with pytest.raises(error):
            last(loop(call, cache, inputs, 60))
        length, mapped = cache.seen, mapped_bytes(engine)
        assert cache.lengths == [length] * 2 and length > 30
        token = before[:, length : length + 1].clone()
        for each in (call, model):
            with pytest.raises(error):
                each(input_ids=token, past_key_values=cache, use_cache=True)
            assert cache.lengths == [length] * 2 and mapped_bytes(engine) == mapped
        cache.crop(-3)
        token = before[:, length - 3 : length - 2].clone()
        output = call(input_ids=token, past_key_values=cache, use_cache=True)
        assert torch.equal(output.logits.argmax(-1), before[:, length - 2 : length - 1])


def test_compiled_step_that_was_cut_off_is_taken_back(compiler, monkeypatch):
    model = small()
    ids = prompts([20, 20], "cpu")["input_ids"]
    before = generate(model, {"input_ids": ids}, max_new_tokens=5)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with enabled(model) as engine, torch.no_grad():
        call = torch.compile(model, backend=compiler, fullgraph=True)
        for held, then in itertools.product((0, 10), (call, model)):
            cache = new_cache(model)
            if held:
                model(input_ids=ids[:, :held], past_key_values=cache)
            inputs = {"input_ids": ids[:, held : held + 10].clone()}
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(engine, "attend", fail)
                call(**inputs, past_key_values=cache, use_cache=True)
            assert cache.lengths == [held] * 2 * bool(held)
            tokens = last(loop(then, cache, inputs, 5))
            assert cache.lengths == [held + 14] * 2
            if held:
                assert tokens == before[:, held:].tolist()


def test_compiled_calls_that_are_not_served_say_why(compiler):
    model = small()
    with pytest.raises(va.ConfigError, match="not enabled"):
        new_cache(model)
    ids = prompts([20, 20], "cpu")["input_ids"]
    with enabled(model):
        cache = new_cache(model)
        for fullgraph, error in ((True, torch._dynamo.exc.Unsupported), (False, va.ConfigError)):
            call = torch.compile(model, backend=compiler, fullgraph=fullgraph)
            with pytest.raises(error, match=r"torch\.no_grad"):
                call(input_ids=ids, past_key_values=cache)
            with torch.no_grad(), pytest.raises(error, match="output_attentions"):
                call(input_ids=ids, past_key_values=cache, output_attentions=True)
        with torch.no_grad(), pytest.raises(va.ConfigError, match="attention_mask must be"):
            call(input_ids=ids, past_key_values=cache, attention_mask=ids[:, 1:])
        assert cache.lengths == []


def test_weights_replaced_since_it_was_compiled_are_noticed(compiler):
    model, other = small(), small(seed=1)
    inputs = {"input_ids": prompts([20, 20], "cpu")["input_ids"]}
    expected = generate(other, inputs, max_new_tokens=1).tolist()
    with enabled(model):
        call = torch.compile(model, backend=compiler, fullgraph=True)
        assert last(loop(call, new_cache(model), inputs, 1)) != expected
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own.data = new.data.clone()
        cache = new_cache(model)
        with pytest.raises(va.ConfigError, match="call it again"):
            last(loop(call, cache, inputs, 1))
        assert last(loop(call, cache, inputs, 1)) == expected


def test_rows_of_caches_that_compilers_noted_are_free_when_they_are_needed(compiler):
    model = small()
    inputs = {"input_ids": prompts([20, 20], "cpu")["input_ids"]}
    gc.disable()
    try:
        with enabled(model, max_batch_size=2):
            call = torch.compile(model, backend=compiler, fullgraph=True)
            for _ in range(3):
                last(loop(call, new_cache(model), inputs, 1))
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_compiled_prompts_may_have_padding_anywhere(name, compiler):
    model = make_model(name, num_hidden_layers=1)
    inputs = prompts([12] * 4, "cpu")
    mask = inputs["attention_mask"]
    mask[0, 5:] = mask[1, :3] = mask[2, 4:6] = mask[2, 10:] = 0
    real = mask.bool()
    with enabled(model, max_batch_size=16):
        call = torch.compile(model, backend=compiler, fullgraph=True)
        for inputs["position_ids"] in (None, torch.arange(12)[None] + 3):
            expected = model(**inputs, past_key_values=new_cache(model)).logits
            of_last = dict(past_key_values=new_cache(model), logits_to_keep=1)
            expected_last = model(**inputs, **of_last).logits
            cache = new_cache(model)
            logits = call(**inputs, past_key_values=cache).logits
            torch.testing.assert_close(logits[real], expected[real])
            torch.testing.assert_close(logits[:, -1:], expected_last)
            assert cache.lengths == [5, 9, 8, 12]
        # All of it is padding: then the rows begin with what comes next.
        cache = new_cache(model)
        call(**inputs | {"attention_mask": mask * 0}, past_key_values=cache)
        assert cache.lengths == [0] * 4
        logits = model(**inputs | {"attention_mask": None}, past_key_values=cache).logits
        assert cache.lengths == [12] * 4
        torch.testing.assert_close(logits[3], expected[3])


def test_compiler_that_does_not_see_whose_attention_it_is_is_found_out(compiler, monkeypatch):
    model = small()
    inputs = prompts([9, 9], "cpu")
    before = generate(model, inputs).tolist()
    with enabled(model) as engine:
        cache = new_cache(model)
        # Its config says nothing, as where a compiler reads what it was before.
        monkeypatch.setattr(model.model.layers[0].self_attn, "config", model.config)
        call = torch.compile(model, backend=compiler, fullgraph=True)
        with torch.no_grad(), pytest.raises(va.ConfigError, match="do not compile it"):
            call(input_ids=inputs["input_ids"], past_key_values=cache)
        monkeypatch.undo()
        assert cache.lengths == []
        assert generate(model, inputs).tolist() == before
        assert live_tokens(engine) == 0


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_operator_that_begins_is_what_compilers_are_told(masked):
    model = small()
    with enabled(model) as engine:
        cache, inputs = new_cache(model), prompts([4, 2] if masked else [4, 4], "cpu")
        mask = inputs["attention_mask"] if masked else None
        positions = torch.arange(4)[None] if masked else None
        args = (inputs["input_ids"], positions, mask, cache.handle, engine.step_order)
        torch.library.opcheck(torch.ops.vattention.begin.default, args)
        assert cache.lengths == []


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model_on_a_gpu_equals_before(mode):
    torch._dynamo.reset()
    model = build("llama", "cuda")
    inputs = prompts([20, 5], "cuda")
    before = generate(model, inputs, max_new_tokens=30).tolist()
    with enabled(model):
        call = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(2):
            assert last(loop(call, new_cache(model), inputs, 30)) == before
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_decode_runs_as_a_graph_where_it_is_asked_for(graphs):
    model = build("llama", "cuda")
    inputs = prompts([12, 5, 3], "cuda")
    before = generate(model, inputs).tolist()
    with enabled(model, graphs=graphs) as engine:
        assert generate(model, inputs).tolist() == before
        assert [decoder._graph is not None for decoder in engine._decoders.values()] == [graphs]


@pytest.mark.gpu
def test_graph_sees_memory_grow_and_come_back():
    model = build("llama", "cuda")
    with enabled(model, pool=exact_pool("cuda"), max_seq_len=20_000) as engine:
        ids = prompts([8_190], "cuda")["input_ids"]
        cache, token = start(model, engine, {"input_ids": ids})
        mapped = mapped_bytes(engine)
        first = decode(model, cache, token, 10)
        assert mapped_bytes(engine) > mapped
        del cache
        release(model)
        assert mapped_bytes(engine) == 0
        cache, token = start(model, engine, {"input_ids": ids})
        assert joined(*decode(model, cache, token, 10)) == joined(*first)
        assert len(engine._decoders) == 1


@pytest.mark.gpu
def test_frequencies_that_depend_on_lengths_are_not_captured():
    model = build("dynamic", "cuda")
    inputs = prompts([30, 5], "cuda")
    before = generate(model, inputs).tolist()
    with enabled(model) as engine:
        assert not engine.graphs
        assert generate(model, inputs).tolist() == before


@pytest.mark.gpu
def test_compiled_decode_equals_before():
    model = make_model("qwen2", "cuda")
    batches = [prompts([12, 5, 3], "cuda"), prompts([7], "cuda")]
    before = [generate(model, inputs).tolist() for inputs in batches]
    state = state_of(model)
    with enabled(model, compile=True):
        assert [generate(model, inputs).tolist() for inputs in batches] == before
    assert state_of(model) == state
    assert [generate(model, inputs).tolist() for inputs in batches] == before
