// What every CUDA operator needs to launch its kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/torch_api.h"

namespace statsmerge {

// The stream that torch uses on the device of `x`.
inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
  if (error != TORCH_SUCCESS) throw std::runtime_error("no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// A grid of `blocks` blocks in one dimension.
inline unsigned grid(int64_t blocks) {
  check(blocks <= 0x7fffffff, "too many elements for one launch");
  return static_cast<unsigned>(blocks);
}

}  // namespace statsmerge
