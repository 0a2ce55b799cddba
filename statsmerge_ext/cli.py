"""The ``statsmerge`` command: its arguments, and how it ends."""

from __future__ import annotations

import argparse
import sys
import traceback
from dataclasses import fields
from pathlib import Path

import torch

from statsmerge_ext import __version__, commands
from statsmerge_ext.distillation.student import StudentTraining
from statsmerge_ext.errors import StatsMergeError
from statsmerge_ext.memory import keep_freed_memory
from statsmerge_ext.ops.quantized import BITS
from statsmerge_ext.recipe import VOCABULARIES

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, text: str, to=subparsers) -> argparse.ArgumentParser:
        subparser = to.add_parser(name, parents=[common], help=text, description=text)
        subparser.set_defaults(command=command)
        return subparser

    merging = add("merge", commands.merge, "Merge checkpoints by a recipe.")
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

    quantize = add("quantize", commands.quantize, "Store experts as quantised task vectors, which every method reads.")
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

    lora = subparsers.add_parser("lora", help="Merge LoRA adapters, or extract one.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    adapters = add("merge", commands.lora_merge, "Merge the adapters of a recipe into one, in factored form.", lora)
    adapters.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file whose experts are adapters")
    extracting = add("extract", commands.lora_extract, "Extract an adapter from the task vector of a model.", lora)
    extracting.add_argument("base", metavar="BASE", type=Path, help="the pretrained checkpoint")
    extracting.add_argument("model", metavar="MODEL", type=Path, help="one fine-tuned from it, or merged on it")
    for subparser in (adapters, extracting):
        subparser.add_argument("out", metavar="OUT", type=Path, help="directory to make")
        subparser.add_argument("--rank", type=int, metavar="R", required=subparser is extracting, help="of the factors")
        subparser.add_argument("--overwrite", action="store_true", help="replace an existing adapter at OUT")

    distilling = add(
        "distill", commands.distill, "Distil a teacher of another architecture into a student that can be merged."
    )
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

    evaluation = add("evaluate", commands.evaluate, "Print a model's accuracy on every task of a suite.")
    evaluation.add_argument("suite", metavar="SUITE", help="name of a task suite, such as vision8")
    which = evaluation.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint of the suite's architecture")
    which.add_argument("--base", action="store_true", help="the suite's pretrained model")
    which.add_argument("--experts", action="store_true", help="each of the suite's experts on its own task")
    evaluation.add_argument("--split", choices=("validation", "test"), default="test", help="default: test")

    demo = add("demo", commands.demo, "Merge the task suites by every method and write a report.")
    demo.add_argument("suites", metavar="SUITE", nargs="*", help="default: all suites")
    demo.add_argument("--out", type=Path, default=Path("demo-report"), metavar="DIR", help="default: demo-report")
    demo.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    demo.add_argument("--seeds", type=int, default=1, metavar="N", help="runs with other samples (default: 1)")

    study = add(
        "study", commands.study, "See how merges of a suite fare as one thing changes; goes on where it was stopped."
    )
    study.add_argument("study", metavar="STUDY", help="samples, tasks, unseen, transfer, robustness, …")
    study.add_argument("--suite", default="vision8", metavar="SUITE", help="default: vision8")
    study.add_argument("--seeds", type=int, metavar="N", help="default: the study's own")
    study.add_argument("--limit", type=int, metavar="N", help="test examples a task (default: all)")
    study.add_argument("--out", type=Path, default=Path("studies"), metavar="DIR", help="default: studies")

    add("methods", commands.methods, "List the merging methods and their hyperparameters.")
    return parser


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not a device; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name!r}: this machine or this build of torch has no CUDA device")
    return device
