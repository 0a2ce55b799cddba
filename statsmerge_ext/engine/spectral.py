"""Solving T · C = D along the eigenvectors of C, as far as a filter trusts each: beside the ridge, which needs none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Eigenvalues λ [groups, in] in ascending order -> f(λ), 1 / λ where they are trusted in full.
Response = Callable[[Tensor], Tensor]


def spectral_solution(gram: Tensor, product: Tensor, anchor: Tensor, response: Response) -> Tensor:
    """A + (D − A C) Q diag(f(λ)) Qᵀ, [groups, out, in] in float64, with Q and λ the eigenvectors and eigenvalues of
    C = ``gram`` [groups, in, in], D = ``product`` and A = ``anchor`` [groups, out, in], and f = ``response``."""
    gram, product, anchor = gram.double(), product.double(), anchor.double()
    values, vectors = torch.linalg.eigh(gram)
    factors = response(values.clamp_min(0))
    return anchor + ((product - anchor @ gram) @ vectors * factors.unsqueeze(-2)) @ vectors.mT


def mean_eigenvalue(gram: Tensor) -> Tensor:
    """tr C / in of every ``gram`` [groups, in, in], [groups, 1, 1]."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def effective_rank(values: Tensor) -> Tensor:
    """(Σ λ)² / Σ λ² of eigenvalues [groups, in]: how many of one size would be as spread, [groups, 1]; 0 for zeros."""
    squares = values.square().sum(-1, keepdim=True)
    return values.sum(-1, keepdim=True).square() / torch.where(squares > 0, squares, 1)


def leading(values: Tensor, count: Tensor) -> Tensor:
    """Which of the eigenvalues are among the ``count`` [groups, 1] largest ones, and above 0."""
    places = torch.arange(values.shape[-1], 0, -1, device=values.device)
    return (places <= count) & (values > 0)


def inverse(values: Tensor, kept: Tensor) -> Tensor:
    """1 / λ where an eigenvalue is ``kept``, else 0."""
    return kept / torch.where(kept, values, 1)


def gradient_descent(values: Tensor, time: float) -> Tensor:
    """(1 − exp(−t λ)) / λ: what gradient descent on ½ tr T C Tᵀ − tr T Dᵀ has solved after the time t."""
    safe = torch.where(values > 0, values, 1)
    return torch.where(values > 0, -torch.expm1(-time * safe) / safe, 0)


def gavish_donoho(values: Tensor, rows: float) -> Tensor:
    """The number of singular values √λ of a matrix of ``rows`` rows that stand out from noise of an unknown level, by
    the threshold of Gavish and Donoho (arXiv 1305.5870, Eq. 5, rational approximation): [groups, 1]."""
    ratio = min(rows, values.shape[-1]) / max(rows, values.shape[-1])
    factor = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
    singular = values.sqrt()
    return (singular > factor * singular.median(-1, keepdim=True).values).sum(-1, keepdim=True)


#: Filter → (eigenvalues over their mean, strength, rows) -> f(λ).
FILTERS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "rank": lambda values, strength, rows: inverse(values, values > strength),
    "effective_rank": lambda values, strength, rows: inverse(values, leading(values, effective_rank(values).ceil())),
    "gavish_donoho": lambda values, strength, rows: inverse(values, leading(values, gavish_donoho(values, rows))),
    "exponential": lambda values, strength, rows: gradient_descent(values, 1 / strength),
}
