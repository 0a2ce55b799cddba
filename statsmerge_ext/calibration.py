"""Unlabelled calibration data: checking what callers hand in, and reading samples from files.

A batch is one tensor [samples, ...] or a mapping of a model's input names to tensors [samples, ...]. Labels never get
past this module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.errors import CalibrationError

Batch = Tensor | dict[str, Tensor]

LABEL_NAMES = frozenset({"label", "labels", "label_ids", "target", "targets"})
#: Number of samples taken from a file with more, where none is asked for (LOT Merging, arXiv 2505.23859, takes 64).
DEFAULT_SAMPLES = 64


@dataclass(frozen=True)
class CalibrationSource:
    """Where unlabelled samples come from: expert name → file, and how they are drawn and batched."""

    data: Mapping[str, Path]
    samples: int | None = None
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0

    def read(self, tokenizer: Path, device: str | torch.device) -> dict[str, list[Batch]]:
        """Each expert's batches on ``device``, as :func:`read_samples` reads them."""
        options = {"batch_size": self.batch_size, "max_length": self.max_length, "seed": self.seed}
        return {
            name: [
                _to(batch, device) for batch in read_samples(path, tokenizer=tokenizer, samples=self.samples, **options)
            ]
            for name, path in self.data.items()
        }


def as_unlabelled_batches(name: str, loader: Iterable[Tensor | Mapping[str, Tensor]]) -> list[Batch]:
    """The batches of a loader, checked to be non-empty and without labels.

    Args:
        name: the task, for messages.
        loader: iterable of batches; it is gone through once, and the batches are kept.

    Raises:
        CalibrationError: names the task, and the batch that is empty, of another type or carries labels; also when
            the loader is empty or was exhausted before.
    """
    if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
        kind = type(loader).__name__
        raise CalibrationError(f"calibration for {name!r}: got a {kind}, expected an iterable of batches")
    batches = [_checked(f"calibration for {name!r}, batch {place}", batch) for place, batch in enumerate(loader)]
    if not batches:
        raise CalibrationError(f"calibration for {name!r}: the loader gave no batch; it is empty or already exhausted")
    return batches


def as_named(batches: Iterable[Batch]) -> dict[str, Tensor]:
    """All tensors of the batches under names of their own, as floating point: what a fingerprint is taken of."""
    return {
        f"{place}/{key}": tensor.double()
        for place, batch in enumerate(batches)
        for key, tensor in (batch.items() if isinstance(batch, Mapping) else [("", batch)])
    }


def read_samples(
    path: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
) -> list[Batch]:
    """Read unlabelled samples from a file and batch them.

    Args:
        path: texts, to be tokenised: ``.txt`` (one sample a line) or ``.jsonl`` (objects with a "text"); or tensors
            [samples, ...]: ``.safetensors`` or ``.npz`` with one array under any name (batches are tensors) or
            several under the names of the model's inputs (batches are mappings).
        tokenizer: directory with the tokenizer for texts; nothing is downloaded.
        samples: how many to draw at random, without replacement; None: 64, or all if the file has fewer.
        batch_size: samples in a batch.
        max_length: longer texts are cut to so many tokens; shorter ones are padded to the longest of their batch.
        seed: of the draw.

    Raises:
        CalibrationError: names the file that is missing, unreadable, empty, too small or labelled.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file; expected calibration samples")
    if path.suffix in (".txt", ".jsonl"):
        texts = _read_lines(path) if path.suffix == ".txt" else _read_jsonl(path)
        chosen = _choose(path, len(texts), samples, seed)
        batches = _tokenise(path, [texts[i] for i in chosen], tokenizer, batch_size, max_length)
    elif path.suffix in (".safetensors", ".npz"):
        arrays = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
        chosen = torch.tensor(_choose(path, _common_length(path, arrays), samples, seed))
        parts = [{key: array[rows] for key, array in arrays.items()} for rows in chosen.split(batch_size)]
        batches = [next(iter(part.values())) for part in parts] if len(arrays) == 1 else parts
    else:
        raise CalibrationError(f"{path}: unknown suffix {path.suffix!r}; expected .txt, .jsonl, .safetensors or .npz")
    return batches


def _to(batch: Batch, device: str | torch.device) -> Batch:
    return {key: part.to(device) for key, part in batch.items()} if isinstance(batch, dict) else batch.to(device)


def _checked(where: str, batch: object) -> Batch:
    if isinstance(batch, Mapping):
        if labels := LABEL_NAMES & {str(key).lower() for key in batch}:
            raise CalibrationError(f"{where}: has {sorted(labels)[0]!r}; calibration never sees labels, leave them out")
        entries = dict(batch)
    elif isinstance(batch, Tensor):
        entries = {"": batch}
    else:
        kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        hint = "; give the inputs without their labels" if isinstance(batch, (tuple, list)) else ""
        raise CalibrationError(f"{where}: got a {kind}, expected a tensor or a mapping of tensors{hint}")
    if not entries:
        raise CalibrationError(f"{where}: is an empty mapping")
    for key, value in entries.items():
        place = f"{where}, {key!r}" if key else where
        if not isinstance(value, Tensor):
            raise CalibrationError(f"{place}: got a {type(value).__name__}, expected a tensor")
        if value.dim() == 0 or len(value) == 0:
            raise CalibrationError(f"{place}: has shape {list(value.shape)}, expected at least one sample")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CalibrationError(f"{place}: holds NaN or infinite values")
    return entries if isinstance(batch, Mapping) else batch


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _read_lines(path: Path) -> list[str]:
    return [line.strip() for line in _read_text(path).splitlines() if line.strip()]


def _read_jsonl(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}, line {number}: is not JSON: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CalibrationError(f'{path}, line {number}: expected an object with a string under "text"')
        texts.append(text)  # Other fields, labels among them, are left behind.
    return texts


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(path))


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except Exception as error:  # zipfile, zlib, numpy and torch each have their own for damaged or foreign content
        raise CalibrationError(f"{path}: cannot be read as an .npz of numeric arrays: {error}") from error


def _common_length(path: Path, arrays: dict[str, Tensor]) -> int:
    _checked(str(path), arrays)
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise CalibrationError(f"{path}: its arrays have different numbers of samples: {lengths}")
    return next(iter(lengths.values()))


def _choose(path: Path, available: int, samples: int | None, seed: int) -> list[int]:
    if available == 0:
        raise CalibrationError(f"{path}: holds no samples")
    if samples is not None and samples > available:
        raise CalibrationError(f"{path}: holds {available} samples, {samples} were asked for")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[: samples or DEFAULT_SAMPLES].tolist()


def _tokenise(
    path: Path, texts: list[str], tokenizer: str | os.PathLike | None, batch_size: int, max_length: int
) -> list[Batch]:
    if tokenizer is None or not any(Path(tokenizer).glob("tokenizer*")):
        raise CalibrationError(f"{path}: texts need a tokenizer, but the base {tokenizer or ''} has no tokenizer files")
    from transformers import AutoTokenizer  # only texts need it

    tokenise = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if tokenise.pad_token is None:  # Decoders often have none; padding is masked, so any token will do.
        tokenise.pad_token = tokenise.eos_token
    return [
        dict(
            tokenise(
                texts[i : i + batch_size], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
        )
        for i in range(0, len(texts), batch_size)
    ]
