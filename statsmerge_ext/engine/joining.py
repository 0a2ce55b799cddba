"""One merge as several: a problem divided among groups of its layers, and their solutions joined to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergedLayers, MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece, Result, Stream
from statsmerge_ext.evidence import GramEvidence
from statsmerge_ext.layers import Layer


def divided(problem: MergeProblem, groups: Iterable[list[Layer]]) -> list[MergeProblem]:
    """The same merge of each of the ``groups`` of layers alone; the evidence of ``problem`` goes to them."""
    evidence = problem.evidence
    problems = [replace(problem, layers=layers, evidence=evidence and _of(evidence, layers)) for layers in groups]
    if evidence:  # what has been solved would stay in memory otherwise
        for sums in (evidence.grams, evidence.products, evidence.diagonals, evidence.weights):
            sums.clear()
    return problems


def joined(problem: MergeProblem, solutions: Sequence[tuple[list[Layer], Solution]]) -> Solution:
    """The solution of ``problem`` that has those of groups of its layers; parameters that are computed when they are
    asked for stay so if all of them are."""
    parts = [solution.parameters for _, solution in solutions]
    if all(isinstance(part, MergedLayers) for part in parts):
        parameters = JoinedLayers(problem, parts)
    else:
        parameters = {name: tensor for part in parts for name, tensor in computed(part).items()}
    return Solution(
        parameters,
        coefficients=_joined_coefficients(problem, solutions),
        is_weighted_sum=all(solution.is_weighted_sum for _, solution in solutions),
        learner=next((solution.learner for _, solution in solutions if solution.learner is not None), None),
        notes=_JoinedNotes([solution.notes for _, solution in solutions]),
    )


def computed(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``parameters`` of a solution, none of which has still to be computed."""
    return parameters.computed() if isinstance(parameters, MergedLayers) else parameters


class JoinedLayers(MergedLayers):
    """Merged parameters that each come from one of ``parts``."""

    def __init__(self, problem: MergeProblem, parts: Iterable[MergedLayers]) -> None:
        super().__init__(problem)
        self._parts = list(parts)

    def stream(self, names: Iterable[str]) -> _Streams:
        names = list(names)
        own = ([name for name in names if name in part] for part in self._parts)
        return _Streams([part.stream(of_part) for part, of_part in zip(self._parts, own) if of_part])

    def merged(self, piece: Piece, base: Tensor, experts: list[Tensor]) -> Tensor:
        part = next(part for part in self._parts if piece.layer.parameter in part)
        return part.merged(piece, base, experts)


class _Streams:
    """Several streams as one :class:`Stream`, one after the other."""

    def __init__(self, streams: Iterable[Stream]) -> None:
        self._of = {piece: stream for stream in streams for piece in stream.pieces}
        self.pieces = list(self._of)

    def results(
        self, compute: Callable[[Piece, Tensor, list[Tensor]], Result], pieces: Iterable[Piece] | None = None
    ) -> Iterator[tuple[Piece, Result]]:
        for stream, own in groupby(self.pieces if pieces is None else pieces, self._of.__getitem__):
            yield from stream.results(compute, list(own))


class _JoinedNotes(Mapping[str, object]):
    """The notes of several solutions as they are when they are looked at: some are written while layers are computed.

    What several of them have of layers is joined to one mapping, and to a list what they have of anything else.
    """

    def __init__(self, notes: Iterable[Mapping[str, object]]) -> None:
        self._notes = list(notes)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for notes in self._notes for name in notes))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> object:
        found = [notes[name] for notes in self._notes if name in notes]
        if not found:
            raise KeyError(name)
        if all(isinstance(note, Mapping) for note in found):
            return {key: value for note in found for key, value in note.items()}
        return found if len(found) > 1 else found[0]


def _joined_coefficients(problem: MergeProblem, solutions: Sequence[tuple[list[Layer], Solution]]) -> Tensor | None:
    """[L, K]: NaN for layers without coefficients, but for those that are the base's: their task vectors count 0."""
    if all(solution.coefficients is None for _, solution in solutions):
        return None
    rows = {layer.name: row for row, layer in enumerate(problem.layers)}
    table = torch.full((len(rows), len(problem.experts)), float("nan"), dtype=torch.float64)
    for layers, solution in solutions:
        own = [rows[layer.name] for layer in layers]
        if solution.coefficients is not None:
            table[own] = torch.as_tensor(solution.coefficients).to(table)
        elif solution.is_weighted_sum:
            table[own] = 0
    return table


def _of(evidence: GramEvidence, layers: Iterable[Layer]) -> GramEvidence:
    """What ``evidence`` says of ``layers``; the Gram matrix of layers in several groups is in each."""
    names = {layer.name for layer in layers}
    leaders = {name: leader for name, leader in evidence.leaders.items() if name in names}

    def those(tensors: Mapping[str, Tensor], kept: set[str]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name in kept}

    shared = set(leaders.values())
    return replace(
        evidence,
        leaders=leaders,
        grams=those(evidence.grams, shared),
        diagonals=those(evidence.diagonals, shared),
        products=those(evidence.products, names),
        weights=those(evidence.weights, names),
    )
