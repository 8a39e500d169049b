"""Generate with the stock cache and with ours: the same tokens, at what speed, in what memory.

Prompts of very different lengths are cut from the Python standard library and given to a small
byte-level Llama that comes with this repository (or to any causal model: `--model`).

1. One padded batch goes through `generate()` with transformers' DynamicCache and with
   VAttentionCache, in turn. The tokens must agree; speed and memory are compared.
2. A queue of requests is served a few at a time from one pool, without padding. Each answer must
   be the one that the stock cache gives for that request alone. Memory is watched at every step,
   and drawn.

Exit status: 0, 1 if any token differs, 2 if the model cannot be used.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from memory_map import MIB, Figures, Recorder, draw
from serving import Request, Server, generate_one
from train_byte_llama import BOS, VOCAB_SIZE, is_held_out, list_sources
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

import vattention as va
from vattention.integrations.transformers import VAttentionCache

SHIPPED_MODEL = Path(__file__).parent / "byte-llama"

SHORTEST_PROMPT = 60
LONGEST_PROMPT = 3_500
ROUNDS = 2
LANES = 3
# The part of a device's memory that 32-bit weights may take; larger models keep their own type.
FP32_SHARE = 0.4


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why."""


# The model and its text


class Text(Protocol):
    """Between text and token ids."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


class ByteText:
    """The shipped model's: a token is a byte."""

    def encode(self, text: str) -> list[int]:
        return [BOS, *text.encode()]

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class TokenizerText:
    """Any other model's: what its tokenizer says."""

    def __init__(self, name: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))


@dataclass(frozen=True)
class Subject:
    """A model, ready to generate, and its text."""

    model: Any
    text: Text
    name: str
    max_seq_len: int
    pad_token: int


def load(name: str | None, device: torch.device) -> Subject:
    """Load the model; raises UsageError, ConfigError."""
    source = str(SHIPPED_MODEL) if name is None else name
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        is_bytes = model.config.vocab_size == VOCAB_SIZE and not list(Path(source).glob("token*"))
        text: Text = ByteText() if is_bytes else TokenizerText(source)
    except Exception as error:  # whatever a hub, a file or a model's own code may raise
        first_line = str(error).strip().partition("\n")[0]
        raise UsageError(f"cannot load the model {source!r}: {first_line}") from error
    config = model.config.get_text_config(decoder=True)
    max_seq_len = getattr(config, "max_position_embeddings", None) or 4096
    VAttentionCache(model.config, max_seq_len=16).close()  # raises if it cannot serve the model
    model = model.to(device, _dtype(model, device)).eval()
    generation = model.generation_config
    end = generation.eos_token_id
    pad = next((i for i in (generation.pad_token_id, config.pad_token_id) if i is not None), None)
    if pad is None:
        pad = end[0] if isinstance(end, list) else end or 0
    generation.pad_token_id = pad
    return Subject(model, text, name or "examples/byte-llama", max_seq_len, pad)


def _dtype(model: Any, device: torch.device) -> torch.dtype:
    """float32, so that tokens can be compared, unless the weights would be too large."""
    if device.type == "cuda":
        room = FP32_SHARE * torch.cuda.mem_get_info(device)[0]
        if 4 * model.num_parameters() > room:
            own: torch.dtype = model.dtype
            return own
    return torch.float32


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"cannot use the device {name!r}: {first_line}") from error
    return device


# Prompts


class Excerpts:
    """Beginnings of files of the standard library that the shipped model was not trained on."""

    def __init__(self, seed: int) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in list_sources(root)
            if path.stat().st_size > LONGEST_PROMPT
            and is_held_out(path.relative_to(root).as_posix())
        ]
        if not files:
            raise UsageError(f"the prompts are Python's own source files; {root} has none")
        self._random = random.Random(seed)
        self._files = files
        self._unused: list[Path] = []

    def take(self, num_bytes: int) -> str:
        """About `num_bytes` of a file not taken before (while there are such), in whole lines."""
        if not self._unused:
            self._unused = self._random.sample(self._files, len(self._files))
        start = self._unused.pop().read_bytes().lstrip()[:num_bytes]
        end = start.rfind(b"\n") + 1
        return start[: end or num_bytes].decode(errors="ignore")


