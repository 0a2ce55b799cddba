"""topk_svd and weight_statistics against float64's full decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from statsmerge_ext import _C
from statsmerge_ext.ops import topk_svd, weight_statistics
from statsmerge_ext.ops.topk_svd import topk_svd_reference, weight_statistics_reference

SHAPES = [(1, 1), (1, 50), (50, 1), (7, 300), (300, 7), (40, 40), (64, 200), (200, 64), (150, 150)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def with_target():
    """Calls a function with a given instruction set."""
    before = _C.cpu_target()
    yield lambda target, function: (_C.set_cpu_target(target), function())[1]
    _C.set_cpu_target(before)


def with_spectrum(m: int, n: int, values: Tensor) -> Tensor:
    k = len(values)
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
    return u * values.double() @ v.T


def check_values(s: Tensor, residual: Tensor, mat: Tensor, tol: float) -> None:
    """Within tol, within the stated bound (and the output type's rounding), the bound within tol too."""
    exact = torch.linalg.svdvals(mat.double())[: len(s)]
    rounding = torch.finfo(s.dtype).eps * exact[0]
    error = (s.double() - exact).abs()
    assert bool((error <= tol * exact + rounding + 1e-6 * exact[0]).all())
    assert bool((error <= residual.double() + rounding).all()), (error, residual)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_vectors(shape, dtype):
    mat = torch.randn(shape).to(dtype)
    k = min(5, *shape)
    result = topk_svd([mat], k, vectors=True)
    s, u, vh = result.S[0], result.U[0], result.Vh[0]
    out = torch.float64 if dtype == torch.float64 else torch.float32
    assert s.dtype == u.dtype == vh.dtype == out
    assert u.shape == (shape[0], k) and vh.shape == (k, shape[1]) and result.passes.shape == (1,)
    check_values(s, result.residual[0], mat, tol=1e-3)
    eye = torch.eye(k, dtype=out)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.T, eye, rtol=0, atol=1e-5)
    # a residual of √tol: singular values converge twice as fast as vectors
    assert (mat.to(out) @ vh.T - u * s).norm() <= 0.05 * s.norm()


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_tolerance_is_kept_on_a_hard_spectrum(tol):
    mat = torch.randn(400, 300, dtype=torch.float64)
    result = topk_svd([mat], 4, tol=tol)
    assert bool((result.residual[0] <= tol * result.S[0]).all())
    check_values(result.S[0], result.residual[0], mat, tol)


def test_tighter_tolerance_takes_more_passes():
    mat = torch.randn(300, 300)
    loose, tight = (topk_svd([mat], 3, tol=tol).passes.item() for tol in (1e-1, 1e-6))
    assert loose < tight


def test_few_passes_are_admitted():
    mat = torch.randn(500, 500)
    result = topk_svd([mat], 3, max_passes=3)
    assert result.passes.item() <= 4
    exact = torch.linalg.svdvals(mat.double())[:3]
    assert bool((result.residual[0] > 1e-3 * result.S[0]).any())
    assert bool(((result.S[0] - exact).abs() <= result.residual[0]).all())


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([5.0, 5.0, 5.0] + [1.0] * 40),
        torch.tensor([3.0, 3.0 - 1e-5, 3.0 - 2e-5, 2.9] + [1.0] * 40),
        torch.ones(80),
        torch.logspace(0, -5, 60),
        torch.tensor([1.0, 1e-4, 1e-8]),
    ],
    ids=["repeated", "clustered", "orthogonal", "graded", "steep"],
)
def test_spectra(values):
    mat = with_spectrum(120, 90, values)
    result = topk_svd([mat], 3)
    check_values(result.S[0], result.residual[0], mat, tol=1e-3)


