"""What makes a model's own layers fast in decode, without touching what they compute.

- Linears that read one input become one: their weights become views of one matrix, the first of
  them computes all, and the others return their part. No memory is added.
- Decoder layers are compiled while a graph is captured, one compiled code for all of them: what
  surrounds the matrix products (norms, rotary embeddings, activations) becomes a few kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vattention.errors import ConfigError
from vattention.integrations.transformers import forwards
from vattention.integrations.transformers.matvec import product
from vattention.integrations.transformers.views import Override

__all__ = ["Merged", "compilable", "compiled", "merge_linears", "plain_linears"]

# By the names that transformers gives them, in the order in which they are called.
_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Merged:
    """Some linears that read one input, and their weights in one matrix.

    They are computed as one while the engine's model runs, which has looked whether they are still
    what they were. Whoever else calls them gets what they compute themselves.

    Args:
        linears: plain ones, in the order in which they are called.
        override: of the engine.
    """

    def __init__(self, linears: list[torch.nn.Linear], override: Override) -> None:
        """Makes their weights views of one matrix."""
        self.linears = linears
        self.override = override
        self.sizes = [linear.out_features for linear in linears]
        self.computed: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        # Made where inference is on, they could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            self.weight: torch.Tensor | None = torch.cat([linear.weight.data for linear in linears])
            biases: list[torch.Tensor | None] = [linear.bias for linear in linears]
            given = [bias for bias in biases if bias is not None]
            self.bias = torch.cat(given) if given else None
            for linear, weight in zip(linears, self.weight.split(self.sizes), strict=True):
                linear.weight.data = weight
            if self.bias is not None:
                for linear, bias in zip(linears, self.bias.split(self.sizes), strict=True):
                    linear.bias.data = bias
        self._parts = [_Part(self, number) for number in range(len(linears))]
        for linear, part in zip(linears, self._parts, strict=True):
            forwards.put(linear, part.forward)

    def compute(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What linear `number` returns for `x`."""
        linear = self.linears[number]
        if self.weight is None or self.override.name is None or torch.is_grad_enabled():
            return type(linear).forward(linear, x)
        computed = self.computed
        if number == 0:
            y = product(x, self.weight, self.bias)
            computed = self.computed = x, y.split(self.sizes, dim=-1)
        elif computed is None or x is not computed[0]:  # which may be of another input
            return type(linear).forward(linear, x)
        if number == len(self.linears) - 1:
            self.computed = None
        return computed[1][number]

    def end(self, *, own_weights: bool) -> None:
        """Gives the linears their own code back.

        Args:
            own_weights: and matrices of their own; else they keep what they have now.
        """
        self.weight = self.bias = self.computed = None
        for linear, part in zip(self.linears, self._parts, strict=True):
            forwards.take_off(linear, part.forward)
        if own_weights:
            with torch.inference_mode(False), torch.no_grad():
                for linear in self.linears:
                    linear.weight.data = linear.weight.data.clone()
                    if linear.bias is not None:
                        linear.bias.data = linear.bias.data.clone()

    def __reduce_ex__(self, _: Any) -> Any:
        """Not made: a copy would compute with these weights."""
        raise ConfigError("nothing of an enabled model can be copied: disable(model) first")


class _Part:
    """One of them. Its `forward` is a bound method, so that who copies a linear is told of this."""

    def __init__(self, merged: Merged, number: int) -> None:
        self._merged = merged
        self._number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Merged.compute`."""
        return self._merged.compute(self._number, x)


def merge_linears(model: torch.nn.Module, override: Override) -> list[Merged]:
    """Merges what can be merged, or nothing."""
    done: list[Merged] = []
    try:
        for module in model.modules():
            for names in _SHARED_INPUT:
                linears: list[Any] = [getattr(module, name, None) for name in names]
                if all(_is_plain(linear) for linear in linears) and _are_alike(linears):
                    done.append(Merged(linears, override))
    except BaseException:
        while done:
            done.pop().end(own_weights=True)
        raise
    return done


def plain_linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Linears whose code may be replaced, those that were merged left out."""
    return [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and _is_plain(module)
    ]


def _is_plain(linear: Any) -> bool:
    """Whether it is a linear and nothing else: not quantised, adapted, sharded or hooked."""
    return (
        type(linear) is torch.nn.Linear
        and not forwards.has_own(linear)
        and type(linear.weight) is torch.nn.Parameter
        and not linear.weight.is_inference()
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not hasattr(linear, "_hf_hook")
    )


def _are_alike(linears: list[Any]) -> bool:
    first = linears[0]
    return all(
        linear.in_features == first.in_features
        and linear.weight.dtype is first.weight.dtype
        and linear.weight.device == first.weight.device
        and linear.weight.device.type != "meta"
        and (linear.bias is None) == (first.bias is None)
        for linear in linears
    )


def compilable(model: Any) -> list[torch.nn.Module]:
    """The layers that a model is a stack of, and the small parts around the stack.

    Empty if the model does not say which they are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        return []
    # The final norm and the rotary embedding, say: what has neither matrices nor layers.
    around = [
        child
        for child in model.get_decoder().children()
        if not any(
            isinstance(part, (torch.nn.ModuleList, torch.nn.Linear, torch.nn.Embedding))
            for part in child.modules()
        )
    ]
    return [*layers, *around]


@contextmanager
def compiled(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Lets modules run compiled, for a while; those that have a forward of their own do not."""
    # The limit is one for all models of a class, each of which needs some graphs of its own.
    with (
        torch._dynamo.config.patch(recompile_limit=256),
        forwards.put_for_a_while(modules, lambda module: torch.compile(module.forward)),
    ):
        yield
