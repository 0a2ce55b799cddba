// Work in pieces of uneven length.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/parallel.h"

namespace statsmerge {

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Calls f(task) for every task in [0, count), each thread taking the next one that is left.
template <class F>
void parallel_tasks(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(task);
  });
}

}  // namespace statsmerge
