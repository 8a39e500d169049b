"""The attention that an enabled model calls: one operator, opaque to compilers.

A model's attention layer hands over queries, and K and V of the new tokens, as they are after the
cache's `update`, which keeps nothing. The operator writes K and V into the slots and attends. What
it needs to know of the step (which slots, how long) is not among its arguments: the engine says it
before the model runs, see `Step`. So a graph that a compiler made of the layer, or that CUDA has
captured, does not depend on the step, and the same code serves all layers: which layer it is comes
as a tensor, since compilers make a new graph for every other number.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AttentionInterface

if TYPE_CHECKING:
    from vattention.attention import Batch
    from vattention.integrations.transformers.engine import Engine

__all__ = [
    "HANDLE",
    "IMPLEMENTATION",
    "TAGS",
    "BatchStep",
    "Step",
    "handle",
    "owner",
    "register",
    "set_step",
    "step_of",
]

IMPLEMENTATION = "vattention"
"""The name under which transformers finds this attention. It has no mask function: then models
make no mask, and ask the cache for none of what masks are made from."""

HANDLE = "_vattention_handle"
"""The attribute of an attention module that says which engine and which layer it belongs to."""


class Step(Protocol):
    """What the operator calls."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Writes K and V, and attends.

        Takes ``[batch, heads, tokens, dim]`` and returns ``[batch, tokens, heads, dim]``.
        """


class BatchStep:
    """The step of a call whose tokens are the queries of batches, one for each group of layers."""

    def __init__(self, engine: Engine, batches: list[Batch]) -> None:
        self._engine = engine
        self._batches = batches

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Step`."""
        group, _ = self._engine.places[layer]
        return self._engine.attend(layer, self._batches[group], q, k, v, sinks)


_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_steps: dict[int, Step] = {}
_numbers = itertools.count()


def register(owner: object) -> int:
    """A number for an engine or a cache, never used again."""
    number = next(_numbers)
    _owners[number] = owner
    return number


def owner(number: int) -> Any:
    """What has that number; None: it is gone."""
    return _owners.get(number)


def set_step(engine: int, step: Step | None) -> None:
    """Says what the operator is to do when that engine's model runs; None: it must not run."""
    if step is None:
        _steps.pop(engine, None)
    else:
        _steps[engine] = step


def step_of(engine: int) -> Step | None:
    """What was said last."""
    return _steps.get(engine)


def handle(*numbers: int) -> torch.Tensor:
    """What an attention module carries, of an engine and a layer; others carry other numbers."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _append_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    which: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    engine, layer = which.tolist()  # on the host: nothing waits
    step = _steps.get(engine)
    if step is None:
        raise RuntimeError(
            "this model's attention belongs to vattention: call the model, not its layers"
        )
    return step.attend(layer, q, k, v, sinks)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    which: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1])


# A graph that inductor lets CUDA capture must not hold what depends on the step. The engine's own
# graphs may: it sees to what they read.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()

_library = torch.library.Library("vattention", "DEF")
_library.define(
    "append_and_attend(Tensor q, Tensor k, Tensor v, Tensor which, Tensor? sinks) -> Tensor",
    tags=TAGS,
)
for _key in ("CPU", "CUDA"):
    _library.impl("append_and_attend", _append_and_attend, _key)
torch.library.register_fake("vattention::append_and_attend", _fake, lib=_library)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; scale, window and softcap are known since the model was enabled."""
    which = getattr(module, HANDLE)
    output = torch.ops.vattention.append_and_attend.default(query, key, value, which, s_aux)
    return output, None


AttentionInterface.register(IMPLEMENTATION, _attention)
