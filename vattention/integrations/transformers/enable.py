"""`enable(model)`: generate() with our cache, our attention, and decode steps as CUDA graphs."""

from __future__ import annotations

from typing import Any

from vattention import Pool
from vattention.config import check_bool, check_int
from vattention.errors import ConfigError
from vattention.integrations.transformers.engine import Engine
from vattention.integrations.transformers.inspection import inspect_model
from vattention.integrations.transformers.ragged import RaggedCache
from vattention.layout import Order

__all__ = ["disable", "enable", "new_cache", "release"]


def enable(
    model: Any,
    *,
    max_batch_size: int = 64,
    max_seq_len: int | None = None,
    memory: int | str | None = None,
    pool: Pool | None = None,
    order: Order = "balanced",
    backend: str = "auto",
    graphs: bool = True,
    compile: bool = True,
    merge: bool = True,
) -> Any:
    """Lets a causal model of transformers generate at the memory's speed; `disable` undoes it.

    `generate()` is called as before: greedy or sampled, with stopping criteria, streamers and an
    `attention_mask`. K and V lie in memory that is mapped as the sequences grow. Rows hold their
    own tokens only, so padding takes neither memory nor time. A decode step is one CUDA graph,
    captured once for a number of rows and replayed whatever their lengths. What is not served
    (beam search, assisted decoding, embeddings or images as input, outputs of attention or hidden
    states, a cache that the caller passes) runs as it did before. So does a call of more rows than
    `max_batch_size` or more tokens than `max_seq_len`, with a warning.

    The model stays its owner's: weights may be loaded, moved and trained, modules set to train,
    adapted and hooked. What was made of them is made anew at the next prompt. (So change nothing
    within a generation; where hooks run inside the model, its steps run without graphs.) Attention
    modules must be those that were there.

    The model may be called from several threads, each with caches of its own, and on several
    streams, which must live on: calls run one after another. (Not so, on several threads, calls of
    a part of it, or of what `torch.compile` made of all of it.)

    Padding counts for nothing, nor does what rows that have ended were given meanwhile, if the
    mask of the next turn says so. (A token that comes alone, in a decode step, is none, whatever
    its mask says: looking would wait for the device.) transformers counts it in two places, where
    results differ then: in a sliding window, if padding lies between tokens (a chat whose second
    turn is padded again), and in the positions of a model that is given none, which matters with
    RoPE that scales by length. On a GPU the end is looked for a step late, so that the host waits
    for nothing: that step draws from the random generator once more, and `LogitsProcessor`s and
    stopping criteria are called once more.

    Args:
        model: on one device, in the dtype that K and V are to have.
        max_batch_size: rows; at most so many sequences are held at once, those of caches that are
            still alive included.
        max_seq_len: tokens of the longest row; by default what the model's positions allow.
            Addresses only: it costs no memory.
        memory: budget in bytes or as "60GiB"; by default what the device has free now.
        pool: draw on this pool instead.
        order: what lies beside what, see `KVLayout`: "balanced" is as fast as there is, "token"
            takes the least memory where sequences are short, for some per cent of decode's speed.
        backend: the attention backend, see `vattention.attention`.
        graphs: replay decode steps as CUDA graphs.
        compile: compile the decoder layers of the graphs, which takes some seconds at the first
            step: norms, rotary embeddings and activations become a few kernels.
        merge: compute linears that read one input by one matrix product; their weights become
            views of one matrix.

    Returns:
        The model.

    Raises:
        ConfigError: the model or an argument cannot be served; the message says why, and the model
            works as before.
        BackendUnavailable: the backend is not installed, or there is no such device.
    """
    if getattr(model, "_vattention_engine", None) is not None:
        raise ConfigError("this model is enabled already: disable(model) first")
    specs = inspect_model(model)
    max_batch_size = check_int(max_batch_size, name="max_batch_size", minimum=1)
    if max_seq_len is None:
        text = model.config.get_text_config(decoder=True)
        max_seq_len = getattr(text, "max_position_embeddings", None) or 131_072
    max_seq_len = check_int(max_seq_len, name="max_seq_len", minimum=1)
    for name, flag in (("graphs", graphs), ("compile", compile), ("merge", merge)):
        check_bool(flag, name=name)
    device = specs[0].device
    if pool is None:
        pool = Pool(memory, device)
    elif memory is not None:
        raise ConfigError("a pool brings its own memory: leave memory out")
    elif not isinstance(pool, Pool):
        raise ConfigError(f"pool must be a Pool; got {type(pool).__name__}")
    elif pool.device != device:
        raise ConfigError(f"the model is on {device}, the pool on {pool.device}")
    Engine(
        model,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        pool=pool,
        order=order,
        backend=backend,
        graphs=graphs,
        compile=compile,
        merge=merge,
        specs=specs,
    )
    return model


def disable(model: Any) -> Any:
    """Undoes `enable`: the model is as it was, and its memory goes back to the device.

    Raises:
        ConfigError: the model is not enabled.
    """
    engine = _engine(model)
    engine.uninstall()
    engine.release()
    return model


def new_cache(model: Any, *, expected_tokens: int = 0) -> RaggedCache:
    """An empty cache for a loop of one's own: `model(input_ids, cache=cache)`.

    The older name of the argument, `past_key_values`, does as well.

    The first call gives it as many rows as it has. K and V lie in memory that is mapped as they
    come, and that goes back to the pool when the cache is collected, or `cache.reset()`. Call the
    model under `torch.no_grad()`.

    The model may be compiled, all of it: `torch.compile(model, fullgraph=True)`. There is one
    graph for prompts of a shape and one for decode steps, however the cache grows. (Tried with
    torch 2.11 and 2.13.) With an `attention_mask`, padding is computed there, but neither stored
    nor seen; its logits mean nothing. A call that cannot be served is told as compilers do with
    `fullgraph=True`, and raises its `ConfigError` without. `generate()` needs no compiling: its own
    decode steps are faster.

    Args:
        model: an enabled one.
        expected_tokens: how long the longest row may get, see `KVAllocator.allocate`.

    Raises:
        ConfigError: the model is not enabled, or expected_tokens is out of range.
    """
    engine = _engine(model)
    expected = check_int(
        expected_tokens, name="expected_tokens", minimum=0, maximum=engine.max_seq_len
    )
    return RaggedCache(engine, expected)


def release(model: Any) -> int:
    """Gives the memory of generations that have ended back to the device; returns the bytes.

    Addresses and graphs stay, and the next `generate()` maps memory again: what a loop needs that
    trains and generates by turns on one GPU.

    Raises:
        ConfigError: the model is not enabled.
        BackendError: the driver refused.
    """
    return _engine(model).release()


def _engine(model: Any) -> Engine:
    engine = getattr(model, "_vattention_engine", None)
    if not isinstance(engine, Engine):
        raise ConfigError("this model is not enabled")
    return engine
