"""Which vector extensions this process benchmarks: "native" (the best there are) or STATSMERGE_BENCH_TARGET.

Import it before torch: the libraries below torch read their settings when they are loaded.
"""

from __future__ import annotations

import os

TARGET = os.environ.get("STATSMERGE_BENCH_TARGET", "native")

if TARGET == "avx2":
    os.environ.update(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
elif TARGET != "native":
    raise SystemExit(f"STATSMERGE_BENCH_TARGET: expected native or avx2, got {TARGET!r}")
