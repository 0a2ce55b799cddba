"""A cache of the tests' own, and the tiny suite with experts that the project's own script has made."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from statsmerge_ext.evaluation.suites import get_suite, register_suite, suite
from tests.evaluation.tiny_suite import HYPERPARAMETERS, make_definition

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_assets.py"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("STATSMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def definitions(monkeypatch):
    """Suites that a test registers are gone after it."""
    monkeypatch.setattr(suite, "_definitions", dict(suite._definitions))


@pytest.fixture(scope="session")
def tiny_assets(tmp_path_factory):
    """The folder of the tiny suite's experts, provenance and hyperparameters."""
    folder = tmp_path_factory.mktemp("tiny") / "assets"
    specification = importlib.util.spec_from_file_location("build_assets", SCRIPT)
    build_assets = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build_assets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATSMERGE_CACHE", str(folder.parent / "cache"))
        patch.setattr(suite, "_definitions", {})
        patch.setattr(sys, "argv", ["build_assets.py", "--suite", "tiny"])
        register_suite(make_definition(folder))
        build_assets.main()
    (folder / "hyperparameters.json").write_text(json.dumps(HYPERPARAMETERS))
    return folder


@pytest.fixture
def registered(tiny_assets):
    """The tiny suite's definition, registered."""
    definition = make_definition(tiny_assets)
    register_suite(definition)
    return definition


@pytest.fixture
def tiny(registered):
    """The tiny suite, prepared."""
    tiny = get_suite("tiny")
    assert tiny.prepare(progress=False) == []
    return tiny
