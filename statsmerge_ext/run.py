"""Merging checkpoints on disk by a recipe: reading, checking, merging, writing."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from statsmerge_ext.blockwise import BlockMerge, write_blockwise
from statsmerge_ext.checkpoints.architecture import build_model, module_state
from statsmerge_ext.checkpoints.chat_template import most_common_chat_template, with_chat_template
from statsmerge_ext.checkpoints.file_formats import PICKLE_SUFFIXES
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.page_cache import can_hold
from statsmerge_ext.checkpoints.partial import partial_path
from statsmerge_ext.checkpoints.skeleton import build_skeleton
from statsmerge_ext.checkpoints.writing import atomic_output, check_output, parse_size, write_companions
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.merging import Solved, solve
from statsmerge_ext.engine.problem import MergedLayers
from statsmerge_ext.errors import (
    CalibrationError,
    CheckpointError,
    MethodError,
    ProcessError,
    RecipeError,
    StatsMergeError,
)
from statsmerge_ext.estimates import estimate_blockwise, estimate_streamed
from statsmerge_ext.in_memory import is_file, stored_dtype, write_whole
from statsmerge_ext.inputs import Inputs, open_inputs, refuse_to_overwrite
from statsmerge_ext.layers import find_layers, layers_of_state
from statsmerge_ext.model_card import REPORT, accompanying_files
from statsmerge_ext.recipe import VOCABULARIES, Recipe, load_recipe
from statsmerge_ext.streamed import write_streamed


def run_merge(
    recipe: Recipe | str | os.PathLike,
    out_path: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    out_shard_size: str | int = "5GB",
    copy_tokenizer: bool = True,
    random_seed: int = 0,
    memory_budget: str | int | None = None,
    vocab: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: bool = True,
) -> dict:
    """Merge the checkpoints that a recipe names and write the result, whole or not at all.

    Methods that look at the weights alone are streamed: models and result are never in memory as a whole. Under
    torchrun, every process of the group calls this alike and takes its share of such a merge. Methods that look at one
    layer at a time, such as ``lot``, or merge in execution order, such as ``drift_compensation``, go block by block
    through models of transformers; where a model cannot be taken in blocks, it is merged in memory, and the report says
    why.

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
        vocab: "common" to merge experts of another vocabulary where they share the base's, "same" to refuse them;
            None: as the recipe says.
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
    began = time.perf_counter()
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if vocab is not None:
        if vocab not in VOCABULARIES:
            raise RecipeError(f"vocab: got {vocab!r}, expected one of {', '.join(VOCABULARIES)}")
        recipe = replace(recipe, vocab=vocab)
    out = Path(out_path)
    shard_bytes = parse_size(out_shard_size)
    budget = None if memory_budget is None else parse_size(memory_budget, "memory budget")
    refuse_to_overwrite(out, recipe)
    check_output(out, overwrite)
    inputs = open_inputs(recipe, device)
    base, experts = inputs.base, inputs.experts
    options = {"buffers": recipe.buffers, "progress": progress, "seed": random_seed, "memory_budget": budget}
    on_disk = out.suffix not in PICKLE_SUFFIXES  # whether the output can be written while it is computed
    blocks, why_not = _block_merge(inputs, device, options) if on_disk else (None, None)
    if why_not and progress:
        tqdm.write(f"merging in memory: {why_not}", file=sys.stderr)
    left_out = blocks.left_over if blocks else ()
    names = [name for name in base if name not in left_out]
    infos = {name: TensorInfo(base.shape(name), stored_dtype(base, name, recipe.out_dtype)) for name in names}
    plan = _plan(infos)
    _check_space(out, plan["bytes"])
    stays_cached = can_hold(inputs.bytes + plan["bytes"])
    if not stays_cached:
        inputs.leave_page_cache()
    tokenizer = (recipe.tokenizer or recipe.base) if copy_tokenizer and not is_file(out) else None
    template = _chat_template_files(recipe, tokenizer)
    if dry_run:
        if processes.count() > 1:
            raise ProcessError("dry_run: says what one process needs; run it in one, without torchrun")
        if recipe.layers and not blocks:
            layers = find_layers(build_skeleton(base)) if recipe.needs_data else layers_of_state(base)
            recipe.chosen.check_layers(layers)
        prepared = time.perf_counter() - began
        if blocks:
            plan |= estimate_blockwise(blocks, infos, out, stays_cached=stays_cached)
        elif on_disk and not recipe.needs_data:
            of_merge = {"stays_cached": stays_cached, **options, **recipe.hyperparameters}
            plan |= estimate_streamed(recipe.chosen, base, experts, infos, out, **of_merge)
        if "seconds" in plan:
            plan["seconds"] += prepared
        return {"plan": plan}

    journal = out.with_name(out.name + ".journal")
    if not resume:
        journal.unlink(missing_ok=True)
    facts = {"plan": plan, **({"vocabulary": inputs.vocabulary} if inputs.vocabulary else {})}
    model = build_model(base).to(device) if recipe.needs_data and not blocks else None
    if blocks:
        merged, write = blocks, write_blockwise
    else:
        of_model = {name: module_state(expert, model) for name, expert in experts.items()} if model else experts
        data = {"calibration": inputs.batches, "journal": journal} if model else {}
        start = base if model is None else model
        with _as_calibration_error(why_not):
            merged = solve(recipe.chosen, base=start, experts=of_model, **data, **options, **recipe.hyperparameters)
        write = write_streamed
    if blocks or (model is None and on_disk and isinstance(merged.solution.parameters, MergedLayers)):
        identity = {**inputs.identity(), "options": [str(device), shard_bytes, random_seed, budget]}
        writing = {"resume": resume, "shard_bytes": None if is_file(out) else shard_bytes, "stays_cached": stays_cached}
        write = partial(write, merged, out, infos, identity, progress=progress, **writing)
        return _write(write, merged, inputs, out, infos, facts, tokenizer, template)
    result = merged.computed(model)
    report = {**result.report, **({"in_memory": why_not} if why_not else {}), **facts}
    files = accompanying_files(recipe, report, result.coefficients, result.learner) | template
    writing = {"shard_size": out_shard_size, "copy_tokenizer": copy_tokenizer, "tokenizer": recipe.tokenizer}
    form = {"out_dtype": recipe.out_dtype, "files": files, "overwrite": overwrite, "progress": progress}
    write_whole(result.state, result.model, base, out, **form, **writing)
    return report


