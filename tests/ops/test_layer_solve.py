"""layer_solve, its thin form and its diagonal form against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statsmerge_ext import _C
from statsmerge_ext.ops import diagonal_solve, gram_accumulate_, layer_solve, layer_solve_features
from statsmerge_ext.ops.layer_solve import layer_solve_features_reference, layer_solve_reference


def system(n: int, tokens: int, out: int, batch: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 Gram matrix of `tokens` random rows, and a right-hand side in its range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, tokens, n, dtype=torch.float64, generator=generator)
    c = x.mT @ x
    return c, torch.randn(*batch, out, n, dtype=torch.float64, generator=generator) @ c


@pytest.mark.parametrize("n", [1, 9, 64, 65, 150])
@pytest.mark.parametrize("full_rank", [True, False])
def test_pinv_matches_torch(n, full_rank):
    c, d = system(n, 4 * n if full_rank else (n + 1) // 2, 7)
    solution = layer_solve(c, d)
    torch.testing.assert_close(solution.T, d @ torch.linalg.pinv(c, hermitian=True), rtol=1e-8, atol=1e-10)
    assert solution.rank == torch.linalg.matrix_rank(c, hermitian=True)
    kept = torch.linalg.eigvalsh(c)[-int(solution.rank) :]
    assert solution.condition.item() == pytest.approx((kept[-1] / kept[0]).item(), rel=0.1)


@pytest.mark.parametrize("n", [12, 100])
def test_float32_input_is_solved_in_float64(n, assert_as_accurate):
    c64, d64 = system(n, 3 * n, 20)
    c, d = c64.float(), d64.float()
    solution = layer_solve(c, d)
    assert solution.T.dtype == torch.float32
    exact = d.double() @ torch.linalg.pinv(c.double().tril() + c.double().tril(-1).mT, hermitian=True)
    assert_as_accurate(solution.T, exact.float(), exact, floor=0)


@pytest.mark.parametrize("n", [9, 100])
def test_only_the_lower_triangle_is_read(n):
    x = torch.randn(3 * n, n)
    lower = gram_accumulate_(torch.zeros(n, n), x).tril() + torch.full((n, n), torch.nan).triu(1)
    d = torch.randn(4, n)
    exact = d.double() @ torch.linalg.inv(x.double().T @ x.double())
    torch.testing.assert_close(layer_solve(lower, d).T.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [9, 100])
def test_rcond_drops_directions(n):
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    values = torch.logspace(0, -8, n, dtype=torch.float64)
    c, d = q * values @ q.T, torch.randn(3, n, dtype=torch.float64)
    for rcond in (3e-3, 3e-6, 1e-10):
        solution = layer_solve(c, d, rcond=rcond)
        kept = values > rcond
        assert solution.rank == kept.sum()
        assert solution.condition.item() == pytest.approx(1 / values[kept].min().item(), rel=0.1)
        expected = d @ q * torch.where(kept, 1 / values, 0) @ q.T
        assert (solution.T - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("n", [9, 100])
@pytest.mark.parametrize("full_rank", [True, False])
def test_ridge_and_anchor(n, full_rank):
    c, d = system(n, 4 * n if full_rank else n // 2, 6)
    anchor = torch.randn(6, n, dtype=torch.float64)
    inverse = torch.linalg.inv(c + 0.3 * torch.eye(n, dtype=torch.float64))
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(layer_solve(c, d, filter="ridge", ridge=0.3).T, d @ inverse, **close)
    solution = layer_solve(c, d, filter="ridge", ridge=0.3, anchor=anchor)
    torch.testing.assert_close(solution.T, anchor + (d - anchor @ c) @ inverse, **close)
    assert solution.rank == n


@pytest.mark.parametrize("n", [9, 100])
def test_spectral_keeps_the_anchor_where_there_is_no_evidence(n):
    c, d = system(n, n // 2, 6)
    anchor = torch.randn(6, n, dtype=torch.float64)
    t = layer_solve(c, d, filter="spectral", anchor=anchor).T
    pinv = torch.linalg.pinv(c, hermitian=True)
    projector = c @ pinv
    torch.testing.assert_close(t, d @ pinv + anchor @ (torch.eye(n, dtype=c.dtype) - projector), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(t @ c, d, rtol=1e-7, atol=1e-7)
    without = layer_solve(c, d, filter="spectral").T
    torch.testing.assert_close(without, layer_solve(c, d).T)


@pytest.mark.parametrize("n", [9, 25, 70])
def test_batches_equal_single_solves(n):
    c, d = system(n, n, 2, batch=(2, 3))
    solution = layer_solve(c, d)
    assert solution.T.shape == (2, 3, 2, n) and solution.rank.shape == solution.condition.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            single = layer_solve(c[i, j], d[i, j])
            assert torch.equal(solution.T[i, j], single.T) and solution.rank[i, j] == single.rank


def test_a_list_shares_the_factorisation():
    c, d = system(30, 20, 12)
    anchor = torch.randn_like(d)
    parts = layer_solve(c, [d[:5], d[5:]], filter="spectral", anchor=[anchor[:5], anchor[5:]])
    whole = layer_solve(c, d, filter="spectral", anchor=anchor)
    assert [tuple(t.shape) for t in parts.T] == [(5, 30), (7, 30)]
    torch.testing.assert_close(torch.cat(parts.T), whole.T)
    assert parts.rank == whole.rank


@pytest.mark.parametrize("n", [9, 80])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(n, scale):
    x = torch.randn(2 * n, n)
    c, d = (x.T @ x) * scale, torch.randn(3, n)
    unit = layer_solve(x.T @ x, d)
    solution = layer_solve(c, d)
    torch.testing.assert_close(solution.T.double() * scale, unit.T.double(), rtol=1e-3, atol=1e-5)
    assert solution.rank == n


@pytest.mark.parametrize("n", [9, 80])
def test_zero_matrix_gives_zero(n):
    solution = layer_solve(torch.zeros(n, n), torch.randn(3, n))
    assert solution.rank == 0 and solution.condition == 1 and solution.T.count_nonzero() == 0


def test_noise_below_zero_is_dropped():
    c = torch.diag(torch.tensor([1.0, 1e-3, -1e-9, 0.0]))
    solution = layer_solve(c, torch.ones(1, 4))
    assert solution.rank == 2 and solution.T[0, 2:].count_nonzero() == 0


def test_empty_shapes():
    assert layer_solve(torch.eye(5), torch.zeros(0, 5)).T.shape == (0, 5)
    assert layer_solve(torch.zeros(0, 5, 5), torch.zeros(0, 2, 5)).T.shape == (0, 2, 5)
    assert layer_solve(torch.zeros(0, 0), torch.zeros(3, 0)).T.shape == (3, 0)


@pytest.mark.parametrize("n", [9, 100, 300])
@pytest.mark.parametrize("full_rank", [True, False])
def test_does_not_depend_on_threads(n, full_rank, with_threads):
    c, d = system(n, 2 * n if full_rank else n // 2, 5, batch=(4,))
    a, b = (with_threads(threads, lambda: layer_solve(c, d)) for threads in (1, 2))
    assert torch.equal(a.T, b.T) and torch.equal(a.rank, b.rank) and torch.equal(a.condition, b.condition)


def with_spectrum(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric float64 matrix of these eigenvalues, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    c = q * values @ q.T
    return (c + c.T) / 2, q


def check_against_eigenvectors(c: Tensor, d: Tensor, rcond: float) -> None:
    """The rank of float64's eigenvalues, and a result whose error is a small multiple of eps times the condition.

    Where eigenvalues lie so near the cut that rounding decides about them, they may be counted either way; the result
    is then compared with the one that keeps as many. What rounding a low-rank C to float32 put there may be left out,
    up to n · eps of the largest eigenvalue.
    """
    solution = layer_solve(c, d, rcond=rcond)
    n = c.shape[0]
    eps = torch.finfo(torch.float64).eps
    values, vectors = torch.linalg.eigh(c.double())
    largest = values[-1].clamp_min(0)
    cut, rounding = max(rcond, n * eps) * largest, 4 * n * eps * largest
    rank = int(solution.rank)
    assert (values > cut + rounding).sum() <= rank <= (values > cut - rounding).sum()
    kept, basis = values[n - rank :], vectors[:, n - rank :]
    if rank == 0:
        assert solution.T.count_nonzero() == 0 and solution.condition == 1
        return
    exact = (d.double() @ basis / kept) @ basis.T
    condition = (largest / kept[0]).item()
    assert 0.7 * condition <= solution.condition.item() <= 1.01 * condition + 10 * n * eps * condition**2
    scale = d.double().norm() / kept[0]
    resolution = torch.finfo(d.dtype).eps if d.dtype == torch.float32 else 0
    gap = kept[0] - (values[n - rank - 1] if rank < n else 0)  # eigenvectors near the cut are known up to this
    bound = 20 * n * eps * condition * max(1.0, (kept[0] / gap).item())
    if c.dtype == torch.float32 and rank < 0.8 * n:
        bound += min(n * torch.finfo(c.dtype).eps * condition, 1e-3)
    assert (solution.T.double() - exact).norm() <= bound * scale + resolution * exact.norm()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_float32_gram_of_few_features(decay):
    """It is of full rank, but what rounding has put there lies far below the cut; as exact as the same in float32."""
    n, tokens = 240, 100
    features = torch.randn(tokens, n, dtype=torch.float64) * torch.arange(1, n + 1) ** -decay
    gram, exact = features.T @ features, torch.randn(30, n, dtype=torch.float64)
    c, d = gram.float(), (exact @ gram).float()
    rcond = n * torch.finfo(torch.float32).eps
    solution = layer_solve(c, d)
    assert solution.rank == tokens

    def output_error(t: torch.Tensor) -> torch.Tensor:
        return ((t.double() - exact) @ features.T).norm() / (exact @ features.T).norm()

    plain = d @ torch.linalg.pinv(c, rtol=rcond, hermitian=True)
    assert output_error(solution.T) <= 2 * output_error(plain) + 1e-6
    check_against_eigenvectors(c, d, rcond)


SPECTRA = {
    "gap": lambda n: torch.where(torch.arange(n) < (n + 1) // 2, torch.linspace(1, 0.1, n), 0),
    "full": lambda n: torch.linspace(1, 1e-3, n),
    "decay": lambda n: torch.logspace(0, -15, n),
    "slow decay": lambda n: torch.logspace(0, -4, n),
    "cluster at the cut": lambda n: torch.where(torch.arange(n) < n // 3, 1.0, 1e-6),
    "rank 1": lambda n: torch.eye(n)[0] * 3,
    "zero": lambda n: torch.zeros(n),
    "noise below zero": lambda n: torch.where(torch.arange(n) < n // 4, 1.0, -1e-13),
    "negative": lambda n: -torch.linspace(0.1, 1, n),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", [20, 90, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_spectrum(spectrum, n, dtype):
    c, _ = with_spectrum(SPECTRA[spectrum](n).double())
    d = torch.randn(4, n, dtype=torch.float64) @ c
    for rcond in (1e-12, 1e-6, 1e-2):
        check_against_eigenvectors(c.to(dtype), d.to(dtype), rcond)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    rank=st.floats(0, 1),
    decay=st.floats(0, 16),
    rcond=st.sampled_from([0.0, 1e-10, 1e-7, 1e-3]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    seed=st.integers(0, 2**31),
)
def test_any_spectrum(n, rank, decay, rcond, dtype, scale, seed):
    values = torch.logspace(0, -decay, n, dtype=torch.float64) * (torch.arange(n) < rank * n)
    c, _ = with_spectrum(values, seed)
    c = (c * scale).to(dtype)
    check_against_eigenvectors(c, torch.randn(3, n, dtype=dtype, generator=torch.Generator().manual_seed(seed)), rcond)


@pytest.mark.parametrize("n", [9, 90])
@pytest.mark.parametrize("filter", ["pinv", "ridge", "spectral"])
def test_strides_do_not_matter(n, filter):
    c, d = system(n, n // 2, 5, batch=(3,))
    options = {"ridge": 0.1} if filter == "ridge" else {}
    anchor = None if filter == "pinv" else torch.randn_like(d)
    expected = layer_solve(c, d, filter=filter, anchor=anchor, **options)
    wide = torch.full((3, n, 2 * n), torch.nan, dtype=c.dtype)
    wide[:, :, ::2] = c
    solution = layer_solve(wide[:, :, ::2], d.mT.contiguous().mT, filter=filter, anchor=anchor, **options)
    assert torch.equal(solution.T, expected.T) and torch.equal(solution.rank, expected.rank)


@pytest.mark.parametrize("target", _C.build_info()["cpu_targets"])
@pytest.mark.parametrize("tokens", [70, 400])
def test_every_instruction_set(target, tokens):
    c, d = system(150, tokens, 200)
    before = _C.cpu_target()
    try:
        _C.set_cpu_target(target)
        solution = layer_solve(c, d)
    finally:
        _C.set_cpu_target(before)
    exact = d @ torch.linalg.pinv(c, hermitian=True)
    assert (solution.T - exact).norm() <= 1e-10 * exact.norm() and solution.rank == min(tokens, 150)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 5), st.integers(0, 2**31))
def test_solves_any_consistent_system(n, tokens, out, seed):
    c, d = system(n, tokens, out, seed=seed)
    solution = layer_solve(c, d)
    assert (solution.T @ c - d).norm() <= 1e-6 * d.norm() + 1e-12
    reference = layer_solve_reference(c, d, rcond=n * torch.finfo(c.dtype).eps)
    assert solution.rank == reference.rank


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (torch.zeros(4, 5), torch.zeros(2, 4)),
            {},
            ValueError,
            r"C: expected square matrices \[.., in, in\], got \[4, 5\]",
        ),
        ((torch.eye(4).half(), torch.zeros(2, 4)), {}, TypeError, "C: expected float64 or float32, got float16"),
        ((torch.eye(4), torch.zeros(2, 5)), {}, ValueError, r"D: expected shape \['out', 4\], got \[2, 5\]"),
        ((torch.eye(4), [torch.zeros(2, 4), torch.zeros(4)]), {}, ValueError, r"D\[1\]: expected shape"),
        ((torch.eye(4), []), {}, ValueError, "D: expected a list of at least one matrix"),
        (
            (torch.eye(4), torch.zeros(2, 4)),
            {"filter": "qr"},
            ValueError,
            "filter: expected one of pinv, ridge, spectral, got 'qr'",
        ),
        ((torch.eye(4), torch.zeros(2, 4)), {"filter": "ridge"}, ValueError, "ridge: expected a number above 0"),
        (
            (torch.eye(4), torch.zeros(2, 4)),
            {"ridge": 1.0},
            ValueError,
            "ridge: expected 0 with filter='pinv', got 1.0",
        ),
        (
            (torch.eye(4), torch.zeros(2, 4)),
            {"rcond": -1.0},
            ValueError,
            "rcond: expected a finite number of at least 0",
        ),
        (
            (torch.eye(4), torch.zeros(2, 4)),
            {"anchor": torch.zeros(2, 4)},
            ValueError,
            "anchor: expected None with filter='pinv'",
        ),
        (
            (torch.eye(4), torch.zeros(2, 4)),
            {"filter": "spectral", "anchor": torch.zeros(3, 4)},
            ValueError,
            r"anchor: expected shapes as of D, \[\[2, 4\]\], got \[\[3, 4\]\]",
        ),
        ((torch.full((4, 4), torch.nan), torch.zeros(2, 4)), {}, ValueError, "C contains NaN or Inf"),
        (
            (torch.stack([torch.eye(70), torch.eye(70) * torch.inf]), torch.zeros(2, 2, 70)),
            {},
            ValueError,
            r"C\[1\] contains NaN or Inf",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        layer_solve(*arguments, **options)


def features(tokens: list[int], n: int, out: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(t, n).to(dtype) for t in tokens], [torch.randn(out, n) for _ in tokens]


@pytest.mark.parametrize("tokens", [[3, 4], [20, 1, 30]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_equal_the_minimum_norm_least_squares(tokens, dtype):
    xs, ts = features(tokens, 24, 5, dtype)
    weight = [torch.rand(t) for t in tokens]
    for weights in (None, weight):
        roots = (
            [torch.ones(t, dtype=torch.float64) for t in tokens]
            if weights is None
            else [w.double().sqrt() for w in weights]
        )
        rows = [r.unsqueeze(1) * x.double() for r, x in zip(roots, xs)]
        targets = torch.cat([row @ t.double().T for row, t in zip(rows, ts)])
        exact = (torch.linalg.pinv(torch.cat(rows)) @ targets).T
        solution = layer_solve_features(xs, ts, weight=weights)
        assert solution.T.dtype == torch.float32
        torch.testing.assert_close(solution.T.double(), exact, rtol=1e-4, atol=1e-5)
        assert solution.rank == min(sum(tokens), 24)


def test_features_equal_the_gram_route():
    xs, ts = features([8, 9], 40, 6, torch.float64)
    ts = [t.double() for t in ts]
    grams = [x.T @ x for x in xs]
    thin = layer_solve_features(xs, ts)
    gram = layer_solve(sum(grams), sum(t @ g for t, g in zip(ts, grams)))
    torch.testing.assert_close(thin.T, gram.T, rtol=1e-8, atol=1e-9)
    assert thin.rank == gram.rank == 17
    assert thin.condition.item() == pytest.approx(gram.condition.item(), rel=1e-6)


def test_features_do_not_square_the_condition_number():
    q = torch.linalg.qr(torch.randn(60, 20, dtype=torch.float64)).Q.T
    x = torch.logspace(0, -6, 20, dtype=torch.float64).unsqueeze(1) * q
    t = torch.randn(3, 60, dtype=torch.float64)
    solution = layer_solve_features([x], [t])
    assert solution.rank == 20
    torch.testing.assert_close(solution.T, t @ q.T @ q, rtol=1e-6, atol=1e-8)


def test_features_match_their_reference():
    xs, ts = features([5, 6], 30, 4, torch.float32)
    weight = [torch.rand(5), torch.rand(6)]
    for rcond in (1e-6, 0.5):
        ours = layer_solve_features(xs, ts, weight=weight, rcond=rcond)
        reference = layer_solve_features_reference(xs, ts, weight=weight, rcond=rcond)
        torch.testing.assert_close(ours.T, reference.T)
        assert ours.rank == reference.rank
        torch.testing.assert_close(ours.condition, reference.condition)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    n=st.integers(1, 90),
    copies=st.booleans(),
    rcond=st.sampled_from([1e-4, 3e-2]),
    seed=st.integers(0, 2**31),
)
def test_features_with_a_coarse_cut_off(tokens, n, copies, rcond, seed):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(t, n, generator=generator) for t in tokens]
    if copies:
        xs = [x[: len(x) // 2].repeat(2, 1) for x in xs]
    ts = [torch.randn(5, n, generator=generator) for _ in tokens]
    weight = [torch.rand(len(x), generator=generator) for x in xs]
    ours = layer_solve_features(xs, ts, weight=weight, rcond=rcond)
    if not sum(len(x) for x in xs):
        assert ours.rank == 0 and ours.T.count_nonzero() == 0
        return
    reference = layer_solve_features_reference(xs, ts, weight=weight, rcond=rcond)
    torch.testing.assert_close(ours.T, reference.T, rtol=1e-5, atol=1e-5)
    assert ours.rank == reference.rank
    assert 0.7 * reference.condition <= ours.condition <= 1.01 * reference.condition


def test_features_without_tokens_give_zero():
    solution = layer_solve_features([torch.empty(0, 4)], [torch.ones(2, 4)])
    assert solution.T.tolist() == [[0] * 4] * 2 and solution.rank == 0


@pytest.mark.parametrize(
    ("xs", "ts", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "xs: expected at least one matrix, got none"),
        ([torch.ones(2, 3)], [], {}, ValueError, "ts: expected 1 matrices"),
        ([torch.ones(2, 3)], [torch.ones(4)], {}, ValueError, r"ts\[0\]: expected \[out, in\]"),
        (
            [torch.ones(2, 3), torch.ones(2)],
            [torch.ones(4, 3)] * 2,
            {},
            ValueError,
            r"xs\[1\]: expected \[tokens, in\]",
        ),
        ([torch.ones(2, 5)], [torch.ones(4, 3)], {}, ValueError, r"xs\[0\]: expected shape \[2, 3\], got \[2, 5\]"),
        ([torch.ones(2, 3)] * 2, [torch.ones(4, 3), torch.ones(5, 3)], {}, ValueError, r"ts\[1\]: expected shape"),
        (
            [torch.ones(2, 3)],
            [torch.ones(4, 3).int()],
            {},
            TypeError,
            r"ts\[0\]: expected float64 or float32, got int32",
        ),
        (
            [torch.ones(2, 3)],
            [torch.ones(4, 3)],
            {"weight": [torch.ones(3)]},
            ValueError,
            r"weight\[0\]: expected shape \[2\]",
        ),
        (
            [torch.ones(2, 3)],
            [torch.ones(4, 3)],
            {"weight": [-torch.ones(2)]},
            ValueError,
            r"weight\[0\]: expected factors",
        ),
        ([torch.full((2, 3), torch.inf)], [torch.ones(4, 3)], {}, ValueError, "xs contains NaN or Inf"),
    ],
)
def test_bad_features_are_named(xs, ts, options, error, message):
    with pytest.raises(error, match=message):
        layer_solve_features(xs, ts, **options)


def test_diagonal_solve():
    c = torch.tensor([2.0, 0.0, 4.0])
    assert diagonal_solve(c, torch.tensor([1.0, 5.0, 1.0]), torch.tensor([9.0, 8.0, 7.0])).tolist() == [0.5, 8, 0.25]
    rows = diagonal_solve(c, torch.ones(3, 2), torch.full((3, 2), 3.0))
    assert rows.tolist() == [[0.5, 0.5], [3, 3], [0.25, 0.25]]
    with pytest.raises(ValueError, match=r"d: expected shape \[3, '...'\], got \[2, 3\]"):
        diagonal_solve(c, torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="fallback: expected shape"):
        diagonal_solve(c, torch.ones(3), torch.ones(1))


def test_numpy_round_trip():
    c, d = system(6, 20, 2)
    solution = layer_solve(c.numpy(), d.numpy())
    assert isinstance(solution.T, np.ndarray) and isinstance(solution.rank, np.ndarray)
    np.testing.assert_array_equal(solution.T, layer_solve(c, d).T.numpy())
    parts = layer_solve(c.numpy(), [d.numpy()])
    assert isinstance(parts.T[0], np.ndarray)
    thin = layer_solve_features([c.numpy()], [d.numpy()])
    assert isinstance(thin.T, np.ndarray)


def test_opcheck(opcheck):
    for n in (5, 70):
        c, d = system(n, 2 * n, 3, batch=(2,))
        opcheck("layer_solve", c, d, None, 1e-12, 0.0)
        opcheck("layer_solve", c.float(), d.float(), torch.randn_like(d), 1e-5, 0.1)
    xs, ts = features([3, 4], 9, 2, torch.float32)
    opcheck("layer_solve_features", xs, ts, [], 1e-5)
    opcheck("layer_solve_features", xs, ts, [torch.rand(3), torch.rand(4)], 1e-5)


def test_traces_in_one_graph():
    def f(c: Tensor, d: Tensor) -> Tensor:
        first, second = layer_solve(c, [d, 2 * d]).T
        return first + second + layer_solve_features([d], [d], weight=[torch.ones(3)]).T

    c, d = system(5, 20, 3)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(c, d), f(c, d))
