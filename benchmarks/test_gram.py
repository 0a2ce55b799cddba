"""gram_accumulate_: one triangle of xᵀx added to a running sum, beside full products of plain torch.

The triangle that our route leaves alone is poisoned with NaN before every run, and what is judged is the other one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Bar, Route, Work, relative_error, seeded
from target import TARGET
from torch import Tensor

from statsmerge_ext import ops


def lower_error(exact: Tensor):
    lower = exact.tril()
    return lambda gram: {"error": relative_error(gram.tril(), lower)}


def exact_gram(x: Tensor) -> Tensor:
    x = x.double()
    return x.mT @ x


def accumulate(x: Tensor, dtype: torch.dtype = torch.float32, image: Tensor | None = None, **geometry) -> Route:
    """Our route for x [..., tokens, in], or for the ``image`` whose patches x are; a triangle is moved twice."""
    *batch, tokens, size = x.shape
    start = torch.zeros(*batch, size, size, dtype=dtype).masked_fill_(torch.ones(size, size).triu(1).bool(), torch.nan)
    gram = torch.empty_like(start)
    source = x if image is None else image
    triangle = start.numel() // size * (size + 1) / 2
    work = Work(
        read=source.numel() * source.element_size() + triangle * gram.element_size(),
        written=triangle * gram.element_size(),
        flops=2 * tokens * triangle,
        dtype=str(x.dtype if dtype == torch.float32 else dtype)[6:],
    )

    def run() -> Tensor:
        if image is None:
            return ops.gram_accumulate_(gram, x)
        return ops.gram_accumulate_patches_(gram, image, **geometry)

    return Route(run, work, prepare=lambda: gram.copy_(start))


def product_work(x: Tensor, dtype: str) -> Work:
    """A whole product: 2 · tokens · in² whichever half is needed."""
    return Work(read=x.numel() * x.element_size(), flops=2 * x.numel() * x.shape[-1], dtype=dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded())


SHAPES = [(8192, 768), (4096, 3072)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(case, shape):
    x = normal(*shape)
    routes = {OURS: accumulate(x), "x.T @ x": Route(lambda: x.T @ x, product_work(x, "float32"))}
    bars = (Bar("x.T @ x", 1.6, 1.9),)
    case(f"{shape[0]} × {shape[1]} float32", routes, errors=lower_error(exact_gram(x)), bound=1e-6, bars=bars)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(case, shape):
    x = normal(*shape).bfloat16()
    routes = {
        OURS: accumulate(x),
        "upcast + mm": Route(lambda: x.float().T @ x.float(), product_work(x, "float32")),
        "bf16 x.T @ x": Route(lambda: x.T @ x, product_work(x, "bfloat16"), rounds=None if TARGET == "native" else 2),
    }
    bars = (Bar("upcast + mm", 1.4), Bar("bf16 x.T @ x", 6))
    case(f"{shape[0]} × {shape[1]} bfloat16", routes, errors=lower_error(exact_gram(x)), bound=1e-6, bars=bars)


def test_float64(case):
    x = normal(8192, 768)
    routes = {
        OURS: accumulate(x, torch.float64),
        "upcast + mm": Route(lambda: x.double().T @ x.double(), product_work(x, "float64")),
    }
    case("8192 × 768 float32 into float64", routes, errors=lower_error(exact_gram(x)), bound=1e-13)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(96, 16384, 25), (1152, 1024, 9), (64, 256, 64)], ids=str)
def test_batches(case, shape):
    x = normal(*shape)
    routes = {OURS: accumulate(x), "bmm": Route(lambda: torch.bmm(x.mT, x), product_work(x, "float32"))}
    case(f"batch {' × '.join(map(str, shape))} float32", routes, errors=lower_error(exact_gram(x)), bound=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(64, 64), (512, 64), (16, 768)], ids=str)
def test_small(case, shape):
    x = normal(*shape)
    routes = {OURS: accumulate(x), "x.T @ x": Route(lambda: x.T @ x, product_work(x, "float32"))}
    name = f"{shape[0]} × {shape[1]} float32"
    case(name, routes, errors=lower_error(exact_gram(x)), bound=1e-6, rounds=21, warm=True)


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "side"), [(96, 96, 5, 32), (1152, 1152, 3, 8), (64, 1, 3, 32)], ids=str
)
def test_convolution(case, channels, groups, kernel, side):
    """The peer unfolds the patches into a matrix; ours forms them inside the kernel."""
    image = normal(16, channels, side, side).to(memory_format=torch.channels_last)

    def unfold() -> Tensor:
        columns = F.unfold(image, kernel, padding=kernel // 2).unflatten(1, (groups, -1))
        return columns.permute(1, 0, 3, 2).flatten(1, 2)

    def unfold_bmm() -> Tensor:
        columns = unfold()
        return columns.mT @ columns

    x = unfold()
    routes = {
        OURS: accumulate(x, image=image, kernel_size=kernel, padding=kernel // 2, groups=groups),
        "unfold + bmm": Route(unfold_bmm, product_work(x, "float32")),
    }
    grouped = f"{channels} channels in {groups} group{'s' * (groups > 1)}"
    name = f"convolution {kernel} × {kernel}, {grouped}, 16 × {side} × {side}"
    case(name, routes, errors=lower_error(exact_gram(x)), bound=1e-6)
