"""What every attention backend is: a name, its needs, and one call."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from vattention.allocator import KVAllocator
from vattention.attention.batch import Batch
from vattention.attention.needs import Needs, Options

__all__ = ["Backend", "Scales", "why_not_imported"]


def why_not_imported(module: str, package: str) -> str | None:
    """Why a module cannot be imported, for `Backend.missing`; None: it has been.

    Args:
        module: its full name.
        package: what to call it, as it is installed.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"the package {package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # built for another torch, say: they raise what they like
        return f"the package {package} cannot be imported: {type(error).__name__}: {error}"
    return None


@dataclass(frozen=True, kw_only=True, eq=False)  # tensors have no one answer to ==
class Scales:
    """What 8-bit floats stand for: factors on queries, K and V, float32 ``[rows, kv_heads]``."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None


class Backend(ABC):
    """One kernel family over one allocator, for one kind of attention.

    Attributes:
        name: how users call it.
        needs: what it needs.
        version: of the library that it calls, for reports.

    Args:
        kv: the allocator; it has been held against `needs`.
        options: what is to be computed.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]

    def __init__(self, kv: KVAllocator, options: Options) -> None:
        # Not the allocator: it keeps what was made for it, and would keep itself alive.
        self.layout = kv.layout
        self.options = options
        head_dim = kv.layout.head_dim
        self.scale = head_dim**-0.5 if options.scale is None else options.scale
        # As FlashAttention counts: tokens before a query's own, and behind it; -1: all.
        window = options.window
        self.window = (-1, -1) if window is None else (window - 1, 0)

    def is_causal(self, batch: Batch) -> bool:
        """Whether a mask is needed: a single query is its row's last token, and sees all."""
        return self.options.causal and batch.max_queries > 1

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why what it calls cannot be used: it is not installed, or not fit; None: it can."""

    @property
    def version(self) -> str:
        """Of the library that it calls: torch, unless it is another."""
        return str(torch.__version__)

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
        *,
        sinks: torch.Tensor | None,
        scales: Scales | None,
    ) -> torch.Tensor:
        """Computes attention of a batch's queries over one layer.

        No call into the host's memory and no wait: what it needs of the batch is on the device, or
        known to the host already.

        Args:
            q: ``[num_queries, num_heads, head_dim]``.
            k: the layer's K over all slots, ``[slots, max_length, kv_heads, head_dim]``: cut at
                the batch's `max_length`.
            v: V, likewise.
            batch: which rows, and how long.
            sinks: ``[num_heads]`` if the options have sinks.
            scales: if the layout is an 8-bit float.

        Returns:
            ``[num_queries, num_heads, v_head_dim]``; zero where a row is padding.
        """
