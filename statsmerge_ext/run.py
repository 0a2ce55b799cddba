"""Merging checkpoints on disk by a recipe: reading, checking, merging, writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from statsmerge_ext.calibration import Batch, read_samples
from statsmerge_ext.checkpoints import (
    Checkpoint,
    check_compatible,
    check_finite,
    open_checkpoint,
    open_expert,
    save_hf_directory,
    save_state_dict,
)
from statsmerge_ext.checkpoints.architecture import build_model, module_state, stored_state
from statsmerge_ext.checkpoints.compatibility import floating_names
from statsmerge_ext.checkpoints.reading import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from statsmerge_ext.checkpoints.writing import check_output, parse_size
from statsmerge_ext.engine.merging import merge
from statsmerge_ext.errors import CheckpointError
from statsmerge_ext.model_card import accompanying_files
from statsmerge_ext.recipe import Recipe, load_recipe


def run_merge(
    recipe: Recipe | str | os.PathLike,
    out_path: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    out_shard_size: str | int = "5GB",
    copy_tokenizer: bool = True,
    random_seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> dict:
    """Merge the checkpoints that a recipe names and write the result, whole or not at all.

    Args:
        recipe: a recipe, or the path of its file.
        out_path: a Hugging Face directory to make (weights, the base's configuration and tokenizer, a model card,
            the recipe, coefficients and report); or a state dict, where it ends in .safetensors, .pt, .pth or .bin.
        device: where tensors are merged and the model is run.
        out_shard_size: largest size of a weight file in a directory, such as "5GB".
        copy_tokenizer: copy the base's tokenizer files too.
        random_seed: of all that is random in the method.
        overwrite: replace an existing model.
        resume: take up an interrupted merge where its journal, ``<out_path>.journal``, says it was, with the same
            result; without a journal, or for methods that do not learn, it starts from the beginning.
        dry_run: read and check everything that can be checked without merging, and write nothing.
        progress: show progress bars.

    Returns:
        The report (JSON-able); of a dry run its "plan" only: tensors, bytes and dtypes to be written.

    Raises:
        StatsMergeError: a RecipeError, CheckpointError, CalibrationError or MethodError that says what is wrong; no
            partial output is left.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    out = Path(out_path)
    parse_size(out_shard_size)
    _refuse_inputs(out, recipe)
    check_output(out, overwrite)
    base = open_checkpoint(recipe.base, device, at_least=recipe.out_dtype)
    experts = {name: open_expert(path, base, device) for name, path in recipe.experts.items()}
    check_compatible(base, experts)
    plan = _plan(recipe, base)
    _check_space(out, plan["bytes"])
    batches = _read_calibration(recipe, device)
    if dry_run:
        return {"plan": plan}

    journal = out.with_name(out.name + ".journal")
    if not resume:
        journal.unlink(missing_ok=True)
    model = build_model(base).to(device) if recipe.needs_data else None
    result = merge(
        recipe.method,
        base=base if model is None else model,
        experts=experts if model is None else {name: module_state(expert, model) for name, expert in experts.items()},
        calibration=batches,
        buffers=recipe.buffers,
        journal=journal,
        progress=progress,
        seed=random_seed,
        **recipe.hyperparameters,
    )
    merged = result.state if model is None else stored_state(result.model, result.state)
    state = _finished(merged, base, recipe.out_dtype)
    report = {**result.report, "plan": plan}
    files = accompanying_files(recipe, report, result.coefficients, result.learner)
    if _is_file(out):
        save_state_dict(state, out, metadata=files, overwrite=overwrite)
    else:
        save_hf_directory(
            state,
            out,
            like=base,
            shard_size=out_shard_size,
            extra_files=files,
            copy_tokenizer=copy_tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    return report


def _is_file(out: Path) -> bool:
    return out.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)


def _refuse_inputs(out: Path, recipe: Recipe) -> None:
    for path in (recipe.base, *recipe.experts.values()):
        if path.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{out}: is or holds an input of the merge ({path}); choose another place")


def _plan(recipe: Recipe, base: Checkpoint) -> dict:
    dtypes = {name: _out_dtype(base, name, recipe.out_dtype) for name in base}
    return {
        "tensors": len(base),
        "bytes": sum(base.shape(name).numel() * dtype.itemsize for name, dtype in dtypes.items()),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}),
    }


def _out_dtype(base: Checkpoint, name: str, out_dtype: torch.dtype | None) -> torch.dtype:
    stored = base.dtype(name)
    return out_dtype if out_dtype is not None and stored.is_floating_point else stored


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(f"{out}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")


def _read_calibration(recipe: Recipe, device: str | torch.device) -> dict[str, list[Batch]] | None:
    source = recipe.calibration
    if source is None:
        return None
    batches = {}
    for name, path in source.data.items():
        samples = read_samples(
            path,
            tokenizer=recipe.base,
            samples=source.samples,
            batch_size=source.batch_size,
            max_length=source.max_length,
            seed=source.seed,
        )
        batches[name] = [_to(batch, device) for batch in samples]
    return batches


def _to(batch: Batch, device: str | torch.device) -> Batch:
    return {key: part.to(device) for key, part in batch.items()} if isinstance(batch, dict) else batch.to(device)


def _finished(merged: Mapping[str, Tensor], base: Checkpoint, out_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The merged tensors in the output's dtypes, checked to be finite, and the base's integer tensors."""
    first_floating = floating_names(base)[0]
    state = {name: base[name] for name in base if name not in merged and not base.dtype(name).is_floating_point}
    converted: dict[int, Tensor] = {}  # Tied names share one tensor; they have to share it after conversion too.
    for name, tensor in merged.items():
        if id(tensor) not in converted:
            like = name if name in base else first_floating  # transformers may have renamed it
            dtype = _out_dtype(base, like, out_dtype) if tensor.is_floating_point() else tensor.dtype
            converted[id(tensor)] = check_finite(name, tensor.to(dtype), "the merged model")
        state[name] = converted[id(tensor)]
    return state