def prompt_lengths(count: int, longest: int) -> list[int]:
    """Lengths in bytes, each the same multiple of the one before."""
    ratio = longest / SHORTEST_PROMPT
    return [round(SHORTEST_PROMPT * ratio ** (i / max(1, count - 1))) for i in range(count)]


def make_prompts(subject: Subject, excerpts: Excerpts, count: int, room: int) -> list[list[int]]:
    """Token ids of `count` prompts from short to long, none longer than `room` tokens."""
    lengths = prompt_lengths(count, LONGEST_PROMPT)
    prompts = [subject.text.encode(excerpts.take(length))[:room] for length in lengths]
    if not all(prompts):
        raise UsageError(f"the tokenizer of {subject.name} makes no tokens of Python source")
    return prompts


def make_requests(
    prompts: list[list[int]], max_new_tokens: int, rng: random.Random
) -> list[Request]:
    """The prompts in random order and at random times, each with its own number of new tokens."""
    requests = []
    arrives_at = 0
    for index, prompt in enumerate(rng.sample(prompts, len(prompts))):
        new_tokens = rng.randint(max(1, max_new_tokens // 2), 3 * max_new_tokens)
        requests.append(Request(prompt, new_tokens, arrives_at))
        # The first few come at once, the others about as fast as they can be served.
        if index >= LANES - 1:
            arrives_at += rng.randint(max_new_tokens // 4, max(1, round(1.1 * max_new_tokens)))
    return requests


# Progress


class Progress:
    """A line that is rewritten on a terminal, and now and then a new line elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._last = 0.0

    def show(self, text: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if not always and now - self._last < (0.1 if self._is_terminal else 5.0):
            return
        self._last = now
        print(f"\r\x1b[K  {text}" if self._is_terminal else f"  {text}",
              end="" if self._is_terminal else "\n", flush=True)  # fmt: skip

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", flush=True)


# 1: one padded batch, with each of the two caches


class Stopwatch(LogitsProcessor):
    """Notes the time after each step of `generate()`; changes no scores."""

    def __init__(self, device: torch.device, tell: Callable[[int], None]) -> None:
        self._device = device
        self._tell = tell
        self.times = [self._now()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(self._now())
        self._tell(len(self.times) - 1)
        return scores

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class Batch:
    """Prompts, left-padded for `generate()`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, prompts: list[list[int]], subject: Subject) -> Batch:
        longest = max(map(len, prompts))
        ids = [[subject.pad_token] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        device = subject.model.device
        return cls(torch.tensor(ids, device=device), torch.tensor(mask, device=device))

    @property
    def num_tokens(self) -> int:
        """Tokens, padding left out."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Run:
    """One call of `generate()`: seconds of the prompt and of each step after it; the new tokens."""

    prefill_s: float
    steps_s: list[float]
    tokens: torch.Tensor


def run_generate(
    model: Any, batch: Batch, cache: Any, new_tokens: int, tell: Callable[[int], None]
) -> Run:
    watch = Stopwatch(model.device, tell)
    output = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        past_key_values=cache,
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([watch]),
    )
    seconds = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    return Run(seconds[0], seconds[1:], output[:, batch.input_ids.shape[1] :].cpu())


@dataclass(frozen=True)
class CacheSize:
    """What the stock caches take, in bytes."""

    token: int
    """One token, all layers."""
    held: int
    """DynamicCache at the end of a run: its peak but for the moment of a concatenation."""
    largest_tensor: int
    """What a concatenation holds in addition: the old tensor beside the new one."""
    static_row: int
    """One sequence in a StaticCache of the model's full length."""

    @classmethod
    def of(cls, cache: DynamicCache, batch_size: int, max_seq_len: int) -> CacheSize:
        token = held = largest = static_row = 0
        for layer in cache.layers:
            tensors = [layer.keys, layer.values]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            token_bytes = sum(sizes) // (batch_size * layer.keys.shape[2])
            window = getattr(layer, "sliding_window", None) or max_seq_len
            token += token_bytes
            held += sum(sizes)
            largest = max(largest, *sizes)
            static_row += token_bytes * min(window, max_seq_len)
        return cls(token, held, largest, static_row)


@dataclass(frozen=True)
class Comparison:
    """What part 1 found; sizes in bytes."""

    batch: Batch
    stock: list[Run]
    ours: list[Run]
    stock_size: CacheSize
    reserved: int
    peak: int

    @property
    def agree(self) -> bool:
        return all(torch.equal(run.tokens, self.stock[0].tokens) for run in self.stock + self.ours)


def compare(subject: Subject, batch: Batch, new_tokens: int, progress: Progress) -> Comparison:
    """Run both caches in turn, after a short run of each to warm up."""
    model, rows = subject.model, len(batch.input_ids)
    runs: dict[str, list[Run]] = {"stock": [], "ours": []}
    size, reserved, peak = None, 0, 0
    warm_up = Batch(
        batch.input_ids[:, -SHORTEST_PROMPT:], batch.attention_mask[:, -SHORTEST_PROMPT:]
    )

    def run(kind: str, inputs: Batch, count: int, what: str) -> tuple[Run, Any, va.Pool]:
        pool = va.Pool(device=model.device)
        cache = (
            DynamicCache(config=model.config)
            if kind == "stock"
            else VAttentionCache(model.config, rows, subject.max_seq_len, pool=pool)
        )
        what = f"{'DynamicCache' if kind == 'stock' else 'VAttentionCache'}, {what}"
        progress.show(f"{what}: reading {rows} x {inputs.input_ids.shape[1]:,} tokens", always=True)

        def tell(step: int) -> None:
            progress.show(f"{what}: {step} of {count} tokens generated")

        return run_generate(model, inputs, cache, count, tell), cache, pool

    for kind in runs:
        run(kind, warm_up, 4, "warming up")
    # A, B, B, A: so that neither always goes first.
    for turn in range(ROUNDS):
        for kind in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            result, cache, pool = run(kind, batch, new_tokens, f"round {turn + 1} of {ROUNDS}")
            runs[kind].append(result)
            if kind == "stock":
                size = CacheSize.of(cache, rows, subject.max_seq_len)
            else:
                reserved = cache.stats().reserved_bytes
                peak = pool.stats().peak_held_bytes
                cache.close()
            del cache
    progress.clear()
    assert size is not None
    return Comparison(batch, runs["stock"], runs["ours"], size, reserved, peak)


# 2: a queue of requests, from one pool


@dataclass(frozen=True)
class Service:
    """What part 2 found."""

    requests: list[Request]
    answers: list[list[int]]
    agreeing: int
    recorder: Recorder
    stats: va.PoolStats
    adoptions: int
    seconds: float


def serve(
    subject: Subject, requests: list[Request], token_bytes: int, progress: Progress
) -> Service:
    """Serve the requests, recording memory at each step; then check the answers."""
    pool = make_pool(subject.model.device, requests, token_bytes)
    server = Server(subject.model, pool, lanes=LANES, max_seq_len=subject.max_seq_len)
    recorder = Recorder(pool, server.caches)

    def after_step(step: int) -> None:
        recorder.sample(step)
        lengths = ", ".join(f"{tokens:,}" for tokens in recorder.moments[-1].tokens)
        held = pool.stats().held_bytes / MIB
        progress.show(f"serving, step {step}: {lengths} tokens, {held:.1f} MiB held")

    began = time.perf_counter()
    answers = server.serve(requests, after_step)
    seconds = time.perf_counter() - began
    adoptions = sum(
        stats.adoptions for cache in server.caches for stats in cache.stats().layer_types.values()
    )
    finish(recorder)
    stats = pool.stats()
    server.close()
    agreeing = 0
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        progress.show(f"checking request {index + 1} of {len(requests)} with DynamicCache")
        cache = DynamicCache(config=subject.model.config)
        agreeing += generate_one(subject.model, request, cache) == answer
    progress.clear()
    return Service(requests, answers, agreeing, recorder, stats, adoptions, seconds)


def make_pool(device: torch.device, requests: Sequence[Request], token_bytes: int) -> va.Pool:
    """A pool that holds the longest requests that can meet, and keeps little that is idle."""
    longest = sorted((len(r.prompt) + r.new_tokens for r in requests), reverse=True)[:LANES]
    most = sum(longest) * token_bytes
    return va.Pool(device=device, high_watermark=max(1, most // 8))


def finish(recorder: Recorder) -> None:
    """Show the end: what is left for a next request, and nothing after `reclaim`."""
    step = recorder.moments[-1].step
    idle = max(2, step // 40)
    for offset in range(idle):
        recorder.sample(step + 1 + offset)
    recorder.pool.reclaim()
    for offset in range(idle):
        recorder.sample(step + 1 + idle + offset)


# What is printed


def print_text(subject: Subject, service: Service) -> None:
    """A few lines of the answer that repeats itself least, after the end of its prompt."""

    def variety(index: int) -> int:
        return len(set(subject.text.decode(service.answers[index]).splitlines()))

    index = max(range(len(service.answers)), key=variety)
    prompt = subject.text.decode(service.requests[index].prompt).splitlines()[-2:]
    answer = subject.text.decode(service.answers[index]).splitlines()[:6]
    print("One of the texts (> prompt, | generated):\n")
    for mark, lines in ((">", prompt), ("|", answer)):
        for line in lines:
            print(f"    {mark} {line.rstrip()[:88]}")
    print()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of a label and right-aligned cells under `columns`."""
    label = max(len(title), *(len(row[0]) for row in rows))
    widths = [
        max(map(len, cells)) for cells in zip(columns, *(row[1:] for row in rows), strict=True)
    ]
    for first, *cells in ((title, *columns), *rows):
        line = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"  {first:<{label}}{line}".rstrip())
    print()


def print_comparison(found: Comparison) -> None:
    rows = len(found.batch.input_ids)

    def prefill(runs: list[Run]) -> float:
        return found.batch.num_tokens / statistics.median(run.prefill_s for run in runs)

    def decode(runs: list[Run]) -> float:
        steps = [seconds for run in runs for seconds in run.steps_s]
        return rows / statistics.median(steps) if steps else float("nan")

    print_table(
        f"{rows} prompts, padded to one batch",
        ("DynamicCache", "VAttentionCache"),
        [
            (
                "prefill, prompt tokens/s",
                *(f"{prefill(r):,.0f}" for r in (found.stock, found.ours)),
            ),
            ("decode, tokens/s", *(f"{decode(r):,.0f}" for r in (found.stock, found.ours))),
            ("old K and V copied per step, MiB", mib(found.stock_size.held), mib(0)),
            ("tokens", "", "agree" if found.agree else "DIFFER"),
        ],
    )
    size, width = found.stock_size, found.batch.input_ids.shape[1]
    new_tokens = found.ours[0].tokens.shape[1]
    own = (found.batch.num_tokens + rows * (new_tokens - 1)) * size.token
    padded = rows * (width + new_tokens - 1) * size.token
    print_table(
        "memory of that batch",
        ("MiB",),
        [
            ("the tokens' own K and V", mib(own)),
            ("  with the left padding of generate()", mib(padded)),
            ("VAttentionCache: addresses reserved", mib(found.reserved)),
            ("VAttentionCache: physical memory, peak", mib(found.peak)),
            ("DynamicCache: tensors", mib(size.held)),
            ("DynamicCache: while it concatenates", mib(size.held + size.largest_tensor)),
            ("StaticCache: preallocated", mib(rows * size.static_row)),
        ],
    )


def print_service(found: Service, size: CacheSize) -> None:
    moments, stats = found.recorder.moments, found.stats
    generated = sum(map(len, found.answers))
    padded = max(LANES * max(moment.tokens) for moment in moments) * size.token
    print_table(
        f"{len(found.requests)} requests, {LANES} at a time, one pool",
        ("MiB",),
        [
            ("the tokens' own K and V, peak", mib(max(m.used for m in moments))),
            ("physical memory held, peak", mib(stats.peak_held_bytes)),
            ("DynamicCache, as one padded batch, peak", mib(padded)),
            (f"preallocated, {LANES} lanes", mib(LANES * size.static_row)),
        ],
    )
    same = found.agreeing == len(found.requests)
    print(
        f"  {generated:,} tokens in {found.seconds:.1f} s; {found.agreeing} of "
        f"{len(found.requests)} answers {'agree' if same else 'agree: SOME DIFFER'}\n"
        f"  {found.adoptions} began in memory that an earlier request left mapped\n"
        f"  {stats.creates} extents created, {stats.destroys} given back, {stats.maps} mappings\n"
    )


def mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f}"


def print_header(subject: Subject, prompts: list[list[int]], new_tokens: int) -> None:
    model = subject.model
    device = (
        torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"{subject.name}: {model.num_parameters() / 1e6:,.1f} M parameters, {dtype}, on {device}\n"
        f"{len(prompts)} prompts of {', '.join(f'{len(p):,}' for p in prompts)} tokens; "
        f"{new_tokens} new tokens each; room for {subject.max_seq_len:,}\n",
        flush=True,
    )


# The command


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate with the stock cache and with ours, and compare."
    )
    parser.add_argument("--model", help="path or hub name; by default the one shipped here")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="in the padded batch")
    parser.add_argument("--batch", type=int, default=6, help="prompts in the padded batch")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    if options.batch < 1 or options.max_new_tokens < 2:
        parser.error("--batch must be at least 1, --max-new-tokens at least 2")
    return options


def run(options: argparse.Namespace) -> int:
    torch.set_float32_matmul_precision("highest")
    subject = load(options.model, choose_device(options.device))
    new_tokens = options.max_new_tokens
    room = subject.max_seq_len - 3 * new_tokens
    if room < 2:
        raise UsageError(
            f"--max-new-tokens {new_tokens} is too many for this model: it has "
            f"{subject.max_seq_len:,} positions, of which three times as many are needed"
        )
    excerpts, progress = Excerpts(options.seed), Progress()
    prompts = make_prompts(subject, excerpts, options.batch, room)
    print_header(subject, prompts, new_tokens)

    found = compare(subject, Batch.of(prompts, subject), new_tokens, progress)
    print_comparison(found)

    queue = make_prompts(subject, excerpts, 2 * options.batch, room)
    requests = make_requests(queue, new_tokens, random.Random(options.seed))
    service = serve(subject, requests, found.stock_size.token, progress)
    print_service(service, found.stock_size)
    print_text(subject, service)

    figures = Figures(
        title=f"{len(requests)} requests, {LANES} at a time: memory follows the tokens",
        token_bytes=found.stock_size.token,
        preallocated=LANES * found.stock_size.static_row,
    )
    print(f"The memory map: {draw(service.recorder, figures, options.out)}")
    if found.agree and service.agreeing == len(requests):
        return 0
    half = "" if subject.model.dtype == torch.float32 else (
        f"; in {subject.model.dtype} a rounding error can decide between two close tokens"
    )  # fmt: skip
    print(f"error: the caches do not give the same tokens{half}", file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return run(options)
    except va.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except (UsageError, va.BackendUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
