"""What the machine can do at best: the bandwidth and the arithmetic that all floors are computed from.

Matrix products are measured through mm and through oneDNN's linear layer: on some processors the BLAS behind mm reaches
half of what the processor can do, and a share of that would exceed 100 %.
"""

from __future__ import annotations

import pytest
import torch
from harness import seeded

FLOATS = 64 * 2**20
SIZE = 2048


def measure(benchmark, ceiling, amount, function):
    """Record ``amount`` (bytes or FLOPs) for every round of ``function``."""
    benchmark.group = "ceilings"
    benchmark.extra_info.update(ceiling=ceiling, amount=amount)
    benchmark.pedantic(function, rounds=9, warmup_rounds=2)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["sum", "dot"])
def test_read(benchmark, kind):
    x, y = torch.randn(2, FLOATS, generator=seeded())
    function, operands = (x.sum, 1) if kind == "sum" else (lambda: torch.dot(x, y), 2)
    measure(benchmark, "read", 4 * FLOATS * operands, function)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["copy", "update"])
def test_copy(benchmark, kind):
    x, y = torch.randn(2, FLOATS, generator=seeded())
    function, passes = (lambda: y.copy_(x), 2) if kind == "copy" else (lambda: y.add_(x), 3)
    measure(benchmark, kind, 4 * FLOATS * passes, function)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["mm", "linear"])
def test_products(benchmark, kind, dtype):
    if dtype == torch.float64 and kind == "linear":
        pytest.skip("oneDNN has no float64 products")
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("these vector extensions have no bfloat16 products")
    x, y = torch.randn(2, SIZE, SIZE, generator=seeded()).to(dtype)
    if kind == "mm":
        function = lambda: x @ y
    else:
        function = lambda: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    measure(benchmark, str(dtype)[6:], 2 * SIZE**3, function)
