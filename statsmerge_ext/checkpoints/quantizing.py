"""Quantising experts: writing their task vectors in the format of :mod:`statsmerge_ext.checkpoints.task_vectors`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.checkpoints.compatibility import (
    check_compatible,
    check_finite,
    floating_names,
    run_of,
    shape_of,
)
from statsmerge_ext.checkpoints.file_formats import SAFETENSORS_SUFFIX
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.task_vectors import FORMAT, PARTS, SHARED, group_size_of
from statsmerge_ext.checkpoints.weight_files import WeightFile
from statsmerge_ext.checkpoints.writing import atomic_output, check_output
from statsmerge_ext.errors import CheckpointError
from statsmerge_ext.ops import QuantizedTensor

_RUN = 2**20  # elements quantised at a time, a multiple of 8


def quantize_expert(
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    out: str | os.PathLike,
    *,
    bits: int = 4,
    group_size: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the task vector of ``expert`` to one file, quantised tensor by tensor (TVQ); atomic.

    Args:
        base, expert: checkpoints or state dicts.
        out: a ``.safetensors`` file.
        bits: 2, 3, 4 or 8.
        group_size: elements that share a scale, a multiple of 8; None: all of a tensor.

    Raises:
        CheckpointError: the expert does not fit the base, a tensor holds NaN or infinity, or ``out`` exists or cannot
            be written.
        ValueError: bits or group_size out of range.
    """
    out = _file(out)
    check_output(out, overwrite)
    experts = check_compatible(base, {"expert": expert})
    with atomic_output(out, overwrite=overwrite) as temporary:
        unchanged = _unchanged(base, experts["expert"])
        with closing(_Content(temporary, base, bits, group_size, None, fingerprint(base), unchanged)) as content:
            for name, (delta,) in _differences(base, experts, progress):
                content.add(name, delta)


