// How a loop is compiled for several instruction sets, chosen at run time. Only loops in files that include this header
// and carry the attribute are multiplied; the wheel itself stays at the platform's baseline.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define STATSMERGE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define STATSMERGE_CLONES
#endif

// For helpers that are to be compiled into every clone of their caller.
#define STATSMERGE_INLINE inline __attribute__((always_inline))
