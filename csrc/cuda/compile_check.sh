#!/usr/bin/env bash
# Compiles every CUDA kernel for every supported architecture against the installed torch, CUDA or not, prints what each
# takes of a multiprocessor, and fails where one spills registers to memory. Needs no GPU.
# Usage: csrc/cuda/compile_check.sh [ARCH ...]     PYTHON=python and NVCC=nvcc name the tools; KERNELS="gram topk_svd"
# limits it to those sources.
set -euo pipefail
cd "$(dirname "$0")/../.."

architectures=("$@")
[[ ${#architectures[@]} -gt 0 ]] || architectures=(80 90a 100)
includes=$("${PYTHON:-python}" -c \
  "from torch.utils.cpp_extension import include_paths; print(*('-I' + path for path in include_paths()))")
sources=()
for source in csrc/cuda/*.cu; do
  [[ -z ${KERNELS:-} || " $KERNELS " == *" $(basename "$source" .cu) "* ]] && sources+=("$source")
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export work includes NVCC="${NVCC:-nvcc}"
compile() {
  log=$work/$(basename "$1" .cu).$2.log
  # the flags of torch's own extension builds
  if ! $NVCC -gencode "arch=compute_$2,code=sm_$2" -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020B000000000000 -std=c++20 -O3 \
    --expt-relaxed-constexpr -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__ \
    -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -Xptxas -v -Icsrc $includes -c "$1" -o "$log.o" >"$log" 2>&1; then
    echo "$1 does not compile for sm_$2:" >&2
    cat "$log" >&2
    return 1
  fi
}
export -f compile
for architecture in "${architectures[@]}"; do
  for source in "${sources[@]}"; do echo "$source $architecture"; done
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$0" "$1" || exit 255'

"${PYTHON:-python}" csrc/cuda/resources.py "$work"/*.log
