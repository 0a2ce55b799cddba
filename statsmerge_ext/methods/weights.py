"""The ``weights`` hyperparameter that several methods share: how much each expert counts."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from statsmerge_ext.errors import MethodError


def expert_weights(weights: Real | Sequence[float] | None, count: int, default: float, name: str = "weights") -> Tensor:
    """``weights`` as a float64 tensor [count]: a number stands for all experts, None for ``default``.

    Raises MethodError, which calls them ``name``, for another number of weights or for values that are not finite.
    """
    if weights is None:
        weights = default
    if isinstance(weights, Real):
        weights = [float(weights)] * count
    values = torch.tensor(list(weights), dtype=torch.float64)
    if values.shape != (count,) or not torch.isfinite(values).all():
        raise MethodError(f"{name}: expected {count} finite numbers, one an expert, got {list(weights)}")
    return values
