#!/usr/bin/env bash
# Builds and runs the native tests: plainly, and with the address, undefined-behaviour and thread sanitizers.
# Usage: tests/native/run.sh [SANITIZERS ...]   e.g. none address,undefined thread
set -euo pipefail
cd "$(dirname "$0")/../.."
variants=("$@")
[[ ${#variants[@]} -gt 0 ]] || variants=(none address,undefined thread)
for variant in "${variants[@]}"; do
  echo "native tests, sanitizers: $variant"
  directory=build/native-${variant//,/-}
  cmake -S tests/native -B "$directory" -G Ninja -DSANITIZE="${variant#none}" >/dev/null
  cmake --build "$directory" >"$directory/build.log" || { cat "$directory/build.log"; exit 1; }
  "$directory/native_tests"
done
