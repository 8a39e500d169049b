"""A call of an enabled model inside a graph of `torch.compile`.

    begin -> the model's own forward, whose attention is `append_and_attend` -> end

What the host does for a step (count, map memory, say which slots) happens inside the operators
`begin` and `end`, each time the graph runs. The compiler sees tensors only, so a cache that grows
makes no new graph. Rows keep their padding, which a graph of one shape needs: it is computed, and
neither stored nor seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vattention.attention import Batch
from vattention.errors import ConfigError
from vattention.integrations.transformers import operator
from vattention.integrations.transformers.ragged import RaggedCache

if TYPE_CHECKING:
    from vattention.integrations.transformers.engine import Engine

__all__ = ["forward"]


def forward(engine: Engine, cache: RaggedCache, kwargs: dict[str, Any]) -> Any:
    """What the compiler follows; the arguments are those of the model."""
    tokens, positions = torch.ops.vattention.begin(
        kwargs["input_ids"], kwargs.get("attention_mask"), cache.handle, engine.order
    )
    given = kwargs.get("position_ids")
    output = engine.call_model(
        input_ids=tokens,
        position_ids=positions if given is None else given.expand(tokens.shape),
        past_key_values=engine.stand_in,  # what a model read of a cache would be guarded
        logits_to_keep=kwargs.get("logits_to_keep", 0),
    )
    torch.ops.vattention.end(output.logits, cache.handle, engine.order)
    return type(output)(logits=output.logits, past_key_values=cache)


class _Step:
    """The step between `begin` and `end`.

    Args:
        engine: of the model.
        cache: whose rows; its `begin` has been called.
        batches: one for each group, of the rows that have tokens; empty if none has.
        where: numbers of the tokens that are no padding; None: all.
        lengths: what the rows have then.
        width: tokens in each row, padding included.
    """

    def __init__(
        self,
        engine: Engine,
        cache: RaggedCache,
        batches: list[Batch],
        where: torch.Tensor | None,
        lengths: list[int],
        width: int,
    ) -> None:
        self._engine = engine
        self.cache = cache
        self._batches = batches
        self._where = where
        self.lengths = lengths
        self.width = width

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `operator.Step`."""
        batch = self._batches[self._engine.places[layer][0]]
        if self._where is None:
            return self._engine.attend(layer, batch, q, k, v, sinks)
        rows, heads, width, _ = q.shape
        output = q.new_zeros(rows * width, heads, v.shape[-1])
        if len(self._where):
            q, k, v = (
                x.transpose(1, 2).flatten(0, 1)[self._where].transpose(0, 1)[None]
                for x in (q, k, v)
            )
            output[self._where] = self._engine.attend(layer, batch, q, k, v, sinks)[0]
        return output.view(rows, width, heads, -1)


def begin(
    engine: Engine, cache: RaggedCache, tokens: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the operator of that name does on the host: maps memory, and makes the step.

    Returns:
        Positions of the tokens.

    Raises:
        ConfigError: what the model is called with does not fit the cache.
        OutOfPages: the budget does not hold the step.
        SequenceTooLong: a row would be longer than `max_seq_len`. Whatever is raised, the cache is
            as it was.
    """
    rows, width = tokens.shape
    engine.check_cache(cache, rows)
    if width > 1 or not cache.lengths:
        engine.look_at_weights()
    real, counts = engine.real_tokens(cache, tokens, mask)
    batches, lengths = engine.begin(cache, counts)
    ...
