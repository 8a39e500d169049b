"""Train the small byte-level Llama that the examples generate with.

The model is an ordinary `LlamaForCausalLM` over bytes: token ids 0 to 255 are the bytes
themselves, 256 begins a document and 257 ends one (and pads), so no tokenizer is needed. It
learns from the source code of the Python standard library of the interpreter that runs this
script, so no download is needed either. Whole files, chosen by a hash of their name, are held
out for validation.

Three minutes on one data-centre GPU are enough:

    python examples/train_byte_llama.py --minutes 3

writes config.json, generation_config.json, model.safetensors (bfloat16), a model card
(README.md) and training.json into examples/byte-llama. The learning rate follows the elapsed
part of the time budget, so it always ends decayed; a faster device simply makes more steps.
A run of a few steps on a CPU, to see that everything works:

    python examples/train_byte_llama.py --device cpu --steps 3 --batch 2 --length 256 \
        --valid-windows 4 --out build/byte-llama

It needs torch and transformers 5.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import platform
import sysconfig
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS = 256
EOS = 257
VOCAB_SIZE = 258

VALID_PERCENT = 3
FILE_START_FRACTION = 1 / 8
# Validation is also reported by how much context the model had, in these ranges of positions.
POSITION_EDGES = (0, 128, 512, 1024, 2048, 4096, 8192)

WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
PRINT_SECONDS = 5.0

SAMPLE_PROMPT = b"def "
SAMPLE_BYTES = 200
MAX_FOLDER_BYTES = 8_000_000

# Written by Python's build or by whoever administers the machine: not library source.
SKIPPED_NAMES = ("_sysconfigdata", "sitecustomize", "usercustomize")
SKIPPED_FOLDERS = {"site-packages", "dist-packages"}


@dataclass
class Corpus:
    """Files laid end to end, each as BOS, its bytes, EOS."""

    tokens: torch.Tensor
    starts: torch.Tensor
    num_files: int
    num_bytes: int


def list_sources(root: Path) -> list[Path]:
    """The library's .py files in an order that does not depend on the file system."""
    sources = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if SKIPPED_FOLDERS.isdisjoint(folders) and not path.name.startswith(SKIPPED_NAMES):
            sources.append(path)
    return sorted(sources, key=lambda path: path.relative_to(root).as_posix())


def is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < VALID_PERCENT


def make_corpus(files: list[bytes], device: torch.device) -> Corpus:
    # 16 bits a token, because BOS and EOS do not fit in a byte.
    bos = torch.tensor([BOS], dtype=torch.int16)
    eos = torch.tensor([EOS], dtype=torch.int16)
    pieces: list[torch.Tensor] = []
    starts: list[int] = []
    position = 0
    for data in files:
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int16)
        pieces += [bos, body, eos]
        starts.append(position)
        position += len(data) + 2
    return Corpus(
        tokens=torch.cat(pieces).to(device),
        starts=torch.tensor(starts, device=device),
        num_files=len(files),
        num_bytes=sum(map(len, files)),
    )


def load_corpora(root: Path, device: torch.device) -> tuple[Corpus, Corpus]:
    """The training and the validation files of the standard library under `root`."""
    train: list[bytes] = []
    valid: list[bytes] = []
    for path in list_sources(root):
        data = path.read_bytes()
        if data:
            held_out = is_held_out(path.relative_to(root).as_posix())
            (valid if held_out else train).append(data)
    return make_corpus(train, device), make_corpus(valid, device)


