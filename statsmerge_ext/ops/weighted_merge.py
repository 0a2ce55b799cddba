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


class TaskVectors(NamedTuple):
    """K · L task vectors of a model of L tensors, checked and laid out as the raw operator takes them.

    If none is quantised, `scales`, `zero_points`, `bits` and `group_sizes` are empty; otherwise bits 0 marks a
    floating-point one.
    """

    tensors: list[Tensor]  # task by task, as are the following
    scales: list[Tensor]
    zero_points: list[Tensor]
    bits: list[int]
    group_sizes: list[int]
    tasks: int
    shapes: list[torch.Size]  # of the L tensors
    differentiable: list[int]  # which of `tensors` require gradients

    @property
    def operands(self) -> tuple[list, ...]:
        return self[:5]


def weighted_merge(base: Any, task_vectors: Sequence[Any] | TaskVectors, coefficients: Any) -> list[Any]:
    """θ^l = θ_0^l + Σ_k λ_k^l τ_k^l for every tensor l of a model, in one pass over memory.

    Differentiable with respect to the coefficients (in one pass, too), the base and floating-point task vectors.

    Args:
        base: L tensors θ_0^l of any shapes; float64, float32, bfloat16 or float16. Computed in float32, or in float64
            where the base tensor is float64.
        task_vectors: K sequences of L tensors τ_k^l of the base's shapes, each of any of those types or a
            `QuantizedTensor`, whose values are restored as they are added; or what `prepare_task_vectors` made of them.
        coefficients: λ, [K] or [L, K]; real.

    Returns: L contiguous tensors of the base's dtypes.

    Raises:
        TypeError, ValueError: arguments that don't fit each other.
    """
    tensors = as_list(base, "base")
    for l, tensor in enumerate(tensors):
        _check_tensor(tensor, tensors[0].device, "base", l)
    vectors = prepare_task_vectors(task_vectors, tensors)
    lambdas = _coefficients(coefficients, len(tensors), vectors.tasks)
    if not tensors:
        return []
    lambdas = lambdas.to(tensors[0].device).expand(len(tensors), vectors.tasks)
    merged = None
    if torch.is_grad_enabled():
        of_base = [l for l, tensor in enumerate(tensors) if tensor.requires_grad]
        if lambdas.requires_grad or of_base or vectors.differentiable:
            inputs = [*(tensors[l] for l in of_base), *(vectors.tensors[i] for i in vectors.differentiable)]
            merged = list(_WeightedMerge.apply(lambdas, tensors, vectors, of_base, *inputs))
    if merged is None:
        merged = native("weighted_merge")(tensors, *vectors.operands, lambdas)
    return same_kind(base)(merged)


def prepare_task_vectors(task_vectors: Sequence[Any] | TaskVectors, base: Any) -> TaskVectors:
    """Check task vectors against a base once, for `weighted_merge` to be called with them many times.

    Args:
        task_vectors: K sequences of L tensors, as `weighted_merge` takes them. Whether they require gradients is looked
            at here.
        base: the L tensors that they will be added to, or others of their shapes and device.

    Raises:
        TypeError, ValueError: the task vectors don't fit the base.
    """
    base = as_list(base, "base")
    shapes = [tensor.shape for tensor in base]
    if isinstance(task_vectors, TaskVectors):
        if task_vectors.shapes != shapes:
            fail("task_vectors", "task vectors prepared for tensors of the base's shapes", "others")
        if base and task_vectors.tensors:
            check_device(task_vectors.tensors[0], "task_vectors", base[0].device)
        return task_vectors
    if not isinstance(task_vectors, Sequence):
        fail("task_vectors", "a sequence of K sequences of tensors", type(task_vectors).__name__, TypeError)
    vectors: list[Tensor | QuantizedTensor] = []
    for k, task in enumerate(task_vectors):
        if len(task) != len(base):
            fail(f"task_vectors[{k}]", f"{len(base)} tensors, one for every one of base", len(task))
        if base:
            vectors += task if _fits(task, base[0].device, shapes) else _checked(task, k, base[0].device, shapes)
    columns: tuple[list, ...] = (vectors, [], [], [], [])
    if any(isinstance(vector, QuantizedTensor) for vector in vectors):
        nothing = base[0].new_empty(0)
        rows = [
            (v.codes, v.scale, v.zero_point, v.bits, v.group_size)
            if isinstance(v, QuantizedTensor)
            else (v, nothing, nothing, 0, 0)
            for v in vectors
        ]
        columns = tuple(map(list, zip(*rows, strict=True)))
    differentiable = [i for i, tensor in enumerate(columns[0]) if tensor.requires_grad]
    return TaskVectors(*columns, len(task_vectors), shapes, differentiable)


