"""Merging checkpoints on disk by a recipe: reading, checking, merging, writing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.blockwise import BlockMerge, write_blockwise
from statsmerge_ext.calibration import Batch, as_named, read_samples
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
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.partial import partial_path
from statsmerge_ext.checkpoints.reading import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from statsmerge_ext.checkpoints.writing import atomic_output, check_output, parse_size, write_companions
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.merging import Solved, solve
from statsmerge_ext.engine.problem import MergedLayers
from statsmerge_ext.errors import CalibrationError, CheckpointError, StatsMergeError
from statsmerge_ext.methods import get_method
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
    torchrun, every process of the group calls this alike and takes its share of such a merge. Methods that look at one
    layer at a time, such as ``lot``, go block by block through models of transformers; where a model cannot be taken in
    blocks, it is merged in memory, and the report says why.

    Args:
        recipe: a recipe, or the path of its file.
        out_path: a Hugging Face directory to make (weights, the base's configuration and tokenizer, a model card,
            the recipe, coefficients and report); or a state dict, where it ends in .safetensors, .pt, .pth or .bin.
        device: where tensors are merged and the model is run.
        out_shard_size: largest size of a weight file in a directory, such as "5GB".
        copy_tokenizer: copy the tokenizer's files too, the base's unless the recipe says another model's.
        random_seed: of all that is random in the method.
        memory_budget: what a streamed merge may hold of models and result at a time, such as "1GiB", and a merge block
            by block of hidden states, the rest of which goes to files; None: a default.
        overwrite: replace an existing model.
        resume: take up an interrupted run of the same merge where its journal says it was, with the same result; a
            streamed one, or one block by block, leaves it in ``<out_path>.partial``, a method that learns in
            ``<out_path>.journal``. Otherwise these are removed.
        dry_run: read and check everything that can be checked without merging, and leave nothing behind; of a streamed
            merge, or one block by block, a sample is merged for an estimate.
        progress: show progress bars.

    Returns:
        The report (JSON-able); of a dry run its "plan" only: "tensors", "bytes" and "dtypes" to be written, and of a
        merge that is streamed, or goes block by block, also "bytes_read", "seconds" and "memory" in bytes.

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
    batches = _read_calibration(recipe, device)
    options = {"buffers": recipe.buffers, "progress": progress, "seed": random_seed, "memory_budget": budget}
    on_disk = out.suffix not in PICKLE_SUFFIXES  # whether the output can be written while it is computed
    blocks, why_not = _block_merge(recipe, base, experts, batches, device, options) if on_disk else (None, None)
    if why_not and progress:
        tqdm.write(f"merging in memory: {why_not}", file=sys.stderr)
    left_out = blocks.left_over if blocks else ()
    names = [name for name in base if name not in left_out]
    infos = {name: TensorInfo(base.shape(name), _out_dtype(base, name, recipe.out_dtype)) for name in names}
    plan = _plan(infos)
    _check_space(out, plan["bytes"])
    if dry_run:
        if blocks:
            plan |= blocks.estimate(infos, out)
        elif on_disk and not recipe.needs_data:
            plan |= estimate(recipe.method, base, experts, infos, out, **options, **recipe.hyperparameters)
        return {"plan": plan}

    journal = out.with_name(out.name + ".journal")
    if not resume:
        journal.unlink(missing_ok=True)
    model = build_model(base).to(device) if recipe.needs_data and not blocks else None
    if blocks:
        merged, write = blocks, write_blockwise
    else:
        of_model = {name: module_state(expert, model) for name, expert in experts.items()} if model else experts
        data = {"calibration": batches, "journal": journal} if model else {}
        start = base if model is None else model
        with _as_calibration_error(why_not):
            merged = solve(recipe.method, base=start, experts=of_model, **data, **options, **recipe.hyperparameters)
        write = write_streamed
    if blocks or (model is None and on_disk and isinstance(merged.solution.parameters, MergedLayers)):
        facts = _identity(recipe, base, experts, device, shard_bytes, options, batches)
        writing = {"resume": resume, "shard_bytes": None if _is_file(out) else shard_bytes, "progress": progress}
        tokenizer = (recipe.tokenizer or recipe.base) if copy_tokenizer else None
        return _write(partial(write, merged, out, infos, facts, **writing), merged, recipe, out, base, infos, tokenizer)
    result = merged.computed(model)
    state = stored_state(result.model, result.state) if model else result.state
    state = _finished(state, base, recipe.out_dtype)
    report = {**result.report, **({"in_memory": why_not} if why_not else {}), "plan": plan}
    files = accompanying_files(recipe, report, result.coefficients, result.learner)
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


def _block_merge(
    recipe: Recipe,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    batches: Mapping[str, list[Batch]] | None,
    device: str | torch.device,
    options: Mapping[str, object],
) -> tuple[BlockMerge | None, str | None]:
    """The merge block by block, where method and model allow it; or why the model does not."""
    method = get_method(recipe.method)
    if not method.by_layer or not recipe.needs_data or recipe.buffers != "average" or base.config is None:
        return None, None
    of_merge = {"hyperparameters": recipe.hyperparameters, "seed": options["seed"]}
    try:
        return BlockMerge(
            method, base, experts, batches, device, memory_budget=options["memory_budget"], **of_merge
        ), None
    except Exception as error:  # the model's own code is run, which may fail in any way there is
        return None, f"{type(error).__name__}: {error}"


@contextmanager
def _as_calibration_error(failed_before: str | None) -> Iterator[None]:
    """Where the model failed block by block and fails in memory, too, it is its input that it cannot be run on."""
    try:
        yield
    except StatsMergeError:
        raise
    except Exception as error:
        if failed_before is None:
            raise
        raise CalibrationError(
            f"calibration: the model cannot be run on the samples: {type(error).__name__}: {error}"
        ) from error


def _write(
    write: Callable[..., None],
    merge: Solved | BlockMerge,
    recipe: Recipe,
    out: Path,
    base: Checkpoint,
    infos: Mapping[str, TensorInfo],
    tokenizer: Path | None,
) -> dict:
    """Compute and write a merge at once, with what belongs beside the weights; returns the report."""

    def report() -> dict:
        return {**merge.report, "plan": _plan(infos)}

    files = accompanying_files(recipe, report(), merge.coefficients, merge.learner)

    def companions(directory: Path) -> None:
        write_companions(directory, base, infos, files, tokenizer=tokenizer)

    write(metadata=files, companions=companions)
    if processes.rank() == 0 and out.is_dir():
        # What was written says all but what came out of it; the model is in its place, so this may fail.
        with suppress(CheckpointError), atomic_output(out / REPORT, overwrite=True) as temporary:
            temporary.write_text(accompanying_files(recipe, report(), None)[REPORT], encoding="utf-8")
    return report()


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
    recipe: Recipe,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    device: str | torch.device,
    shard_bytes: int,
    options: Mapping[str, object],
    batches: Mapping[str, list[Batch]] | None,
) -> dict:
    """What decides the result of a merge that is written while it is computed, and into which pieces it is cut."""
    return {
        "method": recipe.method,
        "hyperparameters": {name: str(value) for name, value in recipe.hyperparameters.items()},
        "out_dtype": str(recipe.out_dtype),
        "models": {"": base.identity(), **{name: expert.identity() for name, expert in experts.items()}},
        "batches": {name: fingerprint(as_named(of_expert)) for name, of_expert in (batches or {}).items()},
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
