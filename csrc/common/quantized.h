// Task vectors as the merge kernels see them: floating point, or codes of 2, 3, 4 or 8 bits with a scale and a zero point for
// every group of elements (value = scale · (code − zero point)). Shared by the CPU and CUDA kernels; without torch.
#pragma once

#include <cstdint>

#include "common/convert.h"

namespace statsmerge {

struct TaskVector {
  const char* data;
  Storage storage;             // of `data` where bits == 0
  int bits;                    // 0: floating point; 2, 3, 4, 8: packed codes
  const float* scale;          // [groups]
  const int32_t* zero_point;   // [groups]
  int64_t group_size;          // elements that share a scale
};

// Codes are packed without gaps, least significant bits first, so that 8 of them fill `bits` bytes.
STATSMERGE_INLINE uint64_t load_eight_codes(const char* data, int bits, int64_t first) {
  uint64_t word = 0;
  __builtin_memcpy(&word, data + first / 8 * bits, static_cast<size_t>(bits));
  return word;
}

}  // namespace statsmerge
