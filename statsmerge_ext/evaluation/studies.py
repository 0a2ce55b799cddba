"""Studies: how merges fare as one thing changes: samples, tasks, what was merged, corruption, statistics, labels.

A study is a list of cases, each one merge and what it is tested on. Results are kept case by case, so that a study that
was interrupted goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.engine.merging import MergeResult, merge
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evaluation.ceiling import labelled_coefficients
from statsmerge_ext.evaluation.comparison import CALIBRATION_SAMPLES, collect_suite_grams, load_models, merge_suite
from statsmerge_ext.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from statsmerge_ext.evaluation.run import evaluate_model
from statsmerge_ext.evaluation.suites import Suite
from statsmerge_ext.methods import get_method
from statsmerge_ext.methods.registry import nearest
from statsmerge_ext.methods.stats_merging import STATISTICS

BATCH_SIZE = 16
DATA_FREE = ("linear", "task_arithmetic", "ties")
WITH_DATA = ("regmean", "adamerging", "stats_merging/task", "stats_merging/layer", "lot")


@dataclass(frozen=True)
class Case:
    """One merge and what it is tested on.

    Attributes:
        row, setting: its place in the study's table: a method, and the value of what changes.
        entry: method to merge by, as in a comparison; or "labelled", the ceiling that reads labels, or "transfer", the
            coefficients that a learner trained without ``unseen`` predicts for all experts.
        seed: of the calibration samples and of training.
        samples: calibration samples a task.
        unseen: tasks whose experts are not merged.
        tested: tasks that count; empty: all.
        hyperparameters: beside those chosen for the suite.
        corrupted: kind and severity of the test images' corruption, or None.
        calibration_corrupted: of the calibration images'.
    """

    row: str
    setting: str
    entry: str
    seed: int = 0
    samples: int = CALIBRATION_SAMPLES
    unseen: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    corrupted: tuple[str, int] | None = None
    calibration_corrupted: tuple[str, int] | None = None

    @property
    def merged_as(self) -> str:
        """A key that is the same for cases which merge the same model."""
        facts = {k: v for k, v in asdict(self).items() if k not in ("row", "setting", "tested", "corrupted")}
        return json.dumps(facts, sort_keys=True)


@dataclass(frozen=True)
class Study:
    """A named list of cases.

    Attributes:
        name, title: what it is called, and what its table says it shows.
        cases: (suite, seeds) -> the cases.
        seeds: how many are taken unless said otherwise.
    """

    name: str
    title: str
    cases: Callable[[Suite, int], Iterator[Case]]
    seeds: int = 3


def _samples(suite: Suite, seeds: int) -> Iterator[Case]:
    for samples, seed, entry in itertools.product((4, 8, 16, 32, 64), range(seeds), WITH_DATA):
        yield Case(entry, str(samples), entry, seed, samples)


def _tasks(suite: Suite, seeds: int) -> Iterator[Case]:
    """The first two, three, … tasks in an order of each seed's own; only they count."""
    for seed in range(seeds):
        order = [suite.task_names[i] for i in np.random.default_rng(seed).permutation(len(suite.task_names))]
        for count in range(2, len(order) + 1):
            for entry in DATA_FREE + WITH_DATA:
                yield Case(entry, str(count), entry, seed, unseen=tuple(order[count:]), tested=tuple(order[:count]))


def _unseen(suite: Suite, seeds: int) -> Iterator[Case]:
    for pair, seed in itertools.product(itertools.combinations(suite.task_names, 2), range(seeds)):
        seen = tuple(name for name in suite.task_names if name not in pair)
        for entry in DATA_FREE + WITH_DATA:
            for setting, tested in (("seen", seen), ("unseen", pair)):
                yield Case(entry, setting, entry, seed, unseen=pair, tested=tested)


def _transfer(suite: Suite, seeds: int) -> Iterator[Case]:
    """All experts merged; those of two tasks by coefficients that a learner predicts which never saw them."""
    for pair, seed in itertools.product(itertools.combinations(suite.task_names, 2), range(seeds)):
        for entry in ("linear", "task_arithmetic", "transfer"):
            yield Case(entry, "the two new experts' tasks", entry, seed, unseen=pair, tested=pair)


