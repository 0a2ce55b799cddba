// weighted_merge and its gradient, without torch: all tensors of a model in one parallel loop over chunks, every
// element of base and task vectors read once and every result written once.
#pragma once

#include <cstdint>
#include <vector>

#include "common/quantized.h"

namespace statsmerge {

// One contiguous tensor of the model: the base and where the result goes, or the gradient of the result.
struct MergeLayer {
  const char* in;
  char* out;  // as `in`; null for a gradient
  Storage storage;
  int64_t count;

  int64_t numel() const { return count; }
};

// Layer l becomes in + Σ_k coefficients[l · tasks + k] · task_vectors[k · layers + l]; computed in float32, or in
// float64 where the layer is stored so.
void merge(const std::vector<MergeLayer>& layers, const std::vector<TaskVector>& task_vectors,
           const double* coefficients);

// products[l · tasks + k] = <layer l, task_vectors[k · layers + l]>, summed in float64 in an order that does not depend
// on the number of threads.
void merge_products(const std::vector<MergeLayer>& layers, const std::vector<TaskVector>& task_vectors,
                    double* products);

}  // namespace statsmerge
