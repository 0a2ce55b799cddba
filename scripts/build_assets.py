"""Rebuild the task suites' experts from scratch: fetch the data, fine-tune, quantise, evaluate, note the sources.

    python scripts/build_assets.py [--suite vision8] [--task mnist] [--threads 2] [--measure-only]

Each expert takes one to three minutes on one core. Which hyperparameters the methods use on a suite is chosen
afterwards, by scripts/choose_hyperparameters.py.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import statsmerge_ext
from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.evaluation.run import evaluate_task
from statsmerge_ext.evaluation.suites import Suite, get_suite, list_suites
from statsmerge_ext.evaluation.suites.assets import write_expert
from statsmerge_ext.memory import keep_freed_memory

SEED = 0


def fine_tune(suite: Suite, name: str) -> nn.Module:
    """The base, fine-tuned on one task through its frozen head; BatchNorm keeps the base's statistics."""
    settings, task = suite.definition.training, suite.task(name)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = suite.load_base()
    model.train(settings.dropout)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not key.startswith(settings.frozen))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ((inputs, labels),) = task.batches("train", batch_size=10**9)
    steps = len(labels) // settings.batch_size
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.epochs * steps, pct_start=0.1
    )
    for _ in tqdm(range(settings.epochs), desc=f"{suite.name}/{name}", unit="epoch"):
        for rows in torch.randperm(len(labels), generator=generator).split(settings.batch_size)[:steps]:
            batch = take(inputs, rows)
            if settings.augment is not None:
                batch = settings.augment(batch, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                features = suite.forward(model, batch)
            loss = F.cross_entropy(task.head(features.float()), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def take(inputs: Tensor | dict[str, Tensor], rows: Tensor) -> Tensor | dict[str, Tensor]:
    """Some rows of a batch; padding that none of them needs is cut off."""
    if not isinstance(inputs, dict):
        return inputs[rows]
    longest = int(inputs["attention_mask"][rows].sum(1).max())
    return {key: value[rows, :longest] for key, value in inputs.items()}


def build(suite: Suite, name: str) -> dict:
    """Make and store one expert; returns what only its making can tell."""
    start = time.perf_counter()
    model = fine_tune(suite, name)
    seconds = time.perf_counter() - start
    base = suite.load_base().state_dict()
    write_expert(suite.expert_path(name), base, model.state_dict(), suite.definition.training.step)
    return {"seconds": round(seconds, 1), "test accuracy before quantisation": evaluate_task(model, suite, name)}


def measure(suite: Suite, name: str) -> dict:
    """What an expert is now: its data, size, and accuracies beside the base's."""
    base, expert = suite.load_base(), suite.load_base()
    expert.load_state_dict(suite.load_expert(name))
    return {
        "data": suite.task(name).data_fingerprint,
        "bytes": suite.expert_path(name).stat().st_size,
        "accuracy": {
            split: {
                "base": evaluate_task(base, suite, name, split),
                "expert": evaluate_task(expert, suite, name, split),
            }
            for split in ("validation", "test")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list_suites(), help="default: all")
    parser.add_argument("--task", action="append", help="default: all of the suite")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure-only", action="store_true", help="keep the experts, note their accuracies again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for suite_name in options.suite or list_suites():
        suite = get_suite(suite_name)
        for note in suite.prepare():
            print(note)
        file = suite.assets / "provenance.json"
        settings = suite.definition.training
        versions = {
            "statsmerge_ext": statsmerge_ext.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        training = {
            **{key: value for key, value in vars(settings).items() if key != "augment"},
            "augment": settings.augment.__name__ if settings.augment else None,
            "seed": SEED,
        }
        for name in options.task or suite.task_names:
            made = suite.provenance.get("tasks", {}).get(name, {}) if options.measure_only else build(suite, name)
            made = {**made, **measure(suite, name)}
            print(name, json.dumps(made["accuracy"]), flush=True)
            # Read anew each time: other tasks may be built at the same time.
            tasks = {**get_suite(suite_name).provenance.get("tasks", {}), name: made}
            ordered = {d.name: tasks[d.name] for d in suite.definition.datasets if d.name in tasks}
            facts = {"versions": versions, "training": training, "tasks": ordered}
            with atomic_output(file, overwrite=True) as temporary:
                temporary.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
