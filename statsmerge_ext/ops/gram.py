"""gram_accumulate_: sums of outer products of features, the evidence behind every closed-form layer merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import (
    ACCUMULATOR_DTYPES,
    as_output,
    as_tensor,
    check_device,
    check_dtype,
    check_shape,
    fail,
    native,
    register,
)


def gram_accumulate_(gram: Any, x: Any, *, weight: Any = None, other: Any = None) -> Any:
    """Add xᵀ diag(weight) x, or xᵀ diag(weight) other, to `gram` in place and return it.

    Args:
        gram: [in, in2], or [B, in, in2] for a batch of B (the groups of a convolution); float32 or float64, the type
            that is accumulated in. Without `other`, in2 = in and only the lower triangle is kept up to date: what
            stands above the diagonal means nothing until `symmetrize_`.
        x: [..., in] features of any number of leading dimensions (tokens), or [B, ..., in]; float64, float32, bfloat16
            or float16, read in its own type.
        weight: [...] or [B, ...], one factor a token; 0 drops a padding token, whatever finite values it has. An
            attention mask of any integer or boolean type will do.
        other: [..., in2] or [B, ..., in2], the second factor of a cross Gram.

    Raises:
        TypeError, ValueError: an argument is of another dtype, shape or device than the others ask for.
    """
    target = as_output(gram, "gram")
    features = as_tensor(x, "x").detach()
    check_dtype(target, "gram", ACCUMULATOR_DTYPES)
    check_dtype(features, "x")
    check_device(features, "x", target.device)
    if target.dim() not in (2, 3):
        fail("gram", "[in, in] or [B, in, in]", list(target.shape))
    batch = list(target.shape[:-2])
    if features.dim() < len(batch) + 1 or list(features.shape[: len(batch)]) != batch:
        fail("x", f"shape {[*batch, '...', target.shape[-2]]}", list(features.shape))
    tokens = list(features.shape[:-1])
    check_shape(features, "x", [*tokens, target.shape[-2]])
    columns = target.shape[-2]
    second = scale = None
    if other is not None:
        second = as_tensor(other, "other").detach()
        check_dtype(second, "other")
        check_device(second, "other", target.device)
        columns = target.shape[-1]
        check_shape(second, "other", [*tokens, columns])
        second = _batched(second, batch)
    check_shape(target, "gram", [*batch, features.shape[-1], columns])
    if weight is not None:
        scale = as_tensor(weight, "weight").detach()
        check_device(scale, "weight", target.device)
        check_shape(scale, "weight", tokens)
        if scale.is_complex():
            fail("weight", "real numbers", scale.dtype, TypeError)
        scale = scale.to(target.dtype).reshape(*(batch or [1]), -1)
    native("gram_accumulate_")(target if batch else target.unsqueeze(0), _batched(features, batch), scale, second)
    return gram


def _batched(x: Tensor, batch: list[int]) -> Tensor:
    """[B, ..., n] or [..., n] as [B, tokens, n]."""
    tokens = x.shape[len(batch) : -1].numel()
    return x.reshape(*(batch or [1]), tokens, x.shape[-1])


def symmetrize_(gram: Any) -> Any:
    """Mirror the lower triangle of `gram` [..., in, in] onto the upper one in place and return it."""
    target = as_output(gram, "gram")
    if target.dim() < 2 or target.shape[-1] != target.shape[-2]:
        fail("gram", "square matrices [..., in, in]", list(target.shape))
    target.copy_(mirrored(target))
    return gram


def mirrored(gram: Tensor) -> Tensor:
    """The symmetric matrices [..., in, in] whose lower triangles `gram` holds."""
    lower = gram.tril()
    return lower + gram.tril(-1).mT


def gram_accumulate_reference(
    gram: Tensor, x: Tensor, *, weight: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """The same in plain torch; without `other` the whole matrix is up to date."""
    batch = gram.dim() - 2
    left = x.to(gram.dtype).flatten(batch, -2) if x.dim() > batch + 1 else x.to(gram.dtype).unsqueeze(batch)
    right = left
    if other is not None:
        right = other.to(gram.dtype).reshape(*left.shape[:-1], other.shape[-1])
    if weight is not None:
        left = left * weight.to(gram.dtype).reshape(*left.shape[:-1], 1)
    return gram.add_(left.mT @ right)


def _fallback(gram: Tensor, x: Tensor, weight: Tensor | None, other: Tensor | None) -> None:
    gram_accumulate_reference(gram, x, weight=weight, other=other)


def _fake(gram: Tensor, x: Tensor, weight: Tensor | None, other: Tensor | None) -> None:
    torch._check(x.dim() == 3)


register("gram_accumulate_", fake=_fake, fallback=_fallback)
