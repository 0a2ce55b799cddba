"""The whole of a merge in memory: models in, evidence collected, the method applied, one model out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from statsmerge_ext.calibration import as_named, as_unlabelled_batches
from statsmerge_ext.checkpoints import check_compatible, open_checkpoint, open_expert
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.journal import Journal
from statsmerge_ext.engine.problem import MergedLayers, MergeProblem, Solution
from statsmerge_ext.engine.report import facts_for_report, layer_report
from statsmerge_ext.engine.shared_evidence import collect_shared_grams
from statsmerge_ext.errors import CalibrationError, CheckpointError, MethodError
from statsmerge_ext.evidence import GramEvidence
from statsmerge_ext.layers import find_layers, layers_of_state
from statsmerge_ext.methods import LayerRule, Method, by_rules, get_method

#: A model as callers may give it: a module, a state dict, or the path of a checkpoint.
Model = nn.Module | Mapping[str, Tensor] | str | Path


@dataclass
class MergeResult:
    """One merged model.

    Attributes:
        state: its state dict, keys and dtypes as the base's.
        model: the base's module with that state, None where the base was no module.
        coefficients: {"names": layers, "tasks": experts, "values": [L, K]} or None.
        learner: what the method learned and ``stats_merging_predict`` applies to other models, or None.
        report: JSON-able facts: method, experts, seconds, what became of each kind of layer.
    """

    state: dict[str, Tensor]
    model: nn.Module | None = None
    coefficients: dict | None = None
    learner: object | None = None
    report: dict = field(default_factory=dict)


def merge(
    method: str | Method,
    *,
    base: Model,
    experts: Mapping[str, Model],
    layers: Sequence[LayerRule] = (),
    calibration: Mapping[str, Iterable] | None = None,
    heads: Mapping[str, Callable] | None = None,
    forward: Callable[[nn.Module, object], object] | None = None,
    evidence: GramEvidence | str | Path | None = None,
    buffers: str = "average",
    journal: str | Path | None = None,
    progress: bool = False,
    seed: int = 0,
    **hyperparameters,
) -> MergeResult:
    """Merge ``experts`` that were fine-tuned from ``base`` into one model of the same size.

    Args:
        method: name of a method, see :func:`statsmerge_ext.methods.list_methods`; or one that is not registered.
        base: the pretrained model: a module, a state dict, or a checkpoint's path. Methods that look at data need the
            module. It is not changed.
        experts: name -> fine-tuned model, in any of the same forms, or the path of a quantised task vector.
        layers: rules for layers that are merged by another method, or with other hyperparameters, or kept as the base
            has them (the method "keep"); the first that fits a layer counts.
        calibration: name -> batches of that expert's task: tensors, or mappings of tensors. Labels are refused.
        heads: name -> function from the model's output to logits, for methods that compare predictions and models
            whose output is not logits already.
        forward: ``forward(model, batch)``; by default the model is called with the tensor or the mapping's entries.
        evidence: Gram evidence (or its file) collected before from the same models; ``calibration`` is then not needed
            for the methods that use Gram matrices alone.
        buffers: "average" the experts' floating-point buffers (BatchNorm statistics), or "reestimate" them by running
            the merged model on all calibration batches.
        journal: file in which methods that learn keep their progress; the same merge called again takes it up there and
            gives the same result. It is removed at the end.
        progress: show progress bars.
        seed: of all that is random.
        hyperparameters: the method's own.

    Raises:
        MethodError: unknown method or hyperparameter, or something the method needs was not given; a rule that fits no
            layer; methods that cannot be combined.
        CheckpointError: experts that do not fit the base, unreadable files, NaN weights.
        CalibrationError: missing, empty, exhausted or labelled calibration data; evidence from other models.
    """
    solved = solve(
        by_rules(method, layers),
        base=base,
        experts=experts,
        calibration=calibration,
        heads=heads,
        forward=forward,
        evidence=evidence,
        buffers=buffers,
        journal=journal,
        progress=progress,
        seed=seed,
        **hyperparameters,
    )
    return solved.computed(base if isinstance(base, nn.Module) else None)


@dataclass
class Solved:
    """A merge whose method has given its solution; the merged parameters may still have to be computed.

    Attributes:
        problem: what the method was given.
        solution: what it returned.
        facts: for the report, JSON-able.
        started, collected: seconds of a clock at the beginning, and when the evidence was there.
    """

    problem: MergeProblem
    solution: Solution
    facts: dict
    started: float
    collected: float

    def computed(self, module: nn.Module | None) -> MergeResult:
        """The whole result in memory; ``module`` is the base's, if it has one. This gives everything else away."""
        problem, solution = self.problem, self.solution
        if isinstance(solution.parameters, MergedLayers):
            solution.parameters = solution.parameters.computed()
        if problem.journal:
            problem.journal.remove()
        state = _complete(problem, solution, self.facts["buffers"])
        result = MergeResult(state, None, self.coefficients, solution.learner, self.report)
        if module is not None:
            # A new copy: the method's own may be frozen, or in another mode. It and the evidence are let go of before.
            del problem, solution, self.problem, self.solution
            result.model = copy.deepcopy(module)
            result.model.load_state_dict(state)
        return result

    @property
    def learner(self) -> object | None:
        """As in :class:`MergeResult`."""
        return self.solution.learner

    @property
    def report(self) -> dict:
        """JSON-able facts: method, experts, seconds until now, what became of each kind of layer."""
        seconds = {"evidence": self.collected - self.started, "merge": time.perf_counter() - self.collected}
        return {**self.facts, "seconds": seconds, **self.solution.notes}

    @property
    def coefficients(self) -> dict | None:
        """As in :class:`MergeResult`."""
        if self.solution.coefficients is None:
            return None
        values = torch.as_tensor(self.solution.coefficients)
        if values.dim() == 1:
            values = values.expand(len(self.problem.layers), -1)
        names = [layer.name for layer in self.problem.layers]
        return {"names": names, "tasks": list(self.problem.experts), "values": values}