def _fits(task: Sequence[Any], device: torch.device, shapes: list[torch.Size]) -> bool:
    """Whether nothing of a task is to be converted or complained about: a quick look, as they are thousands."""
    return (
        all(isinstance(value, Tensor) for value in task)
        and [value.shape for value in task] == shapes
        and {value.dtype for value in task}.issubset(FLOAT_DTYPES)
        and {value.device for value in task} == {device}
    )


def _checked(
    task: Sequence[Any], k: int, device: torch.device, shapes: list[torch.Size]
) -> list[Tensor | QuantizedTensor]:
    values: list[Tensor | QuantizedTensor] = []
    for l, (value, shape) in enumerate(zip(task, shapes, strict=True)):
        if isinstance(value, QuantizedTensor):
            for part in (value.codes, value.scale, value.zero_point):
                if part.device != device:
                    check_device(part, _name("task_vectors", k, l), device)
        else:
            value = as_tensor(value, _name("task_vectors", k, l))
            _check_tensor(value, device, "task_vectors", k, l)
        if value.shape != shape:
            fail(_name("task_vectors", k, l), f"shape {list(shape)} as of base[{l}]", list(value.shape))
        values.append(value)
    return values


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
    """`inputs` are those of the base tensors and the task vectors that require gradients."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, base: list[Tensor], vectors: TaskVectors, of_base: list[int], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(coefficients, *vectors.tensors, *vectors.scales, *vectors.zero_points)
        ctx.bits, ctx.group_sizes = vectors.bits, vectors.group_sizes
        ctx.of_base, ctx.of_vectors = of_base, vectors.differentiable
        return tuple(native("weighted_merge")(base, *vectors.operands, coefficients))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *saved = ctx.saved_tensors
        layers, tasks = coefficients.shape
        count = layers * tasks
        vectors, rest = saved[:count], saved[count:]
        scales, zero_points = rest[: len(ctx.bits)], rest[len(ctx.bits) :]
        of_coefficients = None
        if ctx.needs_input_grad[0] and tasks:
            raw = native("weighted_merge_grad")(list(grads), vectors, scales, zero_points, ctx.bits, ctx.group_sizes)
            of_coefficients = raw.to(coefficients.dtype)
        of_vectors = []
        for i in ctx.of_vectors:
            k, l = divmod(i, layers)
            of_vectors.append((coefficients[l, k] * grads[l]).to(vectors[i].dtype))
        return of_coefficients, None, None, None, *(grads[l] for l in ctx.of_base), *of_vectors


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


def _by_task(
    like: list[Tensor],
    tensors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
) -> list[list[Tensor | QuantizedTensor]]:
    """K lists of L task vectors from the raw operator's arguments; `like`: L tensors of their shapes."""
    layers = len(like)

    def one(i: int) -> Tensor | QuantizedTensor:
        if not bits or not bits[i]:
            return tensors[i]
        return QuantizedTensor(tensors[i], scales[i], zero_points[i], bits[i], group_sizes[i], like[i % layers].shape)

    return [[one(k * layers + l) for l in range(layers)] for k in range(len(tensors) // layers)]


def _fallback(
    base: list[Tensor],
    task_vectors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
    coefficients: Tensor,
) -> list[Tensor]:
    tasks = _by_task(base, task_vectors, scales, zero_points, bits, group_sizes)
    return weighted_merge_reference(base, tasks, coefficients)


def _grad_fallback(
    grads: list[Tensor],
    task_vectors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
) -> Tensor:
    tasks = _by_task(grads, task_vectors, scales, zero_points, bits, group_sizes)
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
