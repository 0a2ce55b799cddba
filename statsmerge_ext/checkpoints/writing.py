"""Writing a merged model: a state-dict file or a Hugging Face directory, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.checkpoints.file_formats import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.reading import Checkpoint, open_checkpoint
from statsmerge_ext.checkpoints.weight_files import ShardedWeights, WeightFile
from statsmerge_ext.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
)
# What a base directory may hold besides weights and tokenizer that its users rely on; "1_Pooling" and the like
# belong to sentence-transformers, Python files to models with code of their own.
MODEL_FILES = (
    "generation_config.json",
    "*processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*/*",
    "*.py",
)
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_state_dict(
    state: Mapping[str, Tensor],
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a state dict to one file: safetensors or ``torch.save``, by the suffix of `path`; atomic.

    Args:
        state: name → tensor. Of tensors that share their memory safetensors keeps the first name.
        path: ``.safetensors``, ``.pt``, ``.pth`` or ``.bin``.
        metadata: texts for the header of a safetensors file; a pickle file has no place for them.
        overwrite: replace an existing file.

    Raises:
        CheckpointError: the file exists, its suffix is unknown, or it cannot be written (full disk); nothing is left.
    """
    path = Path(path)
    if path.suffix not in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        raise CheckpointError(f"{path}: unknown suffix {path.suffix!r}; expected .safetensors, .pt, .pth or .bin")
    with atomic_output(path, overwrite=overwrite) as temporary:
        if path.suffix == SAFETENSORS_SUFFIX:
            _write_safetensors(_without_aliases(state, keep=()), temporary, metadata)
        else:
            _write_pickle(state, temporary)


