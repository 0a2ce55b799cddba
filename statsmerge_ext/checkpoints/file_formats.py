"""The files that hold weights: safetensors, and state dicts that torch has pickled.

Headers and offsets are validated when a file is opened; tensors are read when they are asked for.
"""

from __future__ import annotations

import os
import pickle
import threading
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from statsmerge_ext.checkpoints.header import TensorInfo, read_header
from statsmerge_ext.checkpoints.page_cache import drop
from statsmerge_ext.errors import CheckpointError

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
# Under these keys training scripts store the state dict beside optimiser state and counters.
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
# Bytes behind what is read where a file leaves the page cache: other threads are reading near by.
_DROPPED_BEHIND = 2**25


class SafetensorsFile:
    """One safetensors file, memory-mapped at the first read of a whole tensor.

    Attributes:
        stays_cached: what is read in runs may stay in the page cache.
    """

    stays_cached = True

    def __init__(self, path: Path):
        self.path = path
        self.files = [path]
        self.infos, self.metadata = read_header(path)
        self._handle = None
        self._file: FileIO | None = None
        # Of threads that open the file at once the last would close the others' descriptors, amid their reading.
        self._opening = threading.Lock()

    def read(self, name: str) -> Tensor:
        try:
            with self._opening:
                if self._handle is None:
                    self._handle = safe_open(self.path, framework="pt", device="cpu")
            return self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error

    def read_run(self, name: str, start: int, stop: int, into: Tensor | None) -> Tensor:
        info = self.infos[name]
        size = (stop - start) * info.dtype.itemsize
        data = torch.empty(size, dtype=torch.uint8) if into is None else into[:size]
        rest, position = memoryview(data.numpy()), info.offset + start * info.dtype.itemsize
        first = position
        try:
            with self._opening:
                if self._file is None:
                    self._file = open(self.path, "rb", buffering=0)
            while rest:
                count = os.preadv(self._file.fileno(), [rest], position)
                if not count:
                    raise CheckpointError(f"{self.path}: tensor {name!r}: the file was cut short while it was read")
                rest, position = rest[count:], position + count
            if not self.stays_cached:
                drop(self._file.fileno(), first - 2 * _DROPPED_BEHIND, position - _DROPPED_BEHIND)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error.strerror or error}") from error
        return data.view(info.dtype)


class PickleFile:
    """One ``torch.save`` file with a state dict, memory-mapped where its format allows."""

    def __init__(self, path: Path):
        self.path = path
        self.files = [path]
        self.metadata: dict[str, str] = {}
        self._state = _find_state_dict(path, _load_pickle(path))
        self.infos = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]


WeightsFile = SafetensorsFile | PickleFile


def open_file(path: Path) -> WeightsFile:
    """Open a file of weights. Raises CheckpointError for one of another kind, or that is damaged."""
    if path.suffix == SAFETENSORS_SUFFIX:
        return SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return PickleFile(path)
    suffixes = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
    raise CheckpointError(f"{path}: unknown kind of file {path.suffix!r}; expected a directory or one of {suffixes}")


def _load_pickle(path: Path) -> object:
    try:
        # Files written before torch 1.6 are not zip archives and cannot be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds Python objects or code besides tensors, which is refused"
        raise CheckpointError(f"{path}: {reason}; save a plain state dict or safetensors instead") from error
    except Exception as error:  # On damaged bytes the unpickler fails in any way there is: KeyError, IndexError, …
        reason = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise CheckpointError(f"{path}: is truncated or not a torch file ({type(error).__name__}: {reason})") from error


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _find_state_dict(path: Path, content: object) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for key in NESTED_KEYS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict (name → tensor)")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{path}: entry {name!r} is a {kind}, expected a state dict (name → tensor)")
        if value.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor {name!r} is stored as {value.layout}, expected a dense tensor")
    return content
