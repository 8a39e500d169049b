"""The prompts, from text to requests; imported by generate.py.

They are cut from the Python standard library, in very different lengths.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Protocol

from serving import Request
from train_byte_llama import BOS, is_held_out, list_sources
from transformers import AutoTokenizer

SHORTEST_PROMPT = 60
LONGEST_PROMPT = 3_500


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why."""


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
        self._name = name
        self._tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        if not tokens:
            raise UsageError(f"the tokenizer of {self._name} makes no tokens of Python source")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))


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


def prompt_lengths(count: int) -> list[int]:
    """Lengths in bytes, each the same multiple of the one before."""
    ratio = LONGEST_PROMPT / SHORTEST_PROMPT
    return [round(SHORTEST_PROMPT * ratio ** (i / max(1, count - 1))) for i in range(count)]


def make_prompts(text: Text, excerpts: Excerpts, count: int, room: int) -> list[list[int]]:
    """Token ids of `count` prompts from short to long, none longer than `room` tokens."""
    return [text.encode(excerpts.take(length))[:room] for length in prompt_lengths(count)]


def make_requests(
    prompts: list[list[int]], max_new_tokens: int, lanes: int, rng: random.Random
) -> list[Request]:
    """The prompts in random order and at random times, each with its own number of new tokens."""
    requests = []
    arrives_at = 0
    for index, prompt in enumerate(rng.sample(prompts, len(prompts))):
        new_tokens = rng.randint(max(1, max_new_tokens // 2), 3 * max_new_tokens)
        requests.append(Request(prompt, new_tokens, arrives_at))
        # One for each lane comes at once, the others about as fast as they can be served.
        if index >= lanes - 1:
            arrives_at += rng.randint(max_new_tokens // 4, max(1, round(1.1 * max_new_tokens)))
    return requests