def save_hf_directory(
    state: Mapping[str, Tensor],
    out: str | os.PathLike,
    like: str | os.PathLike | Checkpoint | None = None,
    shard_size: str | int = "5GB",
    extra_files: Mapping[str, str] | None = None,
    *,
    copy_tokenizer: bool = True,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write a Hugging Face directory that ``from_pretrained`` loads; atomic: built beside `out`, renamed at the end.

    Args:
        state: name → tensor. Of tensors that share their memory (tied weights) the names that `like` stores are kept.
        out: the directory; its parents are made.
        like: the base checkpoint, whose configuration, processor and tokenizer files are copied; the configuration's
            dtype becomes that of the written weights. None or a single file: there is nothing to copy.
        shard_size: largest size of a weight file, in bytes or as "5GB", "500MB".
        extra_files: file name → text, written beside the weights (model card, recipe, report).
        copy_tokenizer: whether the tokenizer files are copied too.
        tokenizer: the directory that they come from; None: that of `like`.
        overwrite: replace an existing model directory.
        progress: show a progress bar over the weight files.

    Raises:
        CheckpointError: `out` exists, or cannot be written (full disk); nothing is left.
    """
    out, shard_bytes = Path(out), parse_size(shard_size)
    if like is not None and not isinstance(like, Checkpoint):
        like = open_checkpoint(like)
    state = _without_aliases(state, keep=like or ())
    with atomic_output(out, overwrite=overwrite, directory=True) as temporary:
        # The weights come last: once they are written only the renaming is left that could fail.
        infos = _infos(state)
        source = tokenizer or (like.path if like is not None else None)
        write_companions(temporary, like, infos, extra_files or {}, tokenizer=source if copy_tokenizer else None)
        with closing(ShardedWeights(temporary, infos, shard_bytes)) as files:
            for name in tqdm(files.names, "Writing", unit="tensor", disable=not progress):
                files.write(name, state[name])


def write_companions(
    directory: Path,
    like: Checkpoint | None,
    infos: Mapping[str, TensorInfo],
    extra_files: Mapping[str, str],
    *,
    tokenizer: Path | None,
) -> None:
    """All that a model directory holds beside its weights, whose `infos` tell the configuration's dtype.

    The tokenizer's files come from the directory `tokenizer`, if any; the other arguments are those of
    `save_hf_directory`. Raises OSError where something cannot be written.
    """
    if like is not None and like.path.is_dir():
        _copy_files(like.path, directory, MODEL_FILES)
    if tokenizer is not None and tokenizer.is_dir():
        _copy_files(tokenizer, directory, TOKENIZER_FILES)
    if like is not None and like.config is not None:
        config = _with_dtype(like.config, _main_dtype(infos))
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, text in extra_files.items():
        (directory / name).write_text(text, encoding="utf-8")


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output that exists (an empty directory is fine), or that is not a model although it may be replaced."""
    is_directory = out.is_dir()
    if not out.exists() or (is_directory and not any(out.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{out}: exists already; choose another place, or allow it to be overwritten")
    if is_directory and not ((out / "config.json").exists() or any(out.glob("*" + SAFETENSORS_SUFFIX))):
        raise CheckpointError(f"{out}: is a directory without a model in it; refusing to overwrite it")


@contextmanager
def atomic_output(out: Path, *, overwrite: bool, directory: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `out` to write to; when the block ends well it is synced to disk and renamed.

    When the block fails, or is interrupted, the temporary path is removed and `out` is as it was.
    """
    check_output(out, overwrite)
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        move_into_place(temporary, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def sync_tree(path: Path) -> None:
    """Return when a file, or a directory and all in it, is on the disk."""
    for part in [*path.rglob("*"), path]:
        _sync(part)


def move_into_place(temporary: Path, out: Path) -> None:
    """Rename onto `out`; an existing directory with content, which cannot be renamed onto, is moved aside first."""
    if out.is_dir() and any(out.iterdir()):
        old = out.parent / f".{out.name}.{secrets.token_hex(4)}.old"
        os.replace(out, old)
        try:
            os.replace(temporary, out)
        except OSError:
            os.replace(old, out)
            raise
        _remove(old)
    else:
        os.replace(temporary, out)
    _sync(out.parent)


def parse_size(size: str | int, name: str = "shard size") -> int:
    """Bytes of a size such as 5000000, "5GB" or "500 MiB".

    Raises CheckpointError, which calls it `name`, for anything else or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match and match[2] in SIZE_UNITS and float(match[1]) > 0:
        return max(1, int(float(match[1]) * SIZE_UNITS[match[2]]))
    raise CheckpointError(f"{name}: got {size!r}, expected a number of bytes or something like 5GB, 500MB, 2GiB")


def _main_dtype(infos: Mapping[str, TensorInfo]) -> torch.dtype | None:
    """The floating-point dtype that most values have; None if there is none."""
    values: Counter[torch.dtype] = Counter()
    for info in infos.values():
        if info.dtype.is_floating_point:
            values[info.dtype] += info.shape.numel()
    return values.most_common(1)[0][0] if values else None


def _without_aliases(state: Mapping[str, Tensor], keep: Collection[str]) -> dict[str, Tensor]:
    """Drop the further names of tensors that are one and the same memory; the names in `keep` stay."""
    names_at: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        names_at.setdefault(place, []).append(name)
    kept = {n for names in names_at.values() for n in ([n for n in names if n in keep] or names[:1])}
    return {name: tensor for name, tensor in state.items() if name in kept}


def _write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    with closing(WeightFile(path, _infos(state), metadata)) as file:
        for name in file.names:
            file.write(name, state[name])


def _write_pickle(state: Mapping[str, Tensor], path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, file)
    except RuntimeError as error:
        # When a write fails, torch.save raises once more while it closes its archive; the cause is the first error.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error)  # noqa: B904


def _infos(state: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in state.items()}


def _copy_files(source: Path, target: Path, patterns: Collection[str]) -> None:
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _with_dtype(config: dict, dtype: torch.dtype | None) -> dict:
    """The configuration with its dtype entries (newer: dtype, older: torch_dtype, also nested) set to `dtype`."""
    if dtype is None:
        return config
    name = str(dtype).removeprefix("torch.")

    def update(part: dict) -> dict:
        return {
            key: name if key in ("dtype", "torch_dtype") else update(value) if isinstance(value, dict) else value
            for key, value in part.items()
        }

    updated = update(config)
    if "dtype" not in config and "torch_dtype" not in config:
        updated["torch_dtype"] = name  # The key that every version of transformers reads.
    return updated


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
