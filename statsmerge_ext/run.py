"""Merging checkpoints on disk by a recipe: reading, checking, merging, writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
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
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.partial import partial_path
from statsmerge_ext.checkpoints.reading import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from statsmerge_ext.checkpoints.writing import atomic_output, check_output, parse_size, write_companions
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.merging import Solved, solve
from statsmerge_ext.engine.problem import MergedLayers
from statsmerge_ext.errors import CheckpointError
from statsmerge_ext.model_card import REPORT, accompanying_files
from statsmerge_ext.recipe import Recipe, load_recipe
from statsmerge_ext.streamed import estimate, write_streamed


def run_merge(
    recipe: Recipe | str | os.PathLike,
    out_path: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    out_shard_size: str | int = "5GB",
    copy_tokenizer: bool = True,
    random_seed: int = 0,
    memory_budget: str | int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: bool = True,
) -> dict:
    """Merge the checkpoints that a recipe names and write the result, whole or not at all.

    Methods that look at the weights alone are streamed: models and result are never in memory as a whole. Under
    torchrun, every process of the group calls this alike and takes its share of such a merge.

    Args:
        recipe: a recipe, or the path of its file.
        out_path: a Hugging Face directory to make (weights, the base's configuration and tokenizer, a model card,
            the recipe, coefficients and report); or a state dict, where it ends in .safetensors, .pt, .pth or .bin.
        device: where tensors are merged and the model is run.
        out_shard_size: largest size of a weight file in a directory, such as "5GB".
        copy_tokenizer: copy the tokenizer's files too, the base's unless the recipe says another model's.
        random_seed: of all that is random in the method.
        memory_budget: what a streamed merge may hold of models and result at a time, such as "1GiB"; None: a default.
        overwrite: replace an existing model.
        resume: take up an interrupted run of the same merge where its journal says it was, with the same result; a
            streamed one leaves it in ``<out_path>.partial``, a method that learns in ``<out_path>.journal``. Otherwise
            these are removed.
        dry_run: read and check everything that can be checked without merging, and leave nothing behind; of a streamed
            merge, a sample is merged for an estimate.
        progress: show progress bars.

    Returns:
        The report (JSON-able); of a dry run its "plan" only: "tensors", "bytes" and "dtypes" to be written, and of a
        streamed merge also "bytes_read", "seconds" and "memory" in bytes.

    Raises:
        StatsMergeError: a RecipeError, CheckpointError, CalibrationError, MethodError or ProcessError that says what is
            wrong; no partial output is left, except that of an interrupted run.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    out = Path(out_path)
    shard_bytes = parse_size(out_shard_size)
    budget = None if memory_budget is None else parse_size(memory_budget, "memory budget")
    _refuse_inputs(out, recipe)
    check_output(out, overwrite)
    base = open_checkpoint(recipe.base, device, at_least=recipe.out_dtype)
    experts = {name: open_expert(path, base, device) for name, path in recipe.experts.items()}
    check_compatible(base, experts)
    infos = {name: TensorInfo(base.shape(name), _out_dtype(base, name, recipe.out_dtype)) for name in base}
    plan = _plan(infos)
    _check_space(out, plan["bytes"])
    batches = _read_calibration(recipe, device)

    options = {"buffers": recipe.buffers, "progress": progress, "seed": random_seed, "memory_budget": budget}
    streamed = not recipe.needs_data and out.suffix not in PICKLE_SUFFIXES
    if dry_run:
        if streamed:
            plan |= estimate(recipe.method, base, experts, infos, out, **options, **recipe.hyperparameters)
        return {"plan": plan}

    journal = out.with_name(out.name + ".journal")
    if not resume:
        journal.unlink(missing_ok=True)
    if recipe.needs_data:
        model = build_model(base).to(device)
        of_model = {name: module_state(expert, model) for name, expert in experts.items()}
        data = {"calibration": batches, "journal": journal}
        solved = solve(recipe.method, base=model, experts=of_model, **data, **options, **recipe.hyperparameters)
        merged = solved.computed(model)
        state = _finished(stored_state(merged.model, merged.state), base, recipe.out_dtype)
    else:
        solved = solve(recipe.method, base=base, experts=experts, **options, **recipe.hyperparameters)
        if streamed and isinstance(solved.solution.parameters, MergedLayers):
            identity = _identity(recipe, base, experts, device, shard_bytes, options)
            tokenizer = (recipe.tokenizer or recipe.base) if copy_tokenizer else None
            writing = {"resume": resume, "shard_bytes": None if _is_file(out) else shard_bytes, "progress": progress}
            return _write_streamed(recipe, solved, out, base, infos, plan, identity, tokenizer, **writing)
        merged = solved.computed(None)
        state = _finished(merged.state, base, recipe.out_dtype)
    report = {**merged.report, "plan": plan}
    files = accompanying_files(recipe, report, merged.coefficients, merged.learner)
    if processes.rank() > 0:
        return report  # every process has the whole result; one writes it
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
            tokenizer=recipe.tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    return report


def _write_streamed(
    recipe: Recipe,
    solved: Solved,
    out: Path,
    base: Checkpoint,
    infos: Mapping[str, TensorInfo],
    plan: dict,
    identity: dict,
    tokenizer: Path | None,
    **writing,
) -> dict:
    """Compute and write a merge at once, with what belongs beside the weights; returns the report."""
    report = {**solved.report, "plan": plan}
    files = accompanying_files(recipe, report, solved.coefficients, solved.learner)

    def companions(directory: Path) -> None:
        write_companions(directory, base, infos, files, tokenizer=tokenizer)

    write_streamed(solved, out, infos, identity, metadata=files, companions=companions, **writing)
    report = {**solved.report, "plan": plan}
    if processes.rank() == 0 and out.is_dir():
        # What was written says all but how long it took; the model is in its place, so this may fail.
        with suppress(CheckpointError), atomic_output(out / REPORT, overwrite=True) as temporary:
            temporary.write_text(accompanying_files(recipe, report, None)[REPORT], encoding="utf-8")
    return report


def _is_file(out: Path) -> bool:
    return out.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)


def _refuse_inputs(out: Path, recipe: Recipe) -> None:
    for path in (recipe.base, *recipe.experts.values()):
        if path.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{out}: is or holds an input of the merge ({path}); choose another place")


def _plan(infos: Mapping[str, TensorInfo]) -> dict:
    return {
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}),
    }


def _identity(
    recipe: Recipe, base: Checkpoint, experts: Mapping[str, Checkpoint], device, shard_bytes: int, options: dict
) -> dict:
    """What decides the result of a streamed merge, and into which pieces it is cut."""
    return {
        "method": recipe.method,
        "hyperparameters": {name: str(value) for name, value in recipe.hyperparameters.items()},
        "out_dtype": str(recipe.out_dtype),
        "models": {"": base.identity(), **{name: expert.identity() for name, expert in experts.items()}},
        "options": [str(device), shard_bytes, options["seed"], options["memory_budget"]],
    }


def _out_dtype(base: Checkpoint, name: str, out_dtype: torch.dtype | None) -> torch.dtype:
    stored = base.dtype(name)
    return out_dtype if out_dtype is not None and stored.is_floating_point else stored


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    there = sum(path.stat().st_size for path in partial_path(out).rglob("*.safetensors"))
    free = shutil.disk_usage(existing).free + there
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
