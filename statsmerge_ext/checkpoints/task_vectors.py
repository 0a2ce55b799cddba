"""Quantised task vectors on disk: experts in a few bits a parameter (TVQ and RTVQ, arXiv 2503.06921).

A file is safetensors. Its metadata are "format" and "facts", JSON with
  bits, group_size   of every quantised tensor; group_size null: one group a tensor
  shapes             name → shape, of all tensors
  base               fingerprint of the base that the task vector starts from
  unchanged          names of the tensors that are not stored because all of their values are zero
  shared             null; or the name of another such file in the same directory whose values are added (RTVQ)
A tensor of two or more dimensions is stored as NAME.codes [bytes] uint8 (codes packed without gaps, least significant
bits first, padded to a multiple of 8 codes), NAME.scale [groups] float32 and NAME.zero_point [groups] int32; its values
are scale · (code − zero_point). Others are stored as NAME, float32: their bytes do not count and their errors would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.adapters import is_adapter, open_adapter
from statsmerge_ext.checkpoints.compatibility import (
    dtype_of,
)
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.reading import Checkpoint, open_checkpoint
from statsmerge_ext.errors import CheckpointError
from statsmerge_ext.ops import QuantizedTensor

FORMAT = "statsmerge-task-vector-1"
SHARED = "shared.safetensors"
PARTS = ("codes", "scale", "zero_point")


def open_expert(path: str | os.PathLike, base: Mapping[str, Tensor], device: str | torch.device = "cpu") -> Checkpoint:
    """Open an expert: any checkpoint; or a quantised task vector or LoRA adapter, read as the base plus its values.

    Args:
        path: as for :func:`open_checkpoint`.
        base: the model that it was fine-tuned from, a `Checkpoint` or a state dict.
        device: where the tensors are put when they are read.

    Raises:
        CheckpointError: the file is unreadable, a task vector from another base, or an adapter that is refused.
    """
    if is_adapter(Path(path)):
        return open_adapter(Path(path), base, device)
    checkpoint = open_checkpoint(path, device)
    if checkpoint.metadata.get("format") != FORMAT:
        return checkpoint
    expert = _QuantizedExpert(checkpoint, base)
    config = base.config if isinstance(base, Checkpoint) else None
    return Checkpoint(checkpoint.path, config, dict.fromkeys(expert.infos, expert), device, None)


class _QuantizedFile:
    """A file of this format, its values tensor by tensor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self._tensors = checkpoint
        try:
            facts = json.loads(checkpoint.metadata["facts"])
            self.shapes = {name: torch.Size(shape) for name, shape in facts["shapes"].items()}
            self.base, self.shared = facts["base"], facts["shared"]
            self._unchanged = frozenset(facts["unchanged"])
            self._bits, self._group_size = facts["bits"], facts["group_size"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: its header describes no quantised task vector: {error!r}") from error

    def values(self, name: str) -> Tensor:
        """The values of a tensor, float32 in its shape."""
        shape = self.shapes[name]
        if name in self._unchanged:
            return torch.zeros(shape)
        try:
            if len(shape) < 2:
                return self._tensors[name].reshape(shape)
            parts = (self._tensors[f"{name}.{part}"] for part in PARTS)
            group_size = group_size_of(shape, self._group_size)
            return QuantizedTensor(*parts, self._bits, group_size, shape).dequantize()
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} is not as its header says: {error}") from error


class _QuantizedExpert:
    """A quantised task vector on its base, in the place of a file of a `Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, base: Mapping[str, Tensor]) -> None:
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self._base = base
        self._files = [_QuantizedFile(checkpoint)]
        if self._files[0].shared is not None:
            self._files.append(_QuantizedFile(_sibling(checkpoint, self._files[0].shared)))
        self.files = [file.path for file in self._files]
        known = fingerprint(base)
        for file in self._files:
            if file.base != known:
                raise CheckpointError(f"{file.path}: is a task vector from another base: the fingerprints differ")
        self.infos = {
            name: TensorInfo(shape, torch.promote_types(dtype_of(base, name), torch.float32))
            for name, shape in self._files[0].shapes.items()
        }

    def read(self, name: str) -> Tensor:
        base = self._base[name].to(self.infos[name].dtype)
        return base + sum(file.values(name) for file in self._files).to(base)


def _sibling(checkpoint: Checkpoint, name: object) -> Checkpoint:
    # A plain file name only: anything with a directory in it could lead out of the checkpoint.
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{checkpoint.path}: shares {name!r}, which is not a file in the same directory")
    return open_checkpoint(checkpoint.path.parent / name)


def group_size_of(shape: torch.Size, group_size: int | None) -> int:
    """How many elements of a tensor share a scale: all, up to a whole number of 8 codes, unless that is given."""
    return group_size or max(8, -(-shape.numel() // 8) * 8)
