"""Opening a checkpoint on disk as a lazy mapping from tensor names to tensors.

Nothing here needs a network, the transformers library or unrestricted unpickling.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Collection, Iterator, Mapping
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
# The order in which transformers looks for weights in a directory.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Bytes behind what is read where a file leaves the page cache: other threads are reading near by.
_DROPPED_BEHIND = 2**25


def open_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu", at_least: torch.dtype | None = None
) -> Checkpoint:
    """Open a checkpoint: a Hugging Face directory, a ``.safetensors`` file or a ``.pt``/``.pth``/``.bin`` state dict.

    A directory holds ``model.safetensors``, ``pytorch_model.bin``, or shards with their index file. Pickle files are
    read with ``weights_only=True``; a state dict nested under ``state_dict``, ``model_state_dict`` or ``model`` is
    found. Headers, offsets and indices are validated here, tensors are read when they are asked for.

    Args:
        path: directory or file.
        device: where the tensors are put when they are read.
        at_least: floating-point tensors of a narrower dtype are converted to this one (or to what holds both) when
            they are read.

    Raises:
        CheckpointError: naming the file (and tensor) that is missing, unreadable, truncated or refused.
    """
    path = Path(path)
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").exists() else None
        return Checkpoint(path, config, _directory_entries(path), device, at_least)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory (checkpoints are local; nothing is downloaded)")
    return Checkpoint(path, None, _file_entries(path), device, at_least)


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint on disk: a lazy, read-only mapping from tensor names to tensors; made by `open_checkpoint`.

    Attributes:
        path: the directory or file that was opened.
        config: the parsed ``config.json`` of a directory, or None.
    """

    def __init__(
        self,
        path: Path,
        config: dict | None,
        entries: dict[str, _File],
        device: str | torch.device,
        at_least: torch.dtype | None,
    ):
        self.path = path
        self.config = config
        self._entries = entries
        self._device = device
        self._at_least = at_least

    def __getitem__(self, name: str) -> Tensor:
        return self._delivered(self._entries[name].read(name))

    def run(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Elements ``start`` … ``stop`` of a tensor taken as flat, [stop − start].

        From a safetensors file they are read rather than mapped: the memory that takes is the caller's to count, and a
        file that is cut short meanwhile is an error. From anything else the whole tensor is read.

        Args:
            into: uint8, contiguous, on the CPU: memory to read to, and to return a view of, where they are read.

        Raises CheckpointError when it cannot be read.
        """
        file = self._entries[name]
        if not self.has_runs(name):
            return self._delivered(file.read(name).reshape(-1)[start:stop])
        return self._delivered(file.read_run(name, start, stop, into))

    def leave_page_cache(self) -> None:
        """Have what :meth:`run` reads of safetensors files leave the page cache soon after."""
        for file in self._entries.values():
            if isinstance(file, _SafetensorsFile):
                file.stays_cached = False

    def has_runs(self, name: str) -> bool:
        """Whether :meth:`run` reads a part of the tensor without reading all of it."""
        return hasattr(self._entries[name], "read_run")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without reading it."""
        return self._entries[name].infos[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, without reading it."""
        return self._entries[name].infos[name].dtype

    @property
    def metadata(self) -> dict[str, str]:
        """The texts in the header of a safetensors file; of sharded ones, in the first."""
        return next(iter(self._entries.values())).metadata

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entries[name].path

    @property
    def files(self) -> list[Path]:
        """All files that hold its tensors."""
        return sorted({file for entry in self._entries.values() for file in entry.files})

    def identity(self) -> list:
        """JSON-able facts that change when the checkpoint's files are changed; no tensor is read for them."""
        tensors = [(name, list(self.shape(name)), str(self.dtype(name))) for name in self]
        return [[(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files], tensors]

    def with_entries(
        self, entries: Mapping[str, _File], *, without: Collection[str] = (), config: dict | None
    ) -> Checkpoint:
        """The same checkpoint with other files for some of its tensors, without others, and with another ``config``."""
        kept = {name: entries.get(name, file) for name, file in self._entries.items() if name not in without}
        return Checkpoint(self.path, config, kept, self._device, self._at_least)

    def _delivered(self, tensor: Tensor) -> Tensor:
        widen = self._at_least is not None and tensor.is_floating_point()
        return tensor.to(self._device, torch.promote_types(tensor.dtype, self._at_least) if widen else tensor.dtype)


class _SafetensorsFile:
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


class _PickleFile:
    """One ``torch.save`` file with a state dict, memory-mapped where its format allows."""

    def __init__(self, path: Path):
        self.path = path
        self.files = [path]
        self.metadata: dict[str, str] = {}
        self._state = _find_state_dict(path, _load_pickle(path))
        self.infos = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]


_File = _SafetensorsFile | _PickleFile


def _open_file(path: Path) -> _File:
    if path.suffix == SAFETENSORS_SUFFIX:
        return _SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _PickleFile(path)
    suffixes = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
    raise CheckpointError(f"{path}: unknown kind of file {path.suffix!r}; expected a directory or one of {suffixes}")


def _file_entries(path: Path) -> dict[str, _File]:
    file = _open_file(path)
    if not file.infos:
        raise CheckpointError(f"{path}: holds no tensors")
    return dict.fromkeys(file.infos, file)


def _directory_entries(directory: Path) -> dict[str, _File]:
    for name in WEIGHT_FILES:
        if (directory / name).exists():
            return _sharded_entries(directory / name) if name.endswith(".json") else _file_entries(directory / name)
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory}: is a PEFT adapter, not a full checkpoint; it can only be an expert")
    raise CheckpointError(f"{directory}: holds none of {', '.join(WEIGHT_FILES)}")


def _sharded_entries(index_path: Path) -> dict[str, _File]:
    index = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{index_path}: 'weight_map' must map tensor names to file names")
    shards: dict[str, _File] = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            shards[shard] = _open_shard(index_path, name, shard)
        if name not in shards[shard].infos:
            file = index_path.parent / shard
            raise CheckpointError(f"{file}: tensor {name!r} is missing, although {index_path.name} lists it")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _open_shard(index_path: Path, name: str, shard: str) -> _File:
    # A plain file name only: anything with a directory in it could lead out of the checkpoint.
    if shard in ("", ".", "..") or "/" in shard or "\\" in shard:
        raise CheckpointError(f"{index_path}: tensor {name!r} points to {shard!r}, not to a file in the same directory")
    file = index_path.parent / shard
    if not file.exists():
        raise CheckpointError(f"{file}: missing shard, listed in {index_path.name} for tensor {name!r}")
    return _open_file(file)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


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
