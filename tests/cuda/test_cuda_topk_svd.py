"""topk_svd and weight_statistics on CUDA against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statsmerge_ext.ops import topk_svd, weight_statistics
from statsmerge_ext.ops.topk_svd import weight_statistics_reference

pytestmark = pytest.mark.cuda

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),
    (1, 50),
    (50, 1),
    (7, 300),
    (40, 40),
    (128, 128),
    (130, 129),
    (33, 5000),
    (5000, 33),
    (1, 60000),
    (60000, 1),
    (700, 600),
    (768, 3072),
    (3072, 768),
    (513, 1025),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def with_spectrum(m: int, n: int, values: Tensor) -> Tensor:
    k = len(values)
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
    return u * values.double() @ v.T


def check_values(s: Tensor, residual: Tensor, mat: Tensor, tol: float, floor: float = 2e-6) -> None:
    """Within tol, and within the stated bound and the output type's rounding."""
    exact = torch.linalg.svdvals(mat.double().cpu())[: len(s)]
    rounding = 8 * torch.finfo(s.dtype).eps * exact[0]
    error = (s.double().cpu() - exact).abs()
    assert bool((error <= tol * exact + floor * exact[0]).all()), (error, exact)
    assert bool((error <= residual.double().cpu() + rounding).all()), (error, residual)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_vectors(shape, dtype):
    mat = torch.randn(shape).to(dtype).cuda()
    k = min(5, *shape)
    result = topk_svd([mat], k, vectors=True)
    s, u, vh = result.S[0], result.U[0], result.Vh[0]
    out = torch.float64 if dtype == torch.float64 else torch.float32
    assert s.dtype == u.dtype == vh.dtype == out and s.is_cuda and result.passes.is_cuda
    assert u.shape == (shape[0], k) and vh.shape == (k, shape[1])
    check_values(s, result.residual[0], mat, tol=1e-3)
    eye = torch.eye(k, dtype=out, device="cuda")
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.T, eye, rtol=0, atol=1e-5)
    assert (mat.double() @ vh.double().T - u.double() * s.double()).norm() <= 0.05 * s.norm()


def test_all_shapes_and_dtypes_in_one_call():
    mats = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES for dtype in DTYPES]
    together = topk_svd(mats, 1)
    for mat, s, residual in zip(mats, together.S, together.residual):
        check_values(s, residual, mat, tol=1e-3)
        assert torch.equal(s, topk_svd([mat], 1).S[0])


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_tolerance_is_kept(tol):
    mat = torch.randn(400, 300, dtype=torch.float64, device="cuda")
    result = topk_svd([mat], 4, tol=tol)
    assert bool((result.residual[0] <= tol * result.S[0]).all())
    check_values(result.S[0], result.residual[0], mat, tol, floor=1e-12)


def test_few_passes_are_admitted():
    mat = torch.randn(500, 500, device="cuda")
    result = topk_svd([mat], 3, max_passes=3)
    assert result.passes.item() == 4
    exact = torch.linalg.svdvals(mat.double().cpu())[:3]
    assert bool((result.residual[0] > 1e-3 * result.S[0]).any())
    assert bool(((result.S[0].double().cpu() - exact).abs() <= result.residual[0].cpu()).all())


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([5.0, 5.0, 5.0] + [1.0] * 40),
        torch.tensor([3.0, 3.0 - 1e-5, 3.0 - 2e-5, 2.9] + [1.0] * 40),
        torch.ones(80),
        torch.logspace(0, -5, 60),
        torch.tensor([1.0, 1e-4, 1e-8]),
        torch.tensor([4.0, 2.0]),
        torch.tensor([0.0]),
    ],
    ids=["repeated", "clustered", "orthogonal", "graded", "steep", "rank 2", "zero"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(120, 90), (300, 400)])
