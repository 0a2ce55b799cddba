// The instruction sets that the vector kernels are compiled for, and which of them is in use.
#pragma once

#include <string>
#include <vector>

namespace statsmerge {

// In ascending order; each one's kernels are in the namespace of its name. The baseline is what the compiler may use
// everywhere: SSE2 on x86-64, NEON on AArch64.
enum class Target {
  baseline,
#if defined(__x86_64__)
  avx2,        // with FMA and F16C
  avx512,      // F, BW, DQ and VL
  avx512bf16,  // with dot products of bfloat16 pairs
#endif
};

// Names of the targets that this processor runs, in ascending order.
std::vector<std::string> supported_targets();

// The best of them, until set_target says otherwise.
Target active_target();
std::string active_target_name();

// For tests and benchmarks; throws std::invalid_argument for a name that is not among supported_targets().
void set_target(const std::string& name);

}  // namespace statsmerge

// `table` of the namespace of the target in use: STATSMERGE_ACTIVE(kTable) is a reference to a constant that the file
// named by STATSMERGE_KERNELS defined when every_target.h was included.
#if defined(__x86_64__)
#define STATSMERGE_ACTIVE(table)                                                                 \
  (active_target() == Target::avx512bf16 ? avx512bf16::table                                     \
   : active_target() == Target::avx512   ? avx512::table                                         \
   : active_target() == Target::avx2     ? avx2::table                                           \
                                         : baseline::table)
#else
#define STATSMERGE_ACTIVE(table) (baseline::table)
#endif
