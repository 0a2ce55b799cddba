"""What a suite is made of: everything that differs from one suite to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from statsmerge_ext.evaluation.datasets import Dataset, SplitSizes

Batch = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class TrainingSettings:
    """How an expert is fine-tuned: AdamW with a one-cycle schedule on cross-entropy through the task's frozen head.

    Attributes:
        epochs, batch_size, lr, weight_decay: as usual; lr is the peak.
        frozen: prefixes of parameters that stay the base's.
        augment: (batch, generator) -> batch, or None.
        dropout: whether the model's dropout is on. BatchNorm statistics are frozen in any case.
        bfloat16: whether the forward pass runs under autocast; it pays where matrix products dominate.
        step: quantisation step of the stored expert, in standard deviations of each task vector's tensor.
    """

    epochs: int
    lr: float
    batch_size: int = 32
    weight_decay: float = 0.01
    frozen: tuple[str, ...] = ()
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    dropout: bool = False
    bfloat16: bool = False
    step: float = 0.5


@dataclass(frozen=True)
class SuiteDefinition:
    """One suite.

    Attributes:
        name: of the suite.
        datasets: one a task; the task is called like its data set.
        load_base: makes the pretrained model, float32, in eval mode; a fresh one each time.
        forward: (model, batch) -> features [N, d].
        encode: raw inputs of a data set [N, ...] -> batch.
        sizes: of the splits.
        training: how the experts were made.
        shots: examples a class of the training split that the prototype head is the mean of.
        logit_scale: what the head's cosines are multiplied by.
        distilled_from: name of the suite of another architecture, on the same data sets and inputs, whose base was the
            teacher of this one's; None: the base was pretrained otherwise.
        tuned_on: name of the suite whose hyperparameters the methods take here, so that nothing is chosen on this one;
            None: they are chosen on its own validation splits.
        assets: folder with the experts, provenance.json and hyperparameters.json; None: the package's own, by name.
    """

    name: str
    datasets: tuple[Dataset, ...]
    load_base: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Batch], Tensor]
    encode: Callable[[np.ndarray], Batch]
    training: TrainingSettings
    sizes: SplitSizes = SplitSizes(train=2000, validation=300, test=500)
    shots: int = 8
    logit_scale: float = 30.0
    distilled_from: str | None = None
    tuned_on: str | None = None
    assets: Path | None = None
