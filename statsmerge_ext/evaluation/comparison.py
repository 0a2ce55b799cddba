"""Every method on one suite: merged, timed, evaluated."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext.engine.merging import MergeResult, merge
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evaluation.drift import feature_drift
from statsmerge_ext.evaluation.run import evaluate_experts, evaluate_model
from statsmerge_ext.evaluation.suites import Suite
from statsmerge_ext.evidence import GramEvidence, collect_grams
from statsmerge_ext.layers import find_layers
from statsmerge_ext.methods import get_method
from statsmerge_ext.methods.registry import nearest

#: The rows of a comparison, in order, as keyed in a suite's hyperparameters: "method" or "method/variant"; in "a+b" the
#: model that a merges is the base that b starts from, so that b weighs what a leaves over.
ENTRIES = (
    "linear",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "wudi",
    "swudi",
    "ace",
    "regmean",
    "esm",
    "stats_merging/task",
    "adamerging",
    "adamerging/plusplus",
    "stats_merging/layer",
    "stats_merging/own",
    "lot",
    "lot+stats_merging",
    "regmean_plus_plus",
    "featcal",
    "drift_compensation",
)
CALIBRATION_SAMPLES = 64


@dataclass
class Row:
    """One line of a comparison: what was measured for each seed.

    Attributes:
        name: entry, or "base" or "experts".
        accuracies: one dict task -> accuracy in [0, 1] a seed.
        seconds: one a seed: collecting evidence and merging, without loading and evaluation.
        drift: layer -> feature drift, of the first seed.
        coefficients: of the first seed, as in :class:`~statsmerge_ext.engine.merging.MergeResult`.
    """

    name: str
    accuracies: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)
    coefficients: dict | None = None

    def mean(self, task: str) -> float:
        return statistics.fmean(accuracy[task] for accuracy in self.accuracies)

    def averages(self) -> list[float]:
        """Average accuracy over the tasks, for each seed."""
        return [statistics.fmean(accuracy.values()) for accuracy in self.accuracies]

    def average(self) -> float:
        return statistics.fmean(self.averages())

    def spread(self) -> float:
        """Half the range of the average over the seeds."""
        return (max(self.averages()) - min(self.averages())) / 2


@dataclass
class Comparison:
    """All rows of one suite."""

    suite: str
    tasks: list[str]
    seeds: int
    samples: int
    rows: dict[str, Row]
    notes: list[str] = field(default_factory=list)

    def recovered(self, row: Row) -> float:
        """Share of the gap between base and experts that ``row`` recovers."""
        base, experts = self.rows["base"].average(), self.rows["experts"].average()
        return (row.average() - base) / (experts - base) if experts != base else math.nan


def check_entries(entries: Sequence[str], seeds: int) -> None:
    """Raise MethodError for a row that cannot be made: an unknown method or variant, or no seed at all."""
    if seeds < 1:
        raise MethodError(f"seeds: expected at least 1, got {seeds}")
    for entry in entries:
        needs_of(entry)
        if ("/" in entry or "+" in entry) and entry not in ENTRIES:
            raise MethodError(f"unknown entry {entry!r}{nearest(entry, ENTRIES)}; known: {', '.join(ENTRIES)}")


def needs_of(entry: str) -> frozenset[str]:
    """What the methods of an entry need beyond the weights. Raises MethodError for an unknown method."""
    return frozenset().union(*(get_method(step.partition("/")[0]).needs for step in entry.split("+")))


def merge_suite(
    suite: Suite,
    entry: str,
    models: tuple[nn.Module, Mapping[str, Mapping[str, Tensor]]],
    calibration: Mapping[str, list],
    *,
    evidence: GramEvidence | None = None,
    progress: bool = False,
    seed: int = 0,
    hyperparameters: Mapping[str, object] | None = None,
) -> MergeResult:
    """Merge a suite's experts by ``entry``.

    ``evidence`` is of the suite's own base. ``hyperparameters`` are those of the entry's last method, by default the
    ones chosen for the suite.
    """
    base, experts = models
    first, _, then = entry.rpartition("+")
    if first:
        options = {"evidence": evidence, "progress": progress, "seed": seed}
        base, evidence = merge_suite(suite, first, models, calibration, **options).model, None
    method = then.partition("/")[0]
    return merge(
        method,
        base=base,
        experts=experts,
        calibration=calibration,
        heads={name: suite.task(name).head for name in experts},
        forward=suite.forward,
        evidence=evidence if "grams" in get_method(method).needs else None,
        progress=progress,
        seed=seed,
        **(suite.hyperparameters.get(entry, {}) if hyperparameters is None else hyperparameters),
    )


def load_models(suite: Suite) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The base and the experts' state dicts of a prepared suite."""
    return suite.load_base(), {name: suite.load_expert(name) for name in suite.task_names}


def calibration_of(
    suite: Suite, samples: int = CALIBRATION_SAMPLES, seed: int = 0, batch_size: int = 16
) -> dict[str, list]:
    """Unlabelled training samples of every task."""
    return {name: suite.task(name).calibration(samples, seed=seed, batch_size=batch_size) for name in suite.task_names}


def collect_suite_grams(
    suite: Suite, models: tuple, calibration: Mapping[str, list], progress: bool = False
) -> GramEvidence:
    """Gram evidence of a suite's experts on ``calibration``."""
    base, experts = models
    return collect_grams(
        base,
        find_layers(base),
        base.state_dict(),
        experts,
        calibration,
        forward=suite.forward,
        progress=progress,
    )


def compare(
    suite: Suite,
    entries: Sequence[str] = ENTRIES,
    *,
    seeds: int = 1,
    samples: int = CALIBRATION_SAMPLES,
    progress: bool = True,
) -> Comparison:
    """Merge a prepared suite by every entry, for every seed, and evaluate on the test split.

    A seed draws the calibration samples and everything random in training. Methods that never look at data are merged
    once: they have no spread. Gram evidence is collected once a seed and its time counted for each method that uses it.

    Raises MethodError for an unknown entry or less than one seed.
    """
    check_entries(entries, seeds)
    models = base, experts = load_models(suite)
    rows = {
        "base": Row("base", [evaluate_model(base, suite, progress=progress)]),
        "experts": Row("experts", [evaluate_experts(suite, progress=progress)]),
        **{entry: Row(entry) for entry in entries},
    }
    held_out = {name: next(iter(suite.task(name).batches("validation", batch_size=16)))[0] for name in experts}
    rows["base"].drift = feature_drift(suite.load_base(), experts, held_out, suite.forward)
    for seed in range(seeds):
        calibration = calibration_of(suite, samples, seed)
        start = time.perf_counter()
        needs_grams = any("grams" in needs_of(entry) for entry in entries)
        evidence = collect_suite_grams(suite, models, calibration) if needs_grams else None
        evidence_seconds = time.perf_counter() - start
        for entry in tqdm(entries, desc=f"{suite.name}, seed {seed}", unit="method", disable=not progress):
            needs = needs_of(entry)
            if seed and not needs:
                continue
            start = time.perf_counter()
            result = merge_suite(suite, entry, models, calibration, evidence=evidence, progress=progress, seed=seed)
            seconds = time.perf_counter() - start
            row = rows[entry]
            row.seconds.append(seconds + (evidence_seconds if "grams" in needs else 0.0))
            row.accuracies.append(evaluate_model(result.model, suite))
            if seed == 0:
                row.drift = feature_drift(result.model, experts, held_out, suite.forward)
                row.coefficients = result.coefficients
    return Comparison(suite.name, list(suite.task_names), seeds, samples, rows)
