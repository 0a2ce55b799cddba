"""weighted_merge: base tensors plus weighted task vectors, for all tensors of a model at once, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import (
    FLOAT_DTYPES,
    as_list,
    as_tensor,
    check_device,
    check_dtype,
    check_shape,
    fail,
    native,
    register,
    same_kind,
)
from .quantized import QuantizedTensor


def weighted_merge(base: Any, task_vectors: Sequence[Any], coefficients: Any) -> list[Any]:
    """θ^l = θ_0^l + Σ_k λ_k^l τ_k^l for every tensor l of a model, in one pass over memory.

    Differentiable with respect to the coefficients (in one pass, too), the base and floating-point task vectors.

    Args:
        base: L tensors θ_0^l of any shapes; float64, float32, bfloat16 or float16. Computed in float32, or in float64
            where the base tensor is float64.
        task_vectors: K sequences of L tensors τ_k^l of the base's shapes, each of any of those types or a
            `QuantizedTensor`, whose values are restored as they are added.
        coefficients: λ, [K] or [L, K]; real.

    Returns: L contiguous tensors of the base's dtypes.

    Raises:
        TypeError, ValueError: arguments that don't fit each other.
    """
    tensors = as_list(base, "base")
    for l, tensor in enumerate(tensors):
        _check_tensor(tensor, tensors[0].device, "base", l)
    flat = _flatten(task_vectors, tensors)
    tasks, layers = len(task_vectors), len(tensors)
    lambdas = _coefficients(coefficients, layers, tasks)
    if not tensors:
        return []
    lambdas = lambdas.to(tensors[0].device).expand(layers, tasks)
    everything = [lambdas, *tensors, *flat.tensors]
    if torch.is_grad_enabled() and any(t.requires_grad for t in everything):
        merged = list(_WeightedMerge.apply(lambdas, layers, flat, *tensors, *flat.tensors))
    else:
        merged = native("weighted_merge")(tensors, *flat, lambdas)
    return same_kind(base)(merged)


class _Flat(NamedTuple):
    """K · L task vectors, task by task, as the raw operator takes them.

    If none is quantised, everything but `tensors` is empty; otherwise bits 0 marks a floating-point one.
    """

    tensors: list[Tensor]
    scales: list[Tensor]
    zero_points: list[Tensor]
    bits: list[int]
    group_sizes: list[int]


def _flatten(task_vectors: Any, base: list[Tensor]) -> _Flat:
    if not isinstance(task_vectors, Sequence):
        fail("task_vectors", "a sequence of K sequences of tensors", type(task_vectors).__name__, TypeError)
    for k, task in enumerate(task_vectors):
        if len(task) != len(base):
            fail(f"task_vectors[{k}]", f"{len(base)} tensors, one for every one of base", len(task))
    if not base:
        return _Flat([], [], [], [], [])
    device, shapes, nothing = base[0].device, [tensor.shape for tensor in base], base[0].new_empty(0)
    flat = _Flat([], [], [], [], [])
    for k, task in enumerate(task_vectors):
        for l, (value, shape) in enumerate(zip(task, shapes)):
            if isinstance(value, QuantizedTensor):
                columns = (value.codes, value.scale, value.zero_point, value.bits, value.group_size)
                for part in columns[:3]:
                    if part.device != device:
                        check_device(part, _name("task_vectors", k, l), device)
            else:
                if not isinstance(value, Tensor):
                    value = as_tensor(value, _name("task_vectors", k, l))
                _check_tensor(value, device, "task_vectors", k, l)
                columns = (value, nothing, nothing, 0, 0)
            if value.shape != shape:
                fail(_name("task_vectors", k, l), f"shape {list(shape)} as of base[{l}]", list(value.shape))
            for column, item in zip(flat, columns):
                column.append(item)
    return flat if any(flat.bits) else _Flat(flat.tensors, [], [], [], [])


def _name(argument: str, *indices: int) -> str:
    return argument + "".join(f"[{i}]" for i in indices)


def _check_tensor(tensor: Tensor, device: torch.device, argument: str, *indices: int) -> None:
    """Every call has thousands of these: the name is put together only for the message of an error."""
    if tensor.dtype not in FLOAT_DTYPES or tensor.device != device:
        name = _name(argument, *indices)
        check_dtype(tensor, name)
        check_device(tensor, name, device)


def _coefficients(coefficients: Any, layers: int, tasks: int) -> Tensor:
    if isinstance(coefficients, (list, tuple)):
        coefficients = torch.tensor(coefficients, dtype=torch.float64)
    lambdas = as_tensor(coefficients, "coefficients")
    check_dtype(lambdas, "coefficients")
    if lambdas.dim() == 1:
        check_shape(lambdas, "coefficients", [tasks])
    elif list(lambdas.shape) != [layers, tasks]:
        fail("coefficients", f"shape [K] = [{tasks}] or [L, K] = [{layers}, {tasks}]", list(lambdas.shape))
    return lambdas


class _WeightedMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, layers: int, flat: _Flat, *tensors: Tensor) -> tuple[Tensor, ...]:
        base, task_vectors = list(tensors[:layers]), list(tensors[layers:])
        ctx.save_for_backward(coefficients, *task_vectors, *flat.scales, *flat.zero_points)
        ctx.bits, ctx.group_sizes = flat.bits, flat.group_sizes
        ctx.dtypes = [t.dtype for t in tensors]
        return tuple(native("weighted_merge")(base, task_vectors, *flat[1:], coefficients))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *saved = ctx.saved_tensors
        layers, tasks = coefficients.shape
        count = layers * tasks
        task_vectors, rest = saved[:count], saved[count:]
        scales, zero_points = rest[: len(ctx.bits)], rest[len(ctx.bits) :]
        grad_coefficients = None
        if ctx.needs_input_grad[0] and tasks:
            raw = native("weighted_merge_grad")(
                list(grads), task_vectors, scales, zero_points, ctx.bits, ctx.group_sizes
            )
            grad_coefficients = raw.to(coefficients.dtype)
        needs_tensor = ctx.needs_input_grad[3:]
        grad_base = [grad if needed else None for grad, needed in zip(grads, needs_tensor)]
        grad_task_vectors = [None] * count
        for i in range(count):
            if needs_tensor[layers + i]:
                k, l = divmod(i, layers)
                grad_task_vectors[i] = (coefficients[l, k] * grads[l]).to(ctx.dtypes[layers + i])
        return grad_coefficients, None, None, *grad_base, *grad_task_vectors


def weighted_merge_reference(
    base: list[Tensor], task_vectors: Sequence[Sequence[Tensor | QuantizedTensor]], coefficients: Tensor
) -> list[Tensor]:
    """The same in plain torch, differentiable."""
    coefficients = coefficients.expand(len(base), len(task_vectors))
    merged = []
    for l, tensor in enumerate(base):
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        total = tensor.to(dtype)
        for k, task in enumerate(task_vectors):
            tau = task[l].dequantize() if isinstance(task[l], QuantizedTensor) else task[l]
            total = total + coefficients[l, k].to(dtype) * tau.to(dtype)
        merged.append(total.to(tensor.dtype, copy=True).contiguous())
    return merged


def _unflatten(shapes: list[torch.Size], flat: _Flat) -> list[list[Tensor | QuantizedTensor]]:
    layers = len(shapes)

    def one(i: int) -> Tensor | QuantizedTensor:
        if not flat.bits or not flat.bits[i]:
            return flat.tensors[i]
        return QuantizedTensor(*(column[i] for column in flat), shapes[i % layers])

    return [[one(k * layers + l) for l in range(layers)] for k in range(len(flat.tensors) // layers)]


def _fallback(
    base: list[Tensor],
    task_vectors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
    coefficients: Tensor,
) -> list[Tensor]:
    flat = _Flat(task_vectors, scales, zero_points, bits, group_sizes)
    return weighted_merge_reference(base, _unflatten([b.shape for b in base], flat), coefficients)


def _grad_fallback(
    grads: list[Tensor],
    task_vectors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
) -> Tensor:
    flat = _Flat(task_vectors, scales, zero_points, bits, group_sizes)
    tasks = _unflatten([g.shape for g in grads], flat)
    rows = []
    for l, grad in enumerate(grads):
        taus = [task[l].dequantize() if isinstance(task[l], QuantizedTensor) else task[l] for task in tasks]
        rows.append(torch.stack([(grad.double() * tau.double()).sum() for tau in taus]))
    return torch.stack(rows)


def _fake(
    base: list[Tensor],
    task_vectors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
    coefficients: Tensor,
) -> list[Tensor]:
    return [b.new_empty(b.shape) for b in base]


def _grad_fake(
    grads: list[Tensor],
    task_vectors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
) -> Tensor:
    return grads[0].new_empty(len(grads), len(task_vectors) // len(grads), dtype=torch.float64)


register("weighted_merge", fake=_fake, fallback=_fallback)
register("weighted_merge_grad", fake=_grad_fake, fallback=_grad_fallback)