def _block_merge(
    inputs: Inputs, device: str | torch.device, options: Mapping[str, object]
) -> tuple[BlockMerge | None, str | None]:
    """The merge block by block, where method and model allow it; or why the model does not."""
    recipe, method = inputs.recipe, inputs.recipe.chosen
    if not method.by_block or not recipe.needs_data or recipe.buffers != "average" or inputs.base.config is None:
        return None, None
    of_merge = {"hyperparameters": recipe.hyperparameters, "seed": options["seed"]}
    of_merge["memory_budget"] = options["memory_budget"]
    try:
        return BlockMerge(method, inputs.base, inputs.experts, inputs.batches, device, **of_merge), None
    except MethodError:
        raise
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
    inputs: Inputs,
    out: Path,
    infos: Mapping[str, TensorInfo],
    facts: Mapping[str, object],
    tokenizer: Path | None,
    template: Mapping[str, str],
) -> dict:
    """Compute and write a merge at once, with what belongs beside the weights; returns the report."""

    def report() -> dict:
        return {**merge.report, **facts}

    files = accompanying_files(inputs.recipe, report(), merge.coefficients, merge.learner)

    def companions(directory: Path) -> None:
        write_companions(directory, inputs.base, infos, {**files, **template}, tokenizer=tokenizer)

    write(metadata=files, companions=companions)
    if processes.rank() == 0 and out.is_dir():
        # What was written says all but what came out of it; the model is in its place, so this may fail.
        with suppress(CheckpointError), atomic_output(out / REPORT, overwrite=True) as temporary:
            temporary.write_text(accompanying_files(inputs.recipe, report(), None)[REPORT], encoding="utf-8")
    return report()


def _chat_template_files(recipe: Recipe, tokenizer: Path | None) -> dict[str, str]:
    """Of the tokenizer's files, if they are copied, those that say its chat template, if the recipe chooses one."""
    if tokenizer is None:
        return {}
    template = recipe.chat_template
    if template == "auto":
        template = most_common_chat_template((recipe.base, *recipe.experts.values()))
    return {} if template is None else with_chat_template(template, tokenizer)


def _plan(infos: Mapping[str, TensorInfo]) -> dict:
    return {
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}),
    }


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    there = sum(path.stat().st_size for path in partial_path(out).rglob("*.safetensors"))
    free = shutil.disk_usage(existing).free + there
    if free < needed:
        raise CheckpointError(f"{out}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")
