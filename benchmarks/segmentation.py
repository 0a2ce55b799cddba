"""Layer-wise anchor merging (arXiv 2409.15813) of segmentation models, from data to table in a few minutes.

    python benchmarks/segmentation.py

Scenes are objects of one data set on satellite images, every pixel labelled with its object's class or "background". A
small feature pyramid is pretrained on a few scenes of digits, clothes and animals, with a head for each; from it an
expert for each is fine-tuned, backbone and head, on more. Backbones are merged, the experts' heads are kept. Writes
benchmarks/results/segmentation.json and the table between the markers of docs/studies.md.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from results import RESULTS, environment, measured, put
from studies import PAGE
from torch import Tensor, nn

from statsmerge_ext import merge
from statsmerge_ext.evaluation.datasets import PackageStore, Split, SplitSizes, images, load_or_build
from statsmerge_ext.evaluation.report import markdown_table
from statsmerge_ext.memory import keep_freed_memory

SIDE, OBJECT = 40, 24
SIZES = SplitSizes(train=2000, validation=300, test=500)
TASKS = (images.mnist, images.fashion, images.animal)
#: Scenes a task, passes over them and learning rate: of the base, and of each expert.
PRETRAINING, FINE_TUNING = (400, 10, 4e-3), (1600, 4, 2e-3)
SEEDS, BATCH_SIZE = 2, 16
START = 0.5

Scenes = tuple[Tensor, Tensor]  # float32 [N, 3, SIDE, SIDE] and int64 [N, SIDE, SIDE], 0 for the background


class Pyramid(nn.Module):
    """Three stages of convolutions, their features added up from coarse to fine, [N, 32, SIDE / 2, SIDE / 2]."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), out: int = 32) -> None:
        super().__init__()
        self.stages, self.laterals = nn.ModuleList(), nn.ModuleList()
        before = 3
        for width in widths:
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, stride=2, padding=1),
                    nn.GroupNorm(8, width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1),
                    nn.GroupNorm(8, width),
                    nn.ReLU(),
                )
            )
            self.laterals.append(nn.Conv2d(width, out, 1))
            before = width
        self.smooth = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        top = self.laterals[-1](features[-1])
        for lateral, feature in zip(reversed(self.laterals[:-1]), reversed(features[:-1]), strict=True):
            top = lateral(feature) + F.interpolate(top, size=feature.shape[2:], mode="nearest")
        return self.smooth(top).relu()


def scenes(objects: Split, backgrounds: Split, seed: int) -> Scenes:
    """One scene an object, which stands somewhere on a background."""
    random = np.random.default_rng(seed)
    pictures = torch.from_numpy(backgrounds.inputs[random.integers(len(backgrounds), size=len(objects))])
    x = F.interpolate(pictures.movedim(-1, 1).float() / 255, size=SIDE, mode="bilinear")
    y = torch.zeros(len(objects), SIDE, SIDE, dtype=torch.int64)
    shapes = torch.from_numpy(objects.inputs).float().unsqueeze(1) / 255
    shapes = F.interpolate(shapes, size=OBJECT, mode="bilinear", antialias=True)[:, 0]
    colours = torch.from_numpy(random.uniform(0.3, 1, (len(objects), 3))).float()
    for i, (top, left) in enumerate(random.integers(SIDE - OBJECT + 1, size=(len(objects), 2))):
        place = (..., slice(top, top + OBJECT), slice(left, left + OBJECT))
        x[i][place] = torch.lerp(x[i][place], colours[i].view(3, 1, 1), shapes[i])
        y[i][place] = torch.where(shapes[i] > 0.3, int(objects.labels[i]) + 1, 0)
    return x, y