def quantize_experts(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    out: str | os.PathLike,
    *,
    bits: int = 2,
    shared_bits: int = 3,
    group_size: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the task vectors of several experts in the residual form (RTVQ): a shared file and one for each expert.

    ``out``/shared.safetensors holds the mean task vector in ``shared_bits`` bits, ``out``/NAME.safetensors
    what is left of an expert's own once the quantised mean is taken off, in ``bits`` bits: bits + shared_bits / K a
    parameter and expert in all.

    Args:
        base, experts: checkpoints or state dicts.
        out: the directory to make.
        bits, shared_bits: 2, 3, 4 or 8.
        group_size: as in :func:`quantize_expert`.

    Raises:
        CheckpointError, ValueError: as :func:`quantize_expert`; an expert is called "shared".
    """
    out = Path(out)
    check_output(out, overwrite)
    if "shared" in experts:
        raise CheckpointError("experts: 'shared' is the name of the file that all of them share; choose another")
    experts = check_compatible(base, experts)
    known = fingerprint(base)
    unchanged = [_unchanged(base, expert) for expert in experts.values()]
    nowhere = set.intersection(*map(set, unchanged))
    whole = {name for name in floating_names(base) if len(shape_of(base, name)) < 2}  # these have no shared part
    with atomic_output(out, overwrite=overwrite, directory=True) as temporary, ExitStack() as files:

        def content(file: str, bits: int, shared: str | None, left_out: Collection[str]) -> _Content:
            path = temporary / file
            return files.enter_context(closing(_Content(path, base, bits, group_size, shared, known, left_out)))

        shared = content(SHARED, shared_bits, None, nowhere | whole)
        of_experts = [
            content(f"{name}{SAFETENSORS_SUFFIX}", bits, SHARED, nowhere | whole.intersection(own))
            for name, own in zip(experts, unchanged, strict=True)
        ]
        for name, deltas in _differences(base, experts, progress):
            mean = torch.stack(deltas).mean(0)
            mean = torch.zeros_like(mean) if name in whole else shared.add(name, mean)
            for of_expert, delta in zip(of_experts, deltas, strict=True):
                of_expert.add(name, delta - mean)


class _Content:
    """A file of quantised tensors that is being written.

    ``known`` is the base's fingerprint; ``unchanged`` are the tensors whose values are all zero.
    """

    def __init__(
        self,
        path: Path,
        base: Mapping[str, Tensor],
        bits: int,
        group_size: int | None,
        shared: str | None,
        known: str,
        unchanged: Collection[str],
    ) -> None:
        QuantizedTensor.quantize(torch.zeros(1), bits, group_size)  # refuses what is out of range
        self._bits, self._group_size, self._unchanged = bits, group_size, unchanged
        shapes = {name: shape_of(base, name) for name in floating_names(base)}
        facts = {
            "bits": bits,
            "group_size": group_size,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "base": known,
            "unchanged": [name for name in shapes if name in unchanged],
            "shared": shared,
        }
        infos: dict[str, TensorInfo] = {}
        for name, shape in shapes.items():
            if name in unchanged:
                continue
            if len(shape) < 2:
                infos[name] = TensorInfo(shape, torch.float32)
            else:
                infos |= {f"{name}.{part}": info for part, info in _parts(shape, bits, group_size).items()}
        self._file = WeightFile(path, infos, {"format": FORMAT, "facts": json.dumps(facts)})

    def add(self, name: str, delta: Tensor) -> Tensor:
        """Write a tensor, if it is not one of the unchanged; returns the values that a reader will see."""
        if name in self._unchanged:
            return delta
        if delta.dim() < 2:
            self._file.write(name, delta.float())
            return delta.float()
        values = torch.empty(delta.numel())
        for first, quantized in _quantized_runs(delta.reshape(-1), self._bits, self._group_size):
            group = first // (self._group_size or max(1, delta.numel()))
            self._file.write(f"{name}.codes", quantized.codes, first // 8 * self._bits)
            self._file.write(f"{name}.scale", quantized.scale, group)
            self._file.write(f"{name}.zero_point", quantized.zero_point, group)
            values[first : first + quantized.shape.numel()] = quantized.dequantize()
        return values.view(delta.shape)

    def close(self) -> None:
        self._file.close()


def _file(out: str | os.PathLike) -> Path:
    if Path(out).suffix != SAFETENSORS_SUFFIX:
        raise CheckpointError(f"{out}: a quantised task vector is a {SAFETENSORS_SUFFIX} file")
    return Path(out)


def _unchanged(base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are the same in both; their names stand before all values in a file, so they are found first."""

    def values(state: Mapping[str, Tensor], name: str) -> Tensor:
        return run_of(state, name, 0, shape_of(base, name).numel()).float()

    return [name for name in floating_names(base) if torch.equal(values(base, name), values(expert, name))]


def _differences(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], progress: bool
) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, the experts' task vectors there), one tensor after the other; none stays in memory."""
    for name in tqdm(floating_names(base), desc="Quantising", unit="tensor", disable=not progress):
        shape = shape_of(base, name)
        start = run_of(base, name, 0, shape.numel()).float()
        deltas = []
        for expert in experts.values():
            delta = run_of(expert, name, 0, shape.numel()).float() - start
            deltas.append(check_finite(name, delta.view(shape), getattr(expert, "path", "expert")))
        yield name, deltas


def _quantized_runs(flat: Tensor, bits: int, group_size: int | None) -> Iterator[tuple[int, QuantizedTensor]]:
    """(first element, quantised run) of a flat tensor: together what quantising it at once gives, in less memory."""
    step = _RUN if group_size is None else -(-_RUN // group_size) * group_size
    ends = flat.new_empty(0) if group_size or not len(flat) else torch.stack(flat.aminmax())
    for first in range(0, len(flat), step):
        run = flat[first : first + step]
        if group_size is not None:
            yield first, QuantizedTensor.quantize(run, bits, group_size)
            continue
        # With its ends behind it, a run of a single group gets the scale of the whole; their codes are left out again.
        padding = run[-1:].expand(-len(run) % 8)
        quantized = QuantizedTensor.quantize(torch.cat([run, padding, ends]), bits, None)
        codes = quantized.codes[: -(-len(run) // 8) * bits]
        whole = group_size_of(run.shape, None)
        yield first, QuantizedTensor(codes, quantized.scale, quantized.zero_point, bits, whole, run.shape)


def _parts(shape: torch.Size, bits: int, group_size: int | None) -> dict[str, TensorInfo]:
    """What a quantised tensor of that shape is stored as."""
    groups = -(-shape.numel() // group_size_of(shape, group_size))
    shapes = (-(-shape.numel() // 8) * bits, torch.uint8), (groups, torch.float32), (groups, torch.int32)
    return {part: TensorInfo(torch.Size((count,)), dtype) for part, (count, dtype) in zip(PARTS, shapes, strict=True)}
