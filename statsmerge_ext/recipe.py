"""Merge recipes: YAML in mergekit's form, read strictly.

Whatever a recipe says has an effect or is refused; docs/recipe.md describes the format.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from statsmerge_ext.errors import MethodError, RecipeError
from statsmerge_ext.located_yaml import Keys, LocatedYaml
from statsmerge_ext.methods import Method, get_method
from statsmerge_ext.methods.registry import nearest
from statsmerge_ext.methods.weights import Schedule

KEYS = (
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "calibration",
    "buffers",
)
#: Keys of mergekit's format, and of this one to come, that are known but cannot be honoured.
UNSUPPORTED_KEYS = ("slices", "modules", "chat_template", "statistics", "coefficients", "evaluation")
MODEL_KEYS = ("model", "name", "parameters")
CALIBRATION_KEYS = ("data", "samples", "batch_size", "max_length", "seed")
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
BUFFERS = ("average", "reestimate")
#: mergekit's names of parameters → the methods' hyperparameters.
ALIASES = {"weight": "weights", "lambda": "scaling_factor"}
#: mergekit's parameters that concern its own use of memory, not the result.
WITHOUT_EFFECT = frozenset({"int8_mask"})
#: Averages of the experts' weights need no base; the first model then gives configuration and tokenizer.
METHODS_WITHOUT_BASE = frozenset({"linear"})


@dataclass(frozen=True)
class CalibrationSource:
    """Where unlabelled samples come from: expert name → file, and how they are drawn and batched."""

    data: Mapping[str, Path]
    samples: int | None = None
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        method: name of a registered method.
        base: path of the base checkpoint.
        experts: expert name → path of its checkpoint, at least one.
        text: the recipe as it was written.
        hyperparameters: the method's own, under its own names.
        out_dtype: dtype of the written weights; None: the base's.
        buffers: "average" or "reestimate".
        calibration: unlabelled samples, for methods that look at data; else None.
        tokenizer: the directory that the output's tokenizer and chat template come from; None: the base's.
    """

    method: str
    base: Path
    experts: Mapping[str, Path]
    text: str
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    out_dtype: torch.dtype | None = None
    buffers: str = "average"
    calibration: CalibrationSource | None = None
    tokenizer: Path | None = None

    @property
    def needs_data(self) -> bool:
        """Whether the merge runs the model on calibration samples."""
        return bool(get_method(self.method).needs) or self.buffers == "reestimate"


