"""Serve a queue of requests, a few at a time, each with `generate()` and all from one pool.

Imported by generate.py.

Every lane has a `VAttentionCache` of one row. A lane takes the next request that has arrived, calls
`generate()` for it, resets its cache and takes another; nothing is padded, and every request is as
long as it is. The lanes are threads that run strictly in turn, one decode step each, so that what
happens is the same every time, and so that there is a moment between two steps to look at memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

import vattention as va
from vattention.integrations.transformers import VAttentionCache
from vattention.integrations.transformers.versions import CACHE


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens to generate for it, and the step at which it arrives."""

    prompt: list[int]
    new_tokens: int
    arrives_at: int


class _Stopped(Exception):
    """Ends a lane that waits for its turn when another lane has failed."""


class _Turns:
    """Lets `count` threads run one at a time, in a fixed cycle; a step is one turn of each."""

    def __init__(self, count: int, after_step: Callable[[int], None]) -> None:
        self._count = count
        self._turn = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._after_step = after_step

    @property
    def step(self) -> int:
        return self._turn // self._count

    def wait(self, lane: int) -> None:
        """Return when it is this lane's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._turn % self._count == lane)
            if self._stopped:
                raise _Stopped

    def end(self, lane: int) -> None:
        """Let the next lane go on; called by the lane whose turn it is."""
        if lane == self._count - 1:
            self._after_step(self.step)
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def pass_on(self, lane: int) -> None:
        """End this lane's turn and return when it has the next one."""
        self.end(lane)
        self.wait(lane)

    def stop(self) -> None:
        """Make every lane that waits, or will wait, raise `_Stopped`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class _OneStepPerTurn(LogitsProcessor):
    """Called by `generate()` once a step; changes no scores."""

    def __init__(self, turns: _Turns, lane: int) -> None:
        self._turns = turns
        self._lane = lane

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._turns.pass_on(self._lane)
        return scores


class Server:
    """Serves requests in `lanes` lanes, whose caches draw on `pool`."""

    def __init__(self, model: Any, pool: va.Pool, *, lanes: int, max_seq_len: int) -> None:
        self._model = model
        self.pool = pool
        self.caches = [
            VAttentionCache(model.config, max_batch_size=1, max_seq_len=max_seq_len, pool=pool)
            for _ in range(lanes)
        ]

    def serve(
        self, requests: Sequence[Request], after_step: Callable[[int], None]
    ) -> list[list[int]]:
        """Return the tokens generated for each request; `after_step` gets the number of a step."""
        turns = _Turns(len(self.caches), after_step)
        queue = deque(sorted(range(len(requests)), key=lambda i: requests[i].arrives_at))
        answers: list[list[int]] = [[] for _ in requests]

        def run_lane(lane: int) -> None:
            with suppress(_Stopped):
                turns.wait(lane)
                while not all(answers):
                    if queue and requests[queue[0]].arrives_at <= turns.step:
                        index = queue.popleft()
                        answers[index] = self._answer(requests[index], turns, lane)
                    else:
                        turns.pass_on(lane)
                turns.end(lane)

        with ThreadPoolExecutor(len(self.caches)) as executor:
            lanes = [executor.submit(run_lane, lane) for lane in range(len(self.caches))]
            try:
                wait(lanes, return_when=FIRST_EXCEPTION)
            finally:  # a lane has failed, or Ctrl-C: let the others end
                turns.stop()
        for lane in lanes:
            lane.result()  # raises what the lane raised
        return answers

    def close(self) -> None:
        for cache in self.caches:
            cache.close()

    def _answer(self, request: Request, turns: _Turns, lane: int) -> list[int]:
        cache = self.caches[lane]
        tokens = generate_one(self._model, request, cache, _OneStepPerTurn(turns, lane))
        cache.reset()
        return tokens


def generate_one(
    model: Any, request: Request, cache: Any, processor: LogitsProcessor | None = None
) -> list[int]:
    """The tokens that greedy `generate()` adds to one request's prompt, without any padding."""
    prompt = torch.tensor([request.prompt], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=1,
        min_new_tokens=request.new_tokens,
        max_new_tokens=request.new_tokens,
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
        **{CACHE: cache},
    )
    tokens: list[int] = output[0, prompt.shape[1] :].tolist()
    return tokens
