"""Vocabularies: whether base and experts give their tokens the same numbers, and experts seen through the base's.

A token is known by its string in tokenizer.json. The rows of a table (embeddings, the head and its bias) are tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.compatibility import floating_names, is_token_table, tied_name
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.reading import Checkpoint, read_json
from statsmerge_ext.errors import CheckpointError

FILE = "tokenizer.json"


def in_vocabulary_of(
    base: Checkpoint, experts: Mapping[str, Checkpoint], *, common: bool
) -> tuple[dict[str, Checkpoint], dict[str, dict[str, int]]]:
    """The experts with the base's vocabulary, of which nothing is read but tokenizers.

    Args:
        base, experts: checkpoints; those without tokenizer are believed to have the base's vocabulary.
        common: see an expert whose vocabulary is another through the base's: rows of tokens that both have are the
            expert's, all others the base's, so that there the task vector is zero. Otherwise such an expert is refused.

    Returns: the experts, and of those that are seen through the base's vocabulary the numbers of tokens that are
        "common", "missing" (only the base has them) and "dropped" (only the expert has them).

    Raises:
        CheckpointError: another vocabulary, with what differs; a tokenizer that is missing where it is needed,
            unreadable, or without a token in common.
    """
    fitting, counts = dict(experts), {}
    of_base = base.path / FILE
    for name, expert in experts.items():
        where, of_expert = f"expert {name!r} ({expert.path})", expert.path / FILE
        tables = [key for key in floating_names(base) if key in expert and is_token_table(base, expert, key)]
        resized = [key for key in tables if base.shape(key) != expert.shape(key)]
        missing = [path for path in (of_base, of_expert) if not path.exists()]
        if missing:
            if common and resized:
                raise CheckpointError(f"{where}: has another vocabulary, but {missing[0]} is missing to match tokens")
            continue
        if of_base.read_bytes() == of_expert.read_bytes():
            ours = theirs = _tokens(of_base) if resized else {}
        else:
            ours, theirs = _tokens(of_base), _tokens(of_expert)
        moved = [token for token, number in theirs.items() if ours.get(token, number) != number]
        if not moved and not resized:
            continue
        if not common:
            raise CheckpointError(
                f"{where}: has another vocabulary than the base: {_difference(base, expert, ours, theirs, resized)}; "
                "merge the part that both have in common with vocab: common (--vocab common)"
            )
        fitting[name], counts[name] = _through(base, expert, where, tables, ours, theirs)
    return fitting, counts


def _tokens(path: Path) -> dict[str, int]:
    """Token → number, of a tokenizer.json of any kind."""
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # of a unigram model: [token, score] in the order of their numbers
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        tokens = {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: has no vocabulary that could be read") from error
    if not all(type(number) is int and number >= 0 for number in tokens.values()):
        raise CheckpointError(f"{path}: numbers its tokens otherwise than by natural numbers")
    return tokens


def _difference(
    base: Checkpoint, expert: Checkpoint, ours: Mapping[str, int], theirs: Mapping[str, int], resized: list[str]
) -> str:
    """What differs, in words: sizes of tables, and the first of the tokens that are elsewhere or on one side only."""
    parts = [f"tensor {key!r} has {expert.shape(key)[0]} rows, the base's has {base.shape(key)[0]}" for key in resized]
    moved = [token for token, number in theirs.items() if ours.get(token, number) != number]
    if moved:
        token = moved[0]
        parts.append(f"{len(moved)} common tokens have other numbers ({token!r} is {theirs[token]}, not {ours[token]})")
    for words, some, others in (("only it has", theirs, ours), ("only the base has", ours, theirs)):
        if only := [token for token in some if token not in others]:
            parts.append(f"{words} {len(only)} tokens ({only[0]!r}{', …' if len(only) > 1 else ''})")
    return "; ".join(parts)


def _through(
    base: Checkpoint,
    expert: Checkpoint,
    where: str,
    tables: list[str],
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
) -> tuple[Checkpoint, dict[str, int]]:
    common = ours.keys() & theirs.keys()
    if not common:
        raise CheckpointError(f"{where}: its vocabulary has no token in common with the base's")
    pairs = torch.tensor([(ours[token], theirs[token]) for token in common])
    files = [base.path / FILE, expert.path / FILE]
    entries = {key: _Rows(base, expert, key, pairs, files) for key in tables}
    # A tied table that the expert stores twice and the base once would no longer be seen to be the same.
    twice = [key for key in floating_names(expert) if key not in base and tied_name(expert, key, among=base)]
    counts = {"common": len(common), "missing": len(ours) - len(common), "dropped": len(theirs) - len(common)}
    config = _with_vocabulary_size(expert.config, base.config)
    return expert.with_entries(entries, without=twice, config=config), counts


def _with_vocabulary_size(config: dict | None, base: dict | None) -> dict | None:
    """A configuration with the size of the base's vocabulary, wherever it says one."""
    if config is None or base is None:
        return config
    merged = dict(config)
    for key, value in config.items():
        if key == "vocab_size" and key in base:
            merged[key] = base[key]
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _with_vocabulary_size(value, base[key])
    return merged


class _Rows:
    """One table of an expert with the base's rows, in the place of a file of a `Checkpoint`.

    Args:
        base, expert: the checkpoints.
        key: of the table in both.
        pairs: [tokens, 2], the numbers that base and expert give to the tokens which both have.
        files: what decides the pairs.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, key: str, pairs: Tensor, files: list[Path]) -> None:
        self.path, self.metadata = expert.file(key), {}
        self.files = [self.path, *files]
        # Wide enough for the base's rows too: where the expert has none of its own nothing may differ.
        dtype = torch.promote_types(base.dtype(key), expert.dtype(key))
        self.infos = {key: TensorInfo(base.shape(key), dtype)}
        self._base, self._expert = base, expert
        there = (pairs[:, 0] < base.shape(key)[0]) & (pairs[:, 1] < expert.shape(key)[0])
        #: for every row of the base, the row of the expert; −1: the base's own
        self._rows = torch.full((base.shape(key)[0],), -1)
        self._rows[pairs[there, 0]] = pairs[there, 1]

    def read(self, name: str) -> Tensor:
        shape = self.infos[name].shape
        return self.read_run(name, 0, shape.numel(), None).view(shape)

    def read_run(self, name: str, start: int, stop: int, into: Tensor | None) -> Tensor:
        """As of a safetensors file: elements of the table taken as flat."""
        dtype = self.infos[name].dtype
        size = (stop - start) * dtype.itemsize
        out = (torch.empty(size, dtype=torch.uint8) if into is None else into[:size]).view(dtype)
        for state, first, last, at in self._runs(name, start, stop):
            out[at : at + last - first] = state.run(name, first, last)
        return out

    def _runs(self, name: str, start: int, stop: int) -> Iterator[tuple[Checkpoint, int, int, int]]:
        """(state, its elements from … to, where they come) that together are the elements ``start`` … ``stop``."""
        width = self.infos[name].shape[1:].numel()
        first_row, row = start // width, start // width
        rows = self._rows[first_row : -(-stop // width)]
        # Rows that follow each other in the expert as they do here have the same distance.
        distances = torch.where(rows < 0, torch.iinfo(rows.dtype).min, rows - torch.arange(len(rows)))
        for count in torch.unique_consecutive(distances, return_counts=True)[1].tolist():
            source = int(self._rows[row])
            first, last = max(start, row * width), min(stop, (row + count) * width)
            state, shift = (self._base, 0) if source < 0 else (self._expert, (source - row) * width)
            yield state, first + shift, last + shift, first - start
            row += count
