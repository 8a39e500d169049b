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

from vattention.integrations.transformers.matvec import product

__all__ = [
    "compilable",
    "compiled",
    "forget_merged",
    "merge_linears",
    "plain_linears",
    "unmerge_linears",
]

# By the names that transformers gives them, in the order in which they are called.
_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Merged:
    """Some linears that read one input, and their weights in one matrix."""

    def __init__(self, linears: list[torch.nn.Linear]) -> None:
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        with torch.no_grad():
            self.weight = torch.cat([linear.weight.data for linear in linears])
            biases: list[torch.Tensor | None] = [linear.bias for linear in linears]
            given = [bias for bias in biases if bias is not None]
            self.bias = torch.cat(given) if given else None
            for linear, weight in zip(linears, self.weight.split(self.sizes), strict=True):
                linear.weight.data = weight
            if self.bias is not None:
                for linear, bias in zip(linears, self.bias.split(self.sizes), strict=True):
                    linear.bias.data = bias
        self.computed: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def compute(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What linear `number` returns for `x`."""
        computed = self.computed
        if number == 0 and not torch.is_grad_enabled():  # the merged matrix has no gradient
            y = product(x, self.weight, self.bias)
            computed = self.computed = x, y.split(self.sizes, dim=-1)
        # Which may be of another input.
        elif computed is None or x is not computed[0] or torch.is_grad_enabled():
            linear = self.linears[number]
            return torch.nn.functional.linear(x, linear.weight, linear.bias)
        if number == len(self.linears) - 1:
            self.computed = None
        return computed[1][number]


def _forward_of(merged: _Merged, number: int) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return merged.compute(number, x)

    return forward


def merge_linears(model: torch.nn.Module) -> list[_Merged]:
    """Merges what can be merged, or nothing; returns it, for `unmerge_linears`."""
    done: list[_Merged] = []
    try:
        for module in model.modules():
            for names in _SHARED_INPUT:
                linears: list[Any] = [getattr(module, name, None) for name in names]
                if all(_is_plain(linear) for linear in linears) and _are_alike(linears):
                    merged = _Merged(linears)
                    for number, linear in enumerate(linears):
                        linear.forward = _forward_of(merged, number)
                    done.append(merged)
    except BaseException:
        unmerge_linears(done)
        raise
    return done


def unmerge_linears(all_merged: Iterable[_Merged]) -> None:
    """Gives every linear its own weights and its own code back."""
    for merged in all_merged:
        for linear in merged.linears:
            del linear.forward
            linear.weight.data = linear.weight.data.clone()
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.clone()
        del merged.weight, merged.bias  # one at a time: there may be no room for all


def forget_merged(all_merged: Iterable[_Merged]) -> None:
    """Gives linears their own code back, and leaves the weights that they have now."""
    for merged in all_merged:
        for linear in merged.linears:
            del linear.forward


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
        and "forward" not in vars(linear)
        and type(linear.weight) is torch.nn.Parameter
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
    changed = [module for module in modules if "forward" not in vars(module)]
    # The limit is one for all models of a class, each of which needs some graphs of its own.
    with torch._dynamo.config.patch(recompile_limit=256):
        for module in changed:
            module.forward = torch.compile(module.forward)
        try:
            yield
        finally:
            for module in changed:
                del module.forward
