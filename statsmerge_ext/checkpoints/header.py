"""Reading and validating the header of a safetensors file before any of its tensors is touched.

The format is 8 bytes (little-endian length of the header), the header (JSON: name → dtype, shape, data_offsets) and
the data, which the tensors cover without gaps or overlaps (https://huggingface.co/docs/safetensors). Whatever deviates
is refused here, with the file and the tensor named, so that a truncated download or a hostile file is never mapped.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from statsmerge_ext.errors import CheckpointError

# The limit of the reference implementation: a header of this size describes millions of tensors.
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, and the byte of its file that it begins at (None: it is in no plain file)."""

    shape: torch.Size
    dtype: torch.dtype
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors (name → shape and dtype, in the header's order) and the metadata texts of a safetensors file.

    Raises:
        CheckpointError: the file is missing, empty, truncated or not a valid safetensors file; names the file and,
            where one is at fault, the tensor.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _damaged(path, f"{size} bytes, too short for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
            if length > size - 8:
                raise _damaged(
                    path,
                    f"its header claims {length} bytes, but only {size - 8} follow: truncated, or not safetensors",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = _parse(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "__metadata__ in its header is not a mapping of texts")
    data_bytes = size - 8 - length
    infos, spans = {}, []
    for name, entry in entries.items():
        infos[name], span = _check_entry(path, name, entry, data_bytes)
        infos[name] = replace(infos[name], offset=8 + length + span[0])
        spans.append((*span, name))
    _check_coverage(path, spans, data_bytes)
    return infos, metadata


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}")


def _parse(path: Path, raw: bytes) -> dict:
    def no_duplicates(pairs):
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            raise _damaged(path, f"key {next(n for n in names if names.count(n) > 1)!r} appears twice in its header")
        return entries

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error}): damaged, or not a safetensors file") from error
    if not isinstance(entries, dict):
        raise _damaged(path, f"its header is a JSON {type(entries).__name__}, expected an object")
    return entries


def _check_entry(path: Path, name: str, entry: object, data_bytes: int) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(path, f"tensor {name!r}: its header entry lacks dtype, shape or data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise _damaged(
            path, f"tensor {name!r}: dtype {entry['dtype']!r} is not supported; known are {', '.join(DTYPES)}"
        )
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise _damaged(path, f"tensor {name!r}: shape {shape!r} is not a list of non-negative integers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"tensor {name!r}: data_offsets {offsets!r} are not [begin, end]")
    begin, end = offsets
    if end > data_bytes:
        raise _damaged(
            path, f"tensor {name!r}: ends at byte {end} of the data, but the file holds {data_bytes}: truncated"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        expected = math.prod(shape) * dtype.itemsize
        raise _damaged(
            path,
            f"tensor {name!r}: {end - begin} bytes stored, expected {expected} for {entry['dtype']} of shape {shape}",
        )
    return TensorInfo(torch.Size(shape), dtype), (begin, end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_coverage(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin < position:
            raise _damaged(
                path,
                f"tensor {name!r}: overlaps the tensor before it (begins at {begin}, the other ends at {position})",
            )
        if begin > position:
            raise _damaged(path, f"tensor {name!r}: {begin - position} bytes before it belong to no tensor")
        position = end
    if position != data_bytes:
        raise _damaged(path, f"its tensors cover {position} bytes of data, but the file holds {data_bytes}")
