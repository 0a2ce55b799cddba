"""What suspended forward passes carry from block to block: in memory up to a budget, and beyond it in files.

A pass is suspended amid the model's own code, whose variables hold the hidden states. They cannot be taken away
from there, but the memory behind them can: it is given back after its bytes are written, and read again before
the pass goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 2**12  # bytes that are worth a write


class CarriedStates:
    """The hidden states of suspended passes.

    Args:
        directory: where files are made; it need not exist.
        budget: bytes that may stay in memory.
        shared: tensors that are every pass's and no hidden state: the model's parameters and buffers.

    Attributes:
        most: bytes that all passes have had at once, in memory or in files.
    """

    def __init__(self, directory: Path, budget: int, shared: Iterable[Tensor]) -> None:
        self._directory, self._budget = directory, budget
        self._shared = {id(tensor) for tensor in shared}
        self._known: dict[Hashable, list[weakref.ref[Tensor]]] = {}
        self._in_files: dict[Hashable, list[tuple[Tensor, int]]] = {}
        self._held: dict[Hashable, int] = {}
        self.most = 0

    def suspend(self, key: Hashable, arguments: object, samples: int) -> None:
        """The pass ``key`` has stopped where a module is called with ``arguments`` (nested tuples, lists, mappings).

        Floating-point tensors [samples, …] among them, of this call and of earlier ones, are its hidden states.
        """
        known = [tensor for ref in self._known.get(key, ()) if (tensor := ref()) is not None]
        places = {tensor.untyped_storage().data_ptr() for tensor in known}
        for tensor in _tensors(arguments):
            is_state = tensor.is_floating_point() and tensor.dim() > 1 and len(tensor) == samples
            is_state &= id(tensor if tensor._base is None else tensor._base) not in self._shared
            storage = tensor.untyped_storage()
            if is_state and storage.nbytes() >= _SMALLEST and storage.data_ptr() not in places:
                places.add(storage.data_ptr())
                known.append(tensor)
        self._known[key] = [weakref.ref(tensor) for tensor in known]
        size = sum(tensor.untyped_storage().nbytes() for tensor in known)
        if sum(self._held.values()) + size > self._budget:
            self._in_files[key] = self._write(key, known)
        else:
            self._held[key] = size
        in_files = sum(size for of_pass in self._in_files.values() for _, size in of_pass)
        self.most = max(self.most, sum(self._held.values()) + in_files)

    def resume(self, key: Hashable) -> None:
        """The pass ``key`` is about to go on: all that it has is in memory again."""
        self._held.pop(key, None)
        for place, (tensor, size) in enumerate(self._in_files.pop(key, ())):
            content = torch.from_numpy(np.fromfile(self._file(key, place), np.uint8))
            tensor.untyped_storage().resize_(size)
            _bytes(tensor).copy_(content)

    def forget(self) -> None:
        """Remove all files. Every pass has to be at its end."""
        for path in self._directory.glob("*.states"):
            path.unlink()

    def _write(self, key: Hashable, tensors: list[Tensor]) -> list[tuple[Tensor, int]]:
        self._directory.mkdir(parents=True, exist_ok=True)
        written = []
        for place, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            with open(self._file(key, place), "wb") as file:
                # A copy: torch no longer resizes memory that NumPy has seen.
                file.write(memoryview(_bytes(tensor).to("cpu", copy=True).numpy()))
            written.append((tensor, storage.nbytes()))
            storage.resize_(0)
        return written

    def _file(self, key: Hashable, place: int) -> Path:
        return self._directory / f"{key}-{place}.states"


def _bytes(tensor: Tensor) -> Tensor:
    """The whole memory behind ``tensor``, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
