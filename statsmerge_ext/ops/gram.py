"""gram_accumulate_: sums of outer products of features, the evidence behind every closed-form layer merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
    updated,
)

_MIRRORED = 512  # columns mirrored at a time


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
    return updated(gram, target)


def gram_accumulate_patches_(
    gram: Any,
    x: Any,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    weight: Any = None,
    other: Any = None,
) -> Any:
    """Add patchesᵀ diag(weight) patches, or patchesᵀ diag(weight) other, to `gram` in place and return it, for the
    patches that a convolution reads.

    The patches, `unfold_patches(x, …)`, are formed a few at a time inside the kernel, never as a whole.

    Args:
        gram: [groups, in, in2] with in = C / groups · Π kernel_size, in the order of the convolution's weight; float32
            or float64, the type that is accumulated in. Without `other`, in2 = in and only the lower triangles are kept
            up to date, as by `gram_accumulate_`.
        x: [N, C, *spatial], the convolution's input: one to three spatial dimensions, any strides; float64, float32,
            bfloat16 or float16.
        kernel_size, stride, dilation: one number, or one a dimension.
        padding: zeros around the input: one number, or for every dimension a number or a pair (before, after).
        groups: the convolution's groups.
        weight: [N, *output spatial], one factor a patch.
        other: [N, groups · in2, *output spatial], the second factor of a cross Gram, such as the convolution's output.

    Raises:
        TypeError, ValueError: an argument is of another dtype, shape, range or device than the others ask for.
    """
    target = as_output(gram, "gram")
    images = as_tensor(x, "x").detach()
    check_dtype(target, "gram", ACCUMULATOR_DTYPES)
    check_dtype(images, "x")
    check_device(images, "x", target.device)
    dims = images.dim() - 2
    if dims not in (1, 2, 3):
        fail("x", "[N, C, *spatial] with one to three spatial dimensions", list(images.shape))
    kernel = _numbers(kernel_size, "kernel_size", dims, 1)
    steps = _numbers(stride, "stride", dims, 1)
    spread = _numbers(dilation, "dilation", dims, 1)
    pairs = _pairs(padding, dims)
    if not isinstance(groups, int) or groups < 1 or images.shape[1] % groups:
        fail("groups", f"a divisor of the {images.shape[1]} channels", groups)
    outputs = []
    for axis, size in enumerate(images.shape[2:]):
        room, reach = size + sum(pairs[axis]), spread[axis] * (kernel[axis] - 1) + 1
        if room < reach:
            fail("kernel_size", f"a kernel that fits into the padded size {room} of dimension {axis}", reach)
        outputs.append((room - reach) // steps[axis] + 1)
    columns = images.shape[1] // groups * torch.Size(kernel).numel()
    scale = second = None
    in2 = columns
    if other is not None:
        second = as_tensor(other, "other").detach()
        check_dtype(second, "other")
        check_device(second, "other", target.device)
        in2 = target.shape[-1]
        check_shape(second, "other", [images.shape[0], groups * in2, *outputs])
        second = rows_of_groups(second, groups)
    check_shape(target, "gram", [groups, columns, in2])
    if weight is not None:
        scale = as_tensor(weight, "weight").detach()
        check_device(scale, "weight", target.device)
        check_shape(scale, "weight", [images.shape[0], *outputs])
        if scale.is_complex():
            fail("weight", "real numbers", scale.dtype, TypeError)
        scale = scale.to(target.dtype).reshape(images.shape[0], -1)
    front = 3 - dims
    native("gram_accumulate_patches_")(
        target,
        images[(slice(None), slice(None), *[None] * front)],
        [1] * front + kernel,
        [1] * front + steps,
        [0, 0] * front + [side for pair in pairs for side in pair],
        [1] * front + spread,
        groups,
        scale,
        second,
    )
    return updated(gram, target)


def rows_of_groups(x: Tensor, groups: int) -> Tensor:
    """x [N, groups · channels, *spatial] as [groups, N · positions, channels], without a copy where its memory is laid
    out channels last."""
    return x.movedim(1, -1).flatten(0, -2).unflatten(-1, (groups, -1)).movedim(1, 0)


def unfold_patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The patches that a convolution reads from `x` [N, C, *spatial], in the order of the weight's own flattening:
    [groups, N · outputs, C / groups · Π kernel_size]."""
    dims = len(kernel_size)
    # Unfolding copies single elements: channel-last memory would make every one of them a cache miss.
    x = F.pad(x.contiguous(), [side for pair in reversed(padding) for side in pair])
    for axis in range(dims):
        x = x.unfold(2 + axis, dilation[axis] * (kernel_size[axis] - 1) + 1, stride[axis])[..., :: dilation[axis]]
    # [N, C, *outputs, *kernel] -> [groups, N, *outputs, C / groups, *kernel]
    x = x.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, 2 + dims)
    return x.flatten(1, 1 + dims).flatten(2)