def load_recipe(path: str | os.PathLike) -> Recipe:
    """Read and validate a recipe file; paths in it are relative to its directory.

    Raises:
        RecipeError: names the file, the line and the key that is unknown, missing, of another type or out of range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not a text file in UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_recipe(text, directory=path.parent, name=str(path))


def parse_recipe(text: str, *, directory: str | os.PathLike = ".", name: str = "recipe") -> Recipe:
    """Validate a recipe given as text.

    Args:
        text: YAML.
        directory: what relative paths in it are relative to.
        name: how messages call it.

    Raises:
        RecipeError: as `load_recipe`.
    """
    document = LocatedYaml(text, name)
    for key in UNSUPPORTED_KEYS:
        if isinstance(document.value, dict) and key in document.value:
            raise document.error((key,), "is not supported yet")
    content = document.mapping(document.value, (), KEYS)
    if "merge_method" not in content:
        raise document.error((), "merge_method: missing")
    try:
        method = get_method(document.text(content["merge_method"], ("merge_method",)))
    except MethodError as error:
        raise document.error(("merge_method",), str(error)) from error
    base, models = _read_models(document, content, method, Path(directory))
    recipe = Recipe(
        method=method.name,
        base=base,
        experts={model.name: model.path for model in models},
        hyperparameters=_read_hyperparameters(document, content, method, models, Path(directory)),
        out_dtype=_read_dtype(document, content),
        buffers=_read_buffers(document, content),
        calibration=_read_calibration(document, content, [model.name for model in models], Path(directory)),
        tokenizer=_read_tokenizer(document, content, base, models, Path(directory)),
        text=text,
    )
    if recipe.needs_data and recipe.calibration is None:
        raise document.error((), f"calibration: missing; method {method.name!r} needs unlabelled samples of each task")
    if recipe.calibration is not None and not recipe.needs_data:
        raise document.error(("calibration",), f"would have no effect: method {method.name!r} looks at no data")
    return recipe


@dataclass(frozen=True)
class _Model:
    """One entry of ``models:`` and the keys that lead to it."""

    name: str
    path: Path
    parameters: dict[str, object]
    keys: Keys


def _read_models(
    document: LocatedYaml, content: dict[str, object], method: Method, directory: Path
) -> tuple[Path, list[_Model]]:
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        place = ("models",) if "models" in content else ()
        raise document.error(
            place, f"{'' if place else 'models: '}expected a list of at least one expert (- model: PATH)"
        )
    models = [_read_model(document, entry, ("models", i), directory) for i, entry in enumerate(entries)]
    if "base_model" in content:
        base = _path(document, content["base_model"], ("base_model",), directory)
        if method.name not in METHODS_WITHOUT_BASE:
            # mergekit's recipes list the base among the models; its task vector is zero.
            models = [model for model in models if model.path != base or model.parameters]
    elif method.name in METHODS_WITHOUT_BASE:
        base = models[0].path
    else:
        raise document.error((), f"base_model: missing; method {method.name!r} merges differences from it")
    for i, model in enumerate(models):
        if model.path == base and method.name not in METHODS_WITHOUT_BASE:
            raise document.error(model.keys, "is the base_model; it cannot be an expert of itself")
        for other in models[:i]:
            if other.path == model.path:
                raise document.error(model.keys, f"the same model as models[{other.keys[1]}]")
            if other.name == model.name:
                raise document.error(
                    model.keys,
                    f"has the same name {model.name!r} as models[{other.keys[1]}]; give it another by 'name'",
                )
    if not models:
        raise document.error(("models",), "holds no expert besides the base")
    return base, models


def _read_model(document: LocatedYaml, entry: object, keys: Keys, directory: Path) -> _Model:
    entry = document.mapping(entry, keys, MODEL_KEYS)
    if "model" not in entry:
        raise document.error(keys, "model: missing")
    path = _path(document, entry["model"], (*keys, "model"), directory)
    name = document.text(entry["name"], (*keys, "name")) if "name" in entry else path.name
    parameters = entry.get("parameters")
    parameters = {} if parameters is None else document.mapping(parameters, (*keys, "parameters"))
    return _Model(name, path, parameters, keys)


def _path(document: LocatedYaml, value: object, keys: Keys, directory: Path) -> Path:
    path = Path(document.text(value, keys)).expanduser()
    return Path(os.path.normpath(directory / path))


def _read_hyperparameters(
    document: LocatedYaml, content: dict[str, object], method: Method, models: list[_Model], directory: Path
) -> dict[str, object]:
    shared = content.get("parameters")
    shared = {} if shared is None else document.mapping(shared, ("parameters",))
    hyperparameters = {}
    for key, value in shared.items():
        if key in WITHOUT_EFFECT:
            continue
        name = _hyperparameter(document, method, key, ("parameters", key))
        if name in hyperparameters:
            raise document.error(("parameters", key), f"{name!r} is given twice")
        hyperparameters[name] = _checked_value(document, method, name, value, ("parameters", key), directory)
    for key in dict.fromkeys(key for model in models for key in model.parameters):
        first = next(model for model in models if key in model.parameters)
        name = _hyperparameter(document, method, key, (*first.keys, "parameters", key))
        hyperparameters[name] = _per_model(document, method, key, name, models, hyperparameters.get(name))
    if "weights" in hyperparameters and "scaling_factor" in method.hyperparameters:
        # In mergekit's form the weights are the whole coefficients, unless a lambda is given too.
        hyperparameters.setdefault("scaling_factor", 1.0)
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
    document: LocatedYaml, method: Method, key: str, name: str, models: list[_Model], shared: object
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


def _checked_value(
    document: LocatedYaml, method: Method, name: str, value: object, keys: Keys, directory: Path
) -> object:
    if isinstance(value, dict):
        raise document.error(keys, "filters are taken from the models' own parameters only; expected a plain value")
    hint = typing.get_type_hints(method.function).get(name)
    if _is_per_expert(method, name):
        hint = float | Sequence[float] | None
    if Path in typing.get_args(hint):
        return str(_path(document, value, keys, directory))
    return document.of_type(value, hint, keys)


def _read_dtype(document: LocatedYaml, content: dict[str, object]) -> torch.dtype | None:
    """The output's dtype: ``out_dtype``, or else ``dtype``; merging itself computes in float32 or more."""
    dtypes = {}
    for key in ("dtype", "out_dtype"):
        if content.get(key) is not None:
            name = document.text(content[key], (key,)).removeprefix("torch.")
            if name not in DTYPES:
                raise document.error((key,), f"got {name!r}, expected one of {', '.join(DTYPES)}")
            dtypes[key] = DTYPES[name]
    return dtypes.get("out_dtype", dtypes.get("dtype"))


def _read_buffers(document: LocatedYaml, content: dict[str, object]) -> str:
    buffers = content.get("buffers", BUFFERS[0])
    if buffers not in BUFFERS:
        raise document.error(("buffers",), f"got {buffers!r}, expected one of {', '.join(BUFFERS)}")
    return buffers


def _read_tokenizer(
    document: LocatedYaml, content: dict[str, object], base: Path, models: list[_Model], directory: Path
) -> Path | None:
    """Where the output's tokenizer comes from: the base, or one of the models, by its name or path."""
    source, keys = content.get("tokenizer_source"), ("tokenizer_source",)
    if content.get("tokenizer") is not None:
        if source is not None:
            raise document.error(keys, "is given as tokenizer.source, too")
        source = document.mapping(content["tokenizer"], ("tokenizer",), ("source",)).get("source")
        keys = ("tokenizer", "source")
    if source in (None, "base"):
        return None
    path = _path(document, source, keys, directory)
    known = {model.name: model.path for model in models} | {path: path for path in (base, *(m.path for m in models))}
    if source not in known and path not in known:
        names = ", ".join(model.name for model in models)
        raise document.error(keys, f"expected 'base' or one of the models ({names}), got {source!r}")
    return known.get(source, path)


def _read_calibration(
    document: LocatedYaml, content: dict[str, object], experts: list[str], directory: Path
) -> CalibrationSource | None:
    if content.get("calibration") is None:
        return None
    calibration = document.mapping(content["calibration"], ("calibration",), CALIBRATION_KEYS)
    data = calibration.get("data")
    at = ("calibration", "data")
    if isinstance(data, str):
        files = dict.fromkeys(experts, _path(document, data, at, directory))
    elif "data" not in calibration:
        raise document.error(("calibration",), "data: missing; expected a file, or a mapping from experts to files")
    else:
        entries = document.mapping(data, at, experts)
        if missing := [name for name in experts if name not in entries]:
            raise document.error(at, f"no samples for the experts {', '.join(missing)}")
        files = {name: _path(document, entries[name], (*at, name), directory) for name in experts}
    options = {
        key: document.positive_int(calibration[key], ("calibration", key))
        for key in ("samples", "batch_size", "max_length")
        if key in calibration
    }
    if "seed" in calibration:
        options["seed"] = document.of_type(calibration["seed"], int, ("calibration", "seed"))
    return CalibrationSource(files, **options)
