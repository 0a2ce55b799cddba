"""topk_svd and weight_statistics: leading singular values of many matrices, to a stated accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import as_list, as_tensor, check_device, check_dtype, check_shape, fail, native, register, same_kind

MAX_PASSES = 1000
STATISTICS_TOL = 1e-3


class TopKSVD(NamedTuple):
    """Leading singular triplets: tensors with a batch dimension if the matrices came so, lists if they came as a list.

    S [k], descending; U [m, k] and Vh [k, n] or None; residual [k]: how far each value of S may be from a true singular
    value, absolute; passes [B]: how often each matrix was read.
    """

    S: Any
    U: Any
    Vh: Any
    residual: Any
    passes: Any


def topk_svd(
    mats: Any,
    k: int,
    *,
    minus: Any = None,
    tol: float = 1e-3,
    max_passes: int | None = None,
    vectors: bool = False,
    seed: int = 0,
) -> TopKSVD:
    """The k leading singular values, and vectors, of many matrices.

    Block Lanczos on AᵀA with full reorthogonalisation and thick restarts. Products with the matrix are computed in
    float32 while their rounding errors, which the residual includes, stay below the tolerance, and in float64 from
    there on and for float64 matrices; all else is float64. A matrix of at most 32 rows or columns is decomposed
    directly. Results depend on neither the number of threads nor the other matrices of the call.

    Singular values below about 1e-6 of the largest are found to that absolute accuracy only, as `residual` tells, and
    those lost in float64's rounding error come out as 0. On CUDA float32 products serve all matrices that are not
    float64, and more than 15 values of a matrix that is not small come from a full decomposition.

    Args:
        mats: [B, m, n], or a list of 2-D tensors of any shapes; float64, float32, bfloat16 or float16, read in that
            type.
        k: from 1 to the smallest dimension of any matrix.
        minus: as mats; the matrices are then mats − minus. On the CPU small differences are formed while their matrix
            is at work, and large ones never.
        tol: relative accuracy of the singular values, between 0 and 1: a matrix is done when `residual` ≤ tol · S,
            or as small as rounding error lets it be.
        max_passes: gives up after reading a matrix so often (`residual` tells how far it came); None: 1000.
        vectors: whether to compute U and Vh.
        seed: of the random start.

    Returns: TopKSVD; float64 for float64 matrices, else float32.

    Raises:
        TypeError, ValueError: arguments that don't fit each other;
            a matrix contains NaN or Inf (the message tells which).
    """
    batched = not isinstance(mats, (list, tuple))
    if batched and as_tensor(mats, "mats").dim() != 3:
        fail("mats", "[B, m, n] or a list of matrices", list(as_tensor(mats, "mats").shape))
    whole = batched and _is_native_batch(as_tensor(mats, "mats"), minus)
    matrices = [mat.detach() for mat in ([as_tensor(mats, "mats")] if whole else as_list(mats, "mats"))]
    subtrahends = _subtrahends([minus] if whole and minus is not None else minus, matrices)
    if not isinstance(k, int) or k < 1:
        fail("k", "an integer of at least 1", k)
    for i, mat in enumerate(matrices):
        _check_matrix(mat, f"mats[{i}]", matrices[0].device)
        if mat.dim() != 2 and not whole:
            fail(f"mats[{i}]", "a matrix [m, n]", list(mat.shape))
        if k > min(mat.shape[-2:]):
            fail("k", f"at most {min(mat.shape[-2:])}, the smaller dimension of mats[{i}] {list(mat.shape[-2:])}", k)
    if not 0 < tol < 1:
        fail("tol", "a number between 0 and 1", tol)
    if max_passes is None:
        max_passes = MAX_PASSES
    if max_passes < 1:
        fail("max_passes", "at least 1", max_passes)

    if not matrices:
        return same_kind(mats)(_empty_result(mats if batched else None, k, vectors))
    s, u, vh, residual, passes = native("topk_svd")(
        matrices, subtrahends, k, float(tol), int(max_passes), bool(vectors), int(seed)
    )
    result = TopKSVD(s, u if vectors else None, vh if vectors else None, residual, passes)
    if batched:
        join = (lambda parts: parts[0]) if whole else torch.stack
        result = TopKSVD(*(join(part) if isinstance(part, list) else part for part in result))
    return same_kind(mats)(result)


def _is_native_batch(mats: Tensor, minus: Any) -> bool:
    """Whether the operator can take a batch as it is: lists of tiny matrices take longer to make than to decompose."""
    if mats.device.type != "cpu" or mats.shape[0] == 0 or isinstance(minus, (list, tuple)):
        return False
    return minus is None or as_tensor(minus, "minus").shape == mats.shape


def _check_matrix(mat: Tensor, name: str, device: torch.device) -> None:
    check_dtype(mat, name)
    check_device(mat, name, device)


def _subtrahends(minus: Any, matrices: list[Tensor]) -> list[Tensor]:
    if minus is None:
        return []
    subtrahends = [mat.detach() for mat in as_list(minus, "minus")]
    if len(subtrahends) != len(matrices):
        fail("minus", f"{len(matrices)} tensors, one for every one of mats", len(subtrahends))
    for i, (mat, sub) in enumerate(zip(matrices, subtrahends)):
        _check_matrix(sub, f"minus[{i}]", mat.device)
        check_shape(sub, f"minus[{i}]", mat.shape)
    return subtrahends


def _empty_result(mats: Any, k: int, vectors: bool) -> TopKSVD:
    if mats is None:
        return TopKSVD([], [] if vectors else None, [] if vectors else None, [], torch.empty(0, dtype=torch.int64))
    tensor = as_tensor(mats, "mats")
    dtype = _result_dtype(tensor)
    m, n = tensor.shape[1:]
    s = tensor.new_empty(0, k, dtype=dtype)
    u = tensor.new_empty(0, m, k, dtype=dtype) if vectors else None
    vh = tensor.new_empty(0, k, n, dtype=dtype) if vectors else None
    return TopKSVD(s, u, vh, s.clone(), tensor.new_empty(0, dtype=torch.int64))


def weight_statistics(mats: Any, r: int = 3, *, minus: Any = None) -> Any:
    """Mean, biased variance, L2 norm and the r leading singular values of each tensor (StatsMerging, arXiv 2506.04567).

    Args:
        mats: a list of tensors; one of more than two dimensions is taken as [out, -1], one of fewer as a vector, whose
            only singular value is its norm. float64, float32, bfloat16 or float16.
        r: number of singular values; those that a tensor hasn't got are 0. Relative accuracy: 1e-3.
        minus: as mats; the statistics are then of mats − minus (task vectors).

    Returns: [L, 3 + r], float64.

    Raises:
        TypeError, ValueError: arguments that don't fit each other;
            a tensor contains NaN or Inf (the message tells which).
    """
    tensors = [mat.detach() for mat in as_list(mats, "mats")]
    subtrahends = _subtrahends(minus, tensors)
    if not isinstance(r, int) or r < 0:
        fail("r", "an integer of at least 0", r)
    for i, tensor in enumerate(tensors):
        _check_matrix(tensor, f"mats[{i}]", tensors[0].device)
    if not tensors:
        return same_kind(mats)(torch.empty(0, 3 + r, dtype=torch.float64))
    result = native("weight_statistics")(
        [_as_matrix(t) for t in tensors], [_as_matrix(t) for t in subtrahends], r, STATISTICS_TOL, MAX_PASSES, 0
    )
    return same_kind(mats)(result)


def _as_matrix(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return tensor.reshape(1, tensor.numel())
    return tensor if tensor.dim() == 2 else tensor.flatten(1)


def _result_dtype(mat: Tensor) -> torch.dtype:
    return torch.float64 if mat.dtype == torch.float64 else torch.float32


def topk_svd_reference(mats: list[Tensor], k: int, *, minus: list[Tensor] | None = None) -> TopKSVD:
    """The same for a list of matrices in plain torch: a full decomposition in float64."""
    columns: tuple[list[Tensor], ...] = ([], [], [], [])
    for i, mat in enumerate(mats):
        operand = mat if not minus else mat.to(_result_dtype(mat)) - minus[i].to(_result_dtype(mat))
        if not bool(torch.isfinite(operand).all()):
            raise ValueError(f"mats[{i}]{f' - minus[{i}]' if minus else ''} contains NaN or Inf")
        u, s, vh = torch.linalg.svd(operand.double(), full_matrices=False)
        bound = (max(mat.shape) * torch.finfo(s.dtype).eps * s[:1]).expand(k)
        for column, value in zip(columns, (s[:k], u[:, :k], vh[:k], bound)):
            column.append(value.to(_result_dtype(mat)).contiguous())
    return TopKSVD(*columns, torch.ones(len(mats), dtype=torch.int64, device=mats[0].device))


def weight_statistics_reference(mats: list[Tensor], r: int = 3, *, minus: list[Tensor] | None = None) -> Tensor:
    """The same in plain torch, in float64."""
    rows = []
    for i, mat in enumerate(mats):
        row = torch.zeros(3 + r, dtype=torch.float64, device=mat.device)
        operand = _as_matrix(mat)
        if minus:
            operand = operand.to(_result_dtype(mat)) - _as_matrix(minus[i]).to(_result_dtype(mat))
        operand = operand.double()
        if operand.numel():
            row[:3] = torch.stack([operand.mean(), operand.var(correction=0), operand.norm()])
            values = torch.linalg.svdvals(operand)[:r]
            row[3 : 3 + len(values)] = values
        rows.append(row)
    return torch.stack(rows)


def _fallback(
    mats: list[Tensor], minus: list[Tensor], k: int, tol: float, max_passes: int, vectors: bool, seed: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    s, u, vh, residual, passes = topk_svd_reference(mats, k, minus=minus)
    if not vectors:
        u, vh = [part[:, :0].contiguous() for part in u], [part[:0].contiguous() for part in vh]
    return s, u, vh, residual, passes


def _statistics_fallback(
    mats: list[Tensor], minus: list[Tensor], r: int, tol: float, max_passes: int, seed: int
) -> Tensor:
    return weight_statistics_reference(mats, r, minus=minus)


def _fake(
    mats: list[Tensor], minus: list[Tensor], k: int, tol: float, max_passes: int, vectors: bool, seed: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    kept = k if vectors else 0

    def empty(*shape: int) -> list[Tensor]:
        sizes = [[*mat.shape[:-2], *(mat.shape[d] if d < 0 else d for d in shape)] for mat in mats]
        return [mat.new_empty(size, dtype=_result_dtype(mat)) for mat, size in zip(mats, sizes)]

    count = sum(mat.shape[0] if mat.dim() == 3 else 1 for mat in mats)
    return empty(k), empty(-2, kept), empty(kept, -1), empty(k), mats[0].new_empty(count, dtype=torch.int64)


def _statistics_fake(mats: list[Tensor], minus: list[Tensor], r: int, tol: float, max_passes: int, seed: int) -> Tensor:
    return mats[0].new_empty(len(mats), 3 + r, dtype=torch.float64)


register("topk_svd", fake=_fake, fallback=_fallback)
register("weight_statistics", fake=_statistics_fake, fallback=_statistics_fallback)
