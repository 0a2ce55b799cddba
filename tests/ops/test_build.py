"""The extension module and what the package says of itself."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [
    "topk_svd",
    "weight_statistics",
    "gram_accumulate_",
    "gram_accumulate_patches_",
    "symmetrize_",
    "layer_solve",
    "layer_solve_features",
    "weighted_merge",
    "weighted_merge_grad",
]


def test_build_info():
    from statsmerge_ext import _C

    info = _C.build_info()
    assert info["torch_target_version"] == "2.11"
    assert isinstance(info["cuda"], bool) and info["compiler"]
    assert _C.cpu_target() in info["cpu_targets"] and info["cpu_targets"][0] == "baseline"


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_a_native_cpu_kernel_and_a_fallback(name):
    import statsmerge_ext.ops  # noqa: F401

    for key in ("CPU", "CompositeExplicitAutograd", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"statsmerge::{name}", key)


def test_a_missing_library_is_reported_at_the_call():
    script = """
        import sys
        sys.modules["statsmerge_ext._C"] = None  # makes its import fail
        import torch
        from statsmerge_ext.ops import gram_accumulate_
        try:
            gram_accumulate_(torch.zeros(2, 2), torch.zeros(1, 2))
        except RuntimeError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.startswith("statsmerge::gram_accumulate_ needs the native library"), run.stderr


def test_devices_without_kernels_use_the_references():
    """The meta device stands for them: it runs the fake kernels, and the composite kernels are the references."""
    from statsmerge_ext.ops import topk_svd, weighted_merge

    mats = [torch.empty(5, 6, device="meta", dtype=torch.bfloat16)]
    result = topk_svd(mats, 2, vectors=True)
    assert result.U[0].shape == (5, 2) and result.S[0].dtype == torch.float32 and result.S[0].is_meta
    assert weighted_merge(mats, [mats], [1.0])[0].dtype == torch.bfloat16


def test_source_distribution_carries_the_sources(tmp_path):
    script = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    import tarfile

    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".inl", ".cu", ".cuh", ".sh"}
    ]
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "statsmerge_ext/ops/common.py"} <= names
    assert not any(name.endswith(".so") for name in names)
