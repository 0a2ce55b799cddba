"""Builds the extension `statsmerge_ext._C`; everything else about the package is in pyproject.toml.

The C++ sources use torch's stable ABI only, so one build serves every torch from TORCH_TARGET on.
CUDA kernels are built when nvcc and a CUDA torch are there, or when FORCE_CUDA=1: a GPU need not be present.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

TORCH_REQUIREMENT = "torch>=2.11"
TORCH_TARGET = "0x020B000000000000"  # torch 2.11: one byte each of major and minor, then zeros

ROOT = Path(__file__).resolve().parent


def import_cpp_extension():
    """torch.utils.cpp_extension, or None without torch.

    pip's isolated builds hide the environment that is installed into; its torch is the right one to build against, so
    it is looked for there too.
    """
    site_packages = sysconfig.get_path("purelib")
    sys.path.append(site_packages)
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    finally:
        sys.path.remove(site_packages)
    return cpp_extension


def with_cuda(cpp_extension) -> bool:
    import torch

    if "FORCE_CUDA" in os.environ:
        return os.environ["FORCE_CUDA"] == "1"
    has_nvcc = cpp_extension.CUDA_HOME is not None and (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists()
    return has_nvcc and torch.version.cuda is not None


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(cpp_extension):
    import pybind11

    flags = ["-O3", "-g0", "-std=c++20", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    define = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
    include_dirs = [pybind11.get_include(), str(ROOT / "csrc")]
    if with_cuda(cpp_extension):
        nvcc_flags = ["-O3", "-std=c++20", "--threads=2"]
        return cpp_extension.CUDAExtension(
            "statsmerge_ext._C",
            sources("csrc/*.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/*.cu"),
            include_dirs=include_dirs,
            define_macros=[*define, ("USE_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
        )
    return cpp_extension.CppExtension(
        "statsmerge_ext._C",
        sources("csrc/*.cpp", "csrc/cpu/**/*.cpp"),
        include_dirs=include_dirs,
        define_macros=define,
        extra_compile_args={"cxx": flags},
    )


cpp_extension = import_cpp_extension()
if cpp_extension is None:
    # Only reached while pip asks what the build needs: it installs torch and runs this file again.
    setup(setup_requires=[TORCH_REQUIREMENT])
else:
    setup(
        ext_modules=[extension(cpp_extension)],
        cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    )
