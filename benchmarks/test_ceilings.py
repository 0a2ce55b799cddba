"""What the machine can do at best: the bandwidth and the arithmetic that all floors are computed from.

Measured before everything else and once more after it, since a shared machine's limits move. Matrix products are
measured through mm and through oneDNN's linear layer: on some processors the BLAS behind mm reaches half of what the
processor can do, and a share of that would exceed 100 %.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import seeded
from torch import Tensor

FLOATS = 64 * 2**20
SIZE = 2048

pytestmark = [pytest.mark.quick, pytest.mark.parametrize("moment", ["before", "after"])]

#: What is moved by one call on (x, y), in multiples of their size.
STREAMS: dict[str, tuple[str, int, Callable]] = {
    "sum": ("read", 1, lambda x, y: x.sum()),
    "dot": ("read", 2, torch.dot),
    "copy": ("copy", 2, lambda x, y: y.copy_(x)),
    "add": ("update", 3, lambda x, y: y.add_(x)),
}


def onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


PRODUCTS = [(torch.mm, torch.float32), (torch.mm, torch.float64), (onednn, torch.float32)]
if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # without the instructions bfloat16 is a hundred times slower
    PRODUCTS += [(torch.mm, torch.bfloat16), (onednn, torch.bfloat16)]


def measure(benchmark, ceiling: str, amount: float, function: Callable) -> None:
    """Record ``amount`` (bytes or FLOPs) for every round of ``function``."""
    benchmark.group = "ceilings"
    benchmark.extra_info.update(ceiling=ceiling, amount=amount)
    benchmark.pedantic(function, rounds=9, warmup_rounds=2)


@pytest.mark.parametrize("stream", STREAMS)
def test_memory(benchmark, moment, stream):
    x, y = torch.randn(2, FLOATS, generator=seeded())
    ceiling, passes, function = STREAMS[stream]
    measure(benchmark, ceiling, 4 * FLOATS * passes, lambda: function(x, y))


@pytest.mark.parametrize(("product", "dtype"), PRODUCTS, ids=lambda value: getattr(value, "__name__", str(value)[6:]))
def test_arithmetic(benchmark, moment, product, dtype):
    x, y = torch.randn(2, SIZE, SIZE, generator=seeded()).to(dtype)
    measure(benchmark, str(dtype)[6:], 2 * SIZE**3, lambda: product(x, y))
