"""layer_solve: T · C = D for symmetric positive semidefinite C, the system behind LOT Merging, RegMean and the like.

Beside it its thin form, from the features themselves, and its diagonal form, for norm scales and embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import (
    ACCUMULATOR_DTYPES,
    as_list,
    as_tensor,
    check_device,
    check_dtype,
    check_nonnegative,
    check_shape,
    fail,
    native,
    register,
    same_kind,
)
from .gram import mirrored

FILTERS = ("pinv", "ridge", "spectral")


class LayerSolution(NamedTuple):
    """T [.., out, in], a list if D was one; rank [..]: eigenvalues kept; condition [..]: largest over smallest kept."""

    T: Any
    rank: Any
    condition: Any


def layer_solve(
    C: Any, D: Any, *, filter: str = "pinv", rcond: float | None = None, ridge: float = 0.0, anchor: Any = None
) -> LayerSolution:
    """Solve T · C = D for symmetric positive semidefinite C.

    With A the anchor (0 if none), T = A + (D − A C) F(C). F keeps the eigenvectors of C and takes an eigenvalue λ to
      "pinv":      1/λ where λ > rcond · λ_max, else 0. Without an anchor the Moore–Penrose solution, that of LOT
                   Merging (arXiv 2505.23859, Eq. 9).
      "ridge":     1/(λ + ridge)
      "spectral":  as "pinv", but directions that are left out keep the anchor

    Everything is computed in float64: a residual in float64, as refining a float32 factorisation takes, would cost as
    much as solving in float64 does. C is factorised by Cholesky where that shows which eigenvalues lie above the cut,
    with pivoting where its rank is markedly below its size; the condition is then an estimate, from below and good to a
    few per cent. Otherwise its eigenvectors are computed. Of a float32 C the pivoted factorisation leaves out what
    rounding it to float32 has put beside the features, if that lies below the cut and below 1e-3 of all that is kept:
    T then errs as float32's rounding of C does, usually by less than 1e-5 and at most by 1e-3 of its norm.

    Args:
        C: [.., in, in], float32 or float64; only the lower triangle is read, as `gram_accumulate_` leaves it.
        D: [.., out, in], float32 or float64; or a list of such, which shares one factorisation.
        rcond: relative cut-off of eigenvalues; None: in · eps of C's dtype, and 0 for "ridge".
        ridge: what "ridge" adds to every eigenvalue, absolute, above 0.
        anchor: as D, for "ridge" and "spectral".

    Returns: LayerSolution, T of D's dtype.

    Raises:
        TypeError, ValueError: arguments that don't fit each other; C contains NaN or Inf.
    """
    matrix = as_tensor(C, "C").detach()
    check_dtype(matrix, "C", ACCUMULATOR_DTYPES)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        fail("C", "square matrices [.., in, in]", list(matrix.shape))
    if filter not in FILTERS:
        fail("filter", f"one of {', '.join(FILTERS)}", repr(filter))
    if filter == "ridge" and not 0 < ridge < float("inf"):
        fail("ridge", "a number above 0 with filter='ridge'", ridge)
    if filter != "ridge" and ridge != 0:
        fail("ridge", f"0 with filter={filter!r}", ridge)
    if filter == "pinv" and anchor is not None:
        fail("anchor", "None with filter='pinv' (filter='spectral' keeps an anchor)", type(anchor).__name__)
    if rcond is None:
        rcond = 0.0 if filter == "ridge" else matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    check_nonnegative(rcond, "rcond")

    several = isinstance(D, (list, tuple))
    targets = _rows(D if several else [D], "D", matrix)
    anchors = None if anchor is None else _rows(anchor if several else [anchor], "anchor", matrix)
    if anchors is not None and [a.shape for a in anchors] != [d.shape for d in targets]:
        fail("anchor", f"shapes as of D, {[list(d.shape) for d in targets]}", [list(a.shape) for a in anchors])
    solution = _solve(matrix, targets, anchors, rcond, ridge)
    return same_kind(C)(solution if several else solution._replace(T=solution.T[0]))


def _rows(values: Any, name: str, matrix: Tensor) -> list[Tensor]:
    if not isinstance(values, (list, tuple)) or not values:
        fail(name, "a list of at least one matrix", values)
    rows = [row.detach() for row in as_list(values, name)]
    for i, row in enumerate(rows):
        label = f"{name}[{i}]" if len(rows) > 1 else name
        check_dtype(row, label, ACCUMULATOR_DTYPES)
        check_device(row, label, matrix.device)
        if row.dim() != matrix.dim() or row.shape[:-2] != matrix.shape[:-2] or row.shape[-1] != matrix.shape[-1]:
            fail(label, f"shape {[*matrix.shape[:-2], 'out', matrix.shape[-1]]}", list(row.shape))
        if row.dtype != rows[0].dtype:
            fail(label, f"dtype {rows[0].dtype} as the first", row.dtype, TypeError)
    return rows


def _solve(
    matrix: Tensor, targets: list[Tensor], anchors: list[Tensor] | None, rcond: float, ridge: float
) -> LayerSolution:
    """Stack the right-hand sides, flatten the batch, solve, and undo both."""
    batch, n = matrix.shape[:-2], matrix.shape[-1]

    def stacked(rows: list[Tensor]) -> Tensor:
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)
        return joined.reshape(batch.numel(), joined.shape[-2], n)

    start = None if anchors is None else stacked(anchors).to(targets[0].dtype)
    t, rank, condition = native("layer_solve")(
        matrix.reshape(batch.numel(), n, n), stacked(targets), start, float(rcond), float(ridge)
    )
    t = t.reshape(*batch, t.shape[-2], n)
    parts = list(t.split([row.shape[-2] for row in targets], dim=-2))
    return LayerSolution(parts, rank.reshape(batch), condition.reshape(batch))


def layer_solve_features(
    xs: Sequence[Any], ts: Sequence[Any], *, weight: Sequence[Any] | None = None, rcond: float | None = None
) -> LayerSolution:
    """The "pinv" solution T = argmin Σ_k ‖X_k (T − T_k)ᵀ‖² of smallest norm, from the features instead of their Grams.

    With X the rows of all experts stacked and Y = [X_k T_kᵀ], T = (X^† Y)ᵀ in float64; the cut-off acts on the singular
    values of X. Made for fewer tokens than inputs, where it costs tokens² · in. Where the cut-off is so coarse that the
    squared condition number of what is kept leaves T's precision, as with float32 features of many inputs, X^† comes
    from the Gram matrix of X's smaller side, otherwise from a singular value decomposition of X.

    Args:
        xs: K tensors [tokens_k, in], float64, float32, bfloat16 or float16.
        ts: K tensors [out, in], float32 or float64.
        weight: K tensors [tokens_k] of factors of at least 0, one a token.
        rcond: relative cut-off of singular values; None: max(tokens, in) · eps of the features' dtype (float32's for
            the half-precision types, whose values are taken as exact).

    Returns: LayerSolution; `condition` is that of the Gram matrix XᵀX, comparable with `layer_solve`'s.

    Raises:
        TypeError, ValueError: arguments that don't fit each other; a feature is NaN or Inf.
    """
    features = [x.detach() for x in as_list(xs, "xs")]
    solutions = [t.detach() for t in as_list(ts, "ts")]
    if not features:
        fail("xs", "at least one matrix", "none")
    if len(solutions) != len(features):
        fail("ts", f"{len(features)} matrices, one for every one of xs", len(solutions))
    if solutions[0].dim() != 2:
        fail("ts[0]", "[out, in]", list(solutions[0].shape))
    weights = [] if weight is None else [w.detach() for w in as_list(weight, "weight")]
    if weight is not None and len(weights) != len(features):
        fail("weight", f"{len(features)} vectors, one for every one of xs", len(weights))
    for k, (x, t) in enumerate(zip(features, solutions)):
        check_dtype(x, f"xs[{k}]")
        check_dtype(t, f"ts[{k}]", ACCUMULATOR_DTYPES)
        check_device(x, f"xs[{k}]", features[0].device)
        check_device(t, f"ts[{k}]", features[0].device)
        if x.dim() != 2:
            fail(f"xs[{k}]", "[tokens, in]", list(x.shape))
        check_shape(x, f"xs[{k}]", [x.shape[0], solutions[0].shape[1]])
        check_shape(t, f"ts[{k}]", solutions[0].shape)
        if weights:
            check_shape(weights[k], f"weight[{k}]", x.shape[:1])
            check_device(weights[k], f"weight[{k}]", x.device)
            if not torch.compiler.is_compiling() and bool((weights[k] < 0).any()):
                fail(f"weight[{k}]", "factors of at least 0", weights[k].min().item())
    if rcond is None:
        precise = all(x.dtype == torch.float64 for x in features)
        tokens = sum(x.shape[0] for x in features)
        rcond = max(tokens, features[0].shape[1]) * torch.finfo(torch.float64 if precise else torch.float32).eps
    check_nonnegative(rcond, "rcond")
    t, rank, condition = native("layer_solve_features")(features, solutions, weights, float(rcond))
    return same_kind(xs)(LayerSolution(t, rank.reshape(()), condition.reshape(())))


def diagonal_solve(c: Any, d: Any, fallback: Any) -> Any:
    """layer_solve for a diagonal C: d / c where c > 0, `fallback` elsewhere.

    Norm scales (LOT Merging, arXiv 2505.23859, Eq. 12): c [n] sums the squared normalised inputs, d [n] those times the
    task vectors. Embeddings: c [V] counts tokens, d [V, e] sums counts times task vectors; c applies to all of a row.

    Args:
        c: [..., n], at least 0.
        d: c's shape, and any dimensions after that.
        fallback: d's shape.
    """
    denominator, numerator, elsewhere = as_tensor(c, "c"), as_tensor(d, "d"), as_tensor(fallback, "fallback")
    for name, tensor in (("c", denominator), ("d", numerator), ("fallback", elsewhere)):
        check_dtype(tensor, name)
    if numerator.shape[: denominator.dim()] != denominator.shape:
        fail("d", f"shape {[*denominator.shape, '...']}", list(numerator.shape))
    check_shape(elsewhere, "fallback", numerator.shape)
    denominator = denominator.reshape(*denominator.shape, *[1] * (numerator.dim() - denominator.dim()))
    return same_kind(c)(torch.where(denominator > 0, numerator / denominator, elsewhere))


def layer_solve_reference(
    C: Tensor, D: Tensor, *, rcond: float, ridge: float = 0.0, anchor: Tensor | None = None
) -> LayerSolution:
    """The same for one D in plain torch, in C's dtype or better."""
    c = mirrored(C.double())
    if not bool(torch.isfinite(c).all()):
        raise ValueError("C contains NaN or Inf")
    residual = D.double() if anchor is None else D.double() - anchor.double() @ c
    n = C.shape[-1]
    values, vectors = torch.linalg.eigh(c + ridge * torch.eye(n, dtype=c.dtype, device=c.device))
    cut = max(rcond, n * torch.finfo(c.dtype).eps) * values[..., -1:].clamp_min(0)
    kept = values > cut
    inverse = torch.where(kept, 1 / values, 0)
    t = (residual @ vectors * inverse.unsqueeze(-2)) @ vectors.mT
    smallest = torch.where(kept, values, torch.inf).amin(-1)
    condition = torch.where(kept.any(-1), values[..., -1] / smallest, 1)
    return LayerSolution((t if anchor is None else anchor.double() + t).to(D.dtype), kept.sum(-1), condition)


