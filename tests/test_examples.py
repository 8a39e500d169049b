"""The examples run as a user would run them, and say clearly what they cannot do."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The example's command, in this process; no hub is asked, whatever this machine reaches."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("generate")

    def run(*arguments: object, device: str = "cpu") -> int:
        return module.main(["--device", device, *map(str, arguments)])

    return run


def test_minimal_maps_what_its_tokens_need_and_keeps_it_after_free(capsys):
    runpy.run_path(str(ROOT / "examples" / "minimal.py"))
    printed = capsys.readouterr().out.replace(",", "")
    tokens, used, reserved, mapped, kept = map(int, re.findall(r"\d+(?= tokens| bytes)", printed))
    assert tokens == 1_200
    assert used == tokens * 4 * 2 * 8 * 64 * 2  # layers, K and V, heads, head_dim, bytes
    assert used <= mapped < 2 * used
    assert reserved >= 16 * 32_768 * used // tokens
    assert kept >= mapped  # the background thread may have mapped more since


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generate_shows_that_tokens_agree_and_draws_the_memory_map(
    device, generate, capsys, tmp_path
):
    status = generate(
        *("--batch", 2, "--max-new-tokens", 6, "--out", tmp_path),
        device=device,
    )
    printed = capsys.readouterr().out
    assert status == 0
    assert re.search(r"DynamicCache +VAttentionCache +enable\(model\)$", printed, re.MULTILINE)
    assert re.search(r"^ +tokens +agree +agree$", printed, re.MULTILINE)
    assert "DIFFER" not in printed and "without enable(model)" not in printed
    # It was our cache that an enabled model generated with.
    assert float(re.search(r"enable\(model\): physical memory, peak +([\d.]+)", printed)[1]) > 0
    assert "4 of 4 answers agree" in printed
    for figure in ("memory_map.png", "memory_map_1200.png"):
        assert (tmp_path / figure).read_bytes().startswith(PNG)


def test_generate_runs_another_model_with_its_own_tokenizer(generate, capsys, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces).save_pretrained(tmp_path)
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    status = generate(
        *("--model", tmp_path, "--batch", 2, "--max-new-tokens", 2, "--out", tmp_path / "out")
    )
    assert status == 0
    assert "4 of 4 answers agree" in capsys.readouterr().out


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a model of bytes that takes no time."""
    config = transformers.LlamaConfig(
        vocab_size=258,  # the shipped model's: 256 bytes and two more
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_generate_leaves_enable_out_where_it_refuses_the_model(
    generate, tiny, capsys, tmp_path, monkeypatch
):
    import vattention

    def refuse(model: object, **_: object) -> None:
        raise vattention.ConfigError("enable() cannot serve it:\nit has a mind of its own")

    monkeypatch.setattr("generate.enable", refuse)
    status = generate("--model", tiny, "--batch", 2, "--max-new-tokens", 2, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert status == 0
    assert "without enable(model): enable() cannot serve it: it has a mind of its own\n" in printed
    assert re.search(r"DynamicCache +VAttentionCache$", printed, re.MULTILINE)
    assert re.search(r"^ +tokens +agree$", printed, re.MULTILINE)
    assert "enable(model): physical memory" not in printed


def test_generate_fails_and_says_whose_tokens_differ(generate, tiny, capsys, tmp_path, monkeypatch):
    module = importlib.import_module("generate")
    original = module.generate_batch

    def err_where_enabled(model, batch, cache, *rest):
        run = original(model, batch, cache, *rest)
        return dataclasses.replace(run, tokens=run.tokens + (cache is None))

    monkeypatch.setattr(module, "generate_batch", err_where_enabled)
    status = generate("--model", tiny, "--batch", 2, "--max-new-tokens", 2, "--out", tmp_path)
    printed, error = capsys.readouterr()
    assert status == 1
    assert re.search(r"^ +tokens +agree +DIFFER$", printed, re.MULTILINE)
    assert "error: the tokens are not the same everywhere\n" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such-model"], "cannot load the model 'no/such-model'"),
        (["--device", "nonsense"], "cannot use the device 'nonsense'"),
        (["--max-new-tokens", "4000"], "--max-new-tokens 4000 is too many for this model"),
    ],
)
def test_generate_says_what_it_cannot_do(arguments, message, generate, capsys, tmp_path):
    assert generate("--out", tmp_path, *arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_serving_raises_what_one_lane_raised(monkeypatch):
    import vattention

    monkeypatch.syspath_prepend(ROOT / "examples")
    serving = importlib.import_module("serving")
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "byte-llama")
    requests = [serving.Request([256, 100, 101], 8, arrives_at) for arrives_at in (0, 0, 2, 50)]

    def fail_at_step_3(step: int) -> None:
        if step == 3:
            raise ValueError("at step 3")

    server = serving.Server(model, vattention.Pool(device="cpu"), lanes=3, max_seq_len=64)
    with pytest.raises(ValueError, match="at step 3"):
        server.serve(requests, fail_at_step_3)
    server.close()


def test_training_writes_a_model_that_loads(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for index in range(80):  # some of them are held out, by their names
        body = "\n".join(f"    total += {index} * {line}" for line in range(30))
        text = f"def add_{index}(total):\n{body}\n    return total\n"
        (source / f"module_{index}.py").write_text(text)
    command = [sys.executable, ROOT / "examples" / "train_byte_llama.py", "--device", "cpu"]
    command += ["--steps", 2, "--batch", 1, "--length", 64, "--valid-windows", 1]
    command += ["--source", source, "--out", tmp_path / "model"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "model" / "training.json").read_text())
    assert figures["steps"] == 2
    assert 0 < figures["valid_bits_per_byte"] < 20
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == figures["parameters"]


def test_readme_examples_run():
    """Every Python block of README.md, in turn and in one process, with the host backend."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) >= 2
    source = "\n".join(block.partition("```")[0] for block in blocks)
    setup = textwrap.dedent(
        """
        import os, torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        """
    )
    source = source.replace('device="cuda"', "device=device")
    done = subprocess.run(
        [sys.executable, "-c", setup + source],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
