"""Methods that are chosen layer by layer: a merge's own, and rules for layers that go by another."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from statsmerge_ext.engine.joining import computed, divided, joined
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import Method, get_method, nearest


@dataclass(frozen=True)
class LayerRule:
    """How some layers are merged, where not as all others.

    Attributes:
        filter: a part of the parameters' names, such as "layers.11."; "*" is part of any. A tied parameter has several.
        method: name of a method, or one that is not registered; None: the merge's own, with its hyperparameters but for
            those that the rule has.
        hyperparameters: the method's.
    """

    filter: str
    method: str | Method | None = None
    hyperparameters: Mapping[str, object] = field(default_factory=dict)

    def fits(self, layer: Layer) -> bool:
        """Whether the rule is about ``layer``."""
        return self.filter == "*" or any(self.filter in name for name in (layer.parameter, *layer.tied))


def by_rules(main: str | Method, rules: Sequence[LayerRule]) -> Method:
    """``main``, but that layers go by the first of the ``rules`` that fits them. Without rules, ``main`` itself.

    Each method sees the layers that are its own and no others: TIES takes its share of their entries. Where one runs
    the model, all other layers are merged before, and are as they will be while it runs.

    Raises:
        MethodError: an unknown method or hyperparameter; two methods that run the model.
    """
    main = _as_method(main)
    methods = []
    for place, rule in enumerate(rules):
        try:
            methods.append(main if rule.method is None else _as_method(rule.method))
            methods[-1].check(rule.hyperparameters)
        except MethodError as error:
            raise MethodError(f"layers[{place}] ({rule.filter!r}): {error}") from error
    if not rules:
        return main
    running = [method for method in (*methods, main) if "batches" in method.needs]
    if len(running) > 1:
        names = " and ".join(repr(method.name) for method in running)
        raise MethodError(f"layers: {names} both run the model, which one method of a merge can")
    needs = main.needs.union(*(method.needs for method in methods))
    return _RuledMethod(
        main.name,
        main.function,
        needs,
        main.hyperparameters,
        by_layer=all(method.by_layer for method in (*methods, main)),
        in_order=any(method.in_order for method in running)
        and all(method.by_block for method in (*methods, main))
        and "grams" not in needs,
        main=main,
        rules=tuple(rules),
        methods=tuple(methods),
    )


@dataclass(frozen=True)
class _Part:
    """Layers of a model that go by one method with the same hyperparameters."""

    method: Method
    hyperparameters: Mapping[str, object]
    layers: list[Layer]


@dataclass(frozen=True, kw_only=True)
class _RuledMethod(Method):
    """What :func:`by_rules` gives; ``methods`` are those of the ``rules``, one each."""

    main: Method
    rules: tuple[LayerRule, ...]
    methods: tuple[Method, ...]

    def check_layers(self, layers: Iterable[Layer]) -> None:
        layers = list(layers)
        *parts, rest = self._parts(layers, {})
        for place, (rule, part) in enumerate(zip(self.rules, parts, strict=True)):
            where = f"layers[{place}]: filter {rule.filter!r}"
            if not any(map(rule.fits, layers)):
                raise MethodError(f"{where} is in no parameter's name{nearest(rule.filter, _paths(rule, layers))}")
            if not part.layers:
                raise MethodError(f"{where} fits only layers that rules before it fit, too")
        if not rest.layers:
            raise MethodError(
                f"layers: all are taken by rules and none is left for method {self.name!r}; let the method of the last "
                "rule be the merge's own"
            )

    def watched(self, layers: Iterable[Layer]) -> list[Layer]:
        layers = list(layers)
        names = {layer.name for part in self._parts(layers, {}) for layer in part.method.watched(part.layers)}
        return [layer for layer in layers if layer.name in names]

    def ordered(self, layers: Iterable[Layer]) -> list[Layer]:
        return [layer for part in self._parts(layers, {}) if part.method.in_order for layer in part.layers]

    def identity(self, hyperparameters: Mapping[str, object]) -> dict:
        return {**self.main.identity(hyperparameters), "rules": [str(rule) for rule in self.rules]}

    def facts(self, layers: Iterable[Layer], hyperparameters: Mapping[str, object]) -> dict:
        *parts, rest = self._parts(layers, hyperparameters)
        rules = [
            {
                "filter": rule.filter,
                **part.method.facts(part.layers, part.hyperparameters),
                "layers": [layer.name for layer in part.layers],
            }
            for rule, part in zip(self.rules, parts, strict=True)
        ]
        return {**self.main.facts(rest.layers, hyperparameters), "rules": rules}

    def __call__(self, problem: MergeProblem, **hyperparameters) -> Solution:
        self.check(hyperparameters)
        parts = [
            part
            for part in self._parts(problem.layers, hyperparameters)
            if part.layers or (problem.passes and part.method.in_order)  # passes go through all layers
        ]
        parts.sort(key=lambda part: "batches" in part.method.needs)
        fixed: dict[str, Tensor] = {}
        solutions = []
        for part, own in zip(parts, divided(problem, [part.layers for part in parts]), strict=True):
            if "batches" in part.method.needs:
                for _, solution in solutions:
                    solution.parameters = computed(solution.parameters)
                    fixed.update(solution.parameters)
                own = _starting_from(own, fixed)
            solutions.append((part.layers, part.method(own, **part.hyperparameters)))
        solution = joined(problem, solutions)
        return replace(solution, coefficients=None) if self.by_block and self.needs else solution

    def _parts(self, layers: Iterable[Layer], hyperparameters: Mapping[str, object]) -> list[_Part]:
        """A part for each of the rules, and last the one of all other layers."""
        inherited = ({} if rule.method else hyperparameters for rule in self.rules)
        given = [{**general, **rule.hyperparameters} for general, rule in zip(inherited, self.rules, strict=True)]
        groups: list[list[Layer]] = [[] for _ in (*self.rules, self.main)]
        for layer in layers:
            groups[next((place for place, rule in enumerate(self.rules) if rule.fits(layer)), -1)].append(layer)
        return list(map(_Part, (*self.methods, self.main), (*given, hyperparameters), groups))


def _as_method(method: str | Method) -> Method:
    return get_method(method) if isinstance(method, str) else method


def _starting_from(problem: MergeProblem, merged: Mapping[str, Tensor]) -> MergeProblem:
    """``problem`` with a base that has what is ``merged`` already."""
    known = [layer for layer in problem.model_layers if layer.parameter in merged]
    tied = {key: merged[layer.parameter] for layer in known for key in layer.tied}
    return replace(problem, base=ChainMap({**merged, **tied}, problem.base))


def _paths(rule: LayerRule, layers: Iterable[Layer]) -> set[str]:
    """All parts of the parameters' names that have as many elements as the rule's filter."""
    count = len(rule.filter.split("."))
    names = [name.split(".") for layer in layers for name in (layer.parameter, *layer.tied)]
    return {".".join(name[at : at + count]) for name in names for at in range(len(name) - count + 1)}
