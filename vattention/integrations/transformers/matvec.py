"""A matrix times one vector, at the rate at which memory can be read.

A decode step of one row is little else than reading weights, and libraries make their matrix
products for matrices. A program here has a few rows of the matrix, and no more of them than it can
have under way at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from vattention.integrations.transformers import forwards

try:
    import triton
    import triton.language as tl
except ImportError:  # then torch's product is used
    triton = None

__all__ = ["one_row_products", "product"]

_ROWS, _BLOCK, _WARPS = 2, 2048, 8
# Of elements in a row, as in every model's: only then does a thread load 16 bytes at once, which is
# what the kernel is for.
_MULTIPLE = 16
_DTYPES = (torch.bfloat16, torch.float16)

if triton is not None:

    @triton.jit
    def _matvec(
        x,
        weight,
        bias,
        y,
        rows,
        columns,
        stride,
        HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            part = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            block = tl.load(
                weight + row[:, None] * stride + column[None, :], mask=inside, other=0.0
            )
            total += tl.sum(block.to(tl.float32) * part[None, :], 1)
        if HAS_BIAS:
            total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(y + row, total.to(y.dtype.element_ty), mask=row < rows)


def _on_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, columns = weight.shape
    if (
        triton is None
        or x.numel() != columns
        or x.dtype not in _DTYPES
        or weight.dtype is not x.dtype
        or weight.stride(1) != 1
        or columns % _MULTIPLE
        or weight.stride(0) % _MULTIPLE
    ):
        return torch.nn.functional.linear(x, weight, bias)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    _matvec[(triton.cdiv(rows, _ROWS),)](
        x,
        weight,
        weight if bias is None else bias,  # not read if there is none
        y,
        rows,
        columns,
        weight.stride(0),
        HAS_BIAS=bias is not None,
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return y


def _on_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = torch.library.Library("vattention", "FRAGMENT")
_library.define("one_row_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("one_row_product", _on_cuda, "CUDA")
_library.impl("one_row_product", _on_cpu, "CPU")
torch.library.register_fake("vattention::one_row_product", _fake, lib=_library)

_active = False


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What `torch.nn.functional.linear` returns."""
    if _active:
        result: torch.Tensor = torch.ops.vattention.one_row_product.default(x, weight, bias)
        return result
    return torch.nn.functional.linear(x, weight, bias)


def _forward_of(linear: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return product(x, linear.weight, linear.bias)

    return forward


@contextmanager
def one_row_products(linears: Iterable[torch.nn.Linear]) -> Iterator[None]:
    """Lets linears, and every `product`, be computed for one row, for a while.

    Args:
        linears: those whose code may be replaced.
    """
    global _active
    _active = True
    try:
        with forwards.put_for_a_while(linears, _forward_of):
            yield
    finally:
        _active = False
