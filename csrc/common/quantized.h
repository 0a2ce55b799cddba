// Task vectors as the merge kernels see them: floating point, or codes of 2, 3, 4 or 8 bits with a scale and a zero
// point for every group of elements (value = scale · (code − zero point)). Codes are packed without gaps, least
// significant bits first, so that 8 of them fill `bits` bytes, and padded to a whole number of 8. Without torch; the
// CPU and CUDA kernels share it.
#pragma once

#include <cstdint>

#include "common/convert.h"

namespace statsmerge {

struct TaskVector {
  const char* data;
  Storage storage;            // of `data` where bits == 0
  int bits;                   // 0: floating point; 2, 3, 4, 8: packed codes
  const float* scale;         // [groups]
  const int32_t* zero_point;  // [groups]
  int64_t group_size;         // elements that share a scale
};

}  // namespace statsmerge