def draw_batch(
    corpus: Corpus, batch: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops, as inputs and the tokens that follow them."""
    device = corpus.tokens.device
    last = corpus.tokens.numel() - length - 1
    anywhere = torch.randint(last + 1, (batch,), generator=generator, device=device)
    file = torch.randint(corpus.num_files, (batch,), generator=generator, device=device)
    # Random crops almost never begin with BOS, but prompts may: some crops begin with a file.
    at_file = torch.rand(batch, generator=generator, device=device) < FILE_START_FRACTION
    start = torch.where(at_file, corpus.starts[file].clamp(max=last), anywhere)
    offsets = torch.arange(length + 1, device=device)
    tokens = corpus.tokens[start[:, None] + offsets].long()
    return tokens[:, :-1], tokens[:, 1:]


def make_model(device: torch.device) -> LlamaForCausalLM:
    """A Llama with grouped-query attention whose bfloat16 weights fit in 8 MB."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        use_cache=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(device)


def compile_layers(model: LlamaForCausalLM) -> None:
    # Layer by layer, because transformers gives SDPA an explicit mask when the whole model is
    # traced, which rules out the flash kernel. The layers share one compilation.
    for layer in model.model.layers:
        layer.compile()


def make_optimizer(model: LlamaForCausalLM, lr: float, fused: bool) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    gains = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def learning_rate(peak: float, step: int, fraction: float) -> float:
    # Warmup counts steps, not time: compiling may use up a good part of the time in step 0.
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * warmup * 0.5 * (1.0 + math.cos(math.pi * fraction))


def train(model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Train until the steps or the minutes are over; returns figures about the run."""
    device = corpus.tokens.device
    on_cuda = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(args.seed)
    optimizer = make_optimizer(model, args.lr, fused=on_cuda)
    model.train()

    begin = printed_at = time.perf_counter()
    printed_step = step = 0
    train_bits = math.nan
    loss_sum = torch.zeros((), device=device)

    def fraction_done() -> float:
        if args.steps is not None:
            return step / args.steps
        return (time.perf_counter() - begin) / (60 * args.minutes)

    while (fraction := fraction_done()) < 1.0:
        lr = learning_rate(args.lr, step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = draw_batch(corpus, args.batch, args.length, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.detach()
        step += 1

        finished = fraction_done() >= 1.0
        if finished or time.perf_counter() - printed_at >= PRINT_SECONDS:
            steps = step - printed_step
            # Reading the loss waits for the device, so the clock is read after it.
            train_bits = loss_sum.item() / steps / math.log(2)
            now = time.perf_counter()
            speed = steps * args.batch * args.length / (now - printed_at)
            print(
                f"step {step:6d}  {now - begin:6.1f} s  train {train_bits:.3f} bits/byte  "
                f"lr {lr:.2e}  {speed / 1e6:.3f} MB/s",
                flush=True,
            )
            loss_sum.zero_()
            printed_at, printed_step = now, step

    return {
        "steps": step,
        "seconds": round(time.perf_counter() - begin, 1),
        "bytes_seen": step * args.batch * args.length,
        "train_bits_per_byte": round(train_bits, 4),
    }


@torch.inference_mode()
def validate(
    model: LlamaForCausalLM, corpus: Corpus, batch: int, length: int, max_windows: int | None
) -> dict[str, Any]:
    """Bits per byte of held-out files, over all positions and by the position in the window."""
    device = corpus.tokens.device
    num_windows = (corpus.tokens.numel() - 1) // length
    if max_windows is not None:
        num_windows = min(num_windows, max_windows)
    nats = torch.zeros(length, dtype=torch.float64, device=device)
    count = torch.zeros(length, dtype=torch.int64, device=device)
    offsets = torch.arange(length + 1, device=device)
    for first in range(0, num_windows, batch):
        window = torch.arange(first, min(first + batch, num_windows), device=device)
        tokens = corpus.tokens[window[:, None] * length + offsets].long()
        targets = tokens[:, 1:]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        is_byte = targets < BOS
        nats += (losses * is_byte).sum(0)
        count += is_byte.sum(0)

    def bits(begin: int, end: int) -> float:
        mean = nats[begin:end].sum() / count[begin:end].sum()
        return round(mean.item() / math.log(2), 4)

    edges = [edge for edge in POSITION_EDGES if edge < length] + [length]
    return {
        "valid_bits_per_byte": bits(0, length),
        "valid_bits_per_byte_by_position": {
            f"{begin}-{end - 1}": bits(begin, end) for begin, end in itertools.pairwise(edges)
        },
        "valid_bytes_scored": int(count.sum()),
    }


def continue_greedily(model: LlamaForCausalLM, prompt: bytes, num_bytes: int) -> str:
    inputs = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_bytes,
        do_sample=False,
    )
    return bytes(token for token in output[0].tolist() if token < BOS).decode(errors="replace")


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)


def describe_command(args: argparse.Namespace) -> str:
    """The command that repeats the run, without the options that say only where it ran."""
    budget = f"--minutes {args.minutes:g}" if args.steps is None else f"--steps {args.steps}"
    return (
        f"python examples/train_byte_llama.py {budget} --batch {args.batch} "
        f"--length {args.length} --lr {args.lr:g} --seed {args.seed}"
    )


def model_card(figures: dict[str, Any]) -> str:
    by_position = "\n".join(
        f"| {positions} | {bits:.3f} |"
        for positions, bits in figures["valid_bits_per_byte_by_position"].items()
    )
    return f"""\
# byte-llama

A Llama of {figures["parameters"]:,} parameters over bytes, for the examples of this repository:
small enough to be kept in it, and trained well enough that what it generates can be read. It is
a test model and knows nothing but the look of Python code.

Token ids 0 to 255 are bytes, {BOS} begins a document and {EOS} ends one. There is no tokenizer:
`list(b"def ")` is a prompt. A prompt may begin with {BOS}, to start a file, or not. The weights
are bfloat16. Attention has {figures["attention_heads"]} query heads and \
{figures["key_value_heads"]} key-value heads of dimension {figures["head_dim"]}, in \
{figures["layers"]} layers.

## Data

The `.py` files of the standard library of Python {figures["python"]}, its tests included:
{figures["train_files"]:,} files of {figures["train_bytes"]:,} bytes for training, and \
{figures["valid_files"]:,} files of {figures["valid_bytes"]:,} bytes,
chosen by a hash of their name, held out for validation. Python is copyright of the Python
Software Foundation and licensed under the PSF License Agreement (PSF-2.0); some of its modules
carry permissive licences of their own, listed under "History and License" in its documentation.

## Training

    {figures["command"]}

made {figures["steps"]:,} steps of {figures["batch"]} sequences of {figures["length"]} bytes \
({figures["bytes_seen"]:,} bytes in all) in {figures["seconds"]:.0f} seconds
on {figures["device"]}, with torch {figures["torch"]} and transformers {figures["transformers"]}.
A time budget makes as many steps as the device allows, so a second run gives similar weights,
not the same ones.

## Validation

{figures["valid_bits_per_byte"]:.3f} bits per byte on the held-out files (bfloat16 weights, \
{figures["valid_bytes_scored"]:,} bytes scored, in windows of
{figures["length"]}). By position in the window:

| position | bits per byte |
| --- | --- |
{by_position}

Positions from {figures["length"]} on were neither trained nor validated: the model runs there, \
up to {figures["max_positions"]},
but do not expect good predictions.

Greedy continuation of `{SAMPLE_PROMPT.decode()}`:

{textwrap.indent(figures["sample"], "    ")}
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=3.0, help="training time, compiling too")
    budget.add_argument("--steps", type=int, help="train for this many steps instead")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "byte-llama",
        help="folder to write the model to",
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="the standard library's folder; one with its tests is three times the data",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the crops")
    parser.add_argument("--batch", type=int, default=64, help="sequences in a step")
    parser.add_argument("--length", type=int, default=2048, help="bytes in a sequence")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--valid-windows", type=int, help="validate on at most this many windows")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the layers (on CUDA unless told otherwise)",
    )
    args = parser.parse_args()
    if args.compile is None:
        args.compile = torch.device(args.device).type == "cuda"
    return args


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    train_corpus, valid_corpus = load_corpora(args.source, device)
    model = make_model(device)
    config = model.config
    figures: dict[str, Any] = {
        "command": describe_command(args),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": model.num_parameters(),
        "layers": config.num_hidden_layers,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_positions": config.max_position_embeddings,
        "train_files": train_corpus.num_files,
        "train_bytes": train_corpus.num_bytes,
        "valid_files": valid_corpus.num_files,
        "valid_bytes": valid_corpus.num_bytes,
        "batch": args.batch,
        "length": args.length,
        "peak_lr": args.lr,
        "seed": args.seed,
    }
    print(
        f"{figures['parameters']:,} parameters; {figures['train_files']:,} files of "
        f"{figures['train_bytes']:,} bytes to train on, {figures['valid_files']:,} files of "
        f"{figures['valid_bytes']:,} bytes held out",
        flush=True,
    )

    if args.compile:
        compile_layers(model)
    figures |= train(model, train_corpus, args)
    save_model(model, args.out)

    # What is validated is what was saved: the bfloat16 weights, read back.
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype="auto").to(device).eval()
    figures |= validate(saved, valid_corpus, args.batch, args.length, args.valid_windows)
    print(f"valid {figures['valid_bits_per_byte']:.3f} bits/byte; by position in the window:")
    for positions, bits in figures["valid_bits_per_byte_by_position"].items():
        print(f"  {positions:>10}  {bits:.3f}")
    figures["sample"] = continue_greedily(saved, SAMPLE_PROMPT, SAMPLE_BYTES)
    print(f"greedy continuation of {SAMPLE_PROMPT!r}:\n{figures['sample']}")

    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    (args.out / "README.md").write_text(model_card(figures), encoding="utf-8")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    assert size < MAX_FOLDER_BYTES, f"the folder holds {size:,} bytes"
    print(f"saved the model, {size:,} bytes in all")


if __name__ == "__main__":
    main()
