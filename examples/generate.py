"""Generate with the stock cache and with ours: the same tokens, at what speed, in what memory.

Prompts of very different lengths are cut from the Python standard library and given to a small
byte-level Llama that comes with this repository (or to any causal model: `--model`).

1. One padded batch goes through `generate()` with transformers' DynamicCache, with VAttentionCache,
   and with the cache and the attention that `enable(model)` brings, in turn. The tokens must agree;
   speed and memory are compared.
2. A queue of requests is served a few at a time from one pool, without padding. Each answer must
   be the one that the stock cache gives for that request alone. Memory is watched at every step,
   and drawn.

Exit status: 0, 1 if any token differs, 2 if the model cannot be used.

    generate.py      load a model, compare on a batch, serve the requests, draw the memory
    prompts.py       the prompts and the requests
    padded_batch.py  part 1: a timed run of a padded batch, and the size of a cache
    serving.py       part 2: lanes that take requests from a queue
    memory_map.py    part 2: what is mapped at every step, and the picture of it
    report.py        tables and progress
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from memory_map import Figures, Recorder, draw
from padded_batch import Batch, OurSize, Run, StockSize, generate_batch
from prompts import (
    SHORTEST_PROMPT,
    ByteText,
    Excerpts,
    Text,
    TokenizerText,
    UsageError,
    make_prompts,
    make_requests,
)
from report import (
    Comparison,
    Progress,
    Service,
    mib,
    print_comparison,
    print_header,
    print_service,
    print_text,
)
from serving import Request, Server, generate_one
from train_byte_llama import VOCAB_SIZE
from transformers import AutoModelForCausalLM, DynamicCache

import vattention as va
from vattention.integrations.transformers import VAttentionCache, disable, enable, release

SHIPPED_MODEL = Path(__file__).parent / "byte-llama"

ROUNDS = 2
LANES = 3
# The part of a device's memory that 32-bit weights may take; larger models keep their own type.
FP32_SHARE = 0.4


# The model


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


# 1: one padded batch, with each of the contenders


@dataclass(frozen=True)
class Contender:
    """A way to generate: its name, how to make a cache, and how to measure one after a run."""

    name: str
    make: Callable[[], AbstractContextManager[Any]]
    """Gives None where the model makes its own."""
    measure: Callable[[Any], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What the model needs around a run and its warming up."""

    def run(
        self, model: Any, batch: Batch, new_tokens: int, what: str, progress: Progress
    ) -> tuple[Run, Any]:
        """A run with a new cache, after a short one of as many rows to warm up; and its size."""
        with self.around():
            self._generate(model, batch.last(SHORTEST_PROMPT), 4, f"{what}, warming up", progress)
            return self._generate(model, batch, new_tokens, what, progress)

    def _generate(
        self, model: Any, batch: Batch, new_tokens: int, what: str, progress: Progress
    ) -> tuple[Run, Any]:
        rows, width = batch.input_ids.shape
        progress.show(f"{self.name}, {what}: reading {rows} x {width:,} tokens", always=True)

        def tell(step: int) -> None:
            progress.show(f"{self.name}, {what}: {step} of {new_tokens} tokens generated")

        with self.make() as cache:
            return generate_batch(model, batch, cache, new_tokens, tell), self.measure(cache)


def compare(subject: Subject, batch: Batch, new_tokens: int, progress: Progress) -> Comparison:
    """Run all contenders in turn; without `enable(model)` if it refuses the model."""
    model, rows, max_seq_len = subject.model, len(batch.input_ids), subject.max_seq_len
    pool = va.Pool(device=model.device)
    stock = Contender(
        "DynamicCache",
        make=lambda: nullcontext(DynamicCache(config=model.config)),
        measure=lambda cache: StockSize.of(cache, rows, max_seq_len),
    )
    ours = Contender(
        "VAttentionCache",
        make=lambda: VAttentionCache(model.config, rows, max_seq_len),
        measure=OurSize.of,
    )
    enabled = Contender(
        "enable(model)",
        make=lambda: released(model),
        measure=lambda _: pool.stats().peak_held_bytes,
        around=lambda: enabling(model, rows, max_seq_len, pool),
    )
    contenders = [stock, ours]
    refusal = None
    try:
        with enabled.around():
            contenders.append(enabled)
    except va.ConfigError as error:
        refusal = str(error)
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    sizes: dict[str, Any] = {}
    for turn in range(ROUNDS):
        what = f"round {turn + 1} of {ROUNDS}"
        # A, B, C, C, B, A: so that none always goes first.
        for contender in contenders if turn % 2 == 0 else contenders[::-1]:
            run, sizes[contender.name] = contender.run(model, batch, new_tokens, what, progress)
            runs[contender.name].append(run)
    progress.clear()
    found = (sizes[stock.name], sizes[ours.name], sizes.get(enabled.name))
    return Comparison(batch, runs, *found, refusal)


