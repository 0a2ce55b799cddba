// weighted_merge and its gradient on CUDA: tables of pointers to device memory, those of the task vectors once for all
// calls, and one launch a pass.
#include <algorithm>
#include <mutex>
#include <type_traits>

#include "common/merge_operands.h"
#include "cuda/upload.h"
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

// The rows in device memory, without waiting for the device.
template <class Row>
Tensor uploaded(const std::vector<Row>& rows, const Tensor& like, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(rows.size());
  Tensor table = new_empty(like, {count * static_cast<int64_t>(sizeof(Row))}, ScalarType::Byte);
  cuda::upload(rows.data(), count, static_cast<Row*>(table.mutable_data_ptr()), stream);
  return table;
}

// Tables of task vectors that are on the device already: those of a model are merged many times over, in the forward
// pass and in the gradient. A table is found by its contents, so one may be out of use but never out of date; and by
// its stream, in whose order it was written and its memory is used again.
class TaskVectorTables {
 public:
  Tensor find(const std::vector<TaskVector>& views, const Tensor& like, cudaStream_t stream) {
    cudaStreamCaptureStatus capturing;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capturing));
    if (capturing != cudaStreamCaptureStatusNone) return uploaded(views, like, stream);  // it belongs to the graph
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) {
      return e.device == like.get_device_index() && e.stream == stream && e.views.size() == views.size() &&
             std::memcmp(e.views.data(), views.data(), views.size() * sizeof(TaskVector)) == 0;
    });
    if (found != entries_.end()) {
      std::rotate(entries_.begin(), found, found + 1);
    } else {
      if (entries_.size() == kEntries) entries_.pop_back();
      entries_.insert(entries_.begin(), Entry{like.get_device_index(), stream, views, uploaded(views, like, stream)});
    }
    return entries_.front().table;
  }

 private:
  static_assert(std::has_unique_object_representations_v<TaskVector>);
  static constexpr size_t kEntries = 8;
  struct Entry {
    int32_t device;
    cudaStream_t stream;
    std::vector<TaskVector> views;
    Tensor table;
  };

  std::mutex mutex_;
  std::vector<Entry> entries_;  // the last used first
};

TaskVectorTables& task_vector_tables() {
  static auto* const tables = new TaskVectorTables;  // never deleted: torch's memory may be gone before it would be
  return *tables;
}

// What a launch needs to know, brought to the device without waiting for it: the tensors' rows, which are others in
// every call, and the task vectors' table.
class Tables {
 public:
  // `out` is empty in the gradient, whose `in` are the gradients.
  Tables(const TensorList& in, const TensorList& out, const TaskVectors& task_vectors, cudaStream_t stream)
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
    layers_ = uploaded(layers, in[0], stream);
    chunk_start_ = uploaded(chunks.start, in[0], stream);
    task_vectors_ = task_vector_tables().find(taus, in[0], stream);
    arguments.layers = reinterpret_cast<const cuda::Layer*>(bytes(layers_));
    arguments.chunk_start = reinterpret_cast<const int64_t*>(bytes(chunk_start_));
    arguments.task_vectors = reinterpret_cast<const TaskVector*>(bytes(task_vectors_));
    arguments.layer_count = static_cast<int64_t>(layer_count);
    arguments.tasks = static_cast<int64_t>(taus.size() / layer_count);
    arguments.chunk = chunk;
  }

  const int64_t chunk;
  const Chunks chunks;
  cuda::MergeArguments arguments{};

 private:
  Tensor layers_, chunk_start_, task_vectors_;
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
  const cudaStream_t stream = current_stream(base[0]);
  Tables tables(base, out, taus, stream);
  tables.arguments.coefficients = reinterpret_cast<const double*>(bytes(lambda));
  cuda::merge_kernel<<<grid(tables.chunks.count()), cuda::kThreads, 0, stream>>>(tables.arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor weighted_merge_grad(TensorList grads, TensorList task_vectors, TensorList scales, TensorList zero_points,
                           std::vector<int64_t> bits, std::vector<int64_t> group_sizes) {
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  for (Tensor& g : grads) g = dense(g);
  const cudaStream_t stream = current_stream(grads[0]);
  const Tables tables(grads, {}, taus, stream);
  const cuda::MergeArguments& arguments = tables.arguments;
  const int64_t chunks = tables.chunks.count();
  const Tensor partial = new_empty(grads[0], {chunks, arguments.tasks}, ScalarType::Double);
  Tensor out = new_empty(grads[0], {arguments.layer_count, arguments.tasks}, ScalarType::Double);
  if (out.numel() == 0) return out;
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
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
