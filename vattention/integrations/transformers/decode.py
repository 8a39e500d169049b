"""Decode steps of an enabled model, replayed as CUDA graphs.

A `Decoder` is a decode step for so many rows: its inputs, its batches and, on a GPU, its graph. The
graph holds addresses, none of which ever changes, and reads lengths and slots from the device. So
it stays valid while memory grows under it and when other sequences take its rows. Rows that are not
in use are padding: they read and write nothing.

What is always true between two steps: the decoder's batches hold the rows of the cache with the
stamp `_stamp`, as long as they were when that cache's last step ended.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from vattention.attention import Batch
from vattention.integrations.transformers import operator
from vattention.integrations.transformers.fuse import compiled
from vattention.integrations.transformers.matvec import one_row_products
from vattention.integrations.transformers.ragged import RaggedCache

if TYPE_CHECKING:
    from vattention.integrations.transformers.engine import Engine

__all__ = ["Decoder"]

_WARMUPS = 2


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_capturing = threading.Lock()  # what capturing changes for a while, all models share


class Decoder:
    """One decode step for `rows` sequences of at most `max_length` tokens.

    Args:
        engine: of the model.
        rows: how many.
        max_length: how long they may get.
        axes: what precedes rows in the shape of positions; some models count them several times.
    """

    def __init__(self, engine: Engine, rows: int, max_length: int, axes: tuple[int, ...]) -> None:
        """Captures the graph, which takes a second, and compiles before if it has to."""
        self.rows = rows
        self.max_length = max_length
        self._engine = engine
        self._stamp = 0
        device = engine.device
        graph = device.type == "cuda" and engine.graphs and not engine.parts.has_hooks
        with torch.inference_mode(False):
            self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self._positions = torch.zeros(*axes, rows, 1, dtype=torch.long, device=device)
        self.batches = [Batch(group.kv, rows, graph=graph) for group in engine.groups]
        for batch in self.batches:
            batch.fill_rows([0] * rows, [0] * rows, max_length=max_length)
        self._cache = RaggedCache(engine)  # has no rows: the model is given it as a token of ours
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Any = None
        with torch.inference_mode():
            if graph:
                self._capture(engine)

    def _capture(self, engine: Engine) -> None:
        # All rows are padding here, so running the model writes nowhere.
        current = torch.cuda.current_stream(engine.device)
        side = engine.capture_stream
        side.wait_stream(current)
        one_row = one_row_products(engine.parts.linears) if self.rows == 1 else nullcontext()
        with _capturing, torch.cuda.stream(side), one_row, compiled(engine.parts.compiled):
            for _ in range(_WARMUPS):
                self._run(engine)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile.
            mode = "thread_local"
            # What a collector ends here would have to be waited for.
            with (
                _no_collection(),
                torch.cuda.graph(graph, engine.graph_pool, side, capture_error_mode=mode),
            ):
                self._output = self._run(engine)
        current.wait_stream(side)
        self._graph = graph

    def _run(self, engine: Engine) -> Any:
        for batch in self.batches:
            batch.touch()
            batch.advance()
        return engine.run_model(
            operator.BatchStep(engine, self.batches),
            self._cache,
            input_ids=self._tokens,
            position_ids=self._positions,
        )

    def step(self, cache: RaggedCache, tokens: torch.Tensor, positions: torch.Tensor | None) -> Any:
        """One more token for every row of a cache.

        Args:
            cache: whose rows, mapped for it already.
            tokens: ``[rows of the cache, 1]``.
            positions: their positions, ``[*axes, rows of the cache, 1]``; None: where they are in
                their rows.

        Returns:
            What the model returns, with logits for every row of this decoder.
        """
        engine = self._engine
        live, padding = len(cache.lengths), self.rows - len(cache.lengths)
        if self._stamp != cache.stamp:
            for number, batch in enumerate(self.batches):
                batch.fill_rows(
                    cache.slots(number) + [0] * padding,
                    cache.lengths + [0] * padding,
                    max_length=self.max_length,
                )
            self._positions[..., live:, :].zero_()  # some rotary embeddings look at the largest
        if positions is None:
            positions = self.batches[0].lengths[:live, None]
        self._tokens[:live].copy_(tokens)
        self._positions[..., :live, :].copy_(positions)
        self._stamp = cache.stamp
        for batch in self.batches:
            batch.note_advance()
        try:
            if self._graph is not None:
                self._graph.replay()
                output = self._output
            else:
                output = self._run(engine)
        except BaseException:
            self._stamp = 0  # who knows how far it came
            raise
        return output
