// Small tables from host to device memory as arguments of kernels: in the stream's order, without pinned memory, and
// copied into a CUDA graph that captures it, unlike a copy from the host's memory, which the graph would read again.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/launch.h"

namespace statsmerge::cuda {

// What travels with one launch; arguments are limited to 4 KiB.
struct Words {
  static constexpr int kCount = 500;
  uint64_t words[kCount];
};

static __global__ void upload_kernel(const __grid_constant__ Words words, int count, uint64_t* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = words.words[i];
}

// Copies `count` rows, made of 8-byte words, to `to`.
template <class Row>
void upload(const Row* rows, int64_t count, Row* to, cudaStream_t stream) {
  static_assert(sizeof(Row) % sizeof(uint64_t) == 0 && alignof(Row) <= alignof(uint64_t));
  const int64_t total = count * static_cast<int64_t>(sizeof(Row) / sizeof(uint64_t));
  for (int64_t first = 0; first < total; first += Words::kCount) {
    Words words;
    const int n = static_cast<int>(std::min<int64_t>(Words::kCount, total - first));
    std::memcpy(words.words, reinterpret_cast<const uint64_t*>(rows) + first, n * sizeof(uint64_t));
    upload_kernel<<<1, 256, 0, stream>>>(words, n, reinterpret_cast<uint64_t*>(to) + first);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace statsmerge::cuda
