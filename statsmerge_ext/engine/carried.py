"""What suspended forward passes carry from block to block: in memory up to a budget, and beyond it in files.

A pass is suspended amid the model's own code, whose variables hold hidden states. They cannot be taken away
from there, but the memory behind them can: it is given back after its bytes are written, and read again before
the pass goes on. Which tensors there are is known from watching torch's functions give them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SMALLEST = 2**12  # bytes that are worth a write


class CarriedStates:
    """What suspended passes hold: all tensors that they have made and not let go of.

    Args:
        directory: where files are made; it need not exist.
        budget: bytes that may stay in memory.
        shared: tensors that passes have in common: the model's buffers, and batches that several of them run.
    """

    def __init__(self, directory: Path, budget: int, shared: Iterable[Tensor]) -> None:
        self._directory, self._budget = directory, budget
        self._shared = Counter(_place(tensor) for tensor in shared)
        self._made: dict[Hashable, list[weakref.ref[Tensor]]] = {}
        self._in_files: dict[Hashable, list[tuple[Tensor, int]]] = {}
        self._held: dict[Hashable, int] = {}
        self._most = 0  # bytes that all passes have had at once, in memory or in files

    def following(self, key: Hashable) -> Following:
        """The context in which the pass ``key`` runs, in its own thread."""
        return Following(self._made.setdefault(key, []))

    @contextmanager
    def sharing(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """While the context is open, these tensors (weights) are shared, too."""
        places = Counter(_place(tensor) for tensor in tensors)
        self._shared += places
        try:
            yield
        finally:
            self._shared -= places

    def suspend(self, key: Hashable) -> None:
        """The pass ``key`` has stopped."""
        alive = [tensor for ref in self._made[key] if (tensor := ref()) is not None]
        self._made[key][:] = map(weakref.ref, alive)
        known: dict[int, Tensor] = {}  # by the memory behind them
        for tensor in alive:
            storage = tensor.untyped_storage()
            if storage.nbytes() >= _SMALLEST and storage.resizable() and storage.data_ptr() not in self._shared:
                known.setdefault(storage.data_ptr(), tensor)
        size = sum(tensor.untyped_storage().nbytes() for tensor in known.values())
        if sum(self._held.values()) + size > self._budget:
            self._in_files[key] = self._write(key, list(known.values()))
        else:
            self._held[key] = size
        in_files = sum(size for of_pass in self._in_files.values() for _, size in of_pass)
        self._most = max(self._most, sum(self._held.values()) + in_files)

    def resume(self, key: Hashable) -> None:
        """The pass ``key`` is about to go on: all that it has is in memory again."""
        self._held.pop(key, None)
        for place, (tensor, size) in enumerate(self._in_files.pop(key, ())):
            content = torch.from_numpy(np.fromfile(self._file(key, place), np.uint8))
            tensor.untyped_storage().resize_(size)
            _bytes(tensor).copy_(content)

    def in_memory(self, times: float) -> int:
        """Bytes in memory at most, if passes had so many times what they have had."""
        return int(min(self._budget, times * self._most))

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


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Following(TorchFunctionMode):
    """Notes what torch's functions give to a pass."""

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self._made = made
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context for what is done in the pass's thread and is not the pass's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self._paused:
            results = result if isinstance(result, (tuple, list)) else (result,)
            self._made += [weakref.ref(x) for x in results if isinstance(x, Tensor) and x.layout == torch.strided]
        return result
