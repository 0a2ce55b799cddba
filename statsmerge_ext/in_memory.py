"""The output of a merge that was computed in memory: its tensors as they are stored, and how they get to the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from statsmerge_ext.checkpoints import Checkpoint, check_finite, save_hf_directory, save_state_dict
from statsmerge_ext.checkpoints.architecture import stored_state
from statsmerge_ext.checkpoints.compatibility import floating_names
from statsmerge_ext.checkpoints.file_formats import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from statsmerge_ext.engine import processes


def write_whole(
    state: Mapping[str, Tensor],
    model: nn.Module | None,
    base: Checkpoint,
    out: Path,
    *,
    out_dtype: torch.dtype | None,
    files: Mapping[str, str],
    overwrite: bool,
    **writing: object,
) -> None:
    """Write a merged state dict, whole or not at all; of several processes, all of which have it, the first does.

    Args:
        state: the merged tensors, those of ``model`` if there is one.
        base: checkpoint that the output has its form from.
        out: a directory, or one file.
        out_dtype: of floating-point tensors; None: the base's.
        files: name → text of what belongs beside the weights.
        writing: further arguments of :func:`save_hf_directory`.

    Raises:
        CheckpointError: a merged value that the dtype cannot hold; ``out`` cannot be written.
    """
    if processes.rank() > 0:
        return
    stored = _finished(stored_state(model, state) if model else state, base, out_dtype)
    if is_file(out):
        save_state_dict(stored, out, metadata=files, overwrite=overwrite)
    else:
        save_hf_directory(stored, out, like=base, extra_files=files, overwrite=overwrite, **writing)


def is_file(out: Path) -> bool:
    """Whether an output is one file, rather than a directory."""
    return out.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)


def stored_dtype(base: Checkpoint, name: str, out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which the output has a tensor of the base."""
    stored = base.dtype(name)
    return out_dtype if out_dtype is not None and stored.is_floating_point else stored


def _finished(merged: Mapping[str, Tensor], base: Checkpoint, out_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The merged tensors in the output's dtypes, checked to be finite, and the base's integer tensors."""
    first_floating = floating_names(base)[0]
    state = {name: base[name] for name in base if name not in merged and not base.dtype(name).is_floating_point}
    converted: dict[int, Tensor] = {}  # Tied names share one tensor; they have to share it after conversion too.
    for name, tensor in merged.items():
        if id(tensor) not in converted:
            like = name if name in base else first_floating  # transformers may have renamed it
            dtype = stored_dtype(base, like, out_dtype) if tensor.is_floating_point() else tensor.dtype
            converted[id(tensor)] = check_finite(name, tensor.to(dtype), "the merged model")
        state[name] = converted[id(tensor)]
    return state
