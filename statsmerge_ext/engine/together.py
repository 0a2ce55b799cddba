"""Running several batches as one, and taking what the model says of them apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from statsmerge_ext.calibration import Batch


def groups(batches: Sequence[Batch], most: int) -> list[list[int]]:
    """The numbers of the batches that are run as one: alike but for their samples, and at most ``most`` samples."""
    gathered: list[list[int]] = []
    open_groups: dict[tuple, int] = {}
    for place, batch in enumerate(batches):
        kind = _kind(batch)
        at = open_groups.get(kind)
        if at is None or sum(samples(batches[i]) for i in (*gathered[at], place)) > most:
            open_groups[kind] = at = len(gathered)
            gathered.append([])
        gathered[at].append(place)
    return gathered


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all samples, in order."""
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], Tensor):
        return torch.cat(list(batches))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def take_apart(output: object, sizes: Sequence[int]) -> list[object]:
    """What a model says of a batch that :func:`join` made, as if it had been asked for each of its parts.

    Tensors are cut along their first dimension, also those in mappings (the outputs of transformers), tuples and
    lists; anything without samples (None, numbers) is in every part.

    Raises TypeError for an output of another kind.
    """
    if len(sizes) == 1:
        return [output]
    if isinstance(output, Tensor):
        return list(output.split(list(sizes))) if output.dim() and len(output) == sum(sizes) else [output] * len(sizes)
    if isinstance(output, Mapping):
        columns = {key: take_apart(value, sizes) for key, value in output.items()}
        return [type(output)({key: column[i] for key, column in columns.items()}) for i in range(len(sizes))]
    if isinstance(output, (tuple, list)):
        rows = zip(*(take_apart(value, sizes) for value in output), strict=True)
        return [type(output)(row) for row in rows]
    if output is None or isinstance(output, (bool, int, float)):
        return [output] * len(sizes)
    raise TypeError(f"expected tensors, or mappings, tuples or lists of them, got {type(output).__name__}")


def samples(batch: Batch) -> int:
    """How many samples a batch has."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def one_sample(batch: Batch) -> Batch:
    """The first sample of a batch."""
    return batch[:1] if isinstance(batch, Tensor) else {key: tensor[:1] for key, tensor in batch.items()}


def _kind(batch: Batch) -> tuple:
    """What batches have to agree in."""
    entries = {"": batch} if isinstance(batch, Tensor) else batch
    return tuple((key, tensor.shape[1:], tensor.dtype, tensor.device) for key, tensor in entries.items())