@pytest.mark.parametrize("shape", [(150, 400), (400, 300)])
@pytest.mark.parametrize("decay", [3, 6, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_whose_squares_drown_in_rounding_error_end_the_search(shape, decay, dtype):
    """No number of passes would bring them to the tolerance."""
    values = 10 ** (-torch.arange(min(shape), dtype=torch.float64) / decay)
    mat = with_spectrum(*shape, values).to(dtype)
    result = topk_svd([mat], 60, vectors=True)
    assert result.passes.item() <= 30
    exact, found = torch.linalg.svdvals(mat.double()), result.S[0].double()
    apart = (found.unsqueeze(1) - exact).abs().amin(1)
    assert bool((apart <= result.residual[0] + torch.finfo(dtype).eps * found).all())
    assert bool(((found - exact[:60]).abs() <= 1e-6 * exact[0]).all())
    kept = exact[:60] > 1e-5 * exact[0]
    assert bool((result.residual[0][kept] <= 1e-3 * found[kept]).all())


@pytest.mark.parametrize("shape", [(20, 30), (100, 70)])
def test_rank_below_k(shape):
    mat = with_spectrum(*shape, torch.tensor([4.0, 2.0]))
    result = topk_svd([mat], 4, vectors=True)
    torch.testing.assert_close(
        result.S[0], torch.tensor([4.0, 2.0, 0.0, 0.0], dtype=torch.float64), rtol=1e-9, atol=1e-7
    )
    torch.testing.assert_close(result.U[0].T @ result.U[0], torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(result.Vh[0] @ result.Vh[0].T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(10, 10), (100, 70)])
def test_zero_matrix(shape):
    result = topk_svd([torch.zeros(shape)], 3, vectors=True)
    assert result.S[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(result.U[0].T @ result.U[0], torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 10), (100, 70)])
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, torch.float32), (1e30, torch.float32), (1e-200, torch.float64), (1e200, torch.float64)]
)
def test_extreme_scales(shape, scale, dtype):
    mat = torch.randn(shape, dtype=torch.float64)
    plain, scaled = topk_svd([mat], 3).S[0], topk_svd([(mat * scale).to(dtype)], 3).S[0]
    torch.testing.assert_close(scaled.double() / scale, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("shape", [(20, 40), (90, 70)])
def test_minus(shape, dtype, other):
    mat, sub = torch.randn(shape).to(dtype), torch.randn(shape).to(other)
    result = topk_svd([mat], 3, minus=[sub], vectors=True)
    check_values(result.S[0], result.residual[0], mat.double() - sub.double(), tol=1e-3)


def test_batched_and_listed_are_the_same():
    mats, minus = torch.randn(4, 50, 60), torch.randn(4, 50, 60)
    batched = topk_svd(mats, 3, minus=minus, vectors=True)
    listed = topk_svd(list(mats), 3, minus=list(minus), vectors=True)
    assert batched.S.shape == batched.residual.shape == (4, 3)
    assert batched.U.shape == (4, 50, 3) and batched.Vh.shape == (4, 3, 60)
    for a, b in zip(batched[:4], listed[:4]):
        assert torch.equal(a, torch.stack(b))
    assert topk_svd(mats, 3).U is None


def test_results_do_not_depend_on_the_other_matrices():
    mats = [torch.randn(50, 60), torch.randn(600, 600), torch.randn(5, 5)]
    together = topk_svd(mats, 2).S
    assert all(torch.equal(s, topk_svd([mat], 2).S[0]) for s, mat in zip(together, mats))


@pytest.mark.parametrize("shape", [(60, 80), (900, 800)])
def test_does_not_depend_on_threads(shape, with_threads):
    mats = [torch.randn(shape) for _ in range(3)]
    one, two = (with_threads(n, lambda: topk_svd(mats, 3, vectors=True, seed=7)) for n in (1, 2))
    for a, b in zip(one[:4], two[:4]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(one.passes, two.passes)


@pytest.mark.parametrize(
    "view", [lambda x: x.T, lambda x: x[::2], lambda x: x[:, ::2], lambda x: x[5:, 3:], lambda x: x.T[::3, 1:]]
)
def test_strides(view):
    mat, minus = view(torch.randn(120, 130)), view(torch.randn(120, 130))
    ours, dense = (
        topk_svd([f(mat)], 3, minus=[f(minus)], vectors=True, tol=1e-6) for f in (lambda x: x, Tensor.contiguous)
    )
    torch.testing.assert_close(ours.S[0], dense.S[0], rtol=1e-5, atol=0)
    projection = (ours.U[0].T @ (mat - minus) @ ours.Vh[0].T).diagonal()
    torch.testing.assert_close(projection, ours.S[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", _C.build_info()["cpu_targets"])
@pytest.mark.parametrize("decay", [0.3, 0.5])
def test_most_of_the_triplets(target, decay, with_target):
    """The search space has then more dimensions than the matrix has rows: many of its singular values are rounding."""
    mat = with_spectrum(120, 400, torch.arange(1, 121).double() ** -decay)
    result = with_target(target, lambda: topk_svd(mat[None], 95, vectors=True))
    check_values(result.S[0], result.residual[0], mat, 1e-3)


def test_k_up_to_the_smallest_dimension():
    for shape in ((40, 50), (70, 45), (33, 33)):
        mat = torch.randn(shape, dtype=torch.float64)
        result = topk_svd([mat], min(shape), vectors=True)
        torch.testing.assert_close(result.S[0], torch.linalg.svdvals(mat), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.U[0] * result.S[0] @ result.Vh[0], mat, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
    st.floats(0, 3),
    st.integers(0, 2**31),
)
def test_any_shape(m, n, k, dtype, decay, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, n + 1) ** -decay
    mat = (torch.randn(m, n, generator=generator) * scales).to(dtype)
    k = min(k, m, n)
    result = topk_svd([mat], k)
    check_values(result.S[0], result.residual[0], mat, tol=1e-3)


SPECTRA = {
    "gaussian": None,
    "power": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -1.0,
    "clustered": lambda n: torch.cat([3 - 1e-4 * torch.arange(3.0), torch.linspace(2.5, 0, n - 3)]),
    "repeated": lambda n: torch.cat([torch.full((3,), 2.0), torch.linspace(1.5, 0.1, n - 3)]),
    "low rank": lambda n: torch.tensor([5.0, 3.0, 1e-2]),
    "graded": lambda n: torch.logspace(0, -8, n),
}
VIEWS = [
    lambda x: x,
    lambda x: x.T.contiguous().T,
    lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    lambda x: x.repeat_interleave(2, 1)[:, ::2],
]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(33, 130),
    st.integers(33, 130),
    st.integers(1, 5),
    st.sampled_from(sorted(SPECTRA)),
    st.sampled_from(DTYPES),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
    st.sampled_from(VIEWS),
    st.sampled_from([1e-2, 1e-3, 1e-5]),
    st.sampled_from([1e-18, 1e-3, 1.0, 1e18]),
    st.integers(0, 2**31),
)
@example(88, 97, 3, "graded", torch.float64, None, VIEWS[0], 1e-2, 1e-18, 1)  # a dense spectrum
def test_the_bound_is_a_bound(m, n, k, spectrum, dtype, minus_dtype, view, tol, scale, seed):
    torch.manual_seed(seed)
    values = SPECTRA[spectrum]
    mat = torch.randn(m, n, dtype=torch.float64) if values is None else with_spectrum(m, n, values(min(m, n)))
    if dtype != torch.float16 and minus_dtype is None:
        mat = scale * mat
    mat = view(mat.to(dtype))
    minus = None if minus_dtype is None else view(torch.randn(m, n).to(minus_dtype))
    out = torch.float64 if dtype == torch.float64 else torch.float32
    operand = mat if minus is None else mat.to(out) - minus.to(out)
    result = topk_svd([mat], k, tol=tol, minus=None if minus is None else [minus], seed=seed)
    s, residual = result.S[0].double(), result.residual[0].double()
    exact = torch.linalg.svdvals(operand.double())
    rounding = torch.finfo(out).eps * exact[0]
    assert bool(((s - exact[:k]).abs() <= residual + rounding).all()), (s, exact[:k], residual)
    # what lies below 1e-6 of the largest is only found to that absolute accuracy
    assert bool((residual <= tol * s + 2e-6 * exact[0]).all()), (s, residual)


@pytest.mark.parametrize("target", _C.build_info()["cpu_targets"])
@pytest.mark.parametrize("shape", [(20, 40), (90, 77), (77, 301)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(target, shape, dtype, with_target):
    mat, minus = torch.randn(shape).to(dtype), torch.randn(shape).bfloat16()
    result = with_target(target, lambda: topk_svd([mat], 3, minus=[minus], vectors=True))
    operand = mat.to(result.S[0].dtype) - minus.to(result.S[0].dtype)
    check_values(result.S[0], result.residual[0], operand, tol=1e-3)
    torch.testing.assert_close(result.U[0].T @ result.U[0], torch.eye(3, dtype=operand.dtype), rtol=0, atol=1e-5)


def test_small_singular_values_are_computed_in_double():
    """Squared, they'd be lost in float32's rounding errors; the tolerance holds all the same."""
    mat = with_spectrum(200, 150, torch.logspace(0, -4, 20)).float()
    result = topk_svd([mat], 12, tol=1e-4)
    check_values(result.S[0], result.residual[0], mat, tol=1e-4)
    assert bool((result.residual[0] <= 1e-4 * result.S[0] + 1e-7).all())


def test_scales_of_single_elements():
    """The largest element decides, wherever it is; the others may vanish beside it."""
    for big, at in ((1e30, (0, 0)), (1e25, (69, 54)), (1e38, (40, 2))):
        mat = torch.randn(70, 55)
        mat[at] = big
        assert topk_svd([mat], 1).S[0].item() == pytest.approx(big, rel=1e-6)
    tiny = torch.randn(70, 55) * 1e-44
    exact = torch.linalg.svdvals(tiny.double() * 1e40) / 1e40
    assert topk_svd([tiny], 2).S[0].double().tolist() == pytest.approx(exact[:2].tolist(), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, 1e3]),
    st.sampled_from([0.0, 1e-2, 1.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_statistics_of_any_shape(m, n, dtype, mean, spread, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    mat = (mean + spread * torch.randn(m, n, generator=generator)).to(dtype)
    mat = mat.T if transposed else mat
    ours, exact = weight_statistics([mat])[0], weight_statistics_reference([mat])[0]
    torch.testing.assert_close(ours[[0, 2]], exact[[0, 2]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(ours[3:], exact[3:], rtol=1e-3, atol=2e-6 * exact[3].item())


NAN = torch.full((3, 3), torch.nan)


@pytest.mark.parametrize(
    ("mats", "k", "options", "error", "message"),
    [
        (
            [torch.zeros(3, 3), torch.zeros(2, 9)],
            3,
            {},
            ValueError,
            r"k: expected at most 2, the smaller dimension of mats\[1\] \[2, 9\], got 3",
        ),
        ([torch.zeros(3, 0)], 1, {}, ValueError, "k: expected at most 0"),
        ([torch.zeros(3, 3)], 0, {}, ValueError, "k: expected an integer of at least 1, got 0"),
        (torch.zeros(3, 3), 1, {}, ValueError, r"mats: expected \[B, m, n\] or a list of matrices, got \[3, 3\]"),
        ([torch.zeros(3)], 1, {}, ValueError, r"mats\[0\]: expected a matrix \[m, n\], got \[3\]"),
        ([torch.zeros(3, 3).int()], 1, {}, TypeError, r"mats\[0\]: expected float64 .*, got int32"),
        (
            [torch.zeros(3, 3)],
            1,
            {"minus": []},
            ValueError,
            "minus: expected 1 tensors, one for every one of mats, got 0",
        ),
        (
            [torch.zeros(3, 3)],
            1,
            {"minus": [torch.zeros(3, 4)]},
            ValueError,
            r"minus\[0\]: expected shape \[3, 3\], got \[3, 4\]",
        ),
        ([torch.zeros(3, 3)], 1, {"tol": 0}, ValueError, "tol: expected a number between 0 and 1, got 0"),
        ([torch.zeros(3, 3)], 1, {"max_passes": 0}, ValueError, "max_passes: expected at least 1, got 0"),
        ([torch.zeros(3, 3), NAN, NAN], 1, {}, ValueError, r"mats\[1\] contains NaN or Inf"),
        (
            [torch.zeros(600, 600), torch.full((600, 600), torch.inf)],
            1,
            {},
            ValueError,
            r"mats\[1\] contains NaN or Inf",
        ),
        ([torch.zeros(3, 3)], 1, {"minus": [NAN]}, ValueError, r"mats\[0\] - minus\[0\] contains NaN or Inf"),
    ],
)
def test_bad_arguments_are_named(mats, k, options, error, message):
    with pytest.raises(error, match=message):
        topk_svd(mats, k, **options)


def test_no_matrices():
    result = topk_svd(torch.zeros(0, 5, 6), 2, vectors=True)
    assert [tuple(part.shape) for part in result] == [(0, 2), (0, 5, 2), (0, 2, 6), (0, 2), (0,)]
    assert topk_svd([], 2).S == []


def test_statistics_match_the_reference():
    mats = [
        torch.randn(6),
        torch.randn(8, 3, 3, 3),
        torch.randn(70, 90).bfloat16(),
        torch.ones(5, 1, 3, 3),
        torch.full((40, 50), 1e3) + torch.randn(40, 50),
        torch.tensor(2.0),
        torch.randn(10, 0),
    ]
    minus = [torch.randn(mat.shape).to(mat.dtype) for mat in mats]
    for options in ({}, {"minus": minus}):
        ours, reference = weight_statistics(mats, **options), weight_statistics_reference(mats, **options)
        assert ours.shape == (len(mats), 6) and ours.dtype == torch.float64
        torch.testing.assert_close(ours[:, :3], reference[:, :3], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours[:, 3:], reference[:, 3:], rtol=1e-3, atol=1e-6)
    assert weight_statistics(mats, 0).shape == (len(mats), 3)
    assert weight_statistics([]).shape == (0, 6)


def test_statistics_of_constants_and_vectors():
    row = weight_statistics([torch.full((4, 4), 0.1), torch.tensor([3.0, 4.0])])
    assert row[0, 1] == 0
    assert row[1].tolist() == pytest.approx([3.5, 0.25, 5, 5, 0, 0])


def test_bad_statistics_arguments_are_named():
    with pytest.raises(ValueError, match=r"mats\[1\] contains NaN or Inf"):
        weight_statistics([torch.ones(3), torch.tensor([torch.nan])])
    with pytest.raises(ValueError, match="r: expected an integer of at least 0, got -1"):
        weight_statistics([torch.ones(3)], -1)
    with pytest.raises(TypeError, match=r"mats\[0\]: expected float64 .*, got int64"):
        weight_statistics([torch.ones(3).long()])


def test_numpy_round_trip():
    mat = np.random.default_rng(0).standard_normal((40, 30))
    result = topk_svd([mat], 2)
    assert isinstance(result.S[0], np.ndarray)
    np.testing.assert_allclose(result.S[0], np.linalg.svd(mat, compute_uv=False)[:2], rtol=1e-3)
    assert isinstance(topk_svd(mat[None], 2, vectors=True).U, np.ndarray)
    assert isinstance(weight_statistics([mat]), np.ndarray)


def test_reference_is_the_full_decomposition():
    mat, minus = torch.randn(9, 7), torch.randn(9, 7)
    reference = topk_svd_reference([mat], 2, minus=[minus])
    ours = topk_svd([mat], 2, minus=[minus], vectors=True)
    torch.testing.assert_close(reference.S[0], ours.S[0])
    torch.testing.assert_close((reference.U[0] * ours.U[0]).sum(0).abs(), torch.ones(2))


def test_opcheck(opcheck):
    mats = [torch.randn(5, 8), torch.randn(40, 50, dtype=torch.float64)]
    minus = [torch.randn(5, 8), torch.randn(40, 50, dtype=torch.float64)]
    opcheck("topk_svd", mats, [], 2, 1e-3, 100, True, 0)
    opcheck("topk_svd", mats, minus, 2, 1e-3, 100, False, 0)
    opcheck("topk_svd", [torch.stack([mats[0], mats[0]])], [], 2, 1e-3, 100, True, 0)
    opcheck("weight_statistics", mats, minus, 3, 1e-3, 100, 0)


def test_traces_in_one_graph():
    def f(x: Tensor) -> Tensor:
        result = topk_svd(2 * x, 2, vectors=True)
        return result.S.sum() + weight_statistics([x[0], x[1]]).sum() + result.U.abs().sum()

    x = torch.randn(2, 40, 35)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
