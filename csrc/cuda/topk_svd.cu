// topk_svd and weight_statistics on CUDA: what the kernels are to know of each matrix, memory for them, and their
// order.
//
// The host waits for the device once every few passes, to stop when all matrices are done, and once at the end, to
// raise an error where one is not finite. While a stream is being captured it never waits: all of `max_passes` are
// launched, those behind the last needed return at once, and results of a matrix that is not finite are NaN.
#include <algorithm>

#include "common/tensors.h"
#include "cuda/launch.h"
#include "cuda/svd_kernels.cuh"
#include "cuda/upload.h"

namespace statsmerge {
namespace {

namespace svd = cuda::svd;

constexpr int64_t kPassesAhead = 4;  // passes launched before the host looks whether more are needed

struct Results {
  TensorList s, u, vh, residual;
  Tensor passes, statistics;  // either may be undefined
};

ScalarType accumulator(const Tensor& mat) {
  return mat.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether the rows of x, or of its transpose, are contiguous.
bool has_rows(const Tensor& x, bool transposed) {
  return transposed ? x.strides()[0] == 1 || x.sizes()[0] == 1 : x.strides()[1] == 1 || x.sizes()[1] == 1;
}

int64_t row_stride(const Tensor& x, bool transposed) { return x.strides()[transposed ? 1 : 0]; }

Tensor with_rows(const Tensor& x, bool transposed) {
  if (has_rows(x, transposed)) return x;
  return transposed ? aten::transpose(torch::stable::contiguous(aten::transpose(x))) : torch::stable::contiguous(x);
}

// One call: its matrices, sorted by how they are decomposed, and the memory that lasts as long as the call.
class Call {
 public:
  Call(const TensorList& mats, const TensorList& minus, int64_t k, const svd::Problem& problem, Results& results)
      : k_(k), problem_(problem), results_(results), like_(mats[0]), stream_(current_stream(mats[0])) {
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    cudaStreamCaptureStatus capturing;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &capturing));
    captured_ = capturing != cudaStreamCaptureStatusNone;
    for (size_t i = 0; i < mats.size(); ++i) add(mats[i], minus.empty() ? nullptr : &minus[i], static_cast<int64_t>(i));
  }

  void run() {
    check(!captured_ || full_.empty(), "k: expected at most ", svd::kMaxTriplets,
          " while a CUDA graph is captured, got ", k_);
    status_ = new_empty(like_, {3}, ScalarType::Int);
    int* status = static_cast<int*>(status_.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(status, 0x7f, 3 * sizeof(int), stream_));  // no index is as large
    run_all<float>(single_, status, status + 2);
    run_all<double>(double_, status + 1, status + 2);
    int bad = kNone;
    for (const Full& full : full_) {
      if (!decompose_fully(full)) bad = std::min(bad, static_cast<int>(full.matrix.index));
    }
    if (captured_) return;
    bad = std::min(bad, read(status + 2));
    check(bad == kNone, indexed("mats", bad), has_minus_ ? " - " + indexed("minus", bad) : "", " contains NaN or Inf");
  }

 private:
  static constexpr int kNone = 0x7f7f7f7f;

  struct Kind {
    std::vector<svd::Matrix> dense, lanczos;
    int dense_bytes = 0;
  };

  // A matrix of which more triplets are wanted than Lanczos vectors are kept for.
  struct Full {
    svd::Matrix matrix;
    int k;
    Tensor operand;  // float64
  };

