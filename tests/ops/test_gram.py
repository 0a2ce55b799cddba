"""gram_accumulate_ and symmetrize_ against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from statsmerge_ext import _C
from statsmerge_ext.ops import gram_accumulate_, gram_accumulate_patches_, symmetrize_
from statsmerge_ext.ops.gram import (
    gram_accumulate_patches_reference,
    gram_accumulate_reference,
    symmetrize_reference,
)

TARGETS = _C.build_info()["cpu_targets"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact_gram(x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    left = x.double() if weight is None else x.double() * weight.double().unsqueeze(-1)
    return left.mT @ (x if other is None else other).double()


def ours(gram: Tensor, x: Tensor, **options: Tensor) -> Tensor:
    gram_accumulate_(gram, x, **options)
    return gram if "other" in options else symmetrize_(gram)


@pytest.fixture(params=TARGETS)
def every_target(request):
    before = _C.cpu_target()
    _C.set_cpu_target(request.param)
    yield
    _C.set_cpu_target(before)


@pytest.mark.usefixtures("every_target")
@pytest.mark.parametrize("size", [1, 9, 33, 200])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(dtype, gram_dtype, size, assert_as_accurate):
    x = torch.randn(300, size).to(dtype)
    weight = torch.rand(300)
    other = torch.randn(300, 2 * size).to(dtype)
    for options in ({}, {"weight": weight}, {"other": other}, {"weight": weight, "other": other}):
        columns = 2 * size if "other" in options else size
        gram = ours(torch.zeros(size, columns, dtype=gram_dtype), x, **options)
        peer = gram_accumulate_reference(torch.zeros(size, columns, dtype=gram_dtype), x, **options)
        assert_as_accurate(gram, peer, exact_gram(x, **options), floor=1e-14 if gram_dtype == torch.float64 else 1e-7)


def test_accumulates_over_calls_and_tiles(assert_as_accurate):
    x = torch.randn(9000, 40)
    gram = torch.eye(40)
    for part in x.split(4500):
        assert gram_accumulate_(gram, part) is gram
    assert_as_accurate(symmetrize_(gram), torch.eye(40) + x.T @ x, torch.eye(40) + exact_gram(x))


@pytest.mark.parametrize("size", [9, 70])
def test_batched(size, assert_as_accurate):
    x = torch.randn(5, 4, 30, size)
    weight = torch.rand(5, 4, 30)
    gram = ours(torch.zeros(5, size, size), x, weight=weight)
    flat = x.flatten(1, 2)
    exact = exact_gram(flat, weight.flatten(1))
    assert_as_accurate(gram, (flat * weight.reshape(5, -1, 1)).mT @ flat, exact)


@pytest.mark.parametrize("size", [7, 130])
def test_strided_inputs_and_grams(size, assert_as_accurate):
    x = torch.randn(2 * size, 90)[::2].T
    storage = torch.zeros(size * 3, size + 5)
    gram = storage[::3, 2 : 2 + size]
    assert_as_accurate(ours(gram, x), x.T @ x, exact_gram(x))
    assert storage[1::3].count_nonzero() == 0 and storage[:, :2].count_nonzero() == 0
    transposed = torch.zeros(size, size).T
    assert_as_accurate(ours(transposed, x.to(torch.bfloat16)), x.T @ x, exact_gram(x.to(torch.bfloat16)), floor=1e-6)


def test_masked_tokens_drop_out():
    x = torch.randn(2, 6, 50)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    expected = ours(torch.zeros(50, 50), x[mask.bool()])
    for weight in (mask, mask.bool(), mask.float()):
        torch.testing.assert_close(ours(torch.zeros(50, 50), x, weight=weight), expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (5, 0)])
def test_empty_inputs_change_nothing(shape):
    gram = torch.ones(shape[-1], shape[-1])
    assert torch.equal(gram_accumulate_(gram, torch.empty(shape)), torch.ones(shape[-1], shape[-1]))


def test_one_vector_is_an_outer_product():
    x = torch.randn(6)
    torch.testing.assert_close(ours(torch.zeros(6, 6), x), torch.outer(x, x))


@pytest.mark.parametrize("shape", [(3, 700, 20), (3, 700, 150), (1, 9000, 40), (1, 1500, 600), (40, 300, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_depend_on_threads(shape, dtype, with_threads):
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[:2])
    empty = torch.zeros(shape[0], shape[2], shape[2])
    for options in ({}, {"weight": weight}, {"weight": weight > 0.5}, {"other": x}):
        one, two = (with_threads(n, lambda o=options: ours(empty.clone(), x, **o)) for n in (1, 2))
        assert torch.equal(one, two)


@pytest.mark.usefixtures("every_target")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(8192, 100), (3001, 300), (5001, 33)])
def test_bfloat16_is_as_accurate_as_single_precision(shape, masked, assert_as_accurate):
    x = torch.randn(shape).bfloat16()
    options = {"weight": torch.rand(shape[0]) > 0.3} if masked else {}
    for features in (x, x.T.contiguous().T):
        gram = ours(torch.zeros(shape[1], shape[1]), features, **options)
        peer = gram_accumulate_reference(torch.zeros(shape[1], shape[1]), x, **options)
        assert_as_accurate(gram, peer, exact_gram(x, **options))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 300),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(size, tokens, batch, dtype, transposed, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, size, generator=generator).to(dtype)
    if transposed:
        x = x.mT.contiguous().mT
    weight = torch.rand(batch, tokens, generator=generator) if weighted else None
    gram = torch.zeros(batch, size, size, dtype=torch.float64)
    gram_accumulate_(gram, x, weight=weight)
    torch.testing.assert_close(symmetrize_(gram), exact_gram(x, weight), rtol=1e-12, atol=1e-10)


@st.composite
def convolutions(draw):
    """Arguments of a convolution with one to three spatial dimensions that fits its input."""
    dims = draw(st.integers(1, 3))
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (5, 1), (24, 1), (19, 2), (1, 12)]))

    def numbers(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(dims))

    kernel, dilation = numbers(1, 3 if dims > 1 else 7), numbers(1, 2)
    padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(dims))
    size = tuple(
        max(draw(st.integers(1, 9 if dims > 1 else 40)), d * (k - 1) + 1 - sum(p))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    geometry = {"stride": numbers(1, 3), "padding": padding, "dilation": dilation, "groups": groups}
    return draw(st.integers(1, 20)), groups * per_group, size, kernel, geometry


@settings(max_examples=150, deadline=None)
@given(
    convolutions(),
    st.sampled_from(TARGETS),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["dense", "channels last", "sliced"]),
    st.booleans(),
    st.sampled_from([None, None, 1, 3, 5, 50]),
    st.integers(0, 2**31),
)
@example(  # one element for one element, but from the padding
    (1, 1, (1,), (1,), {"stride": (2,), "padding": ((1, 0),), "dilation": (1,), "groups": 1}),
    TARGETS[0],
    torch.float32,
    torch.float32,
    "dense",
    False,
    None,
    0,
)
def test_patches_of_any_convolution(convolution, target, dtype, gram_dtype, layout, weighted, others, seed):
    images, channels, size, kernel, geometry = convolution
    generator, groups = torch.Generator().manual_seed(seed), geometry["groups"]

    def laid_out(x):
        if layout == "channels last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return torch.stack([x, x + 1], -1)[..., 0] if layout == "sliced" else x

    x = laid_out(torch.randn(images, channels, *size, generator=generator).to(dtype))
    columns = channels // groups * torch.Size(kernel).numel()
    empty = torch.zeros(groups, columns, others or columns, dtype=torch.float64)
    options, expected = {}, {}
    if weighted or others:
        outputs = torch.empty(images, 1, *size, device="meta")
        outputs = torch.nn.functional.pad(outputs, [side for pair in geometry["padding"][::-1] for side in pair])
        for axis, (k, step, spread) in enumerate(zip(kernel, geometry["stride"], geometry["dilation"], strict=True)):
            outputs = outputs.unfold(2 + axis, spread * (k - 1) + 1, step)
        outputs = outputs.shape[2 : 2 + len(size)]
    if weighted:
        options["weight"] = expected["weight"] = torch.rand(images, *outputs, generator=generator)
    if others:
        options["other"] = laid_out(torch.randn(images, groups * others, *outputs, generator=generator).to(dtype))
        by_group = options["other"].movedim(1, -1).reshape(-1, groups, others)
        expected["other"] = by_group.transpose(0, 1)
    exact = gram_accumulate_patches_reference(empty.clone(), x, kernel, **geometry, **expected)
    before = _C.cpu_target()
    _C.set_cpu_target(target)
    try:
        gram = gram_accumulate_patches_(empty.to(gram_dtype), x, kernel, **geometry, **options)
    finally:
        _C.set_cpu_target(before)
    tolerance = 1e-12 if gram_dtype == torch.float64 else 2e-5
    scale = exact.abs().max().clamp_min(1)
    gram = gram if others else symmetrize_(gram)
    torch.testing.assert_close(gram.double(), exact, rtol=0, atol=tolerance * scale.item())


@pytest.mark.usefixtures("every_target")
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("images", "side"), [(8, 28), (50, 6)])  # small images are taken several at a time
def test_depthwise_patches(dtype, kernel, stride, images, side, assert_as_accurate):
    x = torch.randn(images, 40, side, side).to(dtype)
    geometry = {"stride": stride, "padding": kernel // 2, "groups": 40}
    full = {"stride": [stride] * 2, "padding": [(kernel // 2,) * 2] * 2, "dilation": [1, 1], "groups": 40}
    empty = torch.zeros(40, kernel**2, kernel**2)
    gram = symmetrize_(gram_accumulate_patches_(empty.clone(), x, kernel, **geometry))
    peer = gram_accumulate_patches_reference(empty.clone(), x, [kernel] * 2, **full)
    exact = gram_accumulate_patches_reference(empty.double(), x, [kernel] * 2, **full)
    assert_as_accurate(gram, peer, exact)

    y = torch.randn(images, 40, *[(side - 1) // stride + 1] * 2).to(dtype)
    empty, rows = torch.zeros(40, kernel**2, 1), y.movedim(1, -1).reshape(-1, 40, 1).transpose(0, 1)
    cross = gram_accumulate_patches_(empty.mT.clone().mT, x, kernel, **geometry, other=y)
    peer = gram_accumulate_patches_reference(empty.clone(), x, [kernel] * 2, **full, other=rows)
    exact = gram_accumulate_patches_reference(empty.double(), x, [kernel] * 2, **full, other=rows)
    assert_as_accurate(cross, peer, exact)


@pytest.mark.parametrize("channels", [3, 40, 96])
def test_patches_are_those_of_the_convolution(channels):
    """The convolution of x by w is patches · wᵀ, so its squared sum is w gram wᵀ, and what it has in common with the
    patches gram wᵀ."""
    x, w = torch.randn(2, channels, 9, 8).double(), torch.randn(6, channels, 3, 2).double()
    options = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    columns = channels * 6
    gram = symmetrize_(gram_accumulate_patches_(torch.zeros(1, columns, columns).double(), x, (3, 2), **options))[0]
    y = torch.nn.functional.conv2d(x, w, **options)
    out = y.movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(w.flatten(1) @ gram @ w.flatten(1).T, out.T @ out)
    cross = gram_accumulate_patches_(torch.zeros(1, columns, 6).double(), x, (3, 2), **options, other=y)[0]
    torch.testing.assert_close(cross, gram @ w.flatten(1).T)


@pytest.mark.parametrize("shape", [(5, 40, 12, 12), (20, 3, 12, 12), (3, 40, 12, 12)])
def test_patches_do_not_depend_on_threads(shape, with_threads):
    x, groups = torch.randn(shape), 40 if shape[0] == 5 else 1
    columns = shape[1] // groups * 9
    empty = torch.zeros(groups, columns, columns)
    one, two = (
        with_threads(n, lambda: gram_accumulate_patches_(empty.clone(), x, 3, padding=1, groups=groups)) for n in (1, 2)
    )
    assert torch.equal(symmetrize_(one), symmetrize_(two))
    empty = torch.zeros(groups, columns, shape[1] // groups)
    one, two = (
        with_threads(n, lambda: gram_accumulate_patches_(empty.clone(), x, 3, padding=1, groups=groups, other=x))
        for n in (1, 2)
    )
    assert torch.equal(one, two)


def test_patches_of_no_images():
    assert gram_accumulate_patches_(torch.ones(1, 9, 9), torch.zeros(0, 1, 4, 4), 3).eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(1, 9, 9), torch.zeros(4, 4), 3), {}, ValueError, r"x: expected \[N, C, \*spatial\]"),
        (
            (torch.zeros(1, 9, 9), torch.zeros(1, 1, 4, 4), (3, 3, 3)),
            {},
            ValueError,
            "kernel_size: expected one integer",
        ),
        ((torch.zeros(1, 9, 9), torch.zeros(1, 1, 4, 4), 3), {"stride": 0}, ValueError, "stride: expected one integer"),
        (
            (torch.zeros(1, 9, 9), torch.zeros(1, 1, 4, 4), 3),
            {"padding": -1},
            ValueError,
            "padding: expected an integer",
        ),
        (
            (torch.zeros(1, 9, 9), torch.zeros(1, 1, 4, 4), 3),
            {"dilation": 2},
            ValueError,
            "kernel_size: expected a kernel",
        ),
        (
            (torch.zeros(1, 9, 9), torch.zeros(1, 3, 4, 4), 3),
            {"groups": 2},
            ValueError,
            "groups: expected a divisor of",
        ),
        ((torch.zeros(1, 8, 8), torch.zeros(1, 1, 4, 4), 3), {}, ValueError, r"gram: expected shape \[1, 9, 9\]"),
        (
            (torch.zeros(1, 9, 9), torch.zeros(1, 1, 4, 4), 3),
            {"weight": torch.ones(1, 4, 4)},
            ValueError,
            r"weight: expected shape \[1, 2, 2\], got \[1, 4, 4\]",
        ),
        (
            (torch.zeros(2, 9, 5), torch.zeros(1, 2, 4, 4), 3),
            {"groups": 2, "other": torch.zeros(1, 5, 2, 2)},
            ValueError,
            r"other: expected shape \[1, 10, 2, 2\], got \[1, 5, 2, 2\]",
        ),
        (
            (torch.zeros(1, 8, 5), torch.zeros(1, 1, 4, 4), 3),
            {"other": torch.zeros(1, 5, 2, 2)},
            ValueError,
            r"gram: expected shape \[1, 9, 5\]",
        ),
        (
            (torch.zeros(1, 9, 9), torch.zeros(1, 1, 4, 4).int(), 3),
            {},
            TypeError,
            "x: expected float64 or .*, got int32",
        ),
    ],
)
def test_bad_convolutions_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gram_accumulate_patches_(*arguments, **options)


def test_symmetrize_mirrors_the_lower_triangle():
    gram = torch.tensor([[1.0, 7.0], [2.0, 3.0]])
    assert symmetrize_(gram) is gram
    assert gram.tolist() == [[1, 2], [2, 3]]


def test_numpy_is_updated_in_place():
    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    gram = np.zeros((5, 5))
    assert gram_accumulate_(gram, x, weight=np.ones(40)) is gram
    assert symmetrize_(gram) is gram
    np.testing.assert_allclose(gram, x.astype(np.float64).T @ x.astype(np.float64), rtol=1e-12)
    with pytest.raises(ValueError, match="gram: expected a writeable array"):
        gram_accumulate_(np.zeros((5, 5))[::-1], x)


@pytest.mark.parametrize(
    ("gram", "x", "options", "error", "message"),
    [
        (
            torch.zeros(4, 4, dtype=torch.bfloat16),
            torch.zeros(2, 4),
            {},
            TypeError,
            "gram: expected float64 or float32, got bfloat16",
        ),
        (
            torch.zeros(4, 4),
            torch.zeros(2, 4, dtype=torch.int32),
            {},
            TypeError,
            "x: expected float64 or .*, got int32",
        ),
        (torch.zeros(4), torch.zeros(2, 4), {}, ValueError, r"gram: expected \[in, in\] or \[B, in, in\], got \[4\]"),
        (torch.zeros(4, 4), torch.zeros(2, 5), {}, ValueError, r"x: expected shape \[2, 4\], got \[2, 5\]"),
        (
            torch.zeros(3, 4, 4),
            torch.zeros(2, 7, 4),
            {},
            ValueError,
            r"x: expected shape \[3, '...', 4\], got \[2, 7, 4\]",
        ),
        (torch.zeros(4, 5), torch.zeros(2, 4), {}, ValueError, r"gram: expected shape \[4, 4\], got \[4, 5\]"),
        (
            torch.zeros(4, 4),
            torch.zeros(2, 4),
            {"weight": torch.zeros(3)},
            ValueError,
            r"weight: expected shape \[2\], got \[3\]",
        ),
        (
            torch.zeros(4, 5),
            torch.zeros(2, 4),
            {"other": torch.zeros(3, 5)},
            ValueError,
            r"other: expected shape \[2, 5\], got \[3, 5\]",
        ),
        (
            torch.zeros(4, 4),
            "features",
            {},
            TypeError,
            "x: expected a tensor, a NumPy array or an array with DLPack, got str",
        ),
        (
            torch.zeros(4, 4),
            torch.zeros(2, 4, device="meta"),
            {},
            ValueError,
            "x: expected a tensor on cpu, got one on meta",
        ),
    ],
)
def test_bad_arguments_are_named(gram, x, options, error, message):
    with pytest.raises(error, match=message):
        gram_accumulate_(gram, x, **options)


def test_opcheck(opcheck):
    x, weight, other = torch.randn(2, 5, 40), torch.rand(2, 5), torch.randn(2, 5, 3)
    opcheck("gram_accumulate_", torch.zeros(2, 40, 40), x, None, None)
    opcheck("gram_accumulate_", torch.zeros(2, 40, 3), x, weight, other)
    opcheck("gram_accumulate_", torch.zeros(2, 3, 3, dtype=torch.float64), other.bfloat16(), weight, None)


def test_opcheck_of_symmetrize(opcheck):
    opcheck("symmetrize_", torch.randn(3, 5, 5))


def test_opcheck_of_patches(opcheck):
    x, weight = torch.randn(2, 6, 1, 8, 9), torch.rand(2, 4 * 9)
    geometry = ([1, 3, 3], [1, 2, 1], [0, 0, 1, 0, 1, 1], [1, 1, 1])
    opcheck("gram_accumulate_patches_", torch.zeros(6, 9, 9), x, *geometry, 6, weight, None)
    gram = torch.zeros(1, 54, 54, dtype=torch.float64)
    opcheck("gram_accumulate_patches_", gram, x.bfloat16(), *geometry, 1, None, None)
    opcheck("gram_accumulate_patches_", torch.zeros(6, 9, 2), x, *geometry, 6, weight, torch.randn(6, 2 * 4 * 9, 2))


def test_traces_in_one_graph():
    def f(x: Tensor) -> Tensor:
        return symmetrize_(gram_accumulate_(torch.zeros(6, 6), 2 * x, weight=torch.ones(x.shape[0]))) + 1

    x = torch.randn(9, 6)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.parametrize(
    "shape", [(1100, 1100), (2, 700, 700), (300, 9, 9), (7, 33, 33), (3, 1, 1), (0, 4, 4), (2, 0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_symmetrize_mirrors_any_matrices(shape, dtype, transposed):
    gram = torch.randn(shape, dtype=dtype)
    gram = gram.mT if transposed else gram
    expected = gram.tril() + gram.tril(-1).mT
    reference = gram.clone()
    symmetrize_reference(reference)
    assert torch.equal(symmetrize_(gram), expected) and torch.equal(reference, expected)


def test_symmetrize_refuses_what_is_no_gram():
    with pytest.raises(ValueError, match=r"gram: expected square matrices \[in, in\] or \[B, in, in\], got \[2, 3\]"):
        symmetrize_(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="gram: expected .*float64.*, got bfloat16"):
        symmetrize_(torch.zeros(3, 3, dtype=torch.bfloat16))


def test_reference_accepts_what_the_operator_accepts():
    x, weight, other = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5), torch.randn(2, 3, 5, 2)
    for options in ({}, {"weight": weight}, {"other": other}):
        shape = (2, 4, 2 if "other" in options else 4)
        torch.testing.assert_close(
            gram_accumulate_reference(torch.zeros(shape), x, **options), ours(torch.zeros(shape), x, **options)
        )


class DLPackOnly:
    """An array of an unknown library: nothing but the DLPack protocol."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


handed_back = []


def from_dlpack(tensor: torch.Tensor) -> None:
    handed_back.append(tensor.clone())


def test_arrays_updated_in_place_are_handed_back_to_their_library():
    """That is what makes CuPy's stream wait for the update."""
    gram, patches = DLPackOnly(torch.zeros(2, 2)), DLPackOnly(torch.zeros(1, 2, 2))
    assert gram_accumulate_(gram, torch.ones(3, 2)) is gram
    assert symmetrize_(gram) is gram
    assert gram_accumulate_patches_(patches, torch.ones(1, 1, 4), 2) is patches
    assert torch.equal(handed_back[0].tril(), torch.full((2, 2), 3.0).tril())
    assert torch.equal(handed_back[1], torch.full((2, 2), 3.0))
    assert torch.equal(handed_back[2][0].tril(), torch.full((2, 2), 3.0).tril())
    assert torch.equal(handed_back[1], gram.tensor)
