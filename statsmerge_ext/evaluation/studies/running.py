"""Running studies: what was measured is kept, what is missing is merged and measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.engine.merging import MergeResult, merge
from statsmerge_ext.evaluation.ceiling import labelled_coefficients
from statsmerge_ext.evaluation.comparison import collect_suite_grams, load_models, merge_suite, needs_of
from statsmerge_ext.evaluation.corruptions import corrupt
from statsmerge_ext.evaluation.foreign import Teacher, make_student, make_teacher, teacher_accuracy
from statsmerge_ext.evaluation.run import evaluate_task
from statsmerge_ext.evaluation.studies.cases import BYTES, LABELLED, PREDICTED, TEACHER, Case, Study
from statsmerge_ext.evaluation.studies.storage import store
from statsmerge_ext.evaluation.suites import Suite
from statsmerge_ext.methods import get_method, list_methods

BATCH_SIZE = 16
_KEPT_RESULTS = 2
#: Whose learner predicts coefficients.
_LEARNER = "stats_merging/layer"


class Records:
    """What was measured on one suite, by what decides it: one file for all studies.

    Args:
        suite: whose hyperparameters are part of what decides a result.
        path: JSON file; None: keep nothing.
        limit: test examples a task, for a quicker look; None: as the cases say.
    """

    def __init__(self, suite: Suite, path: Path | None = None, limit: int | None = None) -> None:
        self.suite, self.limit = suite, limit
        self._path = path
        exists = path is not None and path.exists()
        self._content = json.loads(path.read_text(encoding="utf-8")) if exists else {"studies": {}, "records": {}}
        #: Study -> facts about when and with what it was measured last; written with the next record.
        self.studies: dict[str, dict] = self._content["studies"]

    def tested(self, case: Case) -> tuple[str, ...]:
        """What is measured of a case: accuracies of these tasks, or BYTES."""
        return (BYTES,) if case.entry == BYTES else case.tested or self.suite.task_names

    def key(self, case: Case) -> str:
        """The same for cases that merge the same model and test it on the same kind of data."""
        facts = {"entry": case.entry, "stored": case.stored}
        if case.entry != BYTES:
            facts["hyperparameters"] = _in_full(case.entry, self.hyperparameters(case))
            facts |= {"left_out": sorted(case.left_out), "corrupted": case.corrupted, "limit": self.examples(case)}
        if "+" in case.entry:
            first = case.entry.rpartition("+")[0]
            facts["start"] = _in_full(first, self.suite.hyperparameters.get(first, {}))
        if case.foreign:
            facts |= {"foreign": case.foreign, "seed": case.seed}
        if _looks_at_data(case.entry):
            facts |= {name: getattr(case, name) for name in ("seed", "samples", "calibration_corrupted")}
        return json.dumps(facts, sort_keys=True)

    def examples(self, case: Case) -> int | None:
        """How many test examples a task are looked at; None: all."""
        return case.limit if self.limit is None else self.limit

    def hyperparameters(self, case: Case) -> dict:
        """All that are not the method's own defaults."""
        entry = _LEARNER if case.entry == PREDICTED else case.entry
        return {**self.suite.hyperparameters.get(entry, {}), **case.hyperparameters}

    def get(self, case: Case) -> dict[str, float] | None:
        """What a case measures, or None if some of it is missing."""
        known = self._content["records"].get(self.key(case), {})
        return {name: known[name] for name in self.tested(case)} if known.keys() >= set(self.tested(case)) else None

    def add(self, case: Case, measured: Mapping[str, float]) -> None:
        """Keep what was measured, on disk as well."""
        self._content["records"].setdefault(self.key(case), {}).update(measured)
        if self._path is not None:
            with atomic_output(self._path, overwrite=True) as temporary:
                temporary.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def _in_full(entry: str, chosen: Mapping[str, object]) -> dict:
    """The hyperparameters of the last method of ``entry``, defaults too: with others it would be another merge."""
    method = entry.rpartition("+")[2].partition("/")[0]
    return {**(get_method(method).hyperparameters if method in list_methods() else {}), **chosen}


def run_study(study: Study, records: Records, *, seeds: int | None = None, progress: bool = True) -> list[Case]:
    """Measure what is missing of a study on the suite of ``records``, which is prepared; returns its cases.

    Args:
        study: what to run.
        records: what is known, and where to keep the rest.
        seeds: instead of the study's own number.
        progress: show a progress bar.

    Raises:
        DataError: a study of images on a suite of texts.
    """
    cases = list(study.cases(records.suite, seeds or study.seeds))
    bench = None
    for case in tqdm(cases, desc=f"{study.name}, {records.suite.name}", unit="case", disable=not progress):
        if records.get(case) is None:
            bench = bench or Bench(records)
            records.add(case, bench.measure(case))
    return cases


