"""A call of an enabled model inside a graph of `torch.compile`.

    begin -> the model's own forward, whose attention is `append_and_attend` -> end

What the host does for a step (count, map memory, say which slots) happens inside the operators
`begin` and `end`, each time the graph runs. The compiler sees tensors only, so a cache that grows
makes no new graph. Rows keep their padding, which a graph of one shape needs. It is neither stored
nor seen, and computed as if it were the real token before it: on whichever side padding is, a row's
last logits are those of its last token.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch

from vattention.attention import Batch
from vattention.errors import ConfigError
from vattention.integrations.transformers import operator
from vattention.integrations.transformers.ragged import RaggedCache
from vattention.integrations.transformers.versions import CACHE

if TYPE_CHECKING:
    from vattention.integrations.transformers.engine import Engine

__all__ = ["collect", "forward"]

# Whether a compiler has followed a call since the collector was last told to run.
_may_hold_caches = False


def forward(engine: Engine, cache: RaggedCache, kwargs: dict[str, Any]) -> Any:
    """What the compiler follows; the arguments are those of the model."""
    tokens, positions = torch.ops.vattention.begin.default(
        kwargs["input_ids"],
        kwargs.get("position_ids"),
        kwargs.get("attention_mask"),
        cache.handle,
        engine.step_order,
    )
    output = engine.call_model(
        engine.stand_in,  # what a model read of a cache would be guarded
        input_ids=tokens,
        position_ids=positions,
        logits_to_keep=kwargs.get("logits_to_keep", 0),
    )
    torch.ops.vattention.end.default(output.logits, cache.handle, engine.step_order)
    return type(output)(logits=output.logits, **{CACHE: cache})


def collect() -> bool:
    """Frees caches that are gone but for what compilers noted of them, which is in cycles.

    Returns whether there may have been any.
    """
    global _may_hold_caches
    if not _may_hold_caches:
        return False
    gc.collect()
    _may_hold_caches = False
    return True


class _Step(operator.BatchStep):
    """The step between `begin` and `end`.

    Args:
        engine: of the model.
        batches: see `Engine.begin`.
        padding: where it is; None: there is none.
        lengths: what the cache's rows have then.
        seen: what the cache has seen then.
    """

    def __init__(
        self,
        engine: Engine,
        batches: list[Batch],
        padding: _Padding | None,
        lengths: list[int],
        seen: int,
    ) -> None:
        super().__init__(engine, batches)
        self._padding = padding
        self.lengths = lengths
        self.seen = seen
        self.attended: set[int] = set()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `operator.Step`."""
        self.attended.add(layer)
        padding = self._padding
        if padding is None:
            return super().attend(layer, q, k, v, sinks)
        if padding.is_all:
            return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        q, k, v = (padding.packed(x.transpose(1, 2)).transpose(0, 1)[None] for x in (q, k, v))
        return padding.spread(super().attend(layer, q, k, v, sinks)[0])


class _Padding:
    """Where the tokens are that are none, from a `[batch, tokens]` of which are real."""

    def __init__(self, real: torch.Tensor) -> None:
        flat = real.reshape(-1)
        self._shape = real.shape
        self._places = flat.nonzero()[:, 0]
        self._sources = (flat.cumsum(0) - 1).clamp_(min=0)
        self.is_all = not len(self._places)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """The real ones of ``[batch, tokens, ...]``, back to back."""
        return x.flatten(0, 1)[self._places]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Back again; padding gets what the real token before it has."""
        return x[self._sources].view(*self._shape, *x.shape[1:])


def _begin(
    tokens: torch.Tensor,
    positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    cache: torch.Tensor,
    order: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps memory and sets the step; returns the tokens, and their positions.

    Whatever is raised, the cache is as it was.
    """
    engine, rows_of = _owners(cache, order)
    rows, width = tokens.shape
    engine.order.lead()
    engine.check_step(rows_of, tokens, positions)
    if positions is not None and positions.dim() > 2:
        raise ConfigError("a model that is compiled as a whole takes position_ids [batch, tokens]")
    if engine.look_at_model(rows_of):
        raise ConfigError("the model was changed since it was compiled: call it again")
    real, counts = engine.real_tokens(rows_of, tokens, mask, decode=rows_of.is_decode(width))
    batches, lengths = engine.begin(rows_of, counts)
    padding = None if real is None else _Padding(real)
    if padding is None or padding.is_all:
        tokens = tokens.clone(memory_format=torch.contiguous_format)
        if positions is not None:
            positions = positions.expand(rows, width).clone(memory_format=torch.contiguous_format)
        elif padding is None:
            # A copy: a compiler may write to what an operator has returned.
            positions = batches[0].positions().view(rows, width).clone()
        else:
            positions = tokens.new_zeros(rows, width, dtype=torch.int64)
    else:
        if positions is None:
            packed = batches[0].positions()
        else:
            packed = padding.packed(positions.expand(rows, width))
        tokens, positions = padding.spread(padding.packed(tokens)), padding.spread(packed)
    operator.set_step(engine.number, _Step(engine, batches, padding, lengths, rows_of.seen + width))
    order[1] += 1
    return tokens, positions


def _end(logits: torch.Tensor, cache: torch.Tensor, order: torch.Tensor) -> None:
    """K and V of the step's tokens have been written."""
    engine, rows_of = _owners(cache, order)
    step = operator.step_of(engine.number)
    assert isinstance(step, _Step)
    operator.set_step(engine.number, None)
    if len(step.attended) != len(engine.places):
        rows_of.settle()
        raise ConfigError(
            f"torch {torch.__version__} compiled this model so that its attention is not the "
            "enabled one's, and what it returned is wrong: do not compile it, or use a later torch"
        )
    rows_of.finish(step.lengths, step.seen)
    order[1] += 1


def _owners(cache: torch.Tensor, order: torch.Tensor) -> tuple[Engine, RaggedCache]:
    return operator.owner(int(order[0])), operator.owner(int(cache))


def _fake_begin(
    tokens: torch.Tensor,
    positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    cache: torch.Tensor,
    order: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    global _may_hold_caches
    _may_hold_caches = True
    dtype = torch.int64 if positions is None else positions.dtype
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape, dtype=dtype)


def _fake_end(logits: torch.Tensor, cache: torch.Tensor, order: torch.Tensor) -> None:
    return None


# `order` belongs to the engine. That it is written to keeps steps in their order, and keeps a step
# whose logits nobody uses.
_library = torch.library.Library("vattention", "FRAGMENT")
for _name, _schema, _function, _fake in (
    (
        "begin",
        "(Tensor tokens, Tensor? positions, Tensor? mask, Tensor cache, Tensor(a!) order)"
        " -> (Tensor, Tensor)",
        _begin,
        _fake_begin,
    ),
    ("end", "(Tensor logits, Tensor cache, Tensor(a!) order) -> ()", _end, _fake_end),
):
    _library.define(_name + _schema, tags=operator.TAGS)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"vattention::{_name}", _fake, lib=_library)