def _robustness(suite: Suite, seeds: int) -> Iterator[Case]:
    entries = ("task_arithmetic", "regmean", "adamerging", "stats_merging/layer", "lot")
    for seed, entry, kind, severity in itertools.product(range(seeds), entries, CORRUPTIONS, SEVERITIES):
        yield Case(entry, kind, entry, seed, corrupted=(kind, severity))


def _robust_calibration(suite: Suite, seeds: int) -> Iterator[Case]:
    for kind, seed, entry in itertools.product(CORRUPTIONS, range(seeds), WITH_DATA):
        yield Case(entry, kind, entry, seed, calibration_corrupted=(kind, 3))


def _statistics(suite: Suite, seeds: int) -> Iterator[Case]:
    chosen = {"all": STATISTICS} | {f"without {name}": [s for s in STATISTICS if s != name] for name in STATISTICS}
    for setting, names in chosen.items():
        for entry, seed in itertools.product(("stats_merging/task", "stats_merging/layer"), range(seeds)):
            yield Case(entry, setting, entry, seed, hyperparameters={"statistics": list(names)})


def _labels(suite: Suite, seeds: int) -> Iterator[Case]:
    for seed in range(seeds):
        for entry in ("stats_merging/layer", "adamerging", "labelled"):
            yield Case(entry, "layer-wise", entry, seed)


STUDIES = {
    study.name: study
    for study in (
        Study("samples", "calibration samples a task", _samples),
        Study("tasks", "number of tasks merged, average over these tasks", _tasks),
        Study("unseen", "six experts merged: their tasks, and the two others'", _unseen, seeds=1),
        Study("transfer", "all experts merged, two of them by predicted coefficients", _transfer, seeds=1),
        Study("robustness", "corrupted test images, mean of five severities", _robustness, seeds=1),
        Study(
            "robust_calibration", "corrupted calibration images (severity 3), clean test images", _robust_calibration
        ),
        Study("statistics", "what the learner of StatsMerging sees", _statistics),
        Study("labels", "without labels, and the ceiling: free coefficients trained with true labels", _labels),
    )
}


def get_study(name: str) -> Study:
    """The study called ``name``. Raises MethodError, with the nearest name, if there is none."""
    if name not in STUDIES:
        raise MethodError(f"unknown study {name!r}{nearest(name, STUDIES)}; known: {', '.join(STUDIES)}")
    return STUDIES[name]


