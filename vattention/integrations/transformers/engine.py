"""An enabled model: its memory, its attention, and what runs when it is called.

    generate() -> model.forward -> Engine.forward -> prefill: the model's own forward over the
                                                     tokens of all rows back to back, no padding
                                                  -> decode: a Decoder, which replays a graph

Layers that keep K and V of one shape and see one window make a group: one allocator. All groups
draw on one pool. Calls that do not come with a `RaggedCache` go to the model as it was.

What attention is told of a call, and what a decode step reads, belongs to the engine. So calls from
several threads run one after another, and those on several streams too.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from vattention import KVAllocator, KVLayout, Pool
from vattention.attention import Attention, Batch, Options, append, tail_slack_tokens
from vattention.attention.tensors import is_tensor, shown
from vattention.errors import ConfigError, OutOfPages, OutOfSlots, SequenceTooLong
from vattention.integrations.transformers import operator, traced
from vattention.integrations.transformers.decode import Decoder
from vattention.integrations.transformers.inspection import LayerSpec, reads_positions
from vattention.integrations.transformers.parts import Parts, Places
from vattention.integrations.transformers.ragged import RaggedCache
from vattention.integrations.transformers.stopping import defer_stop_checks
from vattention.integrations.transformers.streams import StreamOrder
from vattention.integrations.transformers.versions import CACHE, CACHE_NAMES, cache_parameter
from vattention.integrations.transformers.views import (
    Override,
    replace_configs,
    restore_configs,
    restored,
)
from vattention.layout import Order

__all__ = ["Engine"]

# What a call may bring beside the cache, see `_is_given`.
_KNOWN = {
    *CACHE_NAMES,
    "input_ids",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
    "cache_position",
}
# What a generation config says that asks for no cache in particular; checkpoints of models with
# sliding windows come with the second.
_DEFAULT_CACHES = (None, "hybrid", "dynamic")
_GENERATE_KNOWN = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}
# Methods of a model that compare its config with those of its modules, by `is` and by class.
_COMPARE_CONFIGS = ("set_attn_implementation", "set_experts_implementation")


@dataclass(frozen=True)
class Group:
    """Layers of one shape and window.

    Attributes:
        kv: their allocator.
        window: tokens that they see; None: all.
        front_slack_tokens: tokens below the window that must stay mapped.
    """

    kv: KVAllocator
    window: int | None
    front_slack_tokens: int


class Engine:
    """See `enable`, which makes it."""

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int,
        max_seq_len: int,
        pool: Pool,
        order: Order,
        backend: str,
        graphs: bool,
        compile: bool,
        merge: bool,
        specs: list[LayerSpec],
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.pool = pool
        self.device = pool.device
        self.order = StreamOrder(self.device)
        self.graphs = graphs and not reads_positions(model)
        self._model = model
        self.number = operator.register(self)
        self._override = Override()
        self._original = model.forward
        self._prepare_cache = model._prepare_cache_for_generation
        signature = inspect.signature(model.forward)
        self._parameters = list(signature.parameters)
        self._cache_parameter = cache_parameter(self._parameters)
        if "logits_to_keep" not in signature.parameters:
            raise ConfigError("enable() needs a model that can be told which logits to keep")
        self.groups: list[Group] = []
        self.places: list[tuple[int, int]] = []
        self._attentions: list[Attention] = []
        self._make_groups(specs, order, backend)
        self.step_order = operator.handle(self.number, 0)
        self.stand_in = RaggedCache(self)  # has no rows
        self._make_parts = functools.partial(
            Parts,
            model,
            self._override,
            merge=merge,
            compile=compile,
            graphs=self.graphs and self.device.type == "cuda",
        )
        self.parts = self._make_parts()
        self._modules = [spec.module for spec in specs]
        self._places = Places(model, self._modules)
        for layer, spec in enumerate(specs):
            setattr(spec.module, operator.HANDLE, operator.handle(self.number, layer))
        self._lock = threading.RLock()  # held while the model runs
        self._decoders: dict[tuple[object, ...], Decoder] = {}
        if self.device.type == "cuda":
            self.capture_stream = torch.cuda.Stream(self.device)
            self.graph_pool = torch.cuda.graph_pool_handle()
        self._install(model)

    # ---- memory ----

    def _make_groups(self, specs: list[LayerSpec], order: Order, backend: str) -> None:
        slack = max(tail_slack_tokens(spec.dtype, self.device, backend) for spec in specs)
        kinds: dict[tuple[object, ...], list[int]] = {}
        for layer, spec in enumerate(specs):
            kind = (spec.num_kv_heads, spec.head_dim, spec.v_head_dim, spec.options.window)
            kinds.setdefault(kind, []).append(layer)
        self.places = [(-1, -1)] * len(specs)
        attentions: list[Attention | None] = [None] * len(specs)
        for number, layers in enumerate(kinds.values()):
            spec = specs[layers[0]]
            layout = KVLayout(
                num_layers=len(layers),
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                v_head_dim=None if spec.v_head_dim == spec.head_dim else spec.v_head_dim,
                dtype=spec.dtype,
                order=order,
            )
            kv = KVAllocator(
                layout,
                max_sequences=self.max_batch_size,
                max_seq_len=self.max_seq_len,
                pool=self.pool,
                tail_slack_tokens=slack,
            )
            made: dict[Options, Attention] = {}
            for index, layer in enumerate(layers):
                self.places[layer] = (number, index)
                options = specs[layer].options
                if options not in made:
                    made[options] = Attention(kv, options, backend)
                attentions[layer] = made[options]
            front = max(attention.front_slack_tokens for attention in made.values())
            self.groups.append(Group(kv, spec.options.window, front))
        self._attentions = [attention for attention in attentions if attention is not None]

    def release(self) -> int:
        """See `enable`."""
        with self._lock:
            self._drop_stale()
        return self.pool.reclaim()

    # ---- what runs ----

    def attend(
        self,
        layer: int,
        batch: Batch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Writes K and V of new tokens and attends to all there are.

        Args:
            layer: as the model counts.
            batch: of that layer's group.
            q: ``[batch, heads, tokens, dim]``, as transformers has it; likewise the next two.
            k: K of the same tokens.
            v: V.
            sinks: see `attend`.

        Returns:
            ``[batch, tokens, heads, dim]``.
        """
        _, index = self.places[layer]
        dtype = batch.kv.layout.dtype
        append(_by_token(k), _by_token(v), index, batch)
        output = self._attentions[layer](_by_token(q).to(dtype), index, batch, sinks=sinks)
        return output.to(q.dtype).view(q.shape[0], q.shape[2], *output.shape[1:])

    def run_model(self, step: operator.Step, cache: RaggedCache, **inputs: Any) -> Any:
        """The model's own forward, with the attention of a step."""
        operator.set_step(self.number, step)
        try:
            return self.call_model(cache, **inputs)
        finally:
            operator.set_step(self.number, None)

    def call_model(self, cache: RaggedCache, **inputs: Any) -> Any:
        """The model's own forward, with the attention of the step that was set."""
        inputs[self._cache_parameter] = cache
        self._override.name = operator.IMPLEMENTATION
        try:
            return self._original(**inputs, use_cache=True, return_dict=True)
        finally:
            self._override.name = None

    @property
    def is_running(self) -> bool:
        """Whether the model's own forward runs, with our attention."""
        return self._override.name is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's `forward` is while it is enabled."""
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        named = [given[name] for name in CACHE_NAMES if given.get(name) is not None]
        cache = named[0] if len(named) == 1 and len(args) <= len(self._parameters) else None
        if not isinstance(cache, RaggedCache):
            # A compiler cannot follow a lock, and what it makes of this does not need it.
            with nullcontext() if torch.compiler.is_compiling() else self._lock:
                return self._original(*args, **kwargs)
        self._check_call(given)
        run = traced.forward if torch.compiler.is_compiling() else Engine._run
        output = run(self, cache, given)
        return output.to_tuple() if given.get("return_dict") is False else output

    def _run(self, cache: RaggedCache, kwargs: dict[str, Any]) -> Any:
        tokens = kwargs["input_ids"]
        with self._lock:
            self.order.lead()
            self.check_step(cache, tokens, kwargs.get("position_ids"))
            decode = cache.is_decode(tokens.shape[1])
            return (self._decode if decode else self._prefill)(cache, tokens, kwargs)

    def _check_call(self, kwargs: dict[str, Any]) -> None:
        others = [name for name, value in kwargs.items() if name not in _KNOWN and _is_given(value)]
        if others:
            raise ConfigError(
                f"an enabled model does not take {', '.join(others)} with the cache of its own; "
                "pass another cache, such as transformers' DynamicCache"
            )
        tokens, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not is_tensor(tokens) or tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ConfigError("an enabled model needs input_ids [batch, tokens] with its cache")
        if mask is not None and not is_tensor(mask):
            raise ConfigError(f"attention_mask must be a tensor; got {shown(mask)}")
        if torch.is_grad_enabled():
            raise ConfigError("an enabled model generates: call it under torch.no_grad()")

    def check_step(self, cache: RaggedCache, tokens: torch.Tensor, positions: Any) -> None:
        """Raises a `ConfigError` unless tokens and their positions can be a step of that cache."""
        if tokens.device != self.device:
            raise ConfigError(
                f"input_ids must be on {self.device}, where the model was enabled; they are on "
                f"{tokens.device}"
            )
        rows, width = tokens.shape
        shapes = ((rows, width), (1, width))
        if positions is not None and not (
            is_tensor(positions) and positions.dim() < 4 and positions.shape[-2:] in shapes
        ):
            raise ConfigError(
                f"position_ids must be {[rows, width]} or {[1, width]}, or several of them; got "
                f"{shown(positions)}"
            )
        if cache.engine is not self:
            raise ConfigError("this cache belongs to another model, or to one that was disabled")
        if cache.lengths and len(cache.lengths) != rows:
            raise ConfigError(f"the cache has {len(cache.lengths)} rows, input_ids {rows}")
        cache.settle()

    def _prefill(self, cache: RaggedCache, tokens: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        self.look_at_model(cache)
        rows, width = tokens.shape
        real, counts = self.real_tokens(cache, tokens, kwargs.get("attention_mask"), decode=False)
        before = list(cache.lengths)
        batches, lengths = self.begin(cache, counts)
        try:
            packed_tokens = _packed(tokens, real)
            positions = kwargs.get("position_ids")
            if positions is None:
                packed_positions = batches[0].positions()
            else:
                packed_positions = _packed(positions.expand(*positions.shape[:-2], rows, -1), real)
            if not any(counts):  # nothing but padding: a token of it runs, and is written nowhere
                packed_tokens = tokens.reshape(-1)[:1]
                packed_positions = packed_positions.new_zeros(*packed_positions.shape[:-1], 1)
            wanted, place = _logits_wanted(kwargs.get("logits_to_keep", 0), real, rows, width)
            output = self.run_model(
                operator.BatchStep(self, batches),
                cache,
                input_ids=packed_tokens[None],
                position_ids=packed_positions.unsqueeze(-2),
                logits_to_keep=wanted,
            )
        except BaseException:
            cache.undo_begin(before)
            raise
        cache.finish(lengths, cache.seen + width)
        cache.looked = cache.stamp
        logits = output.logits[0]
        if place is None:
            output.logits = logits.view(rows, -1, logits.shape[-1])
        else:
            kept, where = place
            spread = logits.new_zeros(rows * kept, logits.shape[-1])
            spread[where] = logits
            output.logits = spread.view(rows, kept, -1)
        output[CACHE] = cache
        return output

    def begin(self, cache: RaggedCache, counts: list[int]) -> tuple[list[Batch], list[int]]:
        """Maps memory for so many more tokens of each row; what it raises changes nothing.

        Returns:
            For each group, a batch of the rows that get tokens, of a row of padding if none does;
            and the lengths of all rows then, for `cache.finish`.
        """
        rows = len(counts)
        old = cache.lengths or [0] * rows
        lengths = [length + count for length, count in zip(old, counts, strict=True)]
        self._require_fits(max(lengths))
        if rows > self.max_batch_size:
            raise ConfigError(
                f"{rows} rows do not fit max_batch_size={self.max_batch_size}: enable() the model "
                "with a larger one"
            )
        before = list(cache.lengths)
        live = [row for row in range(rows) if counts[row]]
        try:
            cache.begin(counts)
        except (OutOfPages, OutOfSlots):
            if not traced.collect():
                raise
            cache.begin(counts)
        try:
            batches = []
            for number, group in enumerate(self.groups):
                slots = cache.slots(number)
                batch = Batch(group.kv, len(live) or 1, sum(counts) or 1)
                batch.fill_rows(
                    [slots[row] for row in live] or [0],
                    [lengths[row] for row in live] or [0],
                    [counts[row] for row in live] or [1],
                )
                batches.append(batch)
        except BaseException:
            cache.undo_begin(before)
            raise
        return batches, lengths

    def _require_fits(self, tokens: int) -> None:
        if tokens > self.max_seq_len:
            raise SequenceTooLong(
                f"{tokens} tokens do not fit max_seq_len={self.max_seq_len}: enable() the model "
                "with a larger one (addresses cost no memory), or generate fewer tokens"
            )

    def look_at_model(self, cache: RaggedCache) -> bool:
        """Makes anew what was made of the model's modules, if somebody has changed them since.

        A cache notes that it was looked, until something but a decode step changes it.

        Returns:
            Whether they were changed.

        Raises:
            ConfigError: an attention module is another.
        """
        if cache.looked == cache.stamp:
            return False
        changed = self._drop_stale()
        if changed:
            self._places.check(self._model)
            self.parts = self._make_parts()
        cache.looked = cache.stamp
        return changed

    def _drop_stale(self) -> bool:
        """What holds what the model has no more goes; whether that was so."""
        if self.parts.is_current():
            return False
        self._decoders.clear()
        self.parts.end(own_weights=False)
        return True

    def real_tokens(
        self, cache: RaggedCache, tokens: torch.Tensor, mask: torch.Tensor | None, *, decode: bool
    ) -> tuple[torch.Tensor | None, list[int]]:
        """Which of the batch's tokens are no padding (None: all), and how many in each row.

        In a decode step all are real: looking would wait for the device.
        """
        rows, width = tokens.shape
        if mask is None:
            return None, [width] * rows
        if mask.shape != (rows, cache.seen + width):
            raise ConfigError(
                f"attention_mask must be {[rows, cache.seen + width]}, of all tokens so far and "
                f"these; got {list(mask.shape)}"
            )
        if decode:
            return None, [1] * rows
        bits = mask.to(torch.bool)
        before = bits[:, : cache.seen]
        counts = torch.stack([before.sum(1), bits[:, cache.seen :].sum(1)]).tolist()
        if cache.seen and counts[0] != cache.lengths:
            self._end_rows(cache, before, counts[0])
        if min(counts[1]) == width:
            return None, counts[1]
        return bits[:, cache.seen :], counts[1]

    @staticmethod
    def _end_rows(cache: RaggedCache, before: torch.Tensor, counts: list[int]) -> None:
        """Rows that had ended went on in decode steps, with what the mask says now is padding."""
        surplus = [have - count for have, count in zip(cache.lengths, counts, strict=True)]
        fits = min(surplus) >= 0 and max(surplus) <= cache.decoded
        if not fits or any(
            any(row[cache.seen - ended :])
            for row, ended in zip(before.tolist(), surplus, strict=True)
        ):
            raise ConfigError(
                f"attention_mask says that rows have {counts} tokens, the cache holds "
                f"{cache.lengths}: tokens that were seen cannot be masked afterwards, but for a "
                "row's last ones of decode steps"
            )
        cache.take_back(surplus)

    def _decode(self, cache: RaggedCache, tokens: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape != (tokens.shape[0], cache.seen + 1):
            raise ConfigError(
                f"attention_mask must be {[tokens.shape[0], cache.seen + 1]}; got "
                f"{list(mask.shape)}"
            )
        longest = max(cache.lengths) + 1
        self._require_fits(longest)
        positions = kwargs.get("position_ids")
        axes = () if positions is None else positions.shape[:-2]
        decoder = self._decoder(len(cache.lengths), longest, axes)
        cache.extend([length + 1 for length in cache.lengths])
        output = decoder.step(cache, tokens, positions)
        cache.advance()
        # A copy, since the next step writes the logits anew.
        logits = output.logits[: tokens.shape[0]].clone()
        return type(output)(logits=logits, **{CACHE: cache})

    def _decoder(self, rows: int, longest: int, axes: tuple[int, ...]) -> Decoder:
        size = _bucket(rows, self.max_batch_size)
        most = self._length_bucket(size, longest)
        kind = self.device.type
        # What is cast is captured.
        casts = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (size, most, axes, casts)
        decoder = self._decoders.get(key)
        if decoder is None:
            decoder = self._decoders[key] = Decoder(self, size, most, axes)
        return decoder

    def _length_bucket(self, rows: int, longest: int) -> int:
        """For which lengths a graph is captured: all of them, unless that would make it slow."""
        if self.device.type != "cuda" or not self.graphs:
            return self.max_seq_len
        if not any(attention.is_bound_by_capacity for attention in self._attentions):
            return self.max_seq_len
        return min(self.max_seq_len, max(1024, 1 << (longest - 1).bit_length()))

    # ---- the model ----

    def _install(self, model: Any) -> None:
        defer_stop_checks()

        # Functions, since generate() looks at the signature of what they stand for.
        @functools.wraps(self._original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

        @functools.wraps(self._prepare_cache)
        def prepare_cache(*args: Any, **kwargs: Any) -> Any:
            return self.prepare_cache(*args, **kwargs)

        self._is_installed = True
        self._own = {
            "forward": forward,
            "_prepare_cache_for_generation": prepare_cache,
            "_vattention_engine": self,
        }
        for name in _COMPARE_CONFIGS:
            if hasattr(model, name):
                self._own[name] = self._with_configs(getattr(model, name))
        # Others may have put theirs there before, as accelerate does.
        self._replaced = {name: vars(model)[name] for name in self._own if name in vars(model)}
        for name, value in self._own.items():
            setattr(model, name, value)
        self._views = replace_configs(model, self._override)

    def _with_configs(self, method: Any) -> Any:
        """A method that finds configs in the modules, no views."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock, restored(self._views):
                return method(*args, **kwargs)

        return call

    def prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What `generate()` calls for a cache: ours where we serve what is asked for."""
        others = [
            name
            for name, value in model_kwargs.items()
            if name not in _GENERATE_KNOWN and _is_given(value)
        ]
        for name in CACHE_NAMES:
            if isinstance(cache := model_kwargs.get(name), RaggedCache):
                cache.looked = 0  # another turn of a chat
        ours = (
            self._is_installed
            and self._model.device == self.device
            and generation_mode.value in ("greedy_search", "sample")
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in _DEFAULT_CACHES
            and not generation_config.output_attentions
            and not generation_config.output_hidden_states
            and not generation_config.is_assistant
            and not others
        )
        rows = batch_size * (generation_config.num_return_sequences or 1)
        if ours and (rows > self.max_batch_size or max_cache_length > self.max_seq_len):
            warnings.warn(
                f"{rows} rows of up to {max_cache_length} tokens do not fit the model as it was "
                f"enabled, with max_batch_size={self.max_batch_size} and "
                f"max_seq_len={self.max_seq_len}: generate() runs with transformers' own cache",
                stacklevel=4,
            )
            ours = False
        if ours:
            model_kwargs[CACHE] = RaggedCache(self, max_cache_length)
            return None
        return self._prepare_cache(
            generation_config,
            model_kwargs,
            generation_mode,
            batch_size,
            max_cache_length,
            *args,
            **kwargs,
        )

    def __deepcopy__(self, _: Any) -> Engine:
        """Not made: a copy of the model would share its slots."""
        raise ConfigError("an enabled model cannot be copied: disable(model) first")

    def uninstall(self) -> None:
        """Leaves the model as it was; caches that it made are of no use any more."""
        with self._lock:
            self._uninstall()

    def _uninstall(self) -> None:
        restore_configs(self._views)
        self._views = []
        self._is_installed = False
        for name, value in self._own.items():
            if vars(self._model).get(name) is not value:
                continue  # somebody has put theirs over it, which calls it
            if name in self._replaced:
                setattr(self._model, name, self._replaced[name])
            else:
                delattr(self._model, name)
        for module in self._modules:
            if hasattr(module, operator.HANDLE):
                delattr(module, operator.HANDLE)
        self._decoders.clear()
        self.parts.end(own_weights=True)
        operator.set_step(self.number, None)  # one of a compiled call that was cut off
        self.order.lead()
        for group in self.groups:
            group.kv.close()
        if self.device.type == "cuda":
            del self.graph_pool


def _is_given(value: Any) -> bool:
    """Whether an argument says anything: None, False and an empty mapping do not."""
    return not (value is None or value is False or (isinstance(value, Mapping) and not value))


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` as ``[batch * tokens, heads, dim]``."""
    return x.transpose(1, 2).flatten(0, 1)


def _packed(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """``[..., batch, tokens]`` as ``[..., tokens]``: those that are real, row after row."""
    return x.flatten(-2) if real is None else x[..., real]


def _logits_wanted(
    keep: int | torch.Tensor, real: torch.Tensor | None, rows: int, width: int
) -> tuple[torch.Tensor, tuple[int, torch.Tensor] | None]:
    """Of which packed tokens the model makes logits, and where these go.

    Args:
        keep: what the caller asked for: the last so many tokens of each row, 0 for all, or which.
        real: which tokens are no padding; None: all.
        rows: of the batch.
        width: tokens in each row, padding included.

    Returns:
        Places in the packed batch; and None if there are as many in each row, else how many each
        row has in the output, and where in the flattened output the logits go. The rest is zero.
    """
    if isinstance(keep, int):
        columns = torch.arange(max(0, width - (keep or width)), width, device="cpu")
    else:
        columns = torch.arange(width, device="cpu")[keep.cpu()]
    if real is None:
        places = torch.arange(rows * width, device="cpu").view(rows, width)[:, columns]
        return places.reshape(-1), None
    # Numbers of the tokens among those that are no padding.
    numbers = real.reshape(-1).long().cumsum(0).view(rows, width) - 1
    if isinstance(keep, int) and keep == 1:
        # Whichever side the padding is on, what is meant is the row's last token.
        where = real.any(1).nonzero()[:, 0]
        return numbers[where, -1], (1, where)
    columns = columns.to(real.device)
    chosen = real[:, columns].reshape(-1)
    where = chosen.nonzero()[:, 0]
    return numbers[:, columns].reshape(-1)[where], (len(columns), where)


def _bucket(rows: int, most: int) -> int:
    """How many rows a graph is captured for: the next power of two to 8, then multiples of 8."""
    size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    return min(size, most)
