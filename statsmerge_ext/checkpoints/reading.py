"""Opening a checkpoint on disk as a lazy mapping from tensor names to tensors.

Nothing here needs a network, the transformers library or unrestricted unpickling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.file_formats import SafetensorsFile, WeightsFile, open_file
from statsmerge_ext.errors import CheckpointError

# The order in which transformers looks for weights in a directory.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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
        entries: dict[str, WeightsFile],
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
            if isinstance(file, SafetensorsFile):
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
        self, entries: Mapping[str, WeightsFile], *, without: Collection[str] = (), config: dict | None
    ) -> Checkpoint:
        """The same checkpoint with other files for some of its tensors, without others, and with another ``config``."""
        kept = {name: entries.get(name, file) for name, file in self._entries.items() if name not in without}
        return Checkpoint(self.path, config, kept, self._device, self._at_least)

    def _delivered(self, tensor: Tensor) -> Tensor:
        widen = self._at_least is not None and tensor.is_floating_point()
        return tensor.to(self._device, torch.promote_types(tensor.dtype, self._at_least) if widen else tensor.dtype)


def _file_entries(path: Path) -> dict[str, WeightsFile]:
    file = open_file(path)
    if not file.infos:
        raise CheckpointError(f"{path}: holds no tensors")
    return dict.fromkeys(file.infos, file)


def _directory_entries(directory: Path) -> dict[str, WeightsFile]:
    for name in WEIGHT_FILES:
        if (directory / name).exists():
            return _sharded_entries(directory / name) if name.endswith(".json") else _file_entries(directory / name)
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory}: is a PEFT adapter, not a full checkpoint; it can only be an expert")
    raise CheckpointError(f"{directory}: holds none of {', '.join(WEIGHT_FILES)}")


def _sharded_entries(index_path: Path) -> dict[str, WeightsFile]:
    index = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{index_path}: 'weight_map' must map tensor names to file names")
    shards: dict[str, WeightsFile] = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            shards[shard] = _open_shard(index_path, name, shard)
        if name not in shards[shard].infos:
            file = index_path.parent / shard
            raise CheckpointError(f"{file}: tensor {name!r} is missing, although {index_path.name} lists it")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _open_shard(index_path: Path, name: str, shard: str) -> WeightsFile:
    # A plain file name only: anything with a directory in it could lead out of the checkpoint.
    if shard in ("", ".", "..") or "/" in shard or "\\" in shard:
        raise CheckpointError(f"{index_path}: tensor {name!r} points to {shard!r}, not to a file in the same directory")
    file = index_path.parent / shard
    if not file.exists():
        raise CheckpointError(f"{file}: missing shard, listed in {index_path.name} for tensor {name!r}")
    return open_file(file)


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
