"""Runs the cases of one operator; every case is written as soon as it is measured."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

import torch

from .measuring import Bench

OPERATORS = ("topk_svd", "gram", "layer_solve", "weighted_merge")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("operator", choices=OPERATORS)
    parser.add_argument("--out", type=Path, required=True, help="folder for OPERATOR.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small tensors: tests the benchmark, measures nothing")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    bench = Bench(torch.device(arguments.device), arguments.tiny, arguments.out / f"{arguments.operator}.json")
    bench.measure_ceilings()
    cases = importlib.import_module(f".{arguments.operator}", __package__).cases(bench)
    failed = False
    while True:
        try:
            case = next(cases, None)
            if case is None:
                break
            bench.run(case)
        except Exception:  # the cases before are on disk; after an error of the device none can follow
            traceback.print_exc()
            failed = True
            break
        del case  # its tensors, before the next case makes its own
    bench.save()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
