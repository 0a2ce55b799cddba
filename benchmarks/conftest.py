"""pytest's side of the benchmarks: what every run records about itself."""

from __future__ import annotations

import functools
from importlib import metadata

import pytest
import target
import torch
from harness import compare, has_package

from statsmerge_ext import _C


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: small enough for a smoke run (-m quick)")
    config.addinivalue_line("markers", "long: whole minutes, nearly all of them the peers'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The ceilings enclose everything else."""
    moments = {"before": 0, "after": 2}
    items.sort(key=lambda item: moments.get(getattr(item, "callspec", None) and item.callspec.params.get("moment"), 1))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # the machine's name says nothing about its speed
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["target"] = target.TARGET
    machine_info["kernels"] = _C.cpu_target()
    machine_info["aten"] = torch.backends.cpu.get_cpu_capability()
    machine_info["torch_build"] = torch.__config__.show()
    machine_info["peers"] = {name: metadata.version(name) for name in ("scipy", "scikit-learn") if has_package(name)}


@pytest.fixture
def case(benchmark, request: pytest.FixtureRequest):
    """``harness.compare`` for this test; the module's name says which operator it is about."""
    benchmark.group = request.module.__name__.removeprefix("test_")
    return functools.partial(compare, benchmark)