  void add(const Tensor& mat, const Tensor* minus, int64_t index) {
    if (mat.numel() == 0) return;
    const bool transposed = !has_rows(mat, false) && has_rows(mat, true);
    const ScalarType acc = accumulator(mat);
    Tensor x = with_rows(mat, transposed), y;
    if (minus != nullptr) {
      has_minus_ = true;
      const ScalarType type = minus->scalar_type() == mat.scalar_type() ? mat.scalar_type() : acc;
      x = keep(with_rows(to_dtype(x, type), transposed));
      y = keep(with_rows(to_dtype(*minus, type), transposed));
    } else {
      keep(x);
    }
    svd::Matrix a{};
    a.data = bytes(x);
    a.stride = row_stride(x, transposed);
    a.storage = storage_of(x, "mats");
    const int64_t rows = mat.sizes()[transposed ? 1 : 0], columns = mat.sizes()[transposed ? 0 : 1];
    check(std::max(rows, columns) <= 1 << 30, indexed("mats", index), ": expected fewer than 2^30 rows and columns");
    a.rows = static_cast<int>(rows);
    a.columns = static_cast<int>(columns);
    a.aligned = is_aligned(a.data, a.stride, a.storage);
    if (minus != nullptr) {
      a.minus = bytes(y);
      a.minus_stride = row_stride(y, transposed);
      a.aligned = a.aligned && is_aligned(a.minus, a.minus_stride, a.storage);
    }
    a.k = static_cast<int>(std::min({k_, rows, columns}));
    a.transposed = transposed;
    a.index = index;
    const auto data = [&](TensorList& list) {
      return list.empty() ? nullptr : static_cast<char*>(list[static_cast<size_t>(index)].mutable_data_ptr());
    };
    a.out_s = data(results_.s);
    a.out_residual = data(results_.residual);
    a.out_u = data(results_.u);
    a.out_vh = data(results_.vh);
    if (results_.passes.defined()) a.out_passes = static_cast<int64_t*>(results_.passes.mutable_data_ptr()) + index;
    if (results_.statistics.defined()) {
      a.out_statistics =
          static_cast<double*>(results_.statistics.mutable_data_ptr()) + index * results_.statistics.sizes()[1];
    }
    Kind& kind = acc == ScalarType::Double ? double_ : single_;
    if (svd::is_dense(rows, columns, a.k, shared_limit_)) {
      kind.dense.push_back(a);
      kind.dense_bytes = std::max(kind.dense_bytes, static_cast<int>(svd::dense_shared_bytes(rows, columns, a.k)));
    } else {
      if (a.k > svd::kMaxTriplets) {
        Tensor operand = to_dtype(mat, ScalarType::Double);
        if (minus != nullptr) operand = torch::stable::subtract(operand, to_dtype(*minus, ScalarType::Double));
        full_.push_back({a, a.k, operand});
        if (!results_.statistics.defined()) return;
        a.k = 0;  // the kernels only inspect it
      }
      kind.lanczos.push_back(a);
    }
  }

  static bool is_aligned(const char* data, int64_t stride, Storage storage) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes_of(storage) % 16 == 0;
  }

  const Tensor& keep(const Tensor& x) {
    owners_.push_back(x);
    return owners_.back();
  }

  char* device_memory(int64_t bytes) {
    const Tensor& memory = keep(new_empty(like_, {std::max<int64_t>(bytes, 16)}, ScalarType::Byte));
    return static_cast<char*>(memory.mutable_data_ptr());
  }