class Bench:
    """Makes the models of cases and tests them. Cases in a row mostly share models and evidence: the last are kept."""

    def __init__(self, records: Records) -> None:
        self._records, self._suite = records, records.suite
        self._base, self._experts = load_models(records.suite)
        self._results: dict[str, MergeResult] = {}
        self._grams: tuple[str, object] = ("", None)
        self._distilled: tuple[str, object] = ("", None)

    def measure(self, case: Case) -> dict[str, float]:
        """What ``case`` measures: accuracies in [0, 1] by task, or a share of bytes."""
        if case.entry == BYTES:
            return {BYTES: store(self._base.state_dict(), self._experts, case.stored)[1]}
        if case.entry == TEACHER:
            name, (teacher, _) = case.foreign[0], self._teacher_and_student(case)
            return {name: teacher_accuracy(teacher, self._suite, name, self._records.examples(case))}
        model = self.result(case).model
        options = {"limit": self._records.examples(case)}
        if case.corrupted is not None:
            options["change"] = _corruption(*case.corrupted)
        return {name: evaluate_task(model, self._suite, name, **options) for name in self._records.tested(case)}

    def result(self, case: Case) -> MergeResult:
        """The merge of ``case``."""
        key = self._records.key(replace(case, corrupted=None, limit=None))
        if key not in self._results:
            result = self._merge(case)
            self._results = {**dict(list(self._results.items())[1 - _KEPT_RESULTS :]), key: result}
        return self._results[key]

    def _merge(self, case: Case) -> MergeResult:
        if case.entry == PREDICTED:
            learner = self.result(replace(case, entry=_LEARNER)).learner
            return merge("stats_merging_predict", base=self._base, experts=self._experts, learner=learner)
        experts = {name: state for name, state in self._experts.items() if name not in case.left_out}
        if case.foreign:
            experts[case.foreign[0]] = self._teacher_and_student(case)[1]
        if case.stored != "float32":
            experts, _ = store(self._base.state_dict(), experts, case.stored)
        models = (self._base, experts)
        calibration = self._calibration(case, list(experts))
        hyperparameters = self._records.hyperparameters(case)
        if case.entry == LABELLED:
            return self._ceiling(case, experts, calibration, hyperparameters)
        evidence = None
        if "grams" in needs_of(case.entry):
            facts = [case.seed, case.samples, case.calibration_corrupted, case.stored, case.foreign]
            key = json.dumps([list(experts), facts])
            if self._grams[0] != key:
                self._grams = (key, collect_suite_grams(self._suite, models, calibration))
            evidence = self._grams[1]
        options = {"evidence": evidence, "seed": case.seed, "hyperparameters": hyperparameters}
        return merge_suite(self._suite, case.entry, models, calibration, **options)

    def _ceiling(self, case: Case, experts: Mapping, calibration: Mapping, hyperparameters: Mapping) -> MergeResult:
        tasks = {name: self._suite.task(name) for name in experts}
        drawn = {"samples": case.samples, "seed": case.seed, "batch_size": BATCH_SIZE}
        return merge(
            labelled_coefficients({name: task.calibration_labels(**drawn) for name, task in tasks.items()}),
            base=self._base,
            experts=experts,
            calibration=calibration,
            heads={name: task.head for name, task in tasks.items()},
            forward=self._suite.forward,
            seed=case.seed,
            **hyperparameters,
        )

    def _teacher_and_student(self, case: Case) -> tuple[Teacher, dict[str, Tensor]]:
        key = json.dumps([case.foreign, case.seed])
        if self._distilled[0] != key:
            name, kind = case.foreign
            teacher = make_teacher(kind, self._suite, name, case.seed)
            self._distilled = (key, (teacher, make_student(teacher, self._suite, name, case.seed)[0]))
        return self._distilled[1]

    def _calibration(self, case: Case, names: list[str]) -> dict[str, list[Tensor | dict[str, Tensor]]]:
        options = {"samples": case.samples, "seed": case.seed, "batch_size": BATCH_SIZE}
        if case.calibration_corrupted is not None:
            options["change"] = _corruption(*case.calibration_corrupted)
        return {name: self._suite.task(name).calibration(**options) for name in names}


def _corruption(kind: str, severity: int) -> Callable:
    return partial(corrupt, kind=kind, severity=severity)


def _looks_at_data(entry: str) -> bool:
    return entry in (LABELLED, PREDICTED) or (entry not in (BYTES, TEACHER) and bool(needs_of(entry)))
