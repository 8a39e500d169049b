"""Attention over an allocator's slots: one call, whatever computes it.

    batch = Batch.of({first: 1, second: 1, third: 512})
    out = attend(q, kv, layer, batch)

`attend` keeps, in the allocator, an `Attention` for each kind of attention that it was asked for.
Engines make one themselves: then everything that can be checked is checked before the first step.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping

import torch

from vattention.allocator import KVAllocator
from vattention.attention.backend import Backend, Scales
from vattention.attention.batch import Batch
from vattention.attention.choice import BACKENDS, backend_class, fastest
from vattention.attention.device import on
from vattention.attention.needs import Options
from vattention.attention.tensors import is_tensor, shown
from vattention.config import MAX_BYTES
from vattention.errors import BackendUnavailable, ConfigError
from vattention.sequence import Sequence

__all__ = ["Attention", "attend", "backends"]


def backends(kv: KVAllocator, options: Options) -> dict[str, list[str]]:
    """Every backend by name, and why it cannot run over that memory; no reasons: it can.

    Tail slack is not among the reasons, since it depends on the batch.

    Raises:
        ConfigError: `kv` is no allocator, or `options` are no `Options`.
    """
    _check_kinds(kv, options)
    return {
        name: [missing] if missing else backend.needs.unmet_by(kv, options)
        for name, backend in BACKENDS.items()
        for missing in (_missing_for(backend, kv),)
    }


def _check_kinds(kv: object, options: object) -> None:
    if not isinstance(kv, KVAllocator):
        raise ConfigError(f"kv must be a KVAllocator; got {type(kv).__name__}")
    if not isinstance(options, Options):
        raise ConfigError(f"options must be Options; got {type(options).__name__}")


def _listed(reasons: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())


def _missing_for(backend: type[Backend], kv: KVAllocator) -> str | None:
    return backend.missing() if backend.needs.device == kv.device.type else None


class Attention:
    """One kind of attention over one allocator.

    Args:
        kv: the allocator.
        options: what is to be computed.
        backend: a name of `BACKENDS`, or "auto": for each batch the fastest one that was measured
            to be, see `vattention.attention.choice`.

    Raises:
        ConfigError: no such backend, or it cannot run over that memory; the message says why and
            what to do.
        BackendUnavailable: what it calls is not installed.
    """

    def __init__(self, kv: KVAllocator, options: Options, backend: str = "auto") -> None:
        """Loads the libraries that may be used."""
        _check_kinds(kv, options)
        if backend == "auto":
            reasons = backends(kv, options)
            names = [name for name, why in reasons.items() if not why]
            if not names:
                raise ConfigError(f"no attention backend can run here: {_listed(reasons)}")
        else:
            found = backend_class(backend)
            missing = _missing_for(found, kv)
            if missing:
                raise BackendUnavailable(f"the attention backend {backend!r}: {missing}")
            why = found.needs.unmet_by(kv, options)
            if why:
                raise ConfigError(f"the attention backend {backend!r}: {'; '.join(why)}")
            names = [backend]
        self.options = options
        self.requested = backend
        # The allocator keeps what `attend` makes, and would keep itself alive.
        self._kv = weakref.ref(kv)
        self._layout = kv.layout
        self._max_seq_len = kv.max_seq_len
        self._device = kv.device
        self._made = {name: BACKENDS[name](kv, options) for name in names}
        self._query_elements = options.num_heads * kv.layout.head_dim
        self._max_query_elements = min(
            (
                backend.needs.max_query_elements
                for backend in self._made.values()
                if backend.needs.max_query_elements is not None
            ),
            default=MAX_BYTES,
        )
        self._chosen: dict[tuple[object, ...], Backend] = {}

    def __call__(
        self,
        q: torch.Tensor,
        layer: int,
        batch: Batch,
        *,
        sinks: torch.Tensor | None = None,
        scales: Scales | None = None,
    ) -> torch.Tensor:
        """Attention of a batch's queries over what its sequences hold; see :func:`attend`."""
        self._check(q, batch, sinks)
        if scales is not None:
            self._check_scales(scales, batch)
        with on(self._device):
            batch.notice_capture()
            backend = self.backend_for(batch)
            alignment = backend.needs.alignment_bytes
            if (q.data_ptr() | q.stride(0) * q.itemsize | q.stride(1) * q.itemsize) % alignment:
                q = q.clone(memory_format=torch.contiguous_format)
            k, v = batch.kv.layer(layer)
            if batch.max_length < self._max_seq_len:
                stop = max(batch.max_length, 1)
                k, v = k[:, :stop], v[:, :stop]
            return backend.attend(q, k, v, batch, sinks=sinks, scales=scales)

    @property
    def front_slack_tokens(self) -> int:
        """Tokens below a window that must stay mapped, whichever backend runs."""
        return max(backend.needs.front_slack_tokens for backend in self._made.values())

    @property
    def is_bound_by_capacity(self) -> bool:
        """Whether a graph of it is slow where its `max_length` is far above the lengths."""
        needs = [backend.needs for backend in self._made.values() if backend.needs.graph_safe]
        return bool(needs) and all(each.splits_by_capacity for each in needs)

    def backend_for(self, batch: Batch) -> Backend:
        """What computes that batch.

        Where it will be captured, or is being captured, backends that can be, and that divide
        their work by the lengths and not by `max_length`, come first.

        Args:
            batch: the batch.

        Raises:
            ConfigError: tails are not fit for it, or it cannot be captured; the message says what
                to do.
        """
        backend: Backend = batch.derived(self, lambda: self._find(batch))
        return backend

    def _find(self, batch: Batch) -> Backend:
        lengths, graph = batch.host_lengths, batch.is_captured
        exact = not graph and _is_exact(batch)
        key = (
            batch.is_decode,
            batch.num_rows.bit_length(),
            batch.max_length.bit_length(),
            exact,
            graph,
            lengths is None,
            batch.num_queries * self._query_elements >= self._max_query_elements,
        )
        backend = self._chosen.get(key)
        if backend is None:
            backend = self._chosen[key] = self._choose(batch, exact, graph)
        return backend

    def _choose(self, batch: Batch, exact: bool, graph: bool) -> Backend:
        reasons = {
            name: self._unmet_by_batch(self._made[name], batch, exact, graph) for name in self._made
        }
        fit = [name for name, why in reasons.items() if not why]
        if not fit:
            raise ConfigError(f"no attention backend can compute this batch: {_listed(reasons)}")
        if graph:
            even = [name for name in fit if not self._made[name].needs.splits_by_capacity]
            fit = even or fit
        return self._made[
            fastest(
                fit,
                self._device,
                decode=batch.is_decode,
                rows=batch.num_rows,
                length=batch.max_length,
            )
        ]

    def _unmet_by_batch(
        self, backend: Backend, batch: Batch, exact: bool, graph: bool
    ) -> list[str]:
        needs = backend.needs
        reasons = needs.slack_unmet_by(batch.kv, exact)
        if graph and not needs.graph_safe:
            reasons.append(
                "it plans for the lengths at hand, so a CUDA graph of it serves no other"
            )
        if batch.host_lengths is None and needs.host_lengths:
            reasons.append("it plans on the host, which does not know this batch's lengths")
        most, elements = needs.max_query_elements, batch.num_queries * self._query_elements
        if most is not None and elements >= most:
            reasons.append(
                f"it finds queries up to {most:,} elements, here are {elements:,}: split the batch"
            )
        return reasons

    def _check(self, q: torch.Tensor, batch: Batch, sinks: torch.Tensor | None) -> None:
        if not isinstance(batch, Batch):
            raise ConfigError(f"batch must be a Batch; got {type(batch).__name__}")
        batch.require_filled()
        layout = self._layout
        wanted = (batch.num_queries, self.options.num_heads, layout.head_dim)
        if (
            not is_tensor(q)
            or q.shape != wanted
            or q.dtype is not layout.dtype
            or q.device != self._device
        ):
            raise ConfigError(
                f"q must be {list(wanted)} of {layout.dtype} on {self._device}; got {shown(q)}"
            )
        if q.stride(-1) != 1:
            raise ConfigError(f"q must have dense heads; its strides are {q.stride()}")
        if batch.kv is not self._kv():
            raise ConfigError("the batch is of another allocator than this attention")
        if (sinks is not None) is not self.options.sinks:
            raise ConfigError("pass sinks where the options say so, and only there")
        heads = self.options.num_heads
        if sinks is not None and (
            not is_tensor(sinks)
            or sinks.shape != (heads,)
            or sinks.device != self._device
            or not sinks.is_floating_point()
        ):
            raise ConfigError(
                f"sinks must be [{heads}] on {self._device}, of floating point; got {shown(sinks)}"
            )

    def _check_scales(self, scales: Scales, batch: Batch) -> None:
        layout = self._layout
        if not isinstance(scales, Scales):
            raise ConfigError(f"scales must be Scales; got {type(scales).__name__}")
        if layout.itemsize > 1:
            raise ConfigError(f"scales say what 8-bit floats stand for; K is of {layout.dtype}")
        wanted = (batch.num_rows, layout.num_kv_heads)
        for name, scale in (("q", scales.q), ("k", scales.k), ("v", scales.v)):
            if scale is None:
                continue
            alike = is_tensor(scale) and scale.shape == wanted and scale.device == self._device
            if not alike or scale.dtype is not torch.float32:
                raise ConfigError(
                    f"scales.{name} must be {list(wanted)} of torch.float32 on {self._device}; got "
                    f"{shown(scale)}"
                )

    def __repr__(self) -> str:
        """What it may call."""
        return f"Attention({self.requested!r}: {', '.join(self._made)})"


