// Fresh memory in huge pages: its first touch then costs a fault for every 2 MiB instead of every 4 KiB.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace statsmerge {

struct MemoryRange {
  uintptr_t begin, end;
};

// Asks the system for huge pages under `ranges`, which are about to be written as a whole; neighbours count as one. No
// page is asked for that reaches outside of them by more than an allocator's gap.
inline void advise_huge_pages([[maybe_unused]] std::vector<MemoryRange> ranges) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20, kGap = uintptr_t{16} << 10;
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  for (size_t i = 0, next; i < ranges.size(); i = next) {
    uintptr_t end = ranges[i].end;
    for (next = i + 1; next < ranges.size() && ranges[next].begin <= end + kGap; ++next) end = ranges[next].end;
    const uintptr_t first = (ranges[i].begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice: may fail
  }
#endif
}

}  // namespace statsmerge