def solve(
    method: str | Method,
    *,
    base: Model,
    experts: Mapping[str, Model],
    calibration: Mapping[str, Iterable] | None = None,
    heads: Mapping[str, Callable] | None = None,
    forward: Callable[[nn.Module, object], object] | None = None,
    evidence: GramEvidence | str | Path | None = None,
    buffers: str = "average",
    journal: str | Path | None = None,
    progress: bool = False,
    seed: int = 0,
    memory_budget: int | None = None,
    sample: bool = False,
    **hyperparameters,
) -> Solved:
    """Everything of :func:`merge` up to the method's solution; arguments and errors are the same.

    Args:
        memory_budget: bytes that models read from disk may take at a time; None: a default.
        sample: the models are some tensors of larger ones, among which rules need not find a layer.
    """
    start = time.perf_counter()
    chosen = get_method(method) if isinstance(method, str) else method
    chosen.check(hyperparameters)
    if buffers not in ("average", "reestimate"):
        raise MethodError(f"buffers: expected 'average' or 'reestimate', got {buffers!r}")
    module = base if isinstance(base, nn.Module) else None
    base_state = _as_state(base, "base")
    states = {name: _as_state(model, f"expert {name!r}", base_state) for name, model in experts.items()}
    sources = {name: _source(f"expert {name!r}", state) for name, state in states.items()}
    states = check_compatible(base_state, states)
    layers = find_layers(module) if module is not None else layers_of_state(base_state)
    if not sample:
        chosen.check_layers(layers)
    watched = chosen.watched(layers)

    if isinstance(evidence, (str, Path)):
        evidence = GramEvidence.load(evidence)
    collect = "grams" in chosen.needs and evidence is None
    batches: dict[str, list] = {}
    runs_later = "batches" in chosen.needs or buffers == "reestimate"
    if collect or runs_later:
        if module is None:
            raise MethodError(
                f"base: method {chosen.name!r} runs the model, so it needs a module, not only its weights"
            )
        batches = _batches(calibration, list(states))
    problem = MergeProblem(
        layers=layers,
        base=base_state,
        experts=states,
        model=copy.deepcopy(module) if runs_later else None,
        forward=forward or default_forward,
        batches=batches,
        heads=heads or {},
        base_source=_source("base", base_state),
        sources=sources,
        seed=seed,
        progress=progress,
        memory_budget=memory_budget,
    )
    if collect:
        evidence = collect_shared_grams(
            module, watched, base_state, states, batches, forward=problem.forward, progress=progress
        )
    elif evidence is not None:
        evidence.check_models(base_state, states)
    seen = evidence.seen if "grams" in chosen.needs else None
    problem.evidence = evidence and evidence.shallow_copy()
    del evidence  # what has been solved would stay in memory otherwise
    collected = time.perf_counter()

    if journal is not None and "batches" in chosen.needs:
        problem.journal = Journal(journal, _identity(problem, chosen, hyperparameters))
    solution = chosen(problem, **hyperparameters)
    facts = facts_for_report(chosen, hyperparameters, layers, list(states), buffers, seed)
    facts["layers"] = layer_report(layers, watched, seen)
    return Solved(problem, solution, facts, start, collected)


def default_forward(model: nn.Module, batch: object) -> object:
    """Call ``model`` with a tensor, or with a mapping's entries as keyword arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _identity(problem: MergeProblem, method: Method, hyperparameters: Mapping) -> dict:
    """What decides the result of a merge."""
    return {
        **method.identity(hyperparameters),
        "seed": problem.seed,
        "models": [fingerprint(problem.base), *(fingerprint(state) for state in problem.experts.values())],
        "batches": {name: fingerprint(as_named(of_expert)) for name, of_expert in problem.batches.items()},
    }


def _as_state(model: Model, argument: str, base: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
    if isinstance(model, nn.Module):
        model = model.state_dict()
    if isinstance(model, (str, Path)):
        return open_checkpoint(model) if base is None else open_expert(model, base)
    if isinstance(model, Mapping):
        return model if hasattr(model, "path") else processes.gathered(model)  # a file's tensors are never spread
    raise CheckpointError(f"{argument}: expected a module, a state dict or a path, got {type(model).__name__}")


def _source(label: str, state: Mapping[str, Tensor]) -> str:
    return f"{label} ({state.path})" if hasattr(state, "path") else label


def _batches(calibration: Mapping[str, Iterable] | None, experts: list[str]) -> dict[str, list]:
    calibration = calibration or {}
    missing = [name for name in experts if name not in calibration]
    unknown = [name for name in calibration if name not in experts]
    if missing or unknown:
        raise CalibrationError(
            f"calibration: expected batches for the experts {experts}; missing {missing}, not an expert {unknown}"
        )
    return {name: as_unlabelled_batches(name, calibration[name]) for name in experts}


def _complete(problem: MergeProblem, solution: Solution, buffers: str) -> dict[str, Tensor]:
    """The whole state dict in the base's order: merged parameters under all their keys, and buffers."""
    tied = {key: layer.parameter for layer in problem.layers for key in layer.tied}
    names = {key: tied.get(key, key) for key in problem.base}
    merged = {key: solution.parameters[name] for key, name in names.items() if name in solution.parameters}
    rest = merge_buffers(problem, merged, reestimate=buffers == "reestimate")
    return {key: merged[key] if key in merged else rest[key] for key in problem.base}