def _is_exact(batch: Batch) -> bool:
    lengths = batch.host_lengths
    return lengths is not None and all(length in (0, batch.max_length) for length in lengths)


@functools.lru_cache(maxsize=256, typed=True)
def _options(
    num_heads: int,
    causal: bool,
    window: int | None,
    softcap: float,
    sinks: bool,
    scale: float | None,
) -> Options:
    """Checked once: True is not 1 here."""
    return Options(
        num_heads=num_heads,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
    )


def attend(
    q: torch.Tensor,
    kv: KVAllocator,
    layer: int,
    batch: Batch | Mapping[Sequence, int],
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    scales: Scales | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of some sequences' last tokens over all their tokens: prefill, decode, or both.

    K and V of those tokens are written already, see :func:`vattention.attention.append`. Nothing
    waits for the device.

    Args:
        q: queries, ``[num_queries, num_heads, head_dim]``, row after row of the batch, in the
            layout's dtype, with dense heads.
        kv: the allocator.
        layer: 0 to ``num_layers - 1``.
        batch: which sequences, and how many queries each has; or a mapping that says so, of which
            a batch is made for this call.
        causal: whether a query sees nothing behind its own position.
        window: how many tokens a query sees, itself included; None: all before it. Kernels load
            some tokens below it too: keep `front_slack_tokens` of them mapped.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0: they do not.
        sinks: ``[num_heads]``, a logit for each head that takes weight and has no value.
        scale: factor on the scores; None: ``head_dim ** -0.5``.
        scales: what 8-bit floats stand for; where the layout has them.
        backend: "auto", or one of ``BACKENDS``.

    Returns:
        ``[num_queries, num_heads, v_head_dim]``.

    Raises:
        ConfigError: an argument does not fit, or no backend can compute this; nothing has run.
        BackendUnavailable: what the backend calls is not installed.
    """
    if not isinstance(batch, Batch):
        batch = Batch.of(batch)
    if batch.kv is not kv:
        raise ConfigError("the batch has sequences of another allocator")
    if not is_tensor(q) or q.dim() != 3:
        raise ConfigError(f"q must be [num_queries, num_heads, head_dim]; got {shown(q)}")
    given = (q.shape[1], causal, window, softcap, sinks is not None, scale)
    try:
        options = _options(*given)
        attention = kv._attentions.get((backend, options))
    except TypeError:  # one of them has no hash: it is told which
        options, attention = _options.__wrapped__(*given), None
    if attention is None:
        attention = kv._attentions[backend, options] = Attention(kv, options, backend)
    result: torch.Tensor = attention(q, layer, batch, sinks=sinks, scales=scales)
    return result
