// weighted_merge and its gradient on CUDA: arguments to device memory, one launch a pass.
#include "common/merge_operands.h"
#include "cuda/launch.h"
#include "cuda/weighted_merge.cuh"

namespace statsmerge {
namespace {

// The tables of one call in a single device tensor.
class Tables {
 public:
  Tables(const TensorList& in, const TensorList& out, const TaskVectors& task_vectors, const Chunks& chunks) {
    std::vector<cuda::Layer> layers;
    for (size_t l = 0; l < in.size(); ++l) {
      char* result = out.empty() ? nullptr : static_cast<char*>(out[l].mutable_data_ptr());
      layers.push_back({bytes(in[l]), result, storage_of(in[l], "base"), in[l].numel()});
    }
    const size_t at_layers = append(layers), at_tasks = append(task_vectors.views), at_chunks = append(chunks.start);
    const Tensor host = torch::stable::from_blob(packed_.data(), {static_cast<int64_t>(packed_.size())}, {1},
                                                 torch::headeronly::DeviceType::CPU, ScalarType::Byte);
    device_ =
        torch::stable::to(host, torch::stable::Device(torch::headeronly::DeviceType::CUDA, in[0].get_device_index()));
    const char* start = bytes(device_);
    arguments.layers = reinterpret_cast<const cuda::Layer*>(start + at_layers);
    arguments.task_vectors = reinterpret_cast<const TaskVector*>(start + at_tasks);
    arguments.chunk_start = reinterpret_cast<const int64_t*>(start + at_chunks);
    arguments.layer_count = static_cast<int64_t>(in.size());
    arguments.tasks = static_cast<int64_t>(task_vectors.views.size() / in.size());
  }

  cuda::MergeArguments arguments{};

 private:
  // All rows are made of 8-byte words, so every table starts aligned.
  template <class Row>
  size_t append(const std::vector<Row>& rows) {
    static_assert(sizeof(Row) % 8 == 0);
    const size_t at = packed_.size();
    const char* data = reinterpret_cast<const char*>(rows.data());
    packed_.insert(packed_.end(), data, data + rows.size() * sizeof(Row));
    return at;
  }

  std::vector<char> packed_;
  Tensor device_;
};

TensorList weighted_merge(TensorList base, TensorList task_vectors, TensorList scales, TensorList zero_points,
                          std::vector<int64_t> bits, std::vector<int64_t> group_sizes, Tensor coefficients) {
  const torch::stable::accelerator::DeviceGuard guard(base[0].get_device_index());
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  const Tensor lambda = dense(to_dtype(coefficients, ScalarType::Double));
  TensorList out;
  for (Tensor& b : base) {
    b = dense(b);
    out.push_back(torch::stable::empty_like(b));
  }
  const Chunks chunks(base, cuda::kChunk);
  if (chunks.count() == 0) return out;
  Tables tables(base, out, taus, chunks);
  tables.arguments.coefficients = reinterpret_cast<const double*>(bytes(lambda));
  cuda::merge_kernel<<<grid(chunks.count()), cuda::kThreads, 0, current_stream(base[0])>>>(tables.arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor weighted_merge_grad(TensorList grads, TensorList task_vectors, TensorList scales, TensorList zero_points,
                           std::vector<int64_t> bits, std::vector<int64_t> group_sizes) {
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  for (Tensor& g : grads) g = dense(g);
  const Chunks chunks(grads, cuda::kChunk);
  const Tables tables(grads, {}, taus, chunks);
  const cuda::MergeArguments& arguments = tables.arguments;
  const Tensor partial = new_empty(grads[0], {chunks.count(), arguments.tasks}, ScalarType::Double);
  Tensor out = new_empty(grads[0], {arguments.layer_count, arguments.tasks}, ScalarType::Double);
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  const cudaStream_t stream = current_stream(grads[0]);
  if (chunks.count() > 0) {
    cuda::chunk_dot_kernel<<<grid(chunks.count()), cuda::kThreads, 0, stream>>>(arguments, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (out.numel() > 0) {
    const int64_t blocks = (out.numel() + cuda::kThreads - 1) / cuda::kThreads;
    double* result = static_cast<double*>(out.mutable_data_ptr());
    cuda::sum_chunks_kernel<<<grid(blocks), cuda::kThreads, 0, stream>>>(arguments, sums, result);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CUDA, m) {
  m.impl("weighted_merge", TORCH_BOX(&statsmerge::weighted_merge));
  m.impl("weighted_merge_grad", TORCH_BOX(&statsmerge::weighted_merge_grad));
}
