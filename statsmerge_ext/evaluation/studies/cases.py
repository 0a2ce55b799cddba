"""What is studied: every study as a list of cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from statsmerge_ext.errors import MethodError
from statsmerge_ext.evaluation.comparison import CALIBRATION_SAMPLES
from statsmerge_ext.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from statsmerge_ext.evaluation.foreign import RESNET, SUITE
from statsmerge_ext.evaluation.studies.storage import FORMS
from statsmerge_ext.evaluation.suites import Suite
from statsmerge_ext.methods import get_method
from statsmerge_ext.methods.registry import nearest
from statsmerge_ext.methods.stats_merging import STATISTICS

#: The methods that most studies look at: the strongest of their kinds, a rule and three that see data.
COMPARED = ("task_arithmetic", "adamerging", "stats_merging/own", "lot")
#: Calibration samples a task that methods which solve layers are compared with.
BUDGETS = (8, 16, 32, 64, 256)
#: Test examples a task where cases differ in them alone and are many.
FEW = 128
#: The ceiling that reads labels, the coefficients that a learner predicts for experts it has never seen, the share of
#: float32's bytes that stored experts take, and a teacher of another architecture on its own: what a case can have as
#: its entry beside the methods.
LABELLED, PREDICTED, BYTES, TEACHER = "labelled", "predicted", "bytes", "teacher"


@dataclass(frozen=True)
class Case:
    """One merge and what it is tested on.

    Attributes:
        row, setting: its place in the study's table: a method, and the value of what changes.
        entry: what to merge by, as in a comparison, or one of the names above.
        seed: of the calibration samples and of training.
        samples: calibration samples a task.
        left_out: tasks whose experts are not merged; for PREDICTED, whose experts and samples the learner never saw.
        tested: tasks that count; empty: all.
        part: which part of a study that is a mean over many, such as pairs of tasks, it belongs to.
        hyperparameters: beside those chosen for the suite.
        limit: test examples a task; None: all.
        stored: the form in which the experts were stored, one of FORMS.
        corrupted: kind and severity of the test images' corruption, or None.
        calibration_corrupted: of the calibration images'.
        foreign: a task and the kind of its teacher of another architecture, whose student takes the place of the task's
            expert; the seed is also the teacher's and the student's.
    """

    row: str
    setting: str
    entry: str
    seed: int = 0
    samples: int = CALIBRATION_SAMPLES
    left_out: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    part: str = ""
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    limit: int | None = None
    stored: str = "float32"
    corrupted: tuple[str, int] | None = None
    calibration_corrupted: tuple[str, int] | None = None
    foreign: tuple[str, str] | None = None


@dataclass(frozen=True)
class Study:
    """A named list of cases.

    Attributes:
        name, title: what it is called, and what its table says it shows.
        cases: (suite, seeds) -> the cases; seeds, or rounds of pairs of tasks.
        seeds: how many are taken unless said otherwise.
    """

    name: str
    title: str
    cases: Callable[[Suite, int], Iterator[Case]]
    seeds: int = 3


def _labels(suite: Suite, seeds: int) -> Iterator[Case]:
    for seed in range(seeds):
        for entry in (
            "adamerging",
            "adamerging/plusplus",
            "stats_merging/task",
            "stats_merging/layer",
            "stats_merging/own",
        ):
            yield Case(entry, "average", entry, seed)
        yield Case("free coefficients, true labels", "average", LABELLED, seed)


def _start(suite: Suite, seeds: int) -> Iterator[Case]:
    """Coefficients alone, and on two closed forms. Those on the second are learned as on the first."""
    entries = ("adamerging", "stats_merging/own", "lot", "lot+adamerging", "lot+stats_merging", "drift_compensation")
    learning = suite.hyperparameters.get("lot+stats_merging", {})
    for seed in range(seeds):
        for entry in entries:
            yield Case(entry, "average", entry, seed)
        entry = "drift_compensation+stats_merging"
        yield Case(entry, "average", entry, seed, hyperparameters=learning)


def _pairs(suite: Suite, rounds: int) -> Iterator[tuple[str, str]]:
    """In each round the pairs of tasks that are one place further apart: every task twice; in half as many rounds as
    there are tasks, all pairs."""
    names = suite.task_names
    apart = (((i + r) % len(names), i) for r in range(1, rounds + 1) for i in range(len(names)))
    return ((names[i], names[j]) for i, j in dict.fromkeys(tuple(sorted(pair)) for pair in apart))


def _transfer(suite: Suite, rounds: int) -> Iterator[Case]:
    """Two experts at a time are new: left out, merged by rule, by predicted coefficients, or learned with all."""
    for pair in _pairs(suite, rounds):
        for row, entry, left_out in (
            ("stats_merging/layer of the other six", "stats_merging/layer", pair),
            ("linear", "linear", ()),
            ("task_arithmetic", "task_arithmetic", ()),
            ("stats_merging/layer, predicted", PREDICTED, pair),
            ("stats_merging/layer, learned with all", "stats_merging/layer", ()),
        ):
            part = " and ".join(pair)
            yield Case(row, "the two new tasks", entry, left_out=left_out, tested=pair, part=part)
            yield Case(row, "all tasks", entry, left_out=left_out, part=part)


def _unseen(suite: Suite, rounds: int) -> Iterator[Case]:
    for pair in _pairs(suite, rounds):
        seen = tuple(name for name in suite.task_names if name not in pair)
        for entry in ("linear", *COMPARED):
            for setting, tested in (("six merged tasks", seen), ("two unseen tasks", pair)):
                yield Case(entry, setting, entry, left_out=pair, tested=tested, part=" and ".join(pair))


def _statistics(suite: Suite, seeds: int) -> Iterator[Case]:
    entry = "stats_merging/layer"
    chosen = {"all": None} | {f"without {name}": [s for s in STATISTICS if s != name] for name in STATISTICS}
    for seed, (setting, names) in itertools.product(range(seeds), chosen.items()):
        yield Case(setting, "average", entry, seed, hyperparameters={"statistics": names} if names else {})


def _samples(suite: Suite, seeds: int) -> Iterator[Case]:
    for seed, samples in itertools.product(range(seeds), (4, 8, 16, 32, 64)):
        for entry in ("adamerging", "stats_merging/own", "regmean", "lot"):
            yield Case(entry, str(samples), entry, seed, samples)


def _closed_forms(suite: Suite, seeds: int) -> Iterator[Case]:
    """Methods that solve layers, beside the rule that sees no sample; and one as it is where nothing was chosen."""
    entries = ("task_arithmetic", "regmean", "regmean_plus_plus", "featcal", "lot", "drift_compensation")
    defaults = get_method("drift_compensation").hyperparameters
    for seed, samples in itertools.product(range(seeds), BUDGETS):
        for entry in entries:
            yield Case(entry, str(samples), entry, seed, samples)
        row = "drift_compensation, defaults"
        yield Case(row, str(samples), "drift_compensation", seed, samples, hyperparameters=defaults)


def _tasks(suite: Suite, seeds: int) -> Iterator[Case]:
    """The first two, four, … tasks in an order of each seed's own; only they count."""
    for seed in range(seeds):
        order = [suite.task_names[i] for i in np.random.default_rng(seed).permutation(len(suite.task_names))]
        for count in range(2, len(order) + 1, 2):
            for entry in ("linear", *COMPARED):
                yield Case(entry, str(count), entry, seed, left_out=tuple(order[count:]), tested=tuple(order[:count]))


