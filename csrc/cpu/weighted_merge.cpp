// weighted_merge and its gradient on the CPU: from tensors to the kernels' view of them.
#include "common/merge_operands.h"
#include "cpu/kernels/merge.h"

namespace statsmerge {
namespace {

MergeLayer layer(const Tensor& in, const char* name) { return {bytes(in), nullptr, storage_of(in, name), in.numel()}; }

TensorList weighted_merge(TensorList base, TensorList task_vectors, TensorList scales, TensorList zero_points,
                          std::vector<int64_t> bits, std::vector<int64_t> group_sizes, Tensor coefficients) {
  const Tensor lambda = dense(to_dtype(coefficients, ScalarType::Double));
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  TensorList out;
  std::vector<MergeLayer> layers;
  for (Tensor& b : base) {
    b = dense(b);
    out.push_back(torch::stable::empty_like(b));
    layers.push_back(layer(b, "base"));
    layers.back().out = static_cast<char*>(out.back().mutable_data_ptr());
  }
  merge(layers, taus.views, reinterpret_cast<const double*>(bytes(lambda)));
  return out;
}

// [L, K] inner products <grad_l, task vector k of l>, float64.
Tensor weighted_merge_grad(TensorList grads, TensorList task_vectors, TensorList scales, TensorList zero_points,
                           std::vector<int64_t> bits, std::vector<int64_t> group_sizes) {
  const int64_t layers_count = static_cast<int64_t>(grads.size());
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  std::vector<MergeLayer> layers;
  for (Tensor& g : grads) {
    g = dense(g);
    layers.push_back(layer(g, "grads"));
  }
  Tensor out = new_empty(grads[0], {layers_count, static_cast<int64_t>(task_vectors.size()) / layers_count},
                         ScalarType::Double);
  merge_products(layers, taus.views, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("weighted_merge", TORCH_BOX(&statsmerge::weighted_merge));
  m.impl("weighted_merge_grad", TORCH_BOX(&statsmerge::weighted_merge_grad));
}