  template <class Acc>
  void run_all(Kind& kind, int* remaining, int* first_bad) {
    svd::Arena sizes(nullptr);
    svd::take_step_work(problem_, sizes);
    const int step_bytes = static_cast<int>(sizes.used());
    if (!kind.dense.empty()) {
      STD_CUDA_CHECK(svd::allow_shared_memory(svd::dense_kernel<Acc>, kind.dense_bytes));
      const svd::Batch batch = upload(
          kind.dense, [&](svd::Matrix& a, svd::Arena& arena) { svd::take_dense_memory(a, problem_.vectors, arena); },
          remaining, first_bad);
      svd::dense_kernel<Acc><<<batch.count, svd::kDenseThreads, kind.dense_bytes, stream_>>>(batch);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (kind.lanczos.empty()) return;
    const svd::Batch batch = upload(
        kind.lanczos, [&](svd::Matrix& a, svd::Arena& arena) { svd::take_memory<Acc>(a, problem_, arena); }, remaining,
        first_bad);
    check(std::max(batch.product_items, batch.split_items) * problem_.groups() <= 0x7fffffff,
          "mats: too many elements for one call");
    STD_CUDA_CHECK(svd::allow_step_memory<Acc>(step_bytes));
    svd::launch_begin<Acc>(batch, results_.statistics.defined(), step_bytes, stream_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for (int64_t pass = 0; pass < problem_.max_passes && problem_.k > 0; ++pass) {
      if (pass > 0 && pass % kPassesAhead == 0 && !captured_ && read(remaining) == 0) break;
      svd::launch_pass<Acc>(batch, step_bytes, stream_);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    svd::launch_results<Acc>(batch, step_bytes, stream_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Waits for the device. Returns whether the matrix is finite.
  bool decompose_fully(const Full& full) {
    const auto finite = call_aten<1>("aten::isfinite", "", full.operand);
    const auto all = call_aten<1>("aten::all", "", finite[0]);
    const Tensor host = torch::stable::to(all[0], torch::stable::Device(torch::headeronly::DeviceType::CPU));
    if (!*static_cast<const bool*>(host.const_data_ptr())) return false;
    const auto [u, s, vh] = call_aten<3>("aten::_linalg_svd", "", full.operand, false, problem_.vectors, std::nullopt);
    const double* values = static_cast<const double*>(s.const_data_ptr());
    const size_t index = static_cast<size_t>(full.matrix.index);
    if (!results_.s.empty() && results_.s[index].scalar_type() == ScalarType::Double) {
      svd::full_results_kernel<double><<<1, svd::kPassThreads, 0, stream_>>>(full.matrix, values, full.k);
    } else {
      svd::full_results_kernel<float><<<1, svd::kPassThreads, 0, stream_>>>(full.matrix, values, full.k);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (problem_.vectors) {
      torch::stable::copy_(results_.u[index], slice(u, 1, 0, full.k));
      torch::stable::copy_(results_.vh[index], slice(vh, 0, 0, full.k));
    }
    return true;
  }

  // Gives every matrix its memory and brings their descriptions to the device.
  template <class Take>
  svd::Batch upload(std::vector<svd::Matrix>& matrices, const Take& take, int* remaining, int* first_bad) {
    svd::Batch batch{};
    batch.problem = problem_;
    batch.count = static_cast<int>(matrices.size());
    batch.remaining = remaining;
    batch.first_bad = first_bad;
    for (svd::Matrix& a : matrices) {
      a.first_product = batch.product_items;
      a.first_split = batch.split_items;
      batch.product_items += svd::product_blocks(a);
      batch.split_items += svd::split_blocks(a);
    }
    const auto lay_out = [&](svd::Arena arena) {
      batch.matrices = arena.take<svd::Matrix>(batch.count);
      batch.product_owner = arena.take<int>(batch.product_items);
      batch.split_owner = arena.take<int>(batch.split_items);
      for (svd::Matrix& a : matrices) take(a, arena);
      return arena.used();
    };
    const int64_t bytes = lay_out(svd::Arena(nullptr));
    lay_out(svd::Arena(device_memory(bytes)));
    cuda::upload(matrices.data(), batch.count, const_cast<svd::Matrix*>(batch.matrices), stream_);
    svd::prepare_kernel<<<batch.count, svd::kPassThreads, 0, stream_>>>(batch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return batch;
  }

  // Waits for the device.
  int read(const int* status) {
    int value = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&value, status, sizeof(value), cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return value;
  }

  const int64_t k_;
  const svd::Problem problem_;
  Results& results_;
  const Tensor like_;
  const cudaStream_t stream_;
  int shared_limit_ = 0;
  bool captured_ = false, has_minus_ = false;
  Kind single_, double_;
  std::vector<Full> full_;
  TensorList owners_;
  Tensor status_;  // matrices that are not done, of each kind; the smallest index of one that is not finite
};

std::tuple<TensorList, TensorList, TensorList, TensorList, Tensor> topk_svd(TensorList mats, TensorList minus,
                                                                            int64_t k, double tol, int64_t max_passes,
                                                                            bool vectors, int64_t seed) {
  check(!mats.empty(), "mats: expected at least one matrix");
  const torch::stable::accelerator::DeviceGuard guard(mats[0].get_device_index());
  Results out;
  out.passes = new_empty(mats[0], {static_cast<int64_t>(mats.size())}, ScalarType::Long);
  const int64_t kept = vectors ? k : 0;
  for (const Tensor& mat : mats) {
    const ScalarType type = accumulator(mat);
    out.s.push_back(new_empty(mat, {k}, type));
    out.residual.push_back(new_empty(mat, {k}, type));
    out.u.push_back(new_empty(mat, {mat.sizes()[0], kept}, type));
    out.vh.push_back(new_empty(mat, {kept, mat.sizes()[1]}, type));
  }
  Call(mats, minus, k, svd::make_problem(k, tol, max_passes, vectors, static_cast<uint64_t>(seed)), out).run();
  return {out.s, out.u, out.vh, out.residual, out.passes};
}

Tensor weight_statistics(TensorList mats, TensorList minus, int64_t r, double tol, int64_t max_passes, int64_t seed) {
  check(!mats.empty(), "mats: expected at least one tensor");
  const torch::stable::accelerator::DeviceGuard guard(mats[0].get_device_index());
  Results out;
  out.statistics = new_empty(mats[0], {static_cast<int64_t>(mats.size()), 3 + r}, ScalarType::Double);
  torch::stable::zero_(out.statistics);
  Call(mats, minus, r, svd::make_problem(r, tol, max_passes, false, static_cast<uint64_t>(seed)), out).run();
  return out.statistics;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CUDA, m) {
  m.impl("topk_svd", TORCH_BOX(&statsmerge::topk_svd));
  m.impl("weight_statistics", TORCH_BOX(&statsmerge::weight_statistics));
}
