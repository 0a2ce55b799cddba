// weighted_merge and its gradient on CUDA: arguments to device memory in one asynchronous copy, one launch a pass.
#include "common/merge_operands.h"
#include "cuda/launch.h"
#include "cuda/weighted_merge.cuh"

namespace statsmerge {
namespace {

bool aligned(const void* pointer, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0;
}

// Whether a pack of `t`, one of a tensor of `numel` elements, can be loaded at once and lies in one group.
bool packable(const TaskVector& t, int64_t numel) {
  return aligned(t.data, cuda::alignment_of(t.bits)) &&
         (t.bits == 0 || t.group_size % cuda::kPack == 0 || t.group_size >= numel);
}

int64_t total_numel(const TensorList& tensors) {
  int64_t total = 0;
  for (const Tensor& t : tensors) total += t.numel();
  return total;
}

// The tables of one call in a single device tensor. They are copied from pinned memory, which torch keeps from being
// used again before the copy is done: the host waits for nothing.
class Tables {
 public:
  // `out` is empty in the gradient, whose `in` are the gradients.
  Tables(const TensorList& in, const TensorList& out, const TaskVectors& task_vectors)
      : chunk(cuda::chunk_size(total_numel(in))), chunks(in, chunk) {
    const std::vector<TaskVector>& taus = task_vectors.views;
    const size_t layer_count = in.size();
    std::vector<cuda::Layer> layers;
    for (size_t l = 0; l < layer_count; ++l) {
      char* result = out.empty() ? nullptr : static_cast<char*>(out[l].mutable_data_ptr());
      const int64_t numel = in[l].numel();
      const Storage storage = storage_of(in[l], out.empty() ? "grads" : "base");
      bool packs = aligned(bytes(in[l]), 16) && aligned(result, 16), wide = storage == Storage::f64;
      for (size_t i = l; i < taus.size(); i += layer_count) {
        packs = packs && packable(taus[i], numel);
        wide = wide || (taus[i].bits == 0 && taus[i].storage == Storage::f64);
      }
      layers.push_back({bytes(in[l]), result, numel, packs ? numel / cuda::kPack * cuda::kPack : 0, storage, wide});
    }
    // All rows are made of 8-byte words, so every table starts aligned.
    const size_t layer_bytes = layers.size() * sizeof(cuda::Layer), task_bytes = taus.size() * sizeof(TaskVector);
    const size_t chunk_bytes = chunks.start.size() * sizeof(int64_t);
    const int64_t size = static_cast<int64_t>(layer_bytes + task_bytes + chunk_bytes);
    const Tensor host = torch::stable::empty({size}, ScalarType::Byte, std::nullopt,
                                             torch::stable::Device(torch::headeronly::DeviceType::CPU), true);
    char* packed = static_cast<char*>(host.mutable_data_ptr());
    std::memcpy(packed, layers.data(), layer_bytes);
    if (task_bytes > 0) std::memcpy(packed + layer_bytes, taus.data(), task_bytes);
    std::memcpy(packed + layer_bytes + task_bytes, chunks.start.data(), chunk_bytes);
    device_ = new_empty(in[0], {size}, ScalarType::Byte);
    torch::stable::copy_(device_, host, true);
    const char* start = bytes(device_);
    arguments.layers = reinterpret_cast<const cuda::Layer*>(start);
    arguments.task_vectors = reinterpret_cast<const TaskVector*>(start + layer_bytes);
    arguments.chunk_start = reinterpret_cast<const int64_t*>(start + layer_bytes + task_bytes);
    arguments.layer_count = static_cast<int64_t>(layer_count);
    arguments.tasks = static_cast<int64_t>(taus.size() / layer_count);
    arguments.chunk = chunk;
  }

  const int64_t chunk;
  const Chunks chunks;
  cuda::MergeArguments arguments{};

 private:
  static_assert(sizeof(cuda::Layer) % 8 == 0 && sizeof(TaskVector) % 8 == 0);
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
  if (total_numel(base) == 0) return out;
  Tables tables(base, out, taus);
  tables.arguments.coefficients = reinterpret_cast<const double*>(bytes(lambda));
  cuda::merge_kernel<<<grid(tables.chunks.count()), cuda::kThreads, 0, current_stream(base[0])>>>(tables.arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor weighted_merge_grad(TensorList grads, TensorList task_vectors, TensorList scales, TensorList zero_points,
                           std::vector<int64_t> bits, std::vector<int64_t> group_sizes) {
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  for (Tensor& g : grads) g = dense(g);
  const Tables tables(grads, {}, taus);
  const cuda::MergeArguments& arguments = tables.arguments;
  const int64_t chunks = tables.chunks.count();
  const Tensor partial = new_empty(grads[0], {chunks, arguments.tasks}, ScalarType::Double);
  Tensor out = new_empty(grads[0], {arguments.layer_count, arguments.tasks}, ScalarType::Double);
  if (out.numel() == 0) return out;
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  const cudaStream_t stream = current_stream(grads[0]);
  if (chunks > 0) {
    const int64_t rounds = (arguments.tasks + cuda::kTasksAtOnce - 1) / cuda::kTasksAtOnce;
    check(rounds <= 65535, "task_vectors: expected at most ", 65535 * cuda::kTasksAtOnce, " on CUDA");
    const dim3 blocks(grid(chunks), static_cast<unsigned>(rounds));
    cuda::chunk_dot_kernel<<<blocks, cuda::kThreads, 0, stream>>>(arguments, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t blocks = (out.numel() * 32 + cuda::kThreads - 1) / cuda::kThreads;
  double* result = static_cast<double*>(out.mutable_data_ptr());
  cuda::sum_chunks_kernel<<<grid(blocks), cuda::kThreads, 0, stream>>>(arguments, sums, result);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CUDA, m) {
  m.impl("weighted_merge", TORCH_BOX(&statsmerge::weighted_merge));
  m.impl("weighted_merge_grad", TORCH_BOX(&statsmerge::weighted_merge_grad));
}
