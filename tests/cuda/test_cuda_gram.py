"""gram_accumulate_ on CUDA, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statsmerge_ext.ops import gram_accumulate_, gram_accumulate_patches_, symmetrize_
from statsmerge_ext.ops.gram import unfold_patches
from tests.ops.conftest import relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = (torch.bfloat16, torch.float16)


def ours(gram: Tensor, x: Tensor, **options: Tensor) -> Tensor:
    gram_accumulate_(gram, x, **options)
    return gram if "other" in options else symmetrize_(gram)


def gram_of(x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    """In float64, on the CPU."""
    x = x.cpu().double()
    left = x if weight is None else x * weight.cpu().double().unsqueeze(-1)
    return left.mT @ (x if other is None else other.cpu().double())


def peer_of(gram_dtype: torch.dtype, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    """Plain torch on the device: tensor cores for 16-bit features and weights that round nothing, float otherwise."""
    other = x if other is None else other
    exact = weight is None or bool(((weight == 0) | (weight == 1)).all())
    if gram_dtype == torch.float32 and x.dtype in HALVES and other.dtype == x.dtype and exact:
        left = x if weight is None else x * weight.unsqueeze(-1).to(x.dtype)
        return torch.mm(left.mT, other, out_dtype=torch.float32)
    left = x.to(gram_dtype) if weight is None else x.to(gram_dtype) * weight.to(gram_dtype).unsqueeze(-1)
    return left.mT @ other.to(gram_dtype)


def assert_as_accurate(gram: Tensor, x: Tensor, floor: float | None = None, **options: Tensor) -> None:
    """At most twice the error of plain torch at the same types, plus a floor; and no single entry is far off."""
    exact, peer = gram_of(x, **options), peer_of(gram.dtype, x, **options).cpu()
    gram = gram.cpu()
    floor = floor or (1e-14 if gram.dtype == torch.float64 else 2e-7)
    error, allowed = relative_error(gram, exact), 2 * relative_error(peer, exact) + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    left = gram_of(x, options["weight"].abs() if "weight" in options else None).diagonal().sqrt()
    right = gram_of(options["other"]).diagonal().sqrt() if "other" in options else left
    scale = left.unsqueeze(-1) * right + torch.finfo(torch.float64).tiny
    worst = ((gram.double() - exact).abs() / scale).max().item()
    assert worst <= (1e-12 if gram.dtype == torch.float64 else 1e-4), f"an entry is off by {worst:.3g}"


def test_the_kernels_are_native():
    for name in ("gram_accumulate_", "gram_accumulate_patches_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"statsmerge::{name}", "CUDA")


@pytest.mark.parametrize("size", [1, 9, 33, 64, 65, 130, 200])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type(device, dtype, gram_dtype, size):
    x = torch.randn(300, size, device=device).to(dtype)
    weight = torch.rand(300, device=device)
    other = torch.randn(300, 2 * size, device=device).to(dtype)
    for options in ({}, {"weight": weight}, {"other": other}, {"weight": weight, "other": other}):
        columns = 2 * size if "other" in options else size
        gram = ours(torch.zeros(size, columns, dtype=gram_dtype, device=device), x, **options)
        assert_as_accurate(gram, x, **options)


# Sizes that take the tile kernels for every type: whole tiles, ragged ones, several groups of tiles; and few and many
# tokens, so that tiles are divided or not.
@pytest.mark.parametrize(
    ("size", "tokens"), [(1024, 1), (1056, 63), (1100, 700), (2048, 65), (2307, 512), (4352, 1000)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_grams(device, dtype, size, tokens):
    x = torch.randn(tokens, size, device=device).to(dtype)
    assert_as_accurate(ours(torch.zeros(size, size, device=device), x), x)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "tokens"), [(25, 300), (130, 200), (1100, 100)])
def test_every_kernel(device, dtype, size, tokens):
    """Small shapes that pass through every kernel, for the memory and race checkers."""
    x = torch.randn(tokens, size, device=device).to(dtype)
    weight = torch.randint(0, 3, (tokens,), device=device).float()
    weight[64:128] = 0
    for options in ({}, {"weight": weight}):
        assert_as_accurate(ours(torch.zeros(size, size, device=device), x, **options), x, **options)
    gram = ours(torch.zeros(size, size, dtype=torch.float64, device=device), x, weight=weight)
    assert_as_accurate(gram, x, weight=weight)


@pytest.mark.parametrize(("size", "tokens"), [(4096, 32768), (3000, 100_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens(device, dtype, size, tokens):
    """Against float64 on the device, in parts: what is compared with is not ours."""
    x = torch.randn(tokens, size, device=device).to(dtype)
    exact = sum(part.double().mT @ part.double() for part in x.split(8192))
    gram = ours(torch.zeros(size, size, device=device), x)
    error, allowed = relative_error(gram, exact), 2 * relative_error(peer_of(torch.float32, x), exact) + 2e-7
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    assert (gram - exact).abs().max() <= 1e-3 * tokens


def test_accumulates_over_calls(device):
    for size in (40, 500, 1100):
        x = torch.randn(900, size, device=device)
        gram = torch.eye(size, device=device)
        for part in x.split(400):
            assert gram_accumulate_(gram, part) is gram
        gram -= torch.eye(size, device=device)
        assert_as_accurate(symmetrize_(gram), x, floor=1e-6)


@pytest.mark.parametrize("size", [9, 25, 70, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched(device, dtype, size):
    x = torch.randn(5, 4, 130, size, device=device).to(dtype)
    weight = torch.rand(5, 4, 130, device=device).round()
    for options in ({}, {"weight": weight}):
        gram = ours(torch.zeros(5, size, size, device=device), x, **options)
        for b in range(5):
            flat = {name: value[b].flatten() for name, value in options.items()}
            assert_as_accurate(gram[b], x[b].flatten(0, 1), **flat)


def test_many_tokens_of_small_grams(device):
    for dtype in DTYPES:
        x = torch.randn(9, 50_000, device=device).to(dtype).T  # tokens contiguous, as patches are
        assert_as_accurate(ours(torch.zeros(9, 9, device=device), x), x)
        assert_as_accurate(ours(torch.zeros(9, 9, device=device), x.contiguous()), x)


@pytest.mark.sanitize
@pytest.mark.parametrize("size", [7, 130, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_features_and_grams(device, dtype, size):
    """Rows that are not aligned, columns apart, transposed features; Grams inside others; nothing else is touched."""
    wide = torch.randn(200, 2 * size + 3, device=device).to(dtype)
    features = [wide[:, 1 : 1 + size], wide[:, : 2 * size : 2], torch.randn(size, 200, device=device).to(dtype).T]
    for x in features:
        for offset in (2, 3):
            storage = torch.zeros(3 * size, size + 5, device=device)
            gram = storage[::3, offset : offset + size]
            gram_accumulate_(gram, x)
            assert storage[1::3].count_nonzero() == 0 and storage[2::3].count_nonzero() == 0
            assert storage[:, :offset].count_nonzero() == 0 and storage[:, offset + size :].count_nonzero() == 0
            assert_as_accurate(symmetrize_(gram.clone()), x)
        assert_as_accurate(ours(torch.zeros(size, size, device=device).T, x), x)


@pytest.mark.parametrize("size", [9, 130, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_drop_out(device, dtype, size):
    x = torch.randn(8, 100, size, device=device).to(dtype)
    lengths = torch.tensor([100, 1, 0, 50, 64, 99, 0, 0], device=device)
    mask = torch.arange(100, device=device) < lengths.unsqueeze(1)
    padded = torch.where(mask.unsqueeze(-1), x, min(torch.finfo(dtype).max, 1e30))
    for weight in (mask, mask.int(), mask.float()):
        gram = ours(torch.zeros(size, size, device=device), padded, weight=weight)
        assert_as_accurate(gram, x[mask])
    empty = torch.ones(size, size, device=device)
    assert torch.equal(gram_accumulate_(empty, padded, weight=torch.zeros_like(mask)), torch.ones_like(empty))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_kind_together(device, dtype):
    x = torch.randn(1000, 1100, device=device).to(dtype)
    weight = torch.tensor([0.0, 1.0, -0.3, 7.1, 1.0], device=device).repeat(200)
    assert_as_accurate(ours(torch.zeros(1100, 1100, device=device), x, weight=weight), x, weight=weight)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_small_and_large_values(device, scale):
    x = scale * torch.randn(500, 1100, device=device)
    gram = ours(torch.zeros(1100, 1100, device=device), x)
    assert_as_accurate(gram, x)


def test_what_stands_above_the_diagonal_is_left_alone(device):
    above = torch.full((1100, 1100), float("nan"), device=device).triu(1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(100, 1100, device=device).to(dtype)
        gram = gram_accumulate_(above.clone(), x)
        assert gram.tril().isfinite().all() and gram.isnan().sum() == 1100 * 1099 // 2


@pytest.mark.parametrize("size", [9, 64, 200, 1100, 4352])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(device, dtype, size):
    x, weight = torch.randn(3000, size, device=device).to(dtype), torch.rand(3000, device=device).round(decimals=1)
    for options in ({}, {"weight": weight}):
        first, second = (ours(torch.zeros(size, size, device=device), x, **options) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("size", [9, 200, 1100])
def test_other_streams(device, size):
    x = torch.randn(5000, size, device=device)
    expected = ours(torch.zeros(size, size, device=device), x)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        gram = torch.zeros(size, size, device=device)
        for _ in range(3):
            gram.zero_()
            gram_accumulate_(gram, 1.0 * x)
        symmetrize_(gram)
    stream.synchronize()
    assert torch.equal(gram, expected)


@pytest.mark.parametrize("size", [9, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_waits_for_the_device(device, dtype, size):
    """A CUDA graph can only be captured of what doesn't; replaying it adds the same again."""
    x, weight = torch.randn(300, size, device=device).to(dtype), torch.ones(300, device=device)
    gram = torch.zeros(size, size, device=device)
    gram_accumulate_(gram, x, weight=weight)  # whatever is set up once
    expected = gram.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram_accumulate_(gram, x, weight=weight)
    gram.zero_()
    graph.replay()
    assert torch.equal(gram, expected)


