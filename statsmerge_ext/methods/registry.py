"""The methods by name, built in or from a third party.

A method is a function ``method(problem, *, hyperparameters…) -> Solution``; its keyword arguments, with their defaults,
are its hyperparameters. A package adds its own through :func:`register_method`, in a module that it names in the
entry-point group ``statsmerge_ext.methods``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer

#: What a method can ask for beyond the weights: "grams" (Gram evidence) and "batches" (unlabelled batches and heads).
#: With these it runs the model, whose other layers, where its problem's are some, are what the problem's base has.
NEEDS = frozenset({"grams", "batches"})
#: Arguments of ``merge`` itself: a hyperparameter of such a name would never reach its method.
RESERVED = frozenset(
    {
        "method",
        "base",
        "experts",
        "calibration",
        "heads",
        "forward",
        "layers",
        "evidence",
        "buffers",
        "journal",
        "progress",
        "seed",
    }
)
ENTRY_POINTS = "statsmerge_ext.methods"

_methods: dict[str, Method] = {}


@dataclass(frozen=True)
class Method:
    """A registered method: its ``name``, ``function``, what it ``needs`` and its ``hyperparameters`` with defaults.

    ``by_layer`` says that what becomes of a layer depends on that layer and its evidence alone, so that the method may
    be given the layers of a model in several problems, and of those that are neither linear nor convolutions a few rows
    at a time; what its result has beside parameters and notes does not outlast such a merge. ``in_order`` says of a
    method that it merges in execution order, so that it may be given the blocks of a model one by one in that order,
    also those in which none of the layers is its own.
    """

    name: str
    function: Callable[..., Solution]
    needs: frozenset[str]
    hyperparameters: Mapping[str, object]
    by_layer: bool = False
    in_order: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        function: Callable[..., Solution],
        needs: Iterable[str] = (),
        *,
        by_layer: bool = False,
        in_order: bool = False,
    ) -> Method:
        """The method that ``function`` is.

        Raises MethodError if ``needs`` holds something unknown, or a hyperparameter has the name of an argument of
        :func:`statsmerge_ext.merge`.
        """
        needs = frozenset(needs)
        if not needs <= NEEDS:
            raise MethodError(f"needs: expected some of {sorted(NEEDS)}, got {sorted(needs)}")
        _, *arguments = inspect.signature(function).parameters.values()
        if taken := sorted(RESERVED.intersection(argument.name for argument in arguments)):
            raise MethodError(f"method {name!r}: its hyperparameter {taken[0]!r} is an argument of merge; rename it")
        defaults = {argument.name: argument.default for argument in arguments}
        return cls(name, function, needs, defaults, by_layer, in_order)

    @property
    def by_block(self) -> bool:
        """Whether it can be given a model block by block."""
        return self.by_layer or self.in_order

    def check(self, hyperparameters: Iterable[str]) -> None:
        """Raise MethodError for a hyperparameter that the method does not take."""
        for name in hyperparameters:
            if name not in self.hyperparameters:
                raise MethodError(
                    f"method {self.name!r} has no hyperparameter {name!r}{nearest(name, self.hyperparameters)}; "
                    f"it takes {', '.join(self.hyperparameters) or 'none'}"
                )

    def check_layers(self, layers: Iterable[Layer]) -> None:
        """Raise MethodError if what the method was told of some layers is of none of a model's ``layers``."""

    def watched(self, layers: Iterable[Layer]) -> list[Layer]:
        """Those of a model's ``layers`` that the method needs Gram evidence of."""
        return list(layers) if "grams" in self.needs else []

    def ordered(self, layers: Iterable[Layer]) -> list[Layer]:
        """Those of a model's ``layers`` that the method merges in execution order."""
        return list(layers) if self.in_order else []

    def identity(self, hyperparameters: Mapping[str, object]) -> dict:
        """What decides the result of a merge, as far as the method does, JSON-able."""
        return {"method": self.name, "hyperparameters": {name: str(x) for name, x in hyperparameters.items()}}

    def facts(self, layers: Iterable[Layer], hyperparameters: Mapping[str, object]) -> dict:
        """How the ``layers`` of a model are merged, JSON-able, for the report."""
        every = {**self.hyperparameters, **hyperparameters}
        return {"method": self.name, "hyperparameters": {name: _plain(x) for name, x in every.items()}}

    def __call__(self, problem: MergeProblem, **hyperparameters) -> Solution:
        self.check(hyperparameters)
        return self.function(problem, **hyperparameters)


def register_method(
    name: str,
    *,
    needs: Iterable[str] = (),
    by_layer: bool = False,
    in_order: bool = False,
) -> Callable:
    """Decorator that makes a function available as the method ``name``; further arguments as in :class:`Method`.

    Raises MethodError if the name is taken, and as :meth:`Method.of`.
    """

    def register(function: Callable[..., Solution]) -> Callable[..., Solution]:
        if name in _methods and _methods[name].function is not function:
            raise MethodError(f"a method named {name!r} is already registered")
        _methods[name] = Method.of(name, function, needs, by_layer=by_layer, in_order=in_order)
        return function

    return register


def get_method(name: str) -> Method:
    """The method called ``name``. Raises MethodError, with the nearest name, if there is none."""
    _load_third_parties()
    if name not in _methods:
        raise MethodError(f"unknown method {name!r}{nearest(name, _methods)}; known: {', '.join(sorted(_methods))}")
    return _methods[name]


def list_methods() -> list[str]:
    """The names of all methods, sorted."""
    _load_third_parties()
    return sorted(_methods)


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known name nearest to ``name``, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _plain(value: object) -> object:
    """A hyperparameter as the report shows it, JSON-able."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "setting"):
        return _plain(value.setting)
    return str(value) if isinstance(value, Path) else type(value).__name__


@cache
def _load_third_parties() -> None:
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        entry.load()
