"""The ``statsmerge`` command: arguments in, calls into the package, text out. It computes nothing itself."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path

import torch

from statsmerge_ext import __version__
from statsmerge_ext.checkpoints import check_compatible, open_checkpoint, quantize_expert, quantize_experts
from statsmerge_ext.distillation.run import run_distillation
from statsmerge_ext.distillation.student import StudentTraining
from statsmerge_ext.engine import processes
from statsmerge_ext.errors import CheckpointError, StatsMergeError
from statsmerge_ext.lora import extract_adapter, merge_adapters
from statsmerge_ext.memory import keep_freed_memory
from statsmerge_ext.methods import get_method, list_methods
from statsmerge_ext.ops.quantized import BITS
from statsmerge_ext.recipe import VOCABULARIES, load_recipe
from statsmerge_ext.run import run_merge

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
# What a merge block by block keeps of freed memory for itself: its weights and sums are longer, and are given back.
_KEPT_BLOCK_BY_BLOCK = 2**23


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 2 after an error (one line on stderr), 130 when interrupted."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        options.command(options)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        message = str(error)
        if not isinstance(error, (StatsMergeError, OSError)):  # A defect, here or in a library.
            message = f"{type(error).__name__}: {error} (-v shows where)"
        print("error:", " ".join(message.split()), file=sys.stderr)
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    common.add_argument("--quiet", action="store_true", help="no progress bars, no messages")

    parser = argparse.ArgumentParser(prog="statsmerge", description="Merge fine-tuned models into one.")
    parser.add_argument("--version", action="version", version=f"statsmerge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, text: str, to=commands) -> argparse.ArgumentParser:
        subparser = to.add_parser(name, parents=[common], help=text, description=text)
        subparser.set_defaults(command=command)
        return subparser

    merging = add("merge", _merge, "Merge checkpoints by a recipe.")
    merging.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file")
    merging.add_argument("out", metavar="OUT", type=Path, help="directory to make, or .safetensors/.pt file")
    merging.add_argument("--device", default="cpu", type=_device, help="where to compute (default: cpu)")
    merging.add_argument("--out-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    merging.add_argument(
        "--copy-tokenizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy the base's tokenizer files (default: yes)",
    )
    merging.add_argument("--random-seed", default=0, type=int, metavar="N", help="seed of the method (default: 0)")
    merging.add_argument("--overwrite", action="store_true", help="replace an existing model at OUT")
    merging.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take up an interrupted run of the same merge where it was (default: yes)",
    )
    merging.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="what a streamed merge may hold of the models, or one block by block of hidden states (default: 512MiB)",
    )
    merging.add_argument(
        "--vocab",
        choices=VOCABULARIES,
        help="common: merge experts of another vocabulary where they share the base's (default: as the recipe says)",
    )
    merging.add_argument("--dry-run", action="store_true", help="check everything, say what it would take, stop")

    quantize = add("quantize", _quantize, "Store experts as quantised task vectors, which every method reads.")
    quantize.add_argument("base", metavar="BASE", type=Path, help="the pretrained checkpoint")
    quantize.add_argument("experts", metavar="EXPERT", type=Path, nargs="+", help="checkpoints fine-tuned from it")
    quantize.add_argument("--out", metavar="OUT", type=Path, required=True, help=".safetensors file, or a directory")
    quantize.add_argument("--bits", type=int, choices=BITS, default=4, help="bits a parameter (default: 4)")
    quantize.add_argument("--group-size", type=int, metavar="N", help="parameters with a scale of their own")
    quantize.add_argument(
        "--residual",
        action="store_true",
        help="store what the experts share in a file of its own, and of each what is left, in OUT/NAME.safetensors",
    )
    quantize.add_argument("--shared-bits", type=int, choices=BITS, default=3, help="of that file (default: 3)")
    quantize.add_argument("--overwrite", action="store_true", help="replace what is at OUT")

    lora = commands.add_parser("lora", help="Merge LoRA adapters, or extract one.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    adapters = add("merge", _lora_merge, "Merge the adapters of a recipe into one, in factored form.", lora)
    adapters.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file whose experts are adapters")
    extracting = add("extract", _lora_extract, "Extract an adapter from the task vector of a model.", lora)
    extracting.add_argument("base", metavar="BASE", type=Path, help="the pretrained checkpoint")
    extracting.add_argument("model", metavar="MODEL", type=Path, help="one fine-tuned from it, or merged on it")
    for command in (adapters, extracting):
        command.add_argument("out", metavar="OUT", type=Path, help="directory to make")
        command.add_argument("--rank", type=int, metavar="R", required=command is extracting, help="of the factors")
        command.add_argument("--overwrite", action="store_true", help="replace an existing adapter at OUT")

    distilling = add("distill", _distill, "Distil a teacher of another architecture into a student that can be merged.")
    distilling.add_argument("--teacher", required=True, metavar="PATH", type=Path, help="a classifier's directory")
    distilling.add_argument(
        "--student", required=True, metavar="PATH", type=Path, help="one of the common architecture"
    )
    distilling.add_argument("--data", required=True, metavar="FILE", type=Path, help="unlabelled samples")
    distilling.add_argument("--out", required=True, metavar="OUT", type=Path, help="directory to make")
    for field in fields(StudentTraining):
        if field.type == "bool":
            distilling.add_argument(f"--{field.name.replace('_', '-')}", action="store_true")
        else:
            kind = int if field.type == "int" else float
            text = f"default: {field.default}"
            distilling.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=text)
    distilling.add_argument("--samples", type=int, metavar="N", help="samples to draw (default: 64)")
    distilling.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    distilling.add_argument("--random-seed", type=int, default=0, metavar="N", help="default: 0")
    distilling.add_argument("--overwrite", action="store_true", help="replace an existing model at OUT")
    distilling.add_argument("--resume", action="store_true", help="take up an interrupted run where it was")

    evaluation = add("evaluate", _evaluate, "Print a model's accuracy on every task of a suite.")
    evaluation.add_argument("suite", metavar="SUITE", help="name of a task suite, such as vision8")
    which = evaluation.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint of the suite's architecture")
    which.add_argument("--base", action="store_true", help="the suite's pretrained model")
    which.add_argument("--experts", action="store_true", help="each of the suite's experts on its own task")
    evaluation.add_argument("--split", choices=("validation", "test"), default="test", help="default: test")

    demo = add("demo", _demo, "Merge the task suites by every method and write a report.")
    demo.add_argument("suites", metavar="SUITE", nargs="*", help="default: all suites")
    demo.add_argument("--out", type=Path, default=Path("demo-report"), metavar="DIR", help="default: demo-report")
    demo.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    demo.add_argument("--seeds", type=int, default=1, metavar="N", help="runs with other samples (default: 1)")

    study = add("study", _study, "See how merges of a suite fare as one thing changes; goes on where it was stopped.")
    study.add_argument("study", metavar="STUDY", help="samples, tasks, unseen, transfer, robustness, …")
    study.add_argument("--suite", default="vision8", metavar="SUITE", help="default: vision8")
    study.add_argument("--seeds", type=int, metavar="N", help="default: the study's own")
    study.add_argument("--limit", type=int, metavar="N", help="test examples a task (default: all)")
    study.add_argument("--out", type=Path, default=Path("studies"), metavar="DIR", help="default: studies")

    add("methods", _methods, "List the merging methods and their hyperparameters.")
    return parser


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not a device; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name!r}: this machine or this build of torch has no CUDA device")
    return device


def _merge(options: argparse.Namespace) -> None:
    loading = time.process_time()  # what every command takes before it begins
    recipe = load_recipe(options.recipe)
    if recipe.chosen.by_layer and recipe.needs_data:
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


def _quantize(options: argparse.Namespace) -> None:
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


def _lora_merge(options: argparse.Namespace) -> None:
    _say_kept(options, merge_adapters(options.recipe, options.out, rank=options.rank, overwrite=options.overwrite))


def _lora_extract(options: argparse.Namespace) -> None:
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


def _distill(options: argparse.Namespace) -> None:
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


def _evaluate(options: argparse.Namespace) -> None:
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


def _demo(options: argparse.Namespace) -> None:
    from statsmerge_ext.evaluation.demo import run_demo
    from statsmerge_ext.evaluation.suites import list_suites

    run_demo(
        options.suites or list_suites(),
        options.out,
        methods=options.methods,
        seeds=options.seeds,
        progress=not options.quiet,
    )


def _study(options: argparse.Namespace) -> None:
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


def _methods(options: argparse.Namespace) -> None:
    for name in list_methods():
        method = get_method(name)
        needs = f"  (needs {', '.join(sorted(method.needs))})" if method.needs else ""
        summary = (inspect.getdoc(inspect.getmodule(method.function)) or "").split("\n")[0]
        print(f"{name}{needs}: {summary}")
        for hyperparameter, default in method.hyperparameters.items():
            print(f"    {hyperparameter} = {default!r}")
