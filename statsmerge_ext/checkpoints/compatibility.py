"""Whether experts fit their base: the same architecture, names, shapes and kinds of tensors, and finite values.

Also what a merge asks of a state without caring whether it is a `Checkpoint`, a state dict or a view of either: a
tensor's shape, its dtype, a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.reading import Checkpoint
from statsmerge_ext.errors import CheckpointError

# How many tensor names an error lists before it says "and N more".
LISTED_NAMES = 4
# Parts of the names that models give to their tables with one row a token.
TOKEN_TABLES = ("word_embed", "embed_tokens", "token_embed", "tok_embed", "wte", "shared.weight", "lm_head")


def check_compatible(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Mapping[str, Tensor]]:
    """Check that every expert can be merged into the base; no tensor of an untied checkpoint is read.

    Floating-point tensors of base and expert must agree in name and shape; dtypes may differ (bf16 into fp32).
    Integer and boolean tensors (position tables, counters) are not merged: an expert may lack them or bring its own.
    A checkpoint that stores a tied weight once and one that stores it under each of its names fit each other.

    Args:
        base: a `Checkpoint` or a state dict.
        experts: expert name → `Checkpoint` or state dict.

    Returns:
        expert name → the expert seen through the base's floating-point tensor names, in the base's order; lazy.

    Raises:
        CheckpointError: names the expert, its file and the tensor, what came and what was expected.
    """
    if not experts:
        raise CheckpointError("experts: none given, expected at least one")
    return {name: _check_expert(base, name, expert) for name, expert in experts.items()}


def check_finite(name: str, tensor: Tensor, where: object) -> Tensor:
    """Return the tensor unchanged, or raise a CheckpointError that names it if it holds NaN or infinity.

    Args:
        name: the tensor's name.
        tensor: any shape and dtype; integers are finite.
        where: what it was read from, for the message (a path, or "expert 'mnist'").
    """
    if tensor.is_floating_point() and not _is_finite(tensor):
        nans = int(torch.isnan(tensor).sum())
        infinities = int(torch.isinf(tensor).sum())
        raise CheckpointError(f"{where}: tensor {name!r} holds {nans} NaN and {infinities} infinite values")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum takes one pass and proves that all terms are; looking at each of them takes several.
    if tensor.dtype.itemsize > 1 and math.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        return True
    return bool(torch.isfinite(tensor).all())


def shape_of(state: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of a tensor, read from the file's header where the state is a `Checkpoint`."""
    return state.shape(name) if isinstance(state, (Checkpoint, Renamed)) else state[name].shape