def run_study(
    study: Study, suite: Suite, out: Path, *, seeds: int | None = None, limit: int | None = None, progress: bool = True
) -> dict:
    """Run what is missing of a study on a prepared suite; returns, and keeps in the file ``out``, all its results.

    Args:
        study, suite: what to run.
        out: JSON file; cases that it has already are not run again.
        seeds: instead of the study's own number.
        limit: test examples a task, for a quicker look.
        progress: show a progress bar.

    Raises:
        DataError: a study of images on a suite of texts.
    """
    cases = list(study.cases(suite, seeds or study.seeds))
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"records": {}}
    results |= {"study": study.name, "title": study.title, "suite": suite.name, "limit": limit}
    bench = _Bench(suite)
    for case in tqdm(cases, desc=f"{study.name}, {suite.name}", unit="case", disable=not progress):
        key = json.dumps(asdict(case), sort_keys=True)
        if key in results["records"]:
            continue
        accuracies = bench.accuracies(case, limit)
        results["records"][key] = {"row": case.row, "setting": case.setting, "accuracies": accuracies}
        with atomic_output(out, overwrite=True) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def study_table(results: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: average accuracy in percent, and half the range over what a cell has several of."""
    cells: dict[tuple[str, str], list[float]] = {}
    for record in results["records"].values():
        average = statistics.fmean(record["accuracies"].values())
        cells.setdefault((record["row"], record["setting"]), []).append(100 * average)
    rows, settings = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))

    def cell(row: str, setting: str) -> str:
        values = cells.get((row, setting))
        if not values:
            return ""
        spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}"

    return ["", *settings], [[row, *(cell(row, setting) for setting in settings)] for row in rows]


def plot_study(results: Mapping, path: Path) -> None:
    """Write the table as a picture: curves where the settings are numbers, else bars."""
    from matplotlib.figure import Figure

    (_, *settings), rows = study_table(results)
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    numeric = all(setting.isdigit() for setting in settings)
    width = 0.85 / len(rows)
    for place, (name, *cells) in enumerate(rows):
        points = [(i, float(cell.split()[0])) for i, cell in enumerate(cells) if cell]
        if numeric:
            axes.plot([int(settings[i]) for i, _ in points], [value for _, value in points], marker="o", label=name)
        else:
            axes.bar([i + place * width for i, _ in points], [value for _, value in points], width, label=name)
    if not numeric:
        axes.set_xticks([i + 0.4 for i in range(len(settings))], settings)
    axes.set_xlabel(results["title"])
    axes.set_ylabel(f"{results['suite']}: average test accuracy, %")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    with atomic_output(path, overwrite=True) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


class _Bench:
    """Makes the models of cases. Cases that follow each other mostly share models or evidence, so the last are kept."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._models = load_models(suite)
        self._last: dict[str, tuple[object, object]] = {}

    def accuracies(self, case: Case, limit: int | None) -> dict[str, float]:
        model = self._kept("model", case.merged_as, lambda: self._merge(case).model)
        options = {"limit": limit}
        if case.corrupted is not None:
            options["change"] = partial(corrupt, kind=case.corrupted[0], severity=case.corrupted[1])
        accuracies = evaluate_model(model, self._suite, **options)
        return {name: accuracy for name, accuracy in accuracies.items() if name in (case.tested or accuracies)}

    def _merge(self, case: Case) -> MergeResult:
        suite, (base, experts) = self._suite, self._models
        merged = {name: state for name, state in experts.items() if name not in case.unseen}
        calibration = self._calibration(case, list(merged))
        if case.entry == "transfer":
            entry = "stats_merging/layer"
            learned = merge_suite(suite, entry, (base, merged), calibration, seed=case.seed)
            return merge("stats_merging_predict", base=base, experts=experts, learner=learned.learner)
        hyperparameters = {**suite.hyperparameters.get(case.entry, {}), **case.hyperparameters}
        if case.entry == "labelled":
            drawn = {"samples": case.samples, "seed": case.seed, "batch_size": BATCH_SIZE}
            labels = {name: suite.task(name).calibration_labels(**drawn) for name in merged}
            heads = {name: suite.task(name).head for name in merged}
            settings = suite.hyperparameters.get("adamerging", {})
            models = {"base": base, "experts": merged, "calibration": calibration, "heads": heads}
            return merge(labelled_coefficients(labels), **models, forward=suite.forward, seed=case.seed, **settings)
        evidence = None
        if "grams" in get_method(case.entry.partition("/")[0]).needs:
            key = json.dumps([case.seed, case.samples, list(merged), case.calibration_corrupted])
            evidence = self._kept("grams", key, lambda: collect_suite_grams(suite, (base, merged), calibration))
        return merge_suite(
            suite,
            case.entry,
            (base, merged),
            calibration,
            evidence=evidence,
            seed=case.seed,
            hyperparameters=hyperparameters,
        )

    def _calibration(self, case: Case, names: list[str]) -> dict[str, list]:
        options = {"samples": case.samples, "seed": case.seed, "batch_size": BATCH_SIZE}
        if case.calibration_corrupted is not None:
            kind, severity = case.calibration_corrupted
            options["change"] = partial(corrupt, kind=kind, severity=severity)
        return {name: self._suite.task(name).calibration(**options) for name in names}

    def _kept(self, what: str, key: str, make: Callable[[], object]) -> object:
        if self._last.get(what, (None, None))[0] != key:
            self._last[what] = (key, make())
        return self._last[what][1]