def train(
    backbone: Pyramid, heads: dict[str, nn.Module], data: dict[str, Scenes], setting: tuple[int, int, float], seed: int
) -> None:
    """Train ``backbone`` and ``heads`` on the first scenes of every task in ``data``, in batches of one task."""
    count, epochs, lr = setting
    parameters = [*backbone.parameters(), *(p for name in data for p in heads[name].parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(epochs):
        epoch = [(name, rows) for name in data for rows in torch.randperm(count, generator=generator).split(BATCH_SIZE)]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, len(batches))
    for name, rows in batches:
        x, y = data[name]
        loss = F.cross_entropy(logits(backbone, heads[name], x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def logits(backbone: Pyramid, head: nn.Module, x: Tensor) -> Tensor:
    return F.interpolate(head(backbone(x)), size=x.shape[2:], mode="bilinear")


@torch.inference_mode()
def mean_iou(backbone: Pyramid, head: nn.Conv2d, data: Scenes) -> float:
    """Intersection over union, mean of all classes and the background."""
    count = head.out_channels
    confusion = torch.zeros(count, count)
    for x, y in zip(data[0].split(100), data[1].split(100), strict=True):
        predicted = logits(backbone, head, x).argmax(1)
        confusion += torch.bincount((y * count + predicted).flatten(), minlength=count**2).reshape(count, count)
    hit = confusion.diagonal()
    return float((hit / (confusion.sum(0) + confusion.sum(1) - hit).clamp_min(1)).mean())


def measure(data: dict, seed: int) -> dict[str, dict[str, float]]:
    """Row -> task -> mean IoU, with everything trained and drawn by ``seed``."""
    torch.manual_seed(seed)

    def drawn(name: str, split: str) -> Scenes:
        return scenes(getattr(data[name], split), getattr(data["climate"], split), seed)

    names = [task.name for task in TASKS]
    scenes_of = {name: drawn(name, "train") for name in names}
    base, first_heads = Pyramid(), {name: nn.Conv2d(32, len(data[name].classes) + 1, 1) for name in names}
    train(base, first_heads, scenes_of, PRETRAINING, seed)
    experts, heads = {}, copy.deepcopy(first_heads)
    for name in names:
        experts[name] = copy.deepcopy(base)
        train(experts[name], heads, {name: scenes_of[name]}, FINE_TUNING, seed)
    tests = {name: drawn(name, "test") for name in names}
    models = {
        "base, experts' heads": dict.fromkeys(experts, base),
        "experts": experts,
        "linear": dict.fromkeys(experts, merge("linear", base=base, experts=experts).model),
    }
    for anchor in experts:
        merged = merge("layer_wise_anchor", base=base, experts=experts, anchor=anchor, start=START).model
        models[f"layer_wise_anchor, anchor {anchor}"] = dict.fromkeys(experts, merged)
    return {
        row: {name: mean_iou(model, heads[name], tests[name]) for name, model in of_task.items()}
        for row, of_task in models.items()
    }


def main() -> None:
    keep_freed_memory()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="statsmerge-") as scratch:
        store = PackageStore(Path(scratch))
        data = {d.name: load_or_build(d, SIZES, 0, store) for d in (*TASKS, images.climate)}
    runs = [measure(data, seed) for seed in range(SEEDS)]
    facts = {**environment(), "seconds": round(time.perf_counter() - start)}
    (RESULTS / "segmentation.json").write_text(json.dumps({"environment": facts, "runs": runs}, indent=1) + "\n")
    names = [task.name for task in TASKS]
    rows = []
    for row in runs[0]:
        averages = [100 * statistics.fmean(run[row].values()) for run in runs]
        cells = [f"{100 * statistics.fmean(run[row][name] for run in runs):.1f}" for name in names]
        spread = (max(averages) - min(averages)) / 2
        rows.append([row, *cells, f"{statistics.fmean(averages):.1f} ± {spread:.1f}"])
    table = markdown_table(["", *names, "average"], rows)
    caption = (
        f"Mean intersection over union in percent, {SEEDS} seeds (experts trained anew), ± half the range; all in "
        f"{facts['seconds']} s on {facts['threads']} thread(s). {measured(facts)}"
    )
    put(PAGE, "segmentation", f"{caption}\n\n{table}")
    print(table)


if __name__ == "__main__":
    main()