@contextmanager
def enabling(model: Any, rows: int, max_seq_len: int, pool: va.Pool) -> Iterator[None]:
    """The model is enabled, for a while; its graphs last as long."""
    enable(model, max_batch_size=rows, max_seq_len=max_seq_len, pool=pool)
    try:
        yield
    finally:
        disable(model)


@contextmanager
def released(model: Any) -> Iterator[None]:
    """No cache: an enabled model makes its own. Nothing is mapped for it yet."""
    release(model)
    yield


# 2: a queue of requests, from one pool


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
        held = mib(pool.stats().held_bytes)
        progress.show(f"serving, step {step}: {lengths} tokens, {held} MiB held")

    began = time.perf_counter()
    answers = server.serve(requests, after_step)
    seconds = time.perf_counter() - began
    adoptions = sum(
        stats.adoptions for cache in server.caches for stats in cache.stats().layer_types.values()
    )
    recorder.finish()
    stats = pool.stats()
    server.close()
    num_agreeing = 0
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        progress.show(f"checking request {index + 1} of {len(requests)} with DynamicCache")
        cache = DynamicCache(config=subject.model.config)
        num_agreeing += generate_one(subject.model, request, cache) == answer
    progress.clear()
    return Service(requests, answers, num_agreeing, recorder, stats, adoptions, seconds)


def make_pool(device: torch.device, requests: Sequence[Request], token_bytes: int) -> va.Pool:
    """A pool that holds the longest requests that can meet, and keeps little that is idle."""
    longest = sorted((len(r.prompt) + r.new_tokens for r in requests), reverse=True)[:LANES]
    most = sum(longest) * token_bytes
    return va.Pool(device=device, high_watermark=max(1, most // 8))


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
    # What is compiled says that TF32 would be faster. It would, but tokens are compared.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    subject = load(options.model, choose_device(options.device))
    model, text, new_tokens = subject.model, subject.text, options.max_new_tokens
    room = subject.max_seq_len - 3 * new_tokens
    if room < 2:
        raise UsageError(
            f"--max-new-tokens {new_tokens} is too many for this model: it has "
            f"{subject.max_seq_len:,} positions, of which three times as many are needed"
        )
    excerpts, progress = Excerpts(options.seed), Progress()
    prompts = make_prompts(text, excerpts, options.batch, room)
    print_header(subject.name, model, subject.max_seq_len, prompts, new_tokens)

    batch = Batch.of(prompts, subject.pad_token, model.device)
    found = compare(subject, batch, new_tokens, progress)
    print_comparison(found)

    queue = make_prompts(text, excerpts, 2 * options.batch, room)
    requests = make_requests(queue, new_tokens, LANES, random.Random(options.seed))
    service = serve(subject, requests, found.stock_size.token, progress)
    print_service(service, found.stock_size)
    print_text(text, service)

    figures = Figures(
        title=f"{len(requests)} requests, {LANES} at a time: memory follows the tokens",
        token_bytes=found.stock_size.token,
        preallocated=LANES * found.stock_size.static_row,
    )
    print(f"The memory map: {draw(service.recorder, figures, options.out)}")
    if found.agree and service.agree:
        return 0
    hint = (
        ""
        if model.dtype == torch.float32
        else f"; in {model.dtype} a rounding error can decide between two close tokens"
    )
    print(f"error: the tokens are not the same everywhere{hint}", file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return run(options)
    except (UsageError, va.ConfigError, va.BackendUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
