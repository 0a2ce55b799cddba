"""Writing safetensors files whose tensors are known beforehand, piece by piece and in any order.

Files get their full size and header at once, so that a disk that is too small is found out before anything is
computed, and so that several threads or processes can fill them in.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.header import DTYPES, TensorInfo, read_header
from statsmerge_ext.checkpoints.page_cache import drop
from statsmerge_ext.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
# Of a file that is to leave the page cache: bytes that are sent to the disk together, and how far behind them what the
# disk was sent is dropped.
_WRITTEN_OUT, _DROPPED_BEHIND = 2**22, 2**28


class WeightFile:
    """One safetensors file of given tensors.

    Args:
        path: the file; made in its full size unless it is reopened.
        infos: name → shape and dtype of every tensor.
        metadata: texts for the header.
        reopen: go on with a file that is there already and has the same tensors.
        stays_cached: what is written may stay in the page cache.

    Raises:
        CheckpointError: a dtype that safetensors lacks; a file to be reopened that is damaged.
        OSError: it cannot be written (full disk).
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        *,
        reopen: bool = False,
        stays_cached: bool = True,
    ) -> None:
        self.path, self._stays_cached = path, stays_cached
        if reopen:
            self._places = {name: info.offset for name, info in read_header(path)[0].items()}
            self._file = open(path, "r+b", buffering=0)
            return
        header, size = self._layout(infos, metadata or {})
        self._file = open(path, "w+b", buffering=0)
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)
            self._write(header, 0)
        except BaseException:
            self._file.close()
            raise

    @property
    def names(self) -> list[str]:
        """The tensors in the order of their bytes."""
        return list(self._places)

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Put the elements of ``tensor``, of any shape, in place from element ``first`` of tensor ``name`` on."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():  # torch cannot view an empty tensor as bytes
            data = memoryview(flat.view(torch.uint8).numpy())
            self._write(data, self._places[name] + first * flat.itemsize)

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _layout(self, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, int]:
        for name, info in infos.items():
            if info.dtype not in _NAMES:
                raise CheckpointError(f"{self.path}: tensor {name!r}: safetensors has no dtype {info.dtype}")
        # Wide types first: every tensor then starts at a multiple of its element size.
        order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        self._places, position = {}, 0
        for name in order:
            info = infos[name]
            end = position + info.nbytes
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
            self._places[name] = position
            position = end
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        header = struct.pack("<Q", len(header)) + header
        self._places = {name: len(header) + place for name, place in self._places.items()}
        return header, len(header) + position

    def _write(self, data: bytes | memoryview, position: int) -> None:
        data, first = memoryview(data), position
        while data:
            written = os.pwrite(self._file.fileno(), data, position)
            data, position = data[written:], position + written
        if not self._stays_cached and position // _WRITTEN_OUT > first // _WRITTEN_OUT:
            drop(self._file.fileno(), first - _DROPPED_BEHIND, position)


class ShardedWeights:
    """The weight files of a Hugging Face directory: one, or shards with their index.

    Args:
        directory: where they are made.
        infos: name → shape and dtype of every tensor, in order.
        shard_bytes: largest size of a file's tensors; a larger tensor gets a file of its own.
        reopen: go on with files that the same arguments have made.
        stays_cached: as of :class:`WeightFile`.

    Raises as :class:`WeightFile`.
    """

    def __init__(
        self,
        directory: Path,
        infos: Mapping[str, TensorInfo],
        shard_bytes: int,
        *,
        reopen: bool = False,
        stays_cached: bool = True,
    ) -> None:
        shards = _plan_shards(infos, shard_bytes)
        self._files: list[WeightFile] = []
        self._file_of: dict[str, WeightFile] = {}
        try:
            for number, names in enumerate(shards, 1):
                file = f"model-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
                of_shard = {name: infos[name] for name in names}
                opened = WeightFile(
                    directory / f"{file}.safetensors", of_shard, reopen=reopen, stays_cached=stays_cached
                )
                self._files.append(opened)
                self._file_of.update(dict.fromkeys(names, self._files[-1]))
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            weight_map = {name: file.path.name for name, file in self._file_of.items()}
            index = {"metadata": {"total_size": sum(i.nbytes for i in infos.values())}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def names(self) -> list[str]:
        """The tensors in the order of their bytes, file after file."""
        return [name for file in self._files for name in file.names]

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """As :meth:`WeightFile.write`."""
        self._file_of[name].write(name, tensor, first)

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _plan_shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Consecutive names whose tensors fit together in a shard; a tensor larger than a shard gets one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return shards
