"""The ``statsmerge`` commands, a function each: calls into the package, text out. They compute nothing themselves.

``options`` are a command's arguments as ``cli.py`` parses them.
"""

from __future__ import annotations

import argparse
import inspect
import time
from dataclasses import fields

from statsmerge_ext.checkpoints import check_compatible, open_checkpoint, quantize_expert, quantize_experts
from statsmerge_ext.distillation.run import run_distillation
from statsmerge_ext.distillation.student import StudentTraining
from statsmerge_ext.engine import processes
from statsmerge_ext.errors import CheckpointError
from statsmerge_ext.lora import extract_adapter, merge_adapters
from statsmerge_ext.memory import keep_freed_memory
from statsmerge_ext.methods import get_method, list_methods
from statsmerge_ext.recipe import load_recipe
from statsmerge_ext.run import run_merge

# What a merge block by block keeps of freed memory for itself: its weights and sums are longer, and are given back.
_KEPT_BLOCK_BY_BLOCK = 2**23


def merge(options: argparse.Namespace) -> None:
    loading = time.process_time()  # what every command takes before it begins
    recipe = load_recipe(options.recipe)
    if recipe.chosen.by_block and recipe.needs_data:
        keep_freed_memory(_KEPT_BLOCK_BY_BLOCK)
    with processes.joined():
        quiet = options.quiet or processes.rank() > 0
        report = run_merge(
            recipe,
            options.out,
            device=options.device,
            out_shard_size=options.out_shard_size,
            copy_tokenizer=options.copy_tokenizer,
            random_seed=options.random_seed,
            memory_budget=options.memory_budget,
            vocab=options.vocab,
            overwrite=options.overwrite,
            resume=options.resume,
            dry_run=options.dry_run,
            progress=not quiet,
        )
    plan = report["plan"]
    size = f"{plan['tensors']} tensors, {plan['bytes'] / 1e6:.1f} MB, {', '.join(plan['dtypes'])}"
    if options.dry_run:
        print(f"would write {options.out}: {size}")
        if "seconds" in plan:
            print(
                f"would read {plan['bytes_read'] / 1e6:.1f} MB and take about {loading + plan['seconds']:.1f} s "
                f"and {plan['memory'] / 1e6:.0f} MB of memory"
            )
    elif not quiet:
        print(f"wrote {options.out}: {size}")


def quantize(options: argparse.Namespace) -> None:
    base = open_checkpoint(options.base)
    experts = {path.stem if path.is_file() else path.name: open_checkpoint(path) for path in options.experts}
    shared = {
        "bits": options.bits,
        "group_size": options.group_size,
        "overwrite": options.overwrite,
        "progress": not options.quiet,
    }
    if options.residual:
        quantize_experts(base, experts, options.out, shared_bits=options.shared_bits, **shared)
    elif len(options.experts) == 1:
        quantize_expert(base, *experts.values(), options.out, **shared)
    else:
        raise CheckpointError(
            "quantize: several experts go into one directory with --residual; otherwise one at a time"
        )
    if not options.quiet:
        print(f"wrote {options.out}")


def lora_merge(options: argparse.Namespace) -> None:
    _say_kept(options, merge_adapters(options.recipe, options.out, rank=options.rank, overwrite=options.overwrite))


def lora_extract(options: argparse.Namespace) -> None:
    report = extract_adapter(
        options.base,
        options.model,
        options.out,
        rank=options.rank,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    _say_kept(options, report)
    if report["left_out"] and not options.quiet:
        print(f"left out {len(report['left_out'])} changed tensors that take no factors: {report['left_out'][0]}, …")


def _say_kept(options: argparse.Namespace, report: dict) -> None:
    if not options.quiet:
        kept = report["kept"].values()
        print(
            f"wrote {options.out}: {report['modules']} modules, rank {report['rank']}; kept of the norm of their "
            f"changes: {min(kept):.1%} to {max(kept):.1%}"
        )


def distill(options: argparse.Namespace) -> None:
    report = run_distillation(
        options.teacher,
        options.student,
        options.data,
        options.out,
        training=StudentTraining(**{field.name: getattr(options, field.name) for field in fields(StudentTraining)}),
        samples=options.samples,
        batch_size=options.batch_size,
        seed=options.random_seed,
        overwrite=options.overwrite,
        resume=options.resume,
        progress=not options.quiet,
    )
    if not options.quiet:
        print(f"wrote {options.out}: agrees with its teacher on {report['last']['agreement']:.1%} of the samples")


def evaluate(options: argparse.Namespace) -> None:
    from statsmerge_ext.evaluation.run import evaluate_experts, evaluate_model
    from statsmerge_ext.evaluation.suites import get_suite

    progress = not options.quiet
    suite = get_suite(options.suite)
    suite.prepare(progress=progress)
    if options.experts:
        accuracies = evaluate_experts(suite, options.split, progress)
    else:
        model = suite.load_base()
        if options.model is not None:
            state = check_compatible(model.state_dict(), {"model": open_checkpoint(options.model)})["model"]
            model.load_state_dict({**model.state_dict(), **state})
        accuracies = evaluate_model(model, suite, options.split, progress)
    width = max(len(task) for task in [*accuracies, "average"])
    average = sum(accuracies.values()) / len(accuracies)
    for task, accuracy in [*accuracies.items(), ("average", average)]:
        print(f"{task:{width}}  {accuracy:.4f}")


def demo(options: argparse.Namespace) -> None:
    from statsmerge_ext.evaluation.demo import run_demo
    from statsmerge_ext.evaluation.suites import list_suites

    run_demo(
        options.suites or list_suites(),
        options.out,
        methods=options.methods,
        seeds=options.seeds,
        progress=not options.quiet,
    )


def study(options: argparse.Namespace) -> None:
    from statsmerge_ext.evaluation.report import markdown_table
    from statsmerge_ext.evaluation.studies import Records, get_study, plot_study, run_study, study_table
    from statsmerge_ext.evaluation.suites import get_suite

    study, suite, progress = get_study(options.study), get_suite(options.suite), not options.quiet
    suite.prepare(progress=progress)
    records = Records(suite, options.out / f"{suite.name}.json", options.limit)
    cases = run_study(study, records, seeds=options.seeds, progress=progress)
    header, rows = study_table(cases, records)
    picture = options.out / f"{study.name}-{suite.name}.svg"
    plot_study(header, rows, picture, title=study.title, suite=suite.name)
    print(f"{suite.name}: {study.title}; average test accuracy, %")
    print(markdown_table(header, rows))


def methods(options: argparse.Namespace) -> None:
    for name in list_methods():
        method = get_method(name)
        needs = f"  (needs {', '.join(sorted(method.needs))})" if method.needs else ""
        summary = (inspect.getdoc(inspect.getmodule(method.function)) or "").split("\n")[0]
        print(f"{name}{needs}: {summary}")
        for hyperparameter, default in method.hyperparameters.items():
            print(f"    {hyperparameter} = {default!r}")
