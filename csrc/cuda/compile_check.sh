#!/usr/bin/env bash
# Compiles every CUDA kernel for every supported architecture against the installed torch, CUDA or not; needs no GPU.
# Usage: csrc/cuda/compile_check.sh [ARCH ...]     PYTHON=python and NVCC=nvcc name the tools.
set -euo pipefail
cd "$(dirname "$0")/../.."

architectures=("$@")
[[ ${#architectures[@]} -gt 0 ]] || architectures=(80 90a 100)
mapfile -t includes < <("${PYTHON:-python}" -c \
  "from torch.utils.cpp_extension import include_paths; print(*('-I' + path for path in include_paths()), sep='\n')")

objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
for source in csrc/cuda/*.cu; do
  for architecture in "${architectures[@]}"; do
    echo "$source sm_$architecture"
    "${NVCC:-nvcc}" -gencode "arch=compute_$architecture,code=sm_$architecture" -DUSE_CUDA \
      -DTORCH_TARGET_VERSION=0x020B000000000000 -std=c++20 -O3 --expt-relaxed-constexpr -Icsrc "${includes[@]}" \
      -c "$source" -o "$objects/$(basename "$source").$architecture.o"
  done
done
