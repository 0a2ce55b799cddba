#!/usr/bin/env bash
# Everything there is to learn in one visit to a machine with a GPU, in less than ten minutes: builds for its architecture,
# runs the tests that need a GPU, the benchmarks, and the sanitizers on a few of the tests. A stage that fails or runs out
# of time does not stop the others.
# Usage: OUT=FOLDER benchmarks/gpu_check.sh [--dry-run] [STAGE ...]
#   --dry-run   prints the stages and their limits; runs nothing
#   STAGE       only these, by name or beginning of a name: build, tests, topk_svd, ..., memcheck, racecheck
# Environment: PYTHON (python3), TORCH_CUDA_ARCH_LIST (9.0a), COMMIT (of the checkout, where git is not there to tell),
# SECONDS_IN_ALL (570).
# Exits with 0 where every stage did. Leaves in OUT: environment.txt, a log for every stage, tests.xml, OPERATOR.json, summary.json, summary.txt.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-570}))
dry=false
[[ ${1:-} == --dry-run ]] && dry=true && shift
wanted=("$@")
export PYTHONPATH=$PWD TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}

# stage NAME LIMIT COMMAND...: at most LIMIT seconds of what is left of the whole.
stage() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS code wish
  shift 2
  if [[ ${#wanted[@]} -gt 0 ]]; then
    local asked=false
    for wish in "${wanted[@]}"; do [[ $name == "$wish"* ]] && asked=true; done
    $asked || return 0
  fi
  if $dry; then
    printf '%-24s at most %3d s: %s\n' "$name" "$limit" "$*"
    return 0
  fi
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    code=124
  else
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
  fi
  echo "$name $code $((SECONDS - start))" >>"$OUT/stages.txt"
  echo "== $name: exit code $code after $((SECONDS - start)) s"
  ((code == 0)) || tail -n 15 "$OUT/$name.log" 2>/dev/null
}

# Where nvcc's headers and libraries are, also where nvcc is a link or a wrapper; libcudart may be there by its versioned
# name only, or in torch's own packages.
toolkit() {
  command -v nvcc >/dev/null || return 0
  local top library folder
  top=$(cd "$OUT" && echo >probe.cu && nvcc --dryrun -c probe.cu 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
  [[ -n $top ]] && CUDA_HOME=$(cd "$top" && pwd) && export CUDA_HOME
  folder=$OUT/lib
  mkdir -p "$folder"
  for library in "${CUDA_HOME:-/usr/local/cuda}"/{lib64,lib,targets/x86_64-linux/lib}/libcudart.so* \
    $("$python" -c 'import sys, glob; print(*(f for p in sys.path for f in glob.glob(p + "/nvidia/*/lib/libcudart.so.*")))'); do
    [[ -e $library && ! -e $folder/libcudart.so ]] && ln -s "$library" "$folder/libcudart.so"
  done
  export LIBRARY_PATH=$folder${LIBRARY_PATH:+:$LIBRARY_PATH}
}

environment() {
  echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "commit: ${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
  echo "gpu: $(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader 2>&1 | head -n 1)"
  echo "torch: $("$python" -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda)' 2>&1 | tail -n 1)"
  echo "nvcc: $(nvcc --version 2>&1 | tail -n 2 | head -n 1), CUDA_HOME ${CUDA_HOME:-unknown}"
  "$python" -m pip list 2>/dev/null | grep -iE '^(cupy|numpy|pytest|triton|nvidia-c)' || true
}

if ! $dry; then
  : "${OUT:?names the folder for the results}"
  mkdir -p "$OUT"
  OUT=$(cd "$OUT" && pwd)
  export OUT
  rm -f "$OUT/stages.txt"
  toolkit
  environment | tee "$OUT/environment.txt"
fi
sanitizer=(compute-sanitizer --error-exitcode 9 --launch-timeout 60)
chosen=("$python" -m pytest -q -x -m "cuda and sanitize" -p no:cacheprovider tests/cuda)

stage build 240 env FORCE_CUDA=1 "$python" setup.py build_ext --inplace
stage tests 150 "$python" -m pytest -q -m cuda -p no:cacheprovider --junitxml="${OUT:-OUT}/tests.xml" tests/cuda
for operator in weighted_merge gram layer_solve topk_svd; do
  stage "$operator" 75 "$python" -m benchmarks.gpu "$operator" --out "${OUT:-OUT}"
done
# without torch's own pool every tensor is an allocation whose bounds the sanitizer knows
stage memcheck 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" --tool memcheck "${chosen[@]}"
stage racecheck 75 "${sanitizer[@]}" --tool racecheck "${chosen[@]}"
$dry && exit
"$python" -m benchmarks.gpu.table "$OUT"
! grep -qv ' 0 [0-9]*$' "$OUT/stages.txt"
