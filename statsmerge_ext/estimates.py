"""What a merge from disk to disk will need in bytes, seconds and memory: a sample of it, beside the output, tells."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from statsmerge_ext.blockwise import BlockMerge
from statsmerge_ext.calibration import Batch
from statsmerge_ext.checkpoints import Checkpoint, check_compatible
from statsmerge_ext.checkpoints.compatibility import Renamed, dtype_of, floating_names, shape_of
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.engine.merging import solve
from statsmerge_ext.engine.together import samples
from statsmerge_ext.methods import Method
from statsmerge_ext.output import resumable_output
from statsmerge_ext.streamed import write_streamed

# What is merged of a streamed merge: enough to see the disk at work, and at least this share of all.
_SAMPLE_BYTES, _SAMPLE_SHARE = 2**29, 0.1


def estimate_streamed(
    method: Method,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    infos: Mapping[str, TensorInfo],
    out: Path,
    *,
    stays_cached: bool,
    **options: object,
) -> dict[str, float]:
    """What :func:`write_streamed` will need, from merging samples of the tensors.

    Args:
        method, base, experts: as for :func:`solve`, with the further ``options``.
        infos: name → shape and dtype of every tensor of the output.
        out: where the output shall be.
        stays_cached: of :func:`resumable_output`.

    Returns: "bytes_read" (of base and experts), "seconds", and "memory": the largest resident size, in bytes.

    Raises as :func:`solve` and :func:`write_streamed`.
    """
    options = {**options, "progress": False, "sample": True}
    writing = {"resume": False, "shard_bytes": None, "stays_cached": stays_cached}
    experts = check_compatible(base, experts)
    sizes = {name: infos[name].nbytes for name in floating_names(base)}
    names = list(sizes)
    random.Random(0).shuffle(names)

    def seconds_for(sample: dict[str, str]) -> float:
        began = time.perf_counter()
        of_sample = {name: Renamed(expert, sample) for name, expert in experts.items()}
        solved = solve(method, base=Renamed(base, sample), experts=of_sample, **options)
        with _file_beside(out) as file:
            write_streamed(solved, file, {name: infos[name] for name in sample}, {}, **writing)
        return time.perf_counter() - began

    # The first sample finds memory, files and kernels as the merge will find them. A second, larger one finds them as
    # they are later on: it shows what a byte costs. (The difference of both would be mostly the disk's noise.)
    total = sum(sizes.values())
    enough = max(_SAMPLE_BYTES, _SAMPLE_SHARE * total)
    left = iter(names)
    small, large = _sample(left, sizes, enough / 5), _sample(left, sizes, enough)
    of_small, of_large = (sum(sizes[name] for name in sample) for sample in (small, large))
    seconds = seconds_for(small)
    # The first sample fills all buffers; a second one in the same process would only add what the first has freed.
    peak = _largest_resident_size()
    if of_large:
        seconds += seconds_for(large) * (total - of_small) / of_large
    return {"bytes_read": _bytes_of([base, *experts.values()]), "seconds": seconds, "memory": peak}


def estimate_blockwise(
    merge: BlockMerge, infos: Mapping[str, TensorInfo], out: Path, *, stays_cached: bool
) -> dict[str, float]:
    """What :func:`write_blockwise` will need, from merging one block of each kind with few samples.

    Args, result as of :func:`estimate_streamed`. Raises as :meth:`BlockMerge.write`.
    """
    sample, like = merge.sample(), merge.alike()
    instead = {path: first for path, first in like.items() if path != first}
    of_sample = {name: infos[name] for name in merge.names(like.values())}
    writing = {"resume": False, "shard_bytes": None, "stays_cached": stays_cached}
    with _file_beside(out) as file, resumable_output(file, of_sample, {}, **writing) as output:
        sweep = sample.write(output, instead=instead)
    per_expert = len(merge.batches) / len(sample.batches)
    per_sample = _samples(merge.batches) / _samples(sample.batches)
    spent = [sweep.seconds[path] for path in like.values()]
    of_states = sweep.carried.in_memory(per_sample) - sweep.carried.in_memory(1)
    return {
        "bytes_read": _bytes_of(merge.states.values()),
        "seconds": sum(per_expert * s["experts"] + per_sample * s["samples"] + s["solving"] for s in spent),
        "memory": _largest_resident_size() + of_states,
    }


def _sample(names: Iterator[str], sizes: Mapping[str, int], enough: float) -> dict[str, str]:
    """The next of ``names`` that have ``enough`` bytes together, or all that are left, as names of themselves."""
    taken: dict[str, str] = {}
    size = 0
    while size < enough and (name := next(names, None)) is not None:
        taken[name] = name
        size += sizes[name]
    return taken


@contextmanager
def _file_beside(out: Path) -> Iterator[Path]:
    """A safetensors file to be made on the disk of ``out``, with a directory of its own, which is removed."""
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    with TemporaryDirectory(dir=parent, prefix=f".{out.name}.") as directory:
        yield Path(directory) / "sample.safetensors"


def _bytes_of(states: Iterable[Mapping[str, Tensor]]) -> int:
    """Bytes of what is merged."""
    return sum(
        shape_of(state, name).numel() * dtype_of(state, name).itemsize
        for state in states
        for name in floating_names(state)
    )


def _largest_resident_size() -> int:
    """Bytes, of this process until now."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _samples(batches: Mapping[str, list[Batch]]) -> int:
    return sum(samples(batch) for of_expert in batches.values() for batch in of_expert)