def layer_solve_features_reference(
    xs: list[Tensor], ts: list[Tensor], *, weight: list[Tensor] | None = None, rcond: float
) -> LayerSolution:
    """The same in plain torch."""
    roots = [1.0] * len(xs) if not weight else [w.double().sqrt().unsqueeze(-1) for w in weight]
    rows = [root * x.double() for root, x in zip(roots, xs)]
    x, y = torch.cat(rows), torch.cat([row @ t.double().mT for row, t in zip(rows, ts)])
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > max(rcond, s.shape[0] * torch.finfo(s.dtype).eps) * s[:1]
    t = (y.mT @ u * torch.where(kept, 1 / s, 0)) @ vh
    smallest = torch.where(kept, s, torch.inf).amin()
    condition = torch.where(kept.any(), (s[0] / smallest) ** 2, 1)
    return LayerSolution(t.to(ts[0].dtype), kept.sum(), condition)


def _fallback(c: Tensor, d: Tensor, anchor: Tensor | None, rcond: float, ridge: float) -> LayerSolution:
    return layer_solve_reference(c, d, rcond=rcond, ridge=ridge, anchor=anchor)


def _features_fallback(xs: list[Tensor], ts: list[Tensor], weights: list[Tensor], rcond: float) -> LayerSolution:
    t, rank, condition = layer_solve_features_reference(xs, ts, weight=weights, rcond=rcond)
    return LayerSolution(t, rank.reshape(1), condition.reshape(1))


def _fake(c: Tensor, d: Tensor, anchor: Tensor | None, rcond: float, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    batch = c.shape[0]
    t = d.new_empty(d.shape)
    return t, c.new_empty(batch, dtype=torch.int64), c.new_empty(batch, dtype=torch.float64)


def _features_fake(
    xs: list[Tensor], ts: list[Tensor], weights: list[Tensor], rcond: float
) -> tuple[Tensor, Tensor, Tensor]:
    t = ts[0].new_empty(ts[0].shape)
    return t, t.new_empty(1, dtype=torch.int64), t.new_empty(1, dtype=torch.float64)


register("layer_solve", fake=_fake, fallback=_fallback)
register("layer_solve_features", fake=_features_fake, fallback=_features_fallback)
