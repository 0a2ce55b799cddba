// Compiles the file named by STATSMERGE_KERNELS once for every instruction set, each time in the namespace of a target
// and with cpu/simd/vector.h in front of it. That file includes nothing itself: what it needs of the standard library
// is included before this header, so that no inline function of it is compiled for a processor that may not be there.
// It must not contain lambdas, which the target attributes would miss.
#ifndef STATSMERGE_KERNELS
#error "define STATSMERGE_KERNELS as the file to compile, in quotes"
#endif

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/convert.h"
#include "cpu/simd/targets.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define STATSMERGE_PRAGMA(x) _Pragma(#x)
#define STATSMERGE_BEGIN_TARGET(features) \
  STATSMERGE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define STATSMERGE_END_TARGET _Pragma("clang attribute pop")
#else
#define STATSMERGE_PRAGMA(x) _Pragma(#x)
#define STATSMERGE_BEGIN_TARGET(features) _Pragma("GCC push_options") STATSMERGE_PRAGMA(GCC target(features))
#define STATSMERGE_END_TARGET _Pragma("GCC pop_options")
#endif

namespace statsmerge::baseline {
#define STATSMERGE_VECTOR_BYTES 16
#if defined(__aarch64__)
#define STATSMERGE_REGISTERS 32
#else
#define STATSMERGE_REGISTERS 16
#endif
#include "cpu/simd/vector.h"
#include STATSMERGE_KERNELS
#undef STATSMERGE_VECTOR_BYTES
#undef STATSMERGE_REGISTERS
}  // namespace statsmerge::baseline

#if defined(__x86_64__)
STATSMERGE_BEGIN_TARGET("avx2,fma,f16c")
namespace statsmerge::avx2 {
#define STATSMERGE_VECTOR_BYTES 32
#define STATSMERGE_REGISTERS 16
#include "cpu/simd/vector.h"
#include STATSMERGE_KERNELS
#undef STATSMERGE_VECTOR_BYTES
#undef STATSMERGE_REGISTERS
}  // namespace statsmerge::avx2
STATSMERGE_END_TARGET

#define STATSMERGE_VECTOR_BYTES 64
#define STATSMERGE_REGISTERS 32
STATSMERGE_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace statsmerge::avx512 {
#include "cpu/simd/vector.h"
#include STATSMERGE_KERNELS
}  // namespace statsmerge::avx512
STATSMERGE_END_TARGET

#define STATSMERGE_BF16_DOT 1
STATSMERGE_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace statsmerge::avx512bf16 {
#include "cpu/simd/vector.h"
#include STATSMERGE_KERNELS
}  // namespace statsmerge::avx512bf16
STATSMERGE_END_TARGET
#undef STATSMERGE_BF16_DOT
#undef STATSMERGE_VECTOR_BYTES
#undef STATSMERGE_REGISTERS
#endif

#undef STATSMERGE_KERNELS
