// The kernels' only view of threads, without torch: cpu/parallel.cpp lends them torch's pool.
#pragma once

#include <cstdint>
#include <functional>

namespace statsmerge {

// Calls f(first, last) for disjoint ranges that cover [begin, end), at least `grain` long where that many are left, and
// waits for all. Where calls throw, the exception of the range that comes first is thrown on. Calls from inside f run
// on the calling thread alone.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

}  // namespace statsmerge
