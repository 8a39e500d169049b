"""The product of a matrix and one vector that decode steps of one row use."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from vattention.integrations.transformers import matvec
from vattention.integrations.transformers.matvec import one_row_products, product

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 4096), (1024, 14336), (28672, 4096), (1, 16), (5, 2032), (130, 2064), (257, 96)]


def operands(rows: int, columns: int, dtype: torch.dtype, tokens: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + columns)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    return [normal(1, tokens, columns), normal(rows, columns) / columns**0.5, normal(rows)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_as_exact_as_the_library_s(shape, dtype, has_bias):
    x, weight, bias = operands(*shape, dtype)
    bias = bias if has_bias else None
    with one_row_products([]):
        ours = product(x, weight, bias)
    wanted = torch.nn.functional.linear(
        *(t if t is None else t.double() for t in (x, weight, bias))
    )
    theirs = torch.nn.functional.linear(x, weight, bias)
    assert ours.shape == theirs.shape and ours.dtype is dtype
    error, their_error = ((y.double() - wanted).abs().max() for y in (ours, theirs))
    assert error <= 1.5 * their_error + torch.finfo(dtype).eps * wanted.abs().max()


def test_rows_of_a_larger_matrix_are_read_where_they_lie():
    x, weight, _ = operands(64, 512, torch.bfloat16)
    wide = torch.full((64, 1024), torch.nan, dtype=torch.bfloat16, device="cuda")
    wide[:, :512] = weight
    with one_row_products([]):
        assert torch.equal(product(x, wide[:, :512], None), product(x, weight, None))


@pytest.mark.parametrize(
    "rows, columns, tokens, dtype",
    [
        (48, 64, 2, torch.bfloat16),
        (48, 64, 1, torch.float32),
        (1, 8, 1, torch.bfloat16),
        (5, 2047, 1, torch.float16),
    ],
)
def test_what_the_kernel_is_not_for_goes_to_the_library(rows, columns, tokens, dtype, monkeypatch):
    monkeypatch.setattr(matvec, "_matvec", None)
    x, weight, bias = operands(rows, columns, dtype, tokens)
    with one_row_products([]):
        assert torch.equal(product(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_rows_that_begin_anywhere_go_to_the_library(monkeypatch):
    monkeypatch.setattr(matvec, "_matvec", None)
    x, weight, _ = operands(64, 512, torch.bfloat16)
    wide = torch.zeros(64, 513, dtype=torch.bfloat16, device="cuda")
    wide[:, :512] = weight
    with one_row_products([]):
        found = product(x, wide[:, :512], None)
    assert torch.equal(found, torch.nn.functional.linear(x, wide[:, :512]))


def test_linears_compute_by_it_for_a_while():
    linear = torch.nn.Linear(64, 48, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = product(x, linear.weight, linear.bias)
        with one_row_products([linear]):
            assert "forward" in vars(linear)
            torch.testing.assert_close(linear(x), wanted)
        assert "forward" not in vars(linear)
        assert torch.equal(linear(x), wanted)
