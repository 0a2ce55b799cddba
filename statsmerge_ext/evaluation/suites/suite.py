"""A suite ready for use: its data fetched and split, its heads computed, its experts read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import statsmerge_ext
from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.datasets import Dataset, FetchError, PackageStore, TaskData, load_or_build
from statsmerge_ext.evaluation.suites.assets import read_expert
from statsmerge_ext.evaluation.suites.definition import Batch, SuiteDefinition
from statsmerge_ext.methods.registry import nearest

DATA_SEED = 0
_definitions: dict[str, SuiteDefinition] = {}

#: What is done to raw inputs before they are encoded.
Change = Callable[[np.ndarray], np.ndarray]


def _as_it_is(inputs: np.ndarray) -> np.ndarray:
    return inputs


def register_suite(definition: SuiteDefinition) -> None:
    """Make a suite available by its name. Raises DataError if another has it."""
    if _definitions.setdefault(definition.name, definition) is not definition:
        raise DataError(f"a suite named {definition.name!r} is already registered")


def list_suites() -> list[str]:
    """The names of all suites."""
    return list(_definitions)


def get_suite(name: str) -> Suite:
    """The suite called ``name``, not yet prepared. Raises DataError, with the nearest name, if there is none."""
    if name not in _definitions:
        raise DataError(f"unknown suite {name!r}{nearest(name, _definitions)}; known: {', '.join(_definitions)}")
    return Suite(_definitions[name])


class PrototypeHead(nn.Module):
    """Logits [N, C] = scale × cosine of features [N, d] and class prototypes [C, d], as CLIP's zero-shot heads are."""

    def __init__(self, prototypes: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("prototypes", F.normalize(prototypes, dim=-1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features, dim=-1) @ self.prototypes.T


class Task:
    """One task of a suite: labelled splits, and a frozen head that the base's own features define.

    Attributes:
        name: of the task.
        classes: names of its classes, [C].
        head: features [N, d] -> logits [N, C].
        data_fingerprint: changes when other examples were drawn.
    """

    def __init__(self, name: str, data: TaskData, definition: SuiteDefinition, base: nn.Module) -> None:
        self.name = name
        self.classes = data.classes
        self.data_fingerprint = data.fingerprint
        self._data = data
        self._definition = definition
        self.head = self._prototypes(base)

    def batches(self, split: str, batch_size: int = 128, change: Change = _as_it_is) -> Iterator[tuple[Batch, Tensor]]:
        """Pairs (batch, labels [N]) of "train", "validation" or "test", in order; ``change`` is made to raw inputs."""
        examples = getattr(self._data, split)
        for start in range(0, len(examples), batch_size):
            rows = slice(start, start + batch_size)
            yield self._definition.encode(change(examples.inputs[rows])), torch.from_numpy(examples.labels[rows])

    def calibration(
        self, samples: int = 64, seed: int = 0, batch_size: int = 32, change: Change = _as_it_is
    ) -> list[Batch]:
        """Batches of training inputs drawn at random, without their labels; ``change`` is made to raw inputs.

        Raises DataError when there are not that many.
        """
        inputs = self._data.train.inputs
        return [self._definition.encode(change(inputs[rows])) for rows in self._drawn(samples, seed, batch_size)]

    def calibration_labels(self, samples: int = 64, seed: int = 0, batch_size: int = 32) -> list[Tensor]:
        """The labels of :meth:`calibration`'s batches: for measuring what not reading them costs, and nothing else."""
        return [torch.from_numpy(self._data.train.labels[rows]) for rows in self._drawn(samples, seed, batch_size)]

    def _drawn(self, samples: int, seed: int, batch_size: int) -> list[np.ndarray]:
        count = len(self._data.train.inputs)
        if not 0 < samples <= count:
            raise DataError(f"task {self.name}: samples: expected 1 to {count}, got {samples}")
        rows = np.random.default_rng(seed).choice(count, samples, replace=False)
        return np.split(rows, range(batch_size, samples, batch_size))

    def _prototypes(self, base: nn.Module) -> PrototypeHead:
        """Class means of the first ``shots`` training examples of each class; the split goes round the classes."""
        count = self._definition.shots * len(self.classes)
        inputs, labels = self._data.train.inputs[:count], self._data.train.labels[:count]
        with torch.inference_mode():
            parts = [
                self._definition.forward(base, self._definition.encode(x))
                for x in np.array_split(inputs, -(-count // 128))
            ]
        features = F.normalize(torch.cat(parts).clone(), dim=-1)
        prototypes = torch.stack([features[torch.from_numpy(labels == c)].mean(0) for c in range(len(self.classes))])
        return PrototypeHead(prototypes, self._definition.logit_scale)


class Suite:
    """A base, its tasks and their experts. Call :meth:`prepare` first."""

    def __init__(self, definition: SuiteDefinition) -> None:
        self.definition = definition
        self.name = definition.name
        self.forward = definition.forward
        self.load_base = definition.load_base
        self._tasks: dict[str, Task] | None = None

    def prepare(self, progress: bool = True) -> list[str]:
        """Fetch what is not in the cache, read the splits and compute the heads.

        Returns notes: tasks that are left out because a client or package could not be had, and why; tasks whose data
        differs from what their expert was trained on.

        Raises DataError when no task is left, or a package's content is not as expected.
        """
        data, notes = self._fetch(progress)
        if not data:
            raise DataError(f"suite {self.name}: no task is available; " + "; ".join(notes))
        base = self.load_base()
        trained_on = {name: facts["data"] for name, facts in self.provenance.get("tasks", {}).items()}
        self._tasks = {}
        for name, splits in tqdm(data.items(), desc=f"Heads of {self.name}", unit="task", disable=not progress):
            self._tasks[name] = Task(name, splits, self.definition, base)
            if trained_on.get(name, splits.fingerprint) != splits.fingerprint:
                notes.append(f"{name}: its data differs from what its expert was trained on")
        return notes

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that are available. Raises DataError before :meth:`prepare`."""
        return tuple(self._prepared())

    def task(self, name: str) -> Task:
        """One task. Raises DataError for a name that is not available."""
        tasks = self._prepared()
        if name not in tasks:
            raise DataError(f"suite {self.name} has no task {name!r}{nearest(name, tasks)}; it has {', '.join(tasks)}")
        return tasks[name]

    def load_expert(self, name: str) -> dict[str, Tensor]:
        """The state dict of a task's expert. Raises DataError when its file is missing or damaged."""
        return read_expert(self.expert_path(name), self._base_state)

    def expert_path(self, name: str) -> Path:
        """The file of a task's expert."""
        return self.assets / f"{name}.npz"

    @property
    def assets(self) -> Path:
        """The folder of everything that was made for this suite."""
        return self.definition.assets or Path(statsmerge_ext.__file__).parent / "assets" / self.name

    @cached_property
    def provenance(self) -> dict:
        """How the experts were made, and their accuracies; empty before they are."""
        return _read_json(self.assets / "provenance.json")

    @cached_property
    def hyperparameters(self) -> dict[str, dict]:
        """Row of a comparison -> hyperparameters, chosen on validation splits; empty before they are."""
        tuned_on = self.definition.tuned_on
        return _read_json((get_suite(tuned_on) if tuned_on else self).assets / "hyperparameters.json")

    @cached_property
    def _base_state(self) -> dict[str, Tensor]:
        return self.load_base().state_dict()

    def _prepared(self) -> dict[str, Task]:
        if self._tasks is None:
            raise DataError(f"suite {self.name}: call prepare() first")
        return self._tasks

    def _fetch(self, progress: bool) -> tuple[dict[str, TaskData], list[str]]:
        definition = self.definition

        def load(dataset: Dataset) -> TaskData | FetchError:
            try:
                return load_or_build(dataset, definition.sizes, DATA_SEED, store)
            except FetchError as error:
                return error

        data, notes = {}, []
        with tempfile.TemporaryDirectory(prefix="statsmerge-") as scratch, ThreadPoolExecutor(4) as pool:
            store = PackageStore(Path(scratch))
            loaded = tqdm(
                zip(definition.datasets, pool.map(load, definition.datasets), strict=True),
                desc=f"Data of {self.name}",
                unit="task",
                total=len(definition.datasets),
                disable=not progress,
            )
            for dataset, splits in loaded:
                if isinstance(splits, FetchError):
                    notes.append(f"{dataset.name} is left out: {splits}")
                else:
                    data[dataset.name] = splits
        return data, notes


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