def _robustness(suite: Suite, seeds: int) -> Iterator[Case]:
    for seed, entry in itertools.product(range(seeds), COMPARED):
        yield Case(entry, "clean", entry, seed, limit=FEW)
        for kind, severity in itertools.product(CORRUPTIONS, SEVERITIES):
            yield Case(entry, kind, entry, seed, corrupted=(kind, severity), limit=FEW)


def _robust_calibration(suite: Suite, seeds: int) -> Iterator[Case]:
    for seed, kind in itertools.product(range(seeds), ("clean", *CORRUPTIONS)):
        corrupted = None if kind == "clean" else (kind, 3)
        for entry in COMPARED[1:]:
            yield Case(entry, kind, entry, seed, calibration_corrupted=corrupted)


def _quantisation(suite: Suite, seeds: int) -> Iterator[Case]:
    for form in FORMS:
        yield Case(form, "% of the bytes", BYTES, stored=form)
    for seed, entry, form in itertools.product(range(seeds), ("task_arithmetic", "lot"), FORMS):
        yield Case(form, entry, entry, seed, stored=form)


def _foreign(suite: Suite, seeds: int) -> Iterator[Case]:
    """Two tasks' experts, students and teachers alone; then merges of all tasks with one student or none."""
    names = suite.task_names
    for seed, foreign in itertools.product(range(seeds), ((names[0], RESNET), (names[-1], SUITE))):
        task, kind = foreign
        others = tuple(name for name in names if name != task)
        for setting, student in (("native", None), (f"{task} from {kind}", foreign)):
            alone = {"left_out": others, "tested": (task,), "foreign": student}
            yield Case(f"{task}'s expert, alone", setting, "linear", seed, **alone)
            for entry in ("task_arithmetic", "stats_merging/own", "lot"):
                yield Case(entry, setting, entry, seed, foreign=student)
        yield Case(f"{task}'s teacher", setting, TEACHER, seed, tested=(task,), foreign=foreign)


STUDIES = {
    study.name: study
    for study in (
        Study("labels", "without labels, and the ceiling: free coefficients trained with true labels", _labels),
        Study("start", "coefficients of the task vectors, and of what a closed form leaves over", _start),
        Study("transfer", "all experts merged, two of them unknown to the learner; mean over pairs", _transfer, 4),
        Study("statistics", "what the learner of StatsMerging sees", _statistics),
        Study("samples", "calibration samples a task", _samples),
        Study("closed_forms", "calibration samples a task of methods that solve layers", _closed_forms),
        Study("tasks", "number of tasks merged, average over these tasks", _tasks),
        Study("unseen", "six experts merged: their tasks, and the two others'; mean over pairs", _unseen, 4),
        Study("robustness", f"corrupted test images ({FEW} a task), mean of five severities", _robustness, 1),
        Study(
            "robust_calibration", "corrupted calibration images (severity 3), clean test images", _robust_calibration
        ),
        Study("foreign", "one expert distilled from another architecture; all tasks, or its own", _foreign),
        Study("quantisation", "form in which the experts' task vectors are stored", _quantisation, 1),
    )
}


def get_study(name: str) -> Study:
    """The study called ``name``. Raises MethodError, with the nearest name, if there is none."""
    if name not in STUDIES:
        raise MethodError(f"unknown study {name!r}{nearest(name, STUDIES)}; known: {', '.join(STUDIES)}")
    return STUDIES[name]
