"""Several processes that do one merge together, under torchrun; one process alone takes no notice of any of this."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from statsmerge_ext.errors import ProcessError

Item = TypeVar("Item")


@contextmanager
def joined() -> Iterator[None]:
    """Take part in the group that torchrun's environment variables describe, if there is one.

    Raises ProcessError if the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    with _as_process_error():
        # However much longer one process takes: one that has died is noticed by its closed connections at once.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; the first, 0, does what is to be done once."""
    return dist.get_rank() if count() > 1 else 0


def wait_for_all() -> None:
    """Return when every process has come here. Raises ProcessError if one has ended."""
    if count() > 1:
        with _as_process_error():
            dist.barrier()


def add_up_(tensor: Tensor) -> Tensor:
    """``tensor`` becomes the sum over all processes. Raises ProcessError if one has ended."""
    if count() > 1:
        with _as_process_error():
            dist.all_reduce(tensor)
    return tensor


def of_all(value: object) -> list:
    """What every process calls this with, in the order of their ranks. Raises ProcessError if one has ended."""
    values: list = [value] * count()
    if count() > 1:
        with _as_process_error():
            dist.all_gather_object(values, value)
    return values


def share(items: Sequence[Item], sizes: Sequence[int]) -> list[Item]:
    """This process's part of the ``items``: consecutive ones, of about the same sum of ``sizes`` for every process."""
    whole, me, all_of_us = max(1, sum(sizes)), rank(), count()
    # The middle of an item decides: each item is in one part, whatever the sizes.
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    return [
        item
        for item, middle in zip(items, middles, strict=True)
        if min(all_of_us - 1, int(middle * all_of_us / whole)) == me
    ]


def gathered(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict with tensors that are spread over processes (DTensor, as FSDP's), whole on every one of them.

    All processes have to call it alike. Raises ProcessError if one has ended.
    """
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return state
    with _as_process_error():
        return {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in state.items()}


@contextmanager
def _as_process_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's errors have no type of their own
        raise ProcessError(
            "another process of this merge has ended or cannot be reached; once that is mended, the same command goes "
            f"on where it was ({str(error).splitlines()[0]})"
        ) from error
