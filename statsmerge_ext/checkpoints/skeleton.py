"""Models without their weights, and checkpoints seen under the names that a model has for them.

A skeleton takes no memory for parameters. Which tensors of the files make up which parameter is what transformers
would do on loading: most have the same name or another one, some are put together of several (the experts of a
mixture), all known without reading any of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from statsmerge_ext.checkpoints.architecture import architecture, configuration, quiet_transformers, stored_state
from statsmerge_ext.checkpoints.compatibility import Renamed, dtype_of, shape_of
from statsmerge_ext.checkpoints.reading import Checkpoint
from statsmerge_ext.errors import CheckpointError


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model that a Hugging Face directory describes, its parameters on the meta device, its buffers real.

    It computes in float32 and in eval mode.

    Raises:
        CheckpointError: there is no configuration, or transformers lacks or cannot build the architecture.
    """
    model_class = architecture(checkpoint)
    import transformers

    with quiet_transformers(transformers.utils.logging), _parameters_on_meta():
        try:
            model = model_class._from_config(configuration(checkpoint), dtype=torch.float32)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{checkpoint.path}: transformers cannot build {model_class.__name__}") from error
    return model.eval()


class FileNames:
    """What the tensors of a checkpoint's files are in a skeleton of its architecture.

    Args:
        model: the skeleton.
        checkpoint: of its architecture.

    Attributes:
        aliases: each key of the model's state dict -> the first key of the same parameter.
        direct: first key -> the names of the tensors that are its values; several where files hold a tied one twice.
        left_over: floating-point tensors that the model knows but does not load (a table it computes itself).

    Raises:
        CheckpointError: the model has a parameter that the files lack, or the files a tensor that the model lacks.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self._model = model
        first: dict[int, str] = {}
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        stored = model.state_dict().keys()
        self.aliases = {key: first.setdefault(id(tensor), key) for key, tensor in tensors.items() if key in stored}
        self.direct: dict[str, list[str]] = {}
        self.left_over: list[str] = []
        conversions: dict[str, _Conversion] = {}
        for name, key, conversion in _targets(model, checkpoint):
            if key not in self.aliases:
                self._leave_over(checkpoint, name)
            elif conversion is None:
                self.direct.setdefault(self.aliases[key], []).append(name)
            else:
                conversions.setdefault(key, _Conversion(key, conversion[0])).sources[name] = conversion[1]
        self.forget()
        self._conversions: dict[str, _Conversion] = {}  # by every parameter that one makes
        for conversion in conversions.values():
            like = {
                name: torch.empty(shape_of(checkpoint, name), dtype=dtype_of(checkpoint, name), device="meta")
                for name in conversion.sources
            }
            conversion.results = conversion.apply(model, like)
            self._conversions |= dict.fromkeys(conversion.results, conversion)
        self._check(checkpoint, tensors)

    def state(self, checkpoint: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A checkpoint with the files' names, seen under the model's; lazy."""
        return _ModuleState(checkpoint, self)

    def is_direct(self, key: str) -> bool:
        """Whether a parameter is one tensor of the files as it is, rather than put together or cut."""
        return key not in self._conversions

    def shape(self, key: str) -> torch.Size:
        """The shape of a parameter that is not direct."""
        return self._conversions[key].results[key].shape

    def sources(self, key: str) -> list[str]:
        """The tensors of the files that a parameter is made of."""
        return self.direct.get(key) or list(self._conversions[key].sources)

    def read(self, key: str, state: Mapping[str, Tensor]) -> Tensor:
        """A parameter that is not direct, from tensors under the files' names. The last one is kept, for its parts."""
        known, of_state, value = self._last
        if known != key or of_state is not state:
            value = self._conversions[key].apply(self._model, state)[key]
            self._last = (key, state, value)
        return value

    def forget(self) -> None:
        """Give back what :meth:`read` keeps."""
        self._last = ("", {}, None)

    def stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the files hold of parameters that are not direct; ``state`` has all or none of a file's tensor."""
        return {name: tensor.contiguous() for name, tensor in stored_state(self._model, state).items()} if state else {}

    def _leave_over(self, checkpoint: Checkpoint, name: str) -> None:
        if not dtype_of(checkpoint, name).is_floating_point:
            return
        ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if not any(re.search(pattern, name) for pattern in (*ignored, r"rotary_emb\.inv_freq$")):
            raise CheckpointError(f"{checkpoint.path}: has tensor {name!r}, which {type(self._model).__name__} has not")
        self.left_over.append(name)

    def _check(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        state = self.state(checkpoint)
        for key in dict.fromkeys(self.aliases.values()):
            if key not in state:
                if tensors[key].is_floating_point():
                    raise CheckpointError(f"{checkpoint.path}: lacks tensor {key!r} of {type(self._model).__name__}")
            elif shape_of(state, key) != tensors[key].shape:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {key!r} has shape {list(shape_of(state, key))}, expected "
                    f"{list(tensors[key].shape)} as in config.json"
                )
        for names in self.direct.values():
            for other in names[1:]:
                if not torch.equal(checkpoint[names[0]], checkpoint[other]):
                    raise CheckpointError(f"{checkpoint.path}: tensors {names[0]!r} and {other!r} are tied and differ")


@dataclass
class _Conversion:
    """Tensors of the files that transformers makes others of, together.

    Attributes:
        key: the first parameter that is made.
        prototype: transformers' converter.
        sources: name -> the converter's pattern that it matches.
        results: key in the model -> tensor on the meta device.
    """

    key: str
    prototype: object
    sources: dict[str, str] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key in the model -> tensor."""
        converter = copy.deepcopy(self.prototype)
        for name, pattern in self.sources.items():
            converter.add_tensor(self.key, name, pattern, state[name])
        made = converter.convert(self.key, model=model, config=model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


class _ModuleState(Renamed):
    """A checkpoint under a model's names; parameters that are put together are read as a whole."""

    def __init__(self, state: Mapping[str, Tensor], files: FileNames) -> None:
        direct = {key: next((n for n in names if n in state), names[0]) for key, names in files.direct.items()}
        keys = dict.fromkeys(key for key in files.aliases.values() if key in direct or not files.is_direct(key))
        super().__init__(state, {key: direct.get(key, key) for key in keys})
        self._files = files

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key) if self._files.is_direct(key) else self._files.read(key, self._state)

    def shape(self, key: str) -> torch.Size:
        return super().shape(key) if self._files.is_direct(key) else self._files.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return dtype_of(self._state, self._files.sources(key)[0])

    def run(self, key: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        if self._files.is_direct(key):
            return super().run(key, start, stop, into)
        return self[key].reshape(-1)[start:stop]

    def has_runs(self, key: str) -> bool:
        return self._files.is_direct(key) and super().has_runs(key)


def _targets(model: nn.Module, checkpoint: Iterable[str]) -> Iterator[tuple[str, str, tuple | None]]:
    """(name in the files, key in the model, None or the conversion's prototype and pattern), in the loader's order."""
    known = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # Before version 5 the names are the same.
        yield from ((name, name, None) for name in checkpoint)
        return
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prototypes = {pattern: each for each in converters for pattern in each.source_patterns}
    for name in sorted(checkpoint, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if key not in known and name in known:
            key, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        yield name, key, None if pattern is None else (prototypes[pattern], pattern)
    model._weight_conversions = [each for each in transforms if each.was_used()]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module gets meanwhile keeps its shape and loses its values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # a tied one stays the very same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