def dtype_of(state: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Dtype of a tensor, read from the file's header where the state is a `Checkpoint`."""
    return state.dtype(name) if isinstance(state, (Checkpoint, Renamed)) else state[name].dtype


def floating_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors, the ones that are merged, in the state's order."""
    return [name for name in state if dtype_of(state, name).is_floating_point]


def run_of(state: Mapping[str, Tensor], name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
    """Elements ``start`` … ``stop`` of a tensor taken as flat; of a `Checkpoint`, if possible, only they are read.

    Args as :meth:`Checkpoint.run`.
    """
    if isinstance(state, (Checkpoint, Renamed)):
        return state.run(name, start, stop, into)
    return state[name].detach().reshape(-1)[start:stop]


def has_runs(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether :func:`run_of` comes without reading the whole tensor."""
    return not isinstance(state, (Checkpoint, Renamed)) or state.has_runs(name)


class Renamed(Mapping[str, Tensor]):
    """A state seen under other names, without reading it: name → name in the state."""

    def __init__(self, state: Mapping[str, Tensor], names: dict[str, str]):
        self._state = state
        self._names = names
        if hasattr(state, "path"):
            self.path = state.path

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> torch.Size:
        return shape_of(self._state, self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self._state, self._names[name])

    def run(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        return run_of(self._state, self._names[name], start, stop, into)

    def has_runs(self, name: str) -> bool:
        return has_runs(self._state, self._names[name])


def _check_expert(base: Mapping[str, Tensor], label: str, expert: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    _check_model_type(base, label, expert)
    names = {}
    missing = []
    for name in floating_names(base):
        source = name if name in expert else tied_name(base, name, among=expert)
        if source is None:
            missing.append(name)
        else:
            names[name] = source
    if missing:
        raise CheckpointError(f"{_where(label, expert)}: lacks {_list(missing)} of the base{_hint(base, expert)}")
    extra = [
        name for name in floating_names(expert) if name not in base and tied_name(expert, name, among=base) is None
    ]
    if extra:
        raise CheckpointError(f"{_where(label, expert)}: has {_list(extra)}, which the base lacks{_hint(base, expert)}")
    for name in base:
        if name in names:
            _check_tensor(base, label, expert, name, names[name])
        elif name in expert and dtype_of(expert, name).is_floating_point:
            raise CheckpointError(
                f"{_where(label, expert, name)}: tensor {name!r} is {dtype_of(expert, name)}, "
                f"expected {dtype_of(base, name)} as in the base"
            )
    return Renamed(expert, names)


def _check_model_type(base: Mapping[str, Tensor], label: str, expert: Mapping[str, Tensor]) -> None:
    ours, theirs = _config(base).get("model_type"), _config(expert).get("model_type")
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"{_where(label, expert)}: is another architecture (model_type {theirs!r}, the base is {ours!r}); "
            "only models fine-tuned from the base can be merged into it"
        )


def _check_tensor(base: Mapping[str, Tensor], label: str, expert: Mapping[str, Tensor], name: str, source: str) -> None:
    ours, theirs = shape_of(base, name), shape_of(expert, source)
    if not dtype_of(expert, source).is_floating_point:
        raise CheckpointError(
            f"{_where(label, expert, source)}: tensor {source!r} is {dtype_of(expert, source)}, expected floating "
            f"point as in the base ({dtype_of(base, name)}); quantised experts must be dequantised first"
        )
    if ours == theirs:
        return
    if is_token_table(base, expert, name, source):
        raise CheckpointError(
            f"{_where(label, expert, source)}: another vocabulary size: tensor {source!r} has {theirs[0]} rows, the "
            f"base's has {ours[0]}; merge the common part with vocab: common (--vocab common)"
        )
    raise CheckpointError(
        f"{_where(label, expert, source)}: tensor {source!r} has shape {list(theirs)}, expected {list(ours)} as in "
        f"the base{_hint(base, expert)}"
    )


def is_token_table(
    base: Mapping[str, Tensor], expert: Mapping[str, Tensor], name: str, source: str | None = None
) -> bool:
    """Whether the rows of a tensor are tokens: they are as many as the configurations say, or its name says so.

    ``source`` is its name in the expert, if that is another; the rows may be as many in both or not.
    """
    ours, theirs = shape_of(base, name), shape_of(expert, source or name)
    if not ours or len(ours) != len(theirs) or ours[1:] != theirs[1:]:
        return False
    sizes = (_vocabulary_size(base), _vocabulary_size(expert))
    return sizes == (ours[0], theirs[0]) or any(part in name for part in TOKEN_TABLES)


def _vocabulary_size(state: Mapping[str, Tensor]) -> int | None:
    config = _config(state)
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def tied_name(state: Mapping[str, Tensor], name: str, among: Mapping[str, Tensor]) -> str | None:
    """Name of another tensor of the state that is the same as this one, and that is also in `among`; else None.

    The same are tensors in one place of memory; and those that are equal bit for bit, unless all of their values are
    the same: scales and biases that were never trained are equal by chance.
    """
    shape, dtype = shape_of(state, name), dtype_of(state, name)
    others = [
        other
        for other in state
        if other != name and other in among and shape_of(state, other) == shape and dtype_of(state, other) == dtype
    ]
    if not others or not shape.numel():
        return None
    tensor = state[name]
    is_constant = bool((tensor == tensor.reshape(-1)[0]).all())
    for other in others:
        same = state[other]
        is_same_memory = (same.data_ptr(), same.stride()) == (tensor.data_ptr(), tensor.stride())
        if is_same_memory or (not is_constant and torch.equal(same, tensor)):
            return other
    return None


def _config(state: Mapping[str, Tensor]) -> dict:
    return (state.config if isinstance(state, Checkpoint) else None) or {}


def _hint(base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> str:
    ours, theirs = _config(base).get("architectures"), _config(expert).get("architectures")
    return f"; the base is {ours[0]}, the expert {theirs[0]}" if ours and theirs and ours != theirs else ""


def _where(label: str, expert: Mapping[str, Tensor], tensor: str | None = None) -> str:
    if not isinstance(expert, Checkpoint):
        return f"expert {label!r}"
    return f"expert {label!r} ({expert.path if tensor is None else expert.file(tensor)})"


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:LISTED_NAMES])
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors ({shown}{more})"
