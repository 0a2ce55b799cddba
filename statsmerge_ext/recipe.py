"""Merge recipes: YAML in mergekit's form, read strictly.

Whatever a recipe says has an effect or is refused; docs/recipe.md describes the format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from statsmerge_ext.calibration import CalibrationSource
from statsmerge_ext.errors import MethodError, RecipeError
from statsmerge_ext.located_yaml import Keys, LocatedYaml
from statsmerge_ext.methods import LayerRule, Method, by_rules, get_method
from statsmerge_ext.recipe_parameters import ModelEntry, read_hyperparameters, read_method, read_rules

KEYS = (
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "layers",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
    "calibration",
    "buffers",
    "vocab",
)
#: Keys of mergekit's format, and of this one to come, that are known but cannot be honoured.
UNSUPPORTED_KEYS = ("slices", "modules", "statistics", "coefficients", "evaluation")
MODEL_KEYS = ("model", "name", "parameters")
CALIBRATION_KEYS = ("data", "samples", "batch_size", "max_length", "seed")
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
BUFFERS = ("average", "reestimate")
VOCABULARIES = ("same", "common")
#: Averages of the experts' weights need no base; the first model then gives configuration and tokenizer.
METHODS_WITHOUT_BASE = frozenset({"linear"})


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        method: name of a registered method.
        base: path of the base checkpoint.
        experts: expert name → path of its checkpoint, at least one.
        text: the recipe as it was written.
        hyperparameters: the method's own, under its own names.
        layers: rules for layers that are merged in another way.
        out_dtype: dtype of the written weights; None: the base's.
        buffers: "average" or "reestimate".
        calibration: unlabelled samples, for methods that look at data; else None.
        vocab: "same": experts have the base's vocabulary; "common": they are merged where they share it.
        tokenizer: the directory that the output's tokenizer and chat template come from; None: the base's.
        chat_template: one in Jinja to take in its place, or "auto" for the one that most of the models have.
    """

    method: str
    base: Path
    experts: Mapping[str, Path]
    text: str
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    layers: tuple[LayerRule, ...] = ()
    out_dtype: torch.dtype | None = None
    buffers: str = "average"
    calibration: CalibrationSource | None = None
    vocab: str = "same"
    tokenizer: Path | None = None
    chat_template: str | None = None

    @property
    def chosen(self) -> Method:
        """What merges all layers: the method, with the rules for some of them. Raises MethodError as `by_rules`."""
        return by_rules(self.method, self.layers)

    @property
    def needs_data(self) -> bool:
        """Whether the merge runs the model on calibration samples."""
        return bool(self.chosen.needs) or self.buffers == "reestimate"


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
    document = LocatedYaml(text, name, directory)
    for key in UNSUPPORTED_KEYS:
        if isinstance(document.value, dict) and key in document.value:
            raise document.error((key,), "is not supported yet")
    content = document.mapping(document.value, (), KEYS)
    if "merge_method" not in content:
        raise document.error((), "merge_method: missing")
    method = read_method(document, content["merge_method"], ("merge_method",))
    base, models = _read_models(document, content, method)
    hyperparameters = read_hyperparameters(document, content.get("parameters"), ("parameters",), method, models)
    recipe = Recipe(
        method=method.name,
        base=base,
        experts={model.name: model.path for model in models},
        hyperparameters=hyperparameters,
        layers=read_rules(document, content.get("layers"), method, hyperparameters),
        out_dtype=_read_dtype(document, content),
        buffers=document.one_of(content.get("buffers", BUFFERS[0]), ("buffers",), BUFFERS),
        calibration=_read_calibration(document, content, [model.name for model in models]),
        vocab=document.one_of(content.get("vocab", VOCABULARIES[0]), ("vocab",), VOCABULARIES),
        tokenizer=_read_tokenizer(document, content, base, models),
        chat_template=_read_chat_template(document, content),
        text=text,
    )
    _check_methods(document, recipe, content)
    return recipe


