"""YAML that remembers where each value stands, so that an error can name its line."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from statsmerge_ext.errors import RecipeError
from statsmerge_ext.methods.registry import nearest

Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also takes 1e-3 for a number; YAML 1.1 wants a dot in it."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class LocatedYaml:
    """A parsed YAML document, its values, and errors that name file, line, column and key.

    A value is addressed by the keys that lead to it: ``("models", 0, "parameters", "weight")``.
    """

    def __init__(self, text: str, name: str, directory: str | os.PathLike):
        """Parse `text`; `name` stands for it in messages, and paths in it are relative to `directory`.

        Raises RecipeError for what is not YAML.
        """
        self.name, self._directory = name, Path(directory)
        try:
            loader = _Loader(text)
            self._root = loader.get_single_node()
            self._refuse_duplicates(self._root, seen=set())
            self.value = None if self._root is None else loader.construct_document(self._root)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if isinstance(error, RecipeError):
                raise
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            raise RecipeError(f"{name}{line}: is not YAML: {getattr(error, 'problem', None) or error}") from error

    def error(self, keys: Keys, message: str) -> RecipeError:
        """A RecipeError about the value at `keys` (or, where there is none, about the nearest one around it)."""
        mark = self._mark(keys)
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        return RecipeError(f"{self.name}{line}: {where + ': ' if where else ''}{message}")

    def mapping(self, value: object, keys: Keys, known: Iterable[str] | None = None) -> dict[str, object]:
        """`value`, checked to be a mapping with texts for keys, all of them `known` if that is given."""
        if not isinstance(value, dict):
            raise self.error(keys, f"expected a mapping (key: value), got {_describe(value)}")
        for key in value:
            if not isinstance(key, str):
                raise self.error(keys, f"expected texts for keys, got {_describe(key)}")
            if known is not None and key not in known:
                known = list(known)
                raise self.error((*keys, key), f"unknown key{nearest(key, known)}; known here: {', '.join(known)}")
        return value

    def text(self, value: object, keys: Keys) -> str:
        """`value`, checked to be a text that is not empty."""
        if not isinstance(value, str) or not value.strip():
            raise self.error(keys, f"expected a text, got {_describe(value)}")
        return value

    def path(self, value: object, keys: Keys) -> Path:
        """The path that the text `value` means."""
        return Path(os.path.normpath(self._directory / Path(self.text(value, keys)).expanduser()))

    def one_of(self, value: object, keys: Keys, known: Iterable[str]) -> str:
        """`value`, checked to be one of the texts `known`."""
        if value not in known:
            raise self.error(keys, f"got {value!r}, expected one of {', '.join(known)}")
        return value

    def positive_int(self, value: object, keys: Keys) -> int:
        """`value`, checked to be an integer of at least 1."""
        if type(value) is not int or value < 1:
            raise self.error(keys, f"expected an integer of at least 1, got {_describe(value)}")
        return value

    def of_type(self, value: object, hint: object, keys: Keys) -> object:
        """`value`, checked to be of the annotated type `hint`."""
        if not _fits(value, hint):
            expected = getattr(hint, "__name__", None) or str(hint).replace("collections.abc.", "")
            raise self.error(keys, f"expected {expected}, got {_describe(value)}")
        return value

    def _mark(self, keys: Keys) -> yaml.Mark | None:
        node, mark = self._root, self._root.start_mark if self._root else None
        for key in keys:
            if isinstance(node, yaml.MappingNode):
                pairs = [(k, v) for k, v in node.value if k.value == key]
                if not pairs:
                    break
                mark, node = pairs[-1][0].start_mark, pairs[-1][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
                mark = node.start_mark
            else:
                break
        return mark

    def _refuse_duplicates(self, node: yaml.Node | None, seen: set[int]) -> None:
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            return
        seen.add(id(node))
        keys = set()
        for item in node.value:
            if isinstance(node, yaml.MappingNode):
                key, item = item
                if isinstance(key, yaml.ScalarNode) and key.value in keys and key.value != "<<":
                    mark = key.start_mark
                    raise RecipeError(f"{self.name}:{mark.line + 1}:{mark.column + 1}: {key.value}: appears twice")
                keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            self._refuse_duplicates(item, seen)


def _fits(value: object, hint: object) -> bool:
    """Whether `value`, as YAML gives it, can stand for an argument annotated with `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is types.NoneType:
        return value is None
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str):
        return type(value) is hint
    if origin in (Sequence, list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    return True  # No annotation, or one that YAML has no form for: the method itself has to check.


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    kind = {dict: "a mapping", list: "a list"}.get(type(value))
    return kind or repr(value)
