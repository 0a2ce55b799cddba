"""The methods of a recipe, and their hyperparameters: of all models, of every model, and of some layers."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from statsmerge_ext.errors import MethodError
from statsmerge_ext.located_yaml import Keys, LocatedYaml
from statsmerge_ext.methods import LayerRule, Method, get_method
from statsmerge_ext.methods.registry import nearest
from statsmerge_ext.methods.weights import Schedule

#: mergekit's names of parameters → the methods' hyperparameters.
ALIASES = {"weight": "weights", "lambda": "scaling_factor"}
#: mergekit's parameters that concern its own use of memory, not the result.
WITHOUT_EFFECT = frozenset({"int8_mask"})
RULE_KEYS = ("filter", "merge_method", "parameters")


@dataclass(frozen=True)
class ModelEntry:
    """One entry of ``models:`` and the keys that lead to it."""

    name: str
    path: Path
    parameters: dict[str, object]
    keys: Keys


def read_method(document: LocatedYaml, value: object, keys: Keys) -> Method:
    """The method of the name ``value``. Raises RecipeError for one that there is not."""
    try:
        return get_method(document.text(value, keys))
    except MethodError as error:
        raise document.error(keys, str(error)) from error


def read_rules(
    document: LocatedYaml, rules: object, method: Method, hyperparameters: Mapping[str, object]
) -> tuple[LayerRule, ...]:
    """The rules for some layers, in full: what a rule does not say is as the recipe's ``method`` has it.

    Raises RecipeError for a rule without effect, and as :func:`read_method` and :func:`read_hyperparameters`.
    """
    if rules is None:
        return ()
    if not isinstance(rules, list) or not rules:
        raise document.error(("layers",), "expected a list of at least one rule (- filter: PART)")
    return tuple(_read_rule(document, rule, ("layers", i), method, hyperparameters) for i, rule in enumerate(rules))


def _read_rule(
    document: LocatedYaml, rule: object, keys: Keys, method: Method, hyperparameters: Mapping[str, object]
) -> LayerRule:
    rule = document.mapping(rule, keys, RULE_KEYS)
    if "filter" not in rule:
        raise document.error(keys, "filter: missing; expected a part of parameters' names")
    part = document.text(rule["filter"], (*keys, "filter"))
    if "merge_method" in rule:
        method, hyperparameters = read_method(document, rule["merge_method"], (*keys, "merge_method")), {}
    elif rule.get("parameters") is None:
        raise document.error(keys, "would have no effect: expected a merge_method, parameters, or both")
    own = read_hyperparameters(
        document, rule.get("parameters"), (*keys, "parameters"), method, inherited=hyperparameters
    )
    return LayerRule(part, method.name, own)


def read_hyperparameters(
    document: LocatedYaml,
    shared: object,
    keys: Keys,
    method: Method,
    models: Sequence[ModelEntry] = (),
    inherited: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, object]:
    """The method's hyperparameters under its own names, from the ``parameters`` at ``keys`` and the models' own; what
    they do not say is as ``inherited``.

    Raises RecipeError for one that the method has not, that is given twice, or whose value is of another type.
    """
    shared = {} if shared is None else document.mapping(shared, keys)
    hyperparameters = {}
    for key, value in shared.items():
        if key in WITHOUT_EFFECT:
            continue
        name = _hyperparameter(document, method, key, (*keys, key))
        if name in hyperparameters:
            raise document.error((*keys, key), f"{name!r} is given twice")
        hyperparameters[name] = _checked_value(document, method, name, value, (*keys, key))
    hyperparameters = {**inherited, **hyperparameters}
    for key in dict.fromkeys(key for model in models for key in model.parameters):
        first = next(model for model in models if key in model.parameters)
        name = _hyperparameter(document, method, key, (*first.keys, "parameters", key))
        hyperparameters[name] = _per_model(document, method, key, name, models, hyperparameters.get(name))
    if "weights" in hyperparameters and "scaling_factor" in method.hyperparameters:
        # In mergekit's form the weights are the whole coefficients, unless a lambda is given too.
        hyperparameters.setdefault("scaling_factor", 1.0)
    if "scope" in method.hyperparameters and any("density" in model.parameters for model in models):
        # In mergekit's form a density counts within each parameter, unless a scope is given too.
        hyperparameters.setdefault("scope", "layer")
    return hyperparameters


def _hyperparameter(document: LocatedYaml, method: Method, key: str, keys: Keys) -> str:
    names = {name: name for name in method.hyperparameters}
    names.update({alias: name for alias, name in ALIASES.items() if name in names})
    if key not in names:
        known = ", ".join(names) or "none"
        raise document.error(
            keys, f"method {method.name!r} has no hyperparameter {key!r}{nearest(key, names)}; it takes {known}"
        )
    return names[key]


def _per_model(
    document: LocatedYaml, method: Method, key: str, name: str, models: list[ModelEntry], shared: object
) -> object:
    """The value of a hyperparameter given model by model: a list where the method takes one, else one for all."""
    several = _is_per_expert(method, name)
    values = []
    for model in models:
        keys = (*model.keys, "parameters", key)
        if key not in model.parameters and shared is None:
            raise document.error(model.keys, f"parameters.{key}: missing; other models have it")
        value = model.parameters.get(key, shared)
        if several and isinstance(value, (list, dict)):
            value = Schedule(_setting(document, value, keys, shared))
        elif type(value) not in (int, float):
            expected = "a number, a gradient (list of numbers) or filters" if several else "a number"
            raise document.error(keys, f"expected {expected}, got {value!r}")
        values.append(value)
    if several:
        return values
    if len(set(values)) > 1:
        at = (*models[-1].keys, "parameters", key)
        raise document.error(at, f"method {method.name!r} takes one {name!r} for all models, got {values}")
    return values[0]


def _setting(document: LocatedYaml, value: object, keys: Keys, otherwise: object = None) -> float | tuple:
    """A number, a gradient or filters as :class:`Schedule` has them; ``otherwise`` is for what no filter fits."""
    if type(value) in (int, float):
        return value
    conditions = [value] if isinstance(value, dict) else value
    if isinstance(conditions, list) and conditions and all(type(item) in (int, float) for item in conditions):
        return tuple(conditions)
    if not (isinstance(conditions, list) and conditions):
        raise document.error(keys, f"expected a number, a gradient (list of numbers) or filters, got {value!r}")
    settings: list[tuple] = []
    for place, condition in enumerate(conditions):
        at = (*keys, place) if isinstance(value, list) else keys
        condition = document.mapping(condition, at, ("filter", "value"))
        if "value" not in condition:
            raise document.error(at, "value: missing")
        part = None if condition.get("filter", "*") == "*" else document.text(condition["filter"], (*at, "filter"))
        settings.append((part, _setting(document, condition["value"], (*at, "value"))))
    return tuple([*settings, (None, otherwise)] if type(otherwise) in (int, float) else settings)


def _is_per_expert(method: Method, name: str) -> bool:
    """Whether every expert, and perhaps every layer, has its own value of a hyperparameter."""
    return Schedule in typing.get_args(typing.get_type_hints(method.function).get(name))


def _checked_value(document: LocatedYaml, method: Method, name: str, value: object, keys: Keys) -> object:
    if isinstance(value, dict):
        raise document.error(keys, "filters are taken from the models' own parameters only; expected a plain value")
    hint = typing.get_type_hints(method.function).get(name)
    if _is_per_expert(method, name):
        hint = float | Sequence[float] | None
    if Path in typing.get_args(hint):
        return str(document.path(value, keys))
    return document.of_type(value, hint, keys)