# Input, kernel, stride, padding in front and behind, dilation, groups: depthwise; other small Grams in one, two and
# three dimensions; Grams that cuBLAS takes, grouped; a patch embedding; Grams that the tile kernels take.
CONVOLUTIONS = [
    ((3, 40, 9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 40),
    ((3, 6, 31), (5,), (2,), ((2, 1),), (2,), 2),
    ((2, 16, 9, 8), (3, 2), (2, 3), ((0, 2), (4, 0)), (1, 2), 2),
    ((2, 4, 3, 4, 5), (2, 1, 3), (1, 2, 1), ((1, 0), (0, 0), (2, 2)), (1, 1, 2), 1),
    ((2, 30, 9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 2),
    ((2, 3, 64, 48), (16, 16), (16, 16), ((0, 0), (0, 0)), (1, 1), 1),
    ((2, 120, 6, 7), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
]


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(torch.float32, "dense", marks=pytest.mark.sanitize),
        (torch.float32, "channels last"),
        (torch.float32, "sliced"),
        (torch.float64, "dense"),
        (torch.bfloat16, "dense"),
        pytest.param(torch.bfloat16, "channels last", marks=pytest.mark.sanitize),
        (torch.float16, "sliced"),
    ],
)
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_patches(device, convolution, dtype, layout):
    shape, kernel, stride, padding, dilation, groups = convolution
    x = torch.randn(shape, device=device).to(dtype)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        x = torch.stack([x, x + 1], -1)[..., 0]
    patches = unfold_patches(x, kernel, stride, padding, dilation, groups)
    outputs = [
        (size + sum(sides) - spread * (k - 1) - 1) // step + 1
        for size, sides, spread, k, step in zip(shape[2:], padding, dilation, kernel, stride)
    ]
    weight = torch.randint(0, 3, (shape[0], *outputs), device=device).float()
    columns = patches.shape[-1]
    for gram_dtype in (torch.float32, torch.float64):
        for options in ({}, {"weight": weight}):
            gram = torch.zeros(groups, columns, columns, dtype=gram_dtype, device=device)
            geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            symmetrize_(gram_accumulate_patches_(gram, x, kernel, **geometry, **options))
            flat = {name: value.flatten() for name, value in options.items()}
            for group in range(0, groups, 7):
                assert_as_accurate(gram[group], patches[group], **flat)
            other = torch.randn(shape[0], groups * 2, *outputs, device=device).to(dtype)
            cross = torch.zeros(groups, columns, 2, dtype=gram_dtype, device=device)
            gram_accumulate_patches_(cross, x, kernel, **geometry, **options, other=other)
            rows = other.movedim(1, -1).reshape(-1, groups, 2)
            for group in range(0, groups, 7):
                assert_as_accurate(cross[group], patches[group], **flat, other=rows[:, group])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_patches_than_are_held_at_a_time(device, dtype):
    x = torch.randn(40, 256, 50, 50, device=device).to(dtype)
    patches = unfold_patches(x, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)[0]
    exact = sum(part.double().mT @ part.double() for part in patches.split(8192))
    gram = symmetrize_(gram_accumulate_patches_(torch.zeros(1, 2304, 2304, device=device), x, 3, padding=1))[0]
    error, allowed = relative_error(gram, exact), 2 * relative_error(peer_of(torch.float32, patches), exact) + 2e-7
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("groups", [130, 1])
def test_patches_never_wait_for_the_device(device, groups):
    x, columns = torch.randn(2, 130, 9, 9, device=device), 130 // groups * 9
    gram = torch.zeros(groups, columns, columns, device=device)
    gram_accumulate_patches_(gram, x, 3, groups=groups)  # whatever is set up once
    expected = gram.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram_accumulate_patches_(gram, x, 3, groups=groups)
    gram.zero_()
    graph.replay()
    assert torch.equal(gram, expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (5, 0), (0, 2000)])
def test_empty_inputs_change_nothing(device, shape):
    gram = torch.ones(shape[-1], shape[-1], device=device)
    x = torch.empty(shape, device=device)
    assert torch.equal(gram_accumulate_(gram, x), torch.ones(shape[-1], shape[-1], device=device))


def test_arguments_on_other_devices_are_named(device):
    with pytest.raises(ValueError, match="x: expected a tensor on cuda:0, got one on cpu"):
        gram_accumulate_(torch.zeros(4, 4, device=device), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="weight: expected a tensor on cuda:0, got one on cpu"):
        gram_accumulate_(torch.zeros(4, 4, device=device), torch.zeros(2, 4, device=device), weight=torch.ones(2))
