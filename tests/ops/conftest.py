"""What the operators' tests share: one tolerance rule, one way to run an operator's checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def relative_error(value: Tensor, exact: Tensor) -> float:
    scale = exact.double().norm().item()
    return (value.double() - exact.double()).norm().item() / (scale if scale > 0 else 1.0)


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    """The project's rule: our error against float64 is at most twice plain torch's at the same dtype, plus a floor."""

    def check(ours: Tensor, peer: Tensor, exact: Tensor, floor: float = 1e-7) -> None:
        assert ours.shape == exact.shape
        error, allowed = relative_error(ours, exact), 2 * relative_error(peer, exact) + floor
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture
def opcheck() -> Callable[..., None]:
    def check(name: str, *args: object) -> None:
        torch.library.opcheck(getattr(torch.ops.statsmerge, name).default, args, test_utils=OPCHECKS)

    return check


@pytest.fixture
def with_threads() -> Iterator[Callable[[int, Callable], object]]:
    """Calls a function with a given number of threads."""
    before = torch.get_num_threads()

    def call(threads: int, function: Callable) -> object:
        torch.set_num_threads(threads)
        return function()

    yield call
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
