"""What the operators share: the native library, arrays of other libraries, argument checks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

try:
    importlib.import_module("statsmerge_ext._C")  # registers torch.ops.statsmerge.*
    _IMPORT_ERROR: ImportError | None = None
except ImportError as error:
    _IMPORT_ERROR = error

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACCUMULATOR_DTYPES = (torch.float64, torch.float32)

_LIBRARY = torch.library.Library("statsmerge", "IMPL")


def register(name: str, *, fake: Callable, fallback: Callable) -> None:
    """Give operator `name` its fake kernel, and the plain-torch kernel that devices without a native one use."""
    if _IMPORT_ERROR is None:
        torch.library.register_fake(f"statsmerge::{name}", fake)
        _LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")


def native(name: str) -> torch._ops.OpOverload:
    """The raw operator; without the native library, an error that says how to get it."""
    if _IMPORT_ERROR is not None:
        raise RuntimeError(
            f"statsmerge::{name} needs the native library, which could not be loaded ({_IMPORT_ERROR}); "
            "build it with `pip install -e . --no-build-isolation`"
        ) from _IMPORT_ERROR
    return getattr(torch.ops.statsmerge, name).default


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor on the memory of `value`: a tensor, a NumPy array or anything with DLPack."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if not value.flags.writeable or any(stride < 0 for stride in value.strides):
            value = value.copy()  # torch can't hold these; outputs are checked by `as_output`
        try:
            return torch.from_numpy(value)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    raise TypeError(f"{name}: expected a tensor, a NumPy array or an array with DLPack, got {type(value).__name__}")


def as_output(value: Any, name: str) -> Tensor:
    """As `as_tensor`, for an argument that is updated in place."""
    if isinstance(value, np.ndarray) and (not value.flags.writeable or any(stride < 0 for stride in value.strides)):
        raise ValueError(f"{name}: expected a writeable array without negative strides")
    return as_tensor(value, name)


def updated(value: Any, tensor: Tensor) -> Any:
    """`value`, whose memory `tensor` of `as_output` was written to.

    An array of a library with streams of its own, as CuPy's, is handed back to it through DLPack: whatever its current
    stream does from now on comes after what torch's did.
    """
    same_kind(value)(tensor)
    return value


def as_list(value: Any, name: str) -> list[Tensor]:
    """The tensors of a sequence of arrays, or of the first dimension of a single array."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [as_tensor(item, f"{name}[{i}]") for i, item in enumerate(value)]
    array = as_tensor(value, name)
    if array.dim() == 0:
        fail(name, "a list of tensors, or one tensor of several", "a tensor without dimensions")
    return list(array.unbind(0))


def same_kind(like: Any) -> Callable[[Any], Any]:
    """A function that turns tensors (also in lists and named tuples) into the kind of array that `like` is."""
    if isinstance(like, (list, tuple)):
        like = like[0] if like else None
    if like is None or isinstance(like, Tensor) or not hasattr(like, "__dlpack__"):
        return lambda result: result
    array_module = importlib.import_module(type(like).__module__.partition(".")[0])

    def convert(result: Any) -> Any:
        if isinstance(result, Tensor):
            result = result.detach()
            if array_module is np:
                return result.numpy()
            # torch exports tensors of the current device only
            with torch.cuda.device(result.device) if result.is_cuda else nullcontext():
                return array_module.from_dlpack(result)
        if isinstance(result, tuple):
            return type(result)(*(convert(item) for item in result))
        if isinstance(result, list):
            return [convert(item) for item in result]
        return result

    return convert


def fail(name: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: expected {expected}, got {got}")


def check_dtype(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        fail(name, expected, str(tensor.dtype).removeprefix("torch."), TypeError)


def check_shape(tensor: Tensor, name: str, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        fail(name, f"shape {list(shape)}", list(tensor.shape))


def check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        fail(name, f"a tensor on {device}", f"one on {tensor.device}")


def check_nonnegative(value: float, name: str) -> None:
    if not 0 <= value < float("inf"):
        fail(name, "a finite number of at least 0", value)
