"""A third suite, in one file: three tasks of generated 8 × 8 images and a base of two convolutions with BatchNorm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from statsmerge_ext.evaluation.datasets import Dataset, Examples, Package, SplitSizes
from statsmerge_ext.evaluation.suites import SuiteDefinition, TrainingSettings

SIDE = 8
CLASSES = ("cross", "ring", "dots")
TASKS = ("red", "green", "blue")
SIZES = SplitSizes(train=240, validation=24, test=90)
HYPERPARAMETERS = {
    "task_arithmetic": {"scaling_factor": 0.5},
    "lot": {"scaling_factor": 1.1},
    "stats_merging/task": {"granularity": "task", "epochs": 2, "lr": 1e-2, "hidden": 8},
    "stats_merging/layer": {"granularity": "layer", "epochs": 2, "lr": 1e-2, "hidden": 8},
}
NPM = Package("npm", ("tiny-data@1.0.0",))


def make_dataset(name: str, package: Package | None = None) -> Dataset:
    """Noisy copies of three random patterns, the name's own; read from ``package`` if there is one."""

    def load(store) -> Examples:
        if package is not None:
            store.path(package)
        generator = np.random.default_rng(list(name.encode()))
        labels = np.arange(480) % len(CLASSES)
        patterns = generator.normal(0, 22, (len(CLASSES), SIDE, SIDE))
        images = 128 + patterns[labels] + generator.normal(0, 45, (len(labels), SIDE, SIDE))
        return Examples(images.clip(0, 255).astype(np.uint8), labels, CLASSES, np.arange(len(labels)))

    return Dataset(name, (package,) if package else (), load)


def load_base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2),
            nn.BatchNorm2d(12),
        )
        for norm in (model[1], model[4]):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.1, 0.3)
    return model.eval()


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).flatten(1)


def encode(raw: np.ndarray) -> Tensor:
    return torch.from_numpy(raw).float().div(255).sub(0.5).unsqueeze(1)


def make_definition(assets: Path, datasets: tuple[Dataset, ...] | None = None, name: str = "tiny") -> SuiteDefinition:
    return SuiteDefinition(
        name=name,
        datasets=datasets or tuple(make_dataset(task) for task in TASKS),
        load_base=load_base,
        forward=forward,
        encode=encode,
        training=TrainingSettings(epochs=4, lr=1e-2, batch_size=16, step=0.25),
        sizes=SIZES,
        shots=2,
        logit_scale=20.0,
        distilled_from="tiny",
        assets=assets,
    )