def _numbers(value: Any, name: str, dims: int, least: int) -> list[int]:
    """One number for each of `dims` dimensions."""
    numbers = list(value) if isinstance(value, Sequence) else [value] * dims
    if len(numbers) != dims or not all(isinstance(number, int) and number >= least for number in numbers):
        fail(name, f"one integer of at least {least}, or {dims} of them", value)
    return numbers


def _pairs(padding: Any, dims: int) -> list[tuple[int, int]]:
    """`padding` as one pair (before, after) for each of `dims` dimensions."""
    sides = list(padding) if isinstance(padding, Sequence) else [padding] * dims
    pairs = [tuple(side) if isinstance(side, Sequence) else (side, side) for side in sides]
    numbers = [number for pair in pairs for number in pair]
    if len(numbers) != 2 * dims or len(pairs) != dims or not all(isinstance(n, int) and n >= 0 for n in numbers):
        fail("padding", f"an integer of at least 0, or {dims} integers or pairs of them", padding)
    return pairs


def _batched(x: Tensor, batch: list[int]) -> Tensor:
    """[B, ..., n] or [..., n] as [B, tokens, n]."""
    tokens = x.shape[len(batch) : -1].numel()
    return x.reshape(*(batch or [1]), tokens, x.shape[-1])


def symmetrize_(gram: Any) -> Any:
    """Mirror the lower triangle of `gram` [in, in] or [B, in, in], float32 or float64, onto the upper one in place and
    return it.

    Raises:
        TypeError, ValueError: it is of another dtype or shape.
    """
    target = as_output(gram, "gram")
    check_dtype(target, "gram", ACCUMULATOR_DTYPES)
    if target.dim() not in (2, 3) or target.shape[-1] != target.shape[-2]:
        fail("gram", "square matrices [in, in] or [B, in, in]", list(target.shape))
    native("symmetrize_")(target if target.dim() == 3 else target.unsqueeze(0))
    return updated(gram, target)


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


def gram_accumulate_patches_reference(
    gram: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    weight: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, with every option given for each dimension and `other` as [groups, N · outputs, in2];
    the whole matrices are up to date."""
    patches = unfold_patches(x, kernel_size, stride, padding, dilation, groups)
    factors = None if weight is None else weight.reshape(1, -1).expand(patches.shape[:2])
    return gram_accumulate_reference(gram, patches, weight=factors, other=other)


def _fallback(gram: Tensor, x: Tensor, weight: Tensor | None, other: Tensor | None) -> None:
    gram_accumulate_reference(gram, x, weight=weight, other=other)


def _fake(gram: Tensor, x: Tensor, weight: Tensor | None, other: Tensor | None) -> None:
    torch._check(x.dim() == 3)


def _patches_fallback(
    gram: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    weight: Tensor | None,
    other: Tensor | None,
) -> None:
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    gram_accumulate_patches_reference(
        gram, x, kernel, stride=stride, padding=pairs, dilation=dilation, groups=groups, weight=weight, other=other
    )


def _patches_fake(
    gram: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    weight: Tensor | None,
    other: Tensor | None,
) -> None:
    torch._check(x.dim() == 5)


def symmetrize_reference(gram: Tensor) -> None:
    """`symmetrize_` in plain torch."""
    for start in range(0, gram.shape[-1], _MIRRORED):  # in place but for blocks: Grams may be as large as models
        stop = start + _MIRRORED
        gram[..., :start, start:stop] = gram[..., start:stop, :start].mT
        block = gram[..., start:stop, start:stop]
        block.copy_(mirrored(block))


def _symmetrize_fake(gram: Tensor) -> None:
    torch._check(gram.dim() == 3)


register("gram_accumulate_", fake=_fake, fallback=_fallback)
register("gram_accumulate_patches_", fake=_patches_fake, fallback=_patches_fallback)
register("symmetrize_", fake=_symmetrize_fake, fallback=symmetrize_reference)
