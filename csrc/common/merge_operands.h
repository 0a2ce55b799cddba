// What the CPU and CUDA sides of weighted_merge both make of the operator's arguments.
#pragma once

#include "common/chunks.h"
#include "common/quantized.h"
#include "common/tensors.h"

namespace statsmerge {

// The task vectors of one call, with the contiguous tensors that keep their memory alive.
struct TaskVectors {
  TaskVectors(const TensorList& tensors, const TensorList& scales, const TensorList& zero_points,
              const std::vector<int64_t>& bits, const std::vector<int64_t>& group_sizes) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      TaskVector t{keep(tensors[i]), Storage::f32, bits.empty() ? 0 : static_cast<int>(bits[i]), nullptr, nullptr, 1};
      if (t.bits == 0) {
        t.storage = storage_of(tensors[i], "task_vectors");
      } else {
        t.scale = reinterpret_cast<const float*>(keep(scales[i]));
        t.zero_point = reinterpret_cast<const int32_t*>(keep(zero_points[i]));
        t.group_size = group_sizes[i];
      }
      views.push_back(t);
    }
  }

  std::vector<TaskVector> views;

 private:
  const char* keep(const Tensor& x) {
    owners_.push_back(dense(x));
    return bytes(owners_.back());
  }

  TensorList owners_;
};

}  // namespace statsmerge
