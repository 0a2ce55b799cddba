"""layer_solve on CUDA, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statsmerge_ext.ops import layer_solve, layer_solve_features
from statsmerge_ext.ops.layer_solve import layer_solve_features_reference, layer_solve_reference

EPS = torch.finfo(torch.float64).eps


def system(n: int, tokens: int, out: int, batch: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 Gram matrix of `tokens` random rows, and a right-hand side in its range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, tokens, n, dtype=torch.float64, generator=generator)
    c = x.mT @ x
    return c, torch.randn(*batch, out, n, dtype=torch.float64, generator=generator) @ c


def spectrum_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return q * values @ q.T, q


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.cpu().double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.sanitize
def test_the_kernels_are_native():
    for name in ("layer_solve", "layer_solve_features"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"statsmerge::{name}", "CUDA")


@pytest.mark.parametrize("n", [1, 2, 9, 31, 33, 63, 64, 65, 127, 128, 129, 200, 321, 768, 1100])
@pytest.mark.parametrize("full_rank", [True, False])
def test_matches_the_reference(device, n, full_rank):
    c, d = system(n, 2 * n + 2 if full_rank else (n + 1) // 2, 7)
    solution = layer_solve(c.to(device), d.to(device))
    reference = layer_solve_reference(c, d, rcond=n * EPS)
    assert solution.T.is_cuda and solution.rank.is_cuda and solution.condition.is_cuda
    assert relative(solution.T, reference.T) <= 1e-9 * max(1.0, reference.condition.item() * 1e-6)
    assert (solution.T.cpu() @ c - d).norm() <= 1e-9 * d.norm()
    assert solution.rank.item() == reference.rank.item()
    assert solution.condition.item() == pytest.approx(reference.condition.item(), rel=0.15)


@pytest.mark.sanitize
@pytest.mark.parametrize("n", [5, 70, 150])
@pytest.mark.parametrize("full_rank", [True, False])
def test_small_systems(device, n, full_rank):
    c, d = system(n, 2 * n if full_rank else n // 2, 19, batch=(3,))
    solution = layer_solve(c.to(device), d.to(device))
    assert (solution.T.cpu() @ c - d).norm() <= 1e-8 * d.norm()
    assert solution.rank.tolist() == [n if full_rank else n // 2] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [12, 100])
def test_only_the_lower_triangle_is_read(device, n, dtype):
    c, d = system(n, 3 * n, 20)
    lower = (c.tril() + torch.full((n, n), torch.nan).triu(1)).to(dtype)
    c, d = lower.double().tril() + lower.double().tril(-1).mT, d.to(dtype)
    solution = layer_solve(lower.to(device), d.to(device))
    exact = d.double() @ torch.linalg.inv(c)
    assert solution.T.dtype == dtype
    assert relative(solution.T, exact) <= 10 * torch.finfo(dtype).eps * (1 if dtype == torch.float32 else 1e3)


@pytest.mark.parametrize("n", [9, 100])
def test_rcond_drops_directions(device, n):
    values = torch.logspace(0, -8, n, dtype=torch.float64)
    c, q = spectrum_of(values)
    d = torch.randn(3, n, dtype=torch.float64)
    for rcond in (3e-3, 3e-6, 1e-10):
        solution = layer_solve(c.to(device), d.to(device), rcond=rcond)
        kept = values > rcond
        assert solution.rank.item() == kept.sum()
        assert solution.condition.item() == pytest.approx(1 / values[kept].min().item(), rel=0.1)
        assert relative(solution.T, d @ q * torch.where(kept, 1 / values, 0) @ q.T) <= 1e-6


def test_no_eigenvalue_below_the_cut_is_inverted(device):
    """What the shortcut may claim is decided by the eigenvalues, however close they are to the cut."""
    n = 96
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 20.0, 200.0):
        values = torch.linspace(1, 2, n, dtype=torch.float64)
        values[0] = 2e-6 * factor
        c, _ = spectrum_of(values)
        solution = layer_solve(c.to(device), torch.randn(2, n, dtype=torch.float64).to(device), rcond=1e-6)
        assert solution.rank.item() == n - (factor < 1)


@pytest.mark.parametrize("n", [9, 100, 300])
@pytest.mark.parametrize("full_rank", [True, False])
def test_ridge_spectral_and_anchor(device, n, full_rank):
    c, d = system(n, 4 * n if full_rank else n // 2, 6)
    anchor = torch.randn(6, n, dtype=torch.float64)
    on_device = c.to(device), d.to(device)
    ridge = layer_solve(*on_device, filter="ridge", ridge=0.3, anchor=anchor.to(device))
    inverse = torch.linalg.inv(c + 0.3 * torch.eye(n, dtype=c.dtype))
    assert relative(ridge.T, anchor + (d - anchor @ c) @ inverse) <= 1e-9 and ridge.rank.item() == n
    spectral = layer_solve(*on_device, filter="spectral", anchor=anchor.to(device))
    reference = layer_solve_reference(c, d, rcond=n * EPS, anchor=anchor)
    assert relative(spectral.T, reference.T) <= 1e-8 and spectral.rank.item() == reference.rank.item()


def test_batches_equal_single_solves(device):
    for n in (9, 25, 70, 130):
        full, full_d = system(n, 2 * n, 2, batch=(2, 3))
        thin, thin_d = system(n, n // 2, 2, batch=(2, 3))
        mixed = torch.tensor([[True, False, True], [False, False, True]])[..., None, None]
        c, d = torch.where(mixed, full, thin).to(device), torch.where(mixed, full_d, thin_d).to(device)
        solution = layer_solve(c, d)
        assert solution.T.shape == (2, 3, 2, n) and solution.rank.shape == solution.condition.shape == (2, 3)
        assert solution.rank.tolist() == [[n, n // 2, n], [n // 2, n // 2, n]]
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(solution.T[i, j], layer_solve(c[i, j], d[i, j]).T, rtol=1e-7, atol=1e-9)


def test_many_small_systems(device):
    c, d = system(9, 30, 4, batch=(3000,))
    solution = layer_solve(c.float().to(device), d.float().to(device))
    exact = d.float().double() @ torch.linalg.inv(c.float().double())
    assert relative(solution.T, exact) <= 1e-6 and bool((solution.rank == 9).all())


def test_a_list_shares_the_factorisation(device):
    c, d = (x.to(device) for x in system(30, 60, 12))
    parts, whole = layer_solve(c, [d[:5], d[5:]]), layer_solve(c, d)
    assert [tuple(t.shape) for t in parts.T] == [(5, 30), (7, 30)]
    torch.testing.assert_close(torch.cat(parts.T), whole.T)


@pytest.mark.parametrize("n", [9, 80])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(device, n, scale):
    x, d = torch.randn(2 * n, n), torch.randn(3, n)
    unit = layer_solve(x.T @ x, d)
    solution = layer_solve(((x.T @ x) * scale).to(device), d.to(device))
    torch.testing.assert_close(solution.T.cpu().double() * scale, unit.T.double(), rtol=1e-3, atol=1e-5)
    assert solution.rank.item() == n


@pytest.mark.parametrize("n", [9, 80])
def test_zero_matrix_gives_zero(device, n):
    solution = layer_solve(torch.zeros(n, n, device=device), torch.randn(3, n, device=device))
    assert solution.rank.item() == 0 and solution.condition.item() == 1 and solution.T.count_nonzero().item() == 0


def test_noise_below_zero_is_dropped(device):
    c = torch.diag(torch.tensor([1.0, 1e-3, -1e-9, 0.0])).to(device)
    solution = layer_solve(c, torch.ones(1, 4, device=device))
    assert solution.rank.item() == 2 and solution.T[0, 2:].count_nonzero().item() == 0


def test_empty_shapes(device):
    for c_shape, d_shape in (((5, 5), (0, 5)), ((0, 5, 5), (0, 2, 5)), ((0, 0), (3, 0)), ((2, 70, 70), (2, 0, 70))):
        c = torch.zeros(c_shape, device=device)
        c = c + torch.eye(c_shape[-1], device=device)
        assert layer_solve(c, torch.zeros(d_shape, device=device)).T.shape == d_shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [4, 70])
def test_bad_matrices_are_named(device, bad, n):
    c = torch.eye(n, device=device).repeat(2, 1, 1)
    d = torch.zeros(2, 2, n, device=device)
    upper = c.clone()
    upper[1, 0, n - 1] = bad  # not read
    layer_solve(upper, d)
    c[1, n - 1, 1] = bad
    with pytest.raises(ValueError, match=r"C\[1\] contains NaN or Inf"):
        layer_solve(c, d)
    with pytest.raises(ValueError, match="C contains NaN or Inf"):
        layer_solve(c[1], d[1])


@pytest.mark.parametrize("n", [9, 100, 700])
def test_two_runs_are_the_same(device, n):
    c, d = (x.to(device) for x in system(n, 2 * n, 5, batch=(4,)))
    a, b = layer_solve(c, d), layer_solve(c, d)
    assert torch.equal(a.T, b.T) and torch.equal(a.rank, b.rank) and torch.equal(a.condition, b.condition)


def test_follows_the_current_stream(device):
    c, d = (x.to(device) for x in system(200, 400, 5))
    expected, stream = layer_solve(2 * c, d).T, torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        c *= 2  # the solve must see this
        t = layer_solve(c, d).T
    stream.synchronize()
    assert torch.equal(t, expected)


def test_a_large_system(device):
    n = 2200  # more than one level of every recursion
    x = torch.randn(2 * n, n, device=device, dtype=torch.float64)
    c, t = x.T @ x, torch.randn(50, n, device=device, dtype=torch.float64)
    solution = layer_solve(c, t @ c)
    assert relative(solution.T, t.cpu()) <= 1e-11 and solution.rank.item() == n
    assert solution.condition.item() == pytest.approx(torch.linalg.cond(c).item(), rel=0.15)


@pytest.mark.parametrize("tokens", [[3, 4], [20, 1, 30]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_features_match_the_reference(device, tokens, dtype, weighted):
    xs, ts = [torch.randn(t, 24).to(dtype) for t in tokens], [torch.randn(5, 24) for _ in tokens]
    weight = [torch.rand(t) for t in tokens] if weighted else None
    for rcond in (1e-6, 0.5):
        moved = [x.to(device) for x in xs], [t.to(device) for t in ts]
        ours = layer_solve_features(*moved, weight=weight and [w.to(device) for w in weight], rcond=rcond)
        reference = layer_solve_features_reference(xs, ts, weight=weight, rcond=rcond)
        torch.testing.assert_close(ours.T.cpu(), reference.T, rtol=1e-4, atol=1e-5)
        assert ours.rank.item() == reference.rank.item()
        assert ours.condition.item() == pytest.approx(reference.condition.item(), rel=1e-6)


def test_features_do_not_square_the_condition_number(device):
    q = torch.linalg.qr(torch.randn(60, 20, dtype=torch.float64)).Q.T
    x = torch.logspace(0, -6, 20, dtype=torch.float64).unsqueeze(1) * q
    t = torch.randn(3, 60, dtype=torch.float64)
    solution = layer_solve_features([x.to(device)], [t.to(device)])
    assert solution.rank.item() == 20
    torch.testing.assert_close(solution.T.cpu(), t @ q.T @ q, rtol=1e-6, atol=1e-8)


def test_features_edge_cases(device):
    solution = layer_solve_features([torch.empty(0, 4, device=device)], [torch.ones(2, 4, device=device)])
    assert solution.T.tolist() == [[0] * 4] * 2 and solution.rank.item() == 0
    with pytest.raises(ValueError, match="xs contains NaN or Inf"):
        layer_solve_features([torch.full((2, 3), torch.inf, device=device)], [torch.ones(4, 3, device=device)])


def test_opcheck(device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for n in (5, 70):
        c, d = (x.to(device) for x in system(n, 2 * n, 3, batch=(2,)))
        torch.library.opcheck(torch.ops.statsmerge.layer_solve.default, (c, d, None, 1e-12, 0.0), test_utils=checks)