def test_spectra(values, dtype, shape):
    mat = with_spectrum(*shape, values).to(dtype).cuda()
    result = topk_svd([mat], 4, vectors=True)
    check_values(result.S[0], result.residual[0], mat, tol=1e-3)
    eye = torch.eye(4, dtype=dtype, device="cuda")
    torch.testing.assert_close(result.U[0].T @ result.U[0], eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.Vh[0] @ result.Vh[0].T, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 10), (300, 270)])
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, torch.float32), (1e30, torch.float32), (1e-200, torch.float64), (1e200, torch.float64)]
)
def test_extreme_scales(shape, scale, dtype):
    mat = torch.randn(shape, dtype=torch.float64)
    plain = torch.linalg.svdvals(mat)[:3]
    scaled = topk_svd([(mat * scale).to(dtype).cuda()], 3).S[0]
    torch.testing.assert_close(scaled.double().cpu() / scale, plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("shape", [(20, 40), (290, 270)])
def test_minus(shape, dtype, other):
    mat, sub = torch.randn(shape).to(dtype).cuda(), torch.randn(shape).to(other).cuda()
    result = topk_svd([mat], 3, minus=[sub], vectors=True)
    check_values(result.S[0], result.residual[0], mat.double() - sub.double(), tol=1e-3)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2],
        lambda x: x[:, ::2],
        lambda x: x[5:, 3:],
        lambda x: x.T[::3, 1:],
        lambda x: x[:1].expand(300, -1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(view, dtype):
    mat = view(torch.randn(520, 530, device="cuda").to(dtype))
    minus = view(torch.randn(520, 530, device="cuda").to(dtype))
    for sub in (minus, minus.contiguous(), minus.T.contiguous().T):
        result = topk_svd([mat], 3, minus=[sub], vectors=True)
        difference = mat.double() - minus.double()
        check_values(result.S[0], result.residual[0], difference, tol=1e-3)
        projection = (result.U[0].double().T @ difference @ result.Vh[0].double().T).diagonal()
        torch.testing.assert_close(projection, result.S[0].double(), rtol=1e-3, atol=1e-3 * result.S[0][0].item())


@pytest.mark.parametrize("k", [4, 7, 8, 15, 16, 60])
def test_number_of_triplets(k):
    mat = torch.randn(260, 300, device="cuda")
    result = topk_svd([mat, torch.randn(70, 64, device="cuda")], k, vectors=True)
    check_values(result.S[0], result.residual[0], mat, tol=1e-3)
    eye = torch.eye(k, device="cuda")
    torch.testing.assert_close(result.U[0].T @ result.U[0], eye, rtol=0, atol=1e-5)


def test_two_runs_are_bitwise_equal():
    mats = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES]
    first, second = (topk_svd(mats, 1, vectors=True, seed=3) for _ in range(2))
    for a, b in zip(first[:4], second[:4]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(first.passes, second.passes)


def test_current_stream_is_used():
    mat = torch.randn(1024, 1024, device="cuda")
    expected = topk_svd([mat * 2], 3).S[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        doubled = mat * 2
        got = topk_svd([doubled], 3).S[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


def test_in_a_cuda_graph():
    mats = [torch.randn(400, 300, device="cuda"), torch.randn(20, 30, device="cuda")]
    topk_svd(mats, 2, max_passes=40)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = topk_svd(mats, 2, max_passes=40)
    for mat in mats:
        mat.copy_(torch.randn_like(mat))
    graph.replay()
    for mat, s, residual in zip(mats, result.S, result.residual):
        check_values(s, residual, mat, tol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(3, 3), (600, 600)])
def test_bad_values_are_named(bad, shape):
    good = torch.ones(600, 600, device="cuda")
    spoilt = torch.ones(shape, device="cuda")
    spoilt[-1, -1] = bad
    with pytest.raises(ValueError, match=r"mats\[1\] contains NaN or Inf"):
        topk_svd([good, spoilt, spoilt], 1)
    with pytest.raises(ValueError, match=r"mats\[0\] - minus\[0\] contains NaN or Inf"):
        topk_svd([torch.ones(shape, device="cuda")], 1, minus=[spoilt])
    with pytest.raises(ValueError, match=r"mats\[1\] contains NaN or Inf"):
        weight_statistics([good, spoilt])


def test_statistics_match_the_reference():
    mats = [
        torch.randn(6),
        torch.randn(8, 3, 3, 3),
        torch.randn(700, 900).bfloat16(),
        torch.ones(5, 1, 3, 3),
        torch.full((400, 500), 1e3) + torch.randn(400, 500),
        torch.randn(300, 2),
        torch.randn(20000, 2),
        torch.tensor(2.0),
        torch.randn(10, 0),
        torch.randn(300, 200, dtype=torch.float64),
    ]
    minus = [torch.randn(mat.shape).to(mat.dtype) for mat in mats]
    on_device = [mat.cuda() for mat in mats]
    for ours, reference in (
        (weight_statistics(on_device), weight_statistics_reference(mats)),
        (
            weight_statistics(on_device, minus=[mat.cuda() for mat in minus]),
            weight_statistics_reference(mats, minus=minus),
        ),
    ):
        assert ours.shape == (len(mats), 6) and ours.dtype == torch.float64 and ours.is_cuda
        torch.testing.assert_close(ours[:, :3].cpu(), reference[:, :3], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours[:, 3:].cpu(), reference[:, 3:], rtol=1e-3, atol=1e-6)
    assert weight_statistics(on_device, 0).shape == (len(mats), 3)


def test_matches_the_cpu():
    mats = [torch.randn(300, 200), torch.randn(64, 64), torch.randn(768, 768).bfloat16()]
    cpu, cuda = topk_svd(mats, 3, tol=1e-4), topk_svd([mat.cuda() for mat in mats], 3, tol=1e-4)
    for a, b in zip(cpu.S, cuda.S):
        torch.testing.assert_close(a, b.cpu(), rtol=2e-4, atol=0)