def _check_methods(document: LocatedYaml, recipe: Recipe, content: dict[str, object]) -> None:
    """Refuse methods that do not go together, and a base or samples that they lack or do not look at."""
    try:
        recipe.chosen
    except MethodError as error:
        raise document.error(("layers",), str(error).removeprefix("layers: ")) from error
    names = dict.fromkeys((recipe.method, *(rule.method for rule in recipe.layers)))
    with_base = [name for name in names if name not in METHODS_WITHOUT_BASE]
    if with_base and "base_model" not in content:
        raise document.error((), f"base_model: missing; method {with_base[0]!r} merges differences from it")
    with_data = [f"method {name!r}" for name in names if get_method(name).needs] or ["buffers: reestimate"]
    if recipe.needs_data and recipe.calibration is None:
        raise document.error((), f"calibration: missing; {with_data[0]} needs unlabelled samples of each task")
    if recipe.calibration is not None and not recipe.needs_data:
        looks = f"method {recipe.method!r} looks" if len(names) == 1 else f"the methods {', '.join(names)} look"
        raise document.error(("calibration",), f"would have no effect: {looks} at no data")


def _read_models(document: LocatedYaml, content: dict[str, object], method: Method) -> tuple[Path, list[ModelEntry]]:
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        place = ("models",) if "models" in content else ()
        raise document.error(
            place, f"{'' if place else 'models: '}expected a list of at least one expert (- model: PATH)"
        )
    models = [_read_model(document, entry, ("models", i)) for i, entry in enumerate(entries)]
    if "base_model" in content:
        base = document.path(content["base_model"], ("base_model",))
        if method.name not in METHODS_WITHOUT_BASE:
            # mergekit's recipes list the base among the models, even with parameters; its task vector is zero.
            models = [model for model in models if model.path != base]
    else:
        base = models[0].path
    for i, model in enumerate(models):
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


def _read_model(document: LocatedYaml, entry: object, keys: Keys) -> ModelEntry:
    entry = document.mapping(entry, keys, MODEL_KEYS)
    if "model" not in entry:
        raise document.error(keys, "model: missing")
    path = document.path(entry["model"], (*keys, "model"))
    name = document.text(entry["name"], (*keys, "name")) if "name" in entry else path.name
    parameters = entry.get("parameters")
    parameters = {} if parameters is None else document.mapping(parameters, (*keys, "parameters"))
    return ModelEntry(name, path, parameters, keys)


def _read_dtype(document: LocatedYaml, content: dict[str, object]) -> torch.dtype | None:
    """The output's dtype: ``out_dtype``, or else ``dtype``; merging itself computes in float32 or more."""
    dtypes = {}
    for key in ("dtype", "out_dtype"):
        if content.get(key) is not None:
            name = document.text(content[key], (key,)).removeprefix("torch.")
            dtypes[key] = DTYPES[document.one_of(name, (key,), DTYPES)]
    return dtypes.get("out_dtype", dtypes.get("dtype"))


def _read_tokenizer(
    document: LocatedYaml, content: dict[str, object], base: Path, models: list[ModelEntry]
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
    path = document.path(source, keys)
    known = {model.name: model.path for model in models} | {path: path for path in (base, *(m.path for m in models))}
    if source not in known and path not in known:
        names = ", ".join(model.name for model in models)
        raise document.error(keys, f"expected 'base' or one of the models ({names}), got {source!r}")
    return known.get(source, path)


def _read_chat_template(document: LocatedYaml, content: dict[str, object]) -> str | None:
    template = content.get("chat_template")
    if template is not None and not (isinstance(template, str) and (template == "auto" or "{" in template)):
        raise document.error(("chat_template",), f"expected 'auto' or a template in Jinja, got {template!r}")
    return template


def _read_calibration(
    document: LocatedYaml, content: dict[str, object], experts: list[str]
) -> CalibrationSource | None:
    if content.get("calibration") is None:
        return None
    calibration = document.mapping(content["calibration"], ("calibration",), CALIBRATION_KEYS)
    data = calibration.get("data")
    at = ("calibration", "data")
    if isinstance(data, str):
        files = dict.fromkeys(experts, document.path(data, at))
    elif "data" not in calibration:
        raise document.error(("calibration",), "data: missing; expected a file, or a mapping from experts to files")
    else:
        entries = document.mapping(data, at, experts)
        if missing := [name for name in experts if name not in entries]:
            raise document.error(at, f"no samples for the experts {', '.join(missing)}")
        files = {name: document.path(entries[name], (*at, name)) for name in experts}
    options = {
        key: document.positive_int(calibration[key], ("calibration", key))
        for key in ("samples", "batch_size", "max_length")
        if key in calibration
    }
    if "seed" in calibration:
        options["seed"] = document.of_type(calibration["seed"], int, ("calibration", "seed"))
    return CalibrationSource(files, **options)
