#include "cpu/simd/targets.h"

#include <atomic>
#include <stdexcept>

namespace statsmerge {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};

Target best_target() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return Target::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Target::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Target::avx512bf16 : Target::avx512;
#else
  return Target::baseline;
#endif
}

std::atomic<Target>& active() {
  static std::atomic<Target> target{best_target()};
  return target;
}

}  // namespace

std::vector<std::string> supported_targets() { return {kNames, kNames + static_cast<int>(best_target()) + 1}; }

Target active_target() { return active().load(std::memory_order_relaxed); }

std::string active_target_name() { return kNames[static_cast<int>(active_target())]; }

void set_target(const std::string& name) {
  const auto supported = supported_targets();
  for (size_t i = 0; i < supported.size(); ++i) {
    if (supported[i] == name) return active().store(static_cast<Target>(i), std::memory_order_relaxed);
  }
  std::string message = "target: expected one of";
  for (const std::string& known : supported) message += " " + known;
  throw std::invalid_argument(message + ", got " + name);
}

}  // namespace statsmerge
