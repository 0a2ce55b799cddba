"""gram_accumulate_ and symmetrize_ against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statsmerge_ext.ops import gram_accumulate_, symmetrize_
from statsmerge_ext.ops.gram import gram_accumulate_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact_gram(x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    left = x.double() if weight is None else x.double() * weight.double().unsqueeze(-1)
    return left.mT @ (x if other is None else other).double()


def ours(gram: Tensor, x: Tensor, **options: Tensor) -> Tensor:
    gram_accumulate_(gram, x, **options)
    return gram if "other" in options else symmetrize_(gram)


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


@pytest.mark.parametrize("size", [20, 150])
def test_does_not_depend_on_threads(size, with_threads):
    x, weight = torch.randn(3, 700, size), torch.rand(3, 700)
    grams = [with_threads(n, lambda: ours(torch.zeros(3, size, size), x, weight=weight)) for n in (1, 2)]
    torch.testing.assert_close(grams[0], grams[1], rtol=0, atol=1e-5 * grams[0].abs().max().item())
    again = with_threads(2, lambda: ours(torch.zeros(3, size, size), x, weight=weight))
    assert torch.equal(grams[1], again)


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


def test_traces_in_one_graph():
    def f(x: Tensor) -> Tensor:
        return symmetrize_(gram_accumulate_(torch.zeros(6, 6), 2 * x, weight=torch.ones(x.shape[0]))) + 1

    x = torch.randn(9, 6)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_reference_accepts_what_the_operator_accepts():
    x, weight, other = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5), torch.randn(2, 3, 5, 2)
    for options in ({}, {"weight": weight}, {"other": other}):
        shape = (2, 4, 2 if "other" in options else 4)
        torch.testing.assert_close(
            gram_accumulate_reference(torch.zeros(shape), x, **options), ours(torch.zeros(shape), x, **options)
        )
