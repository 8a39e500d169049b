"""What all tests of `enable` have. torch is not imported here: without it they are skipped."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exact_arithmetic():
    import torch

    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def compiler():
    """What compiles without breaks, and counts graphs."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()
