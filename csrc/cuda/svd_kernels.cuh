// The launches of topk_svd, without torch: every kernel works on all matrices of a call, and returns at once for those
// that are done, so that passes can be launched ahead of what is known of them.
//
// Floor, for a pass over B bytes of matrices: B / 4.3 TB/s on an H200, twice that as Y = A V and W = Aᵀ Y each read the
// matrices (the second reading comes from L2 where they fit into it). 16 FLOP an element: 1.3e11 for 8e9 elements, 2 ms
// at 67 TFLOP/s in fp32, beside 7.5 ms for reading 16 GB twice. Memory beside the matrices: (capacity + keep + 2 block)
// vectors, that is 67 for k ≤ 3, and m / 512 more for the parts of W: about 1/10 of a 768 × 768 matrix in fp32, 1/20 of
// 4096 × 4096 in bf16.
// Predicted for k = 3 and tol 1e-3, with 80 % of the bandwidth and 20 to 33 passes (as many as random matrices take):
// 8 experts × ViT-B/32 in fp32, 2.75 GB: 1.6 ms a pass and 0.3 ms between passes, 35 to 60 ms in all;
// Llama-8B in bf16, 16 GB: 9.5 ms a pass and 0.5 ms between, 0.2 to 0.35 s in all.
#pragma once

#include <cuda_runtime.h>

#include "cuda/svd_dense.cuh"

namespace statsmerge::cuda::svd {

// All matrices of a call that are accumulated in one type; pointers to device memory.
struct Batch {
  Problem problem;
  const Matrix* matrices;
  int count;
  int64_t product_items, split_items;  // blocks of a grid, for one group of vectors
  int* product_owner;                  // [product_items] whose they are
  int* split_owner;                    // [split_items]
  int* remaining;                      // matrices that are not done
  int* first_bad;                      // smallest index of a matrix that is not finite
};

static __global__ void prepare_kernel(Batch batch) {
  const Matrix& a = batch.matrices[blockIdx.x];
  const int owner = static_cast<int>(blockIdx.x);
  const int64_t products = product_blocks(a), parts = split_blocks(a);
  for (int64_t i = threadIdx.x; i < products; i += blockDim.x) batch.product_owner[a.first_product + i] = owner;
  for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) batch.split_owner[a.first_split + i] = owner;
  if (blockIdx.x == 0 && threadIdx.x == 0) *batch.remaining = batch.count;
}

template <class Acc, bool kSums>
__global__ void __launch_bounds__(kPassThreads) inspect_kernel(Batch batch) {
  __shared__ Moments shared[kPassThreads];
  const Matrix& a = batch.matrices[batch.product_owner[blockIdx.x]];
  inspect_block<Acc, kSums>(Block(), a, blockIdx.x - a.first_product, shared);
}

// Y = A V for every matrix that is not done, or with `final` for all: then V are the right singular vectors. The groups
// of vectors that read the same rows run side by side.
template <class Acc>
__global__ void __launch_bounds__(kPassThreads, 3) product_kernel(Batch batch, bool final) {
  const int groups = batch.problem.groups();
  const int64_t item = blockIdx.x / groups;
  const Matrix& a = batch.matrices[batch.product_owner[item]];
  if (a.progress->bad || a.k == 0 || (a.progress->done && !final)) return;
  product_block<Acc>(Block(), a, item - a.first_product, static_cast<int>(blockIdx.x % groups));
}

template <class Acc>
__global__ void __launch_bounds__(kPassThreads, 3) transposed_kernel(Batch batch) {
  __shared__ Quad<Acc> shared[kPassWarps * panel_columns(sizeof(Acc) == 8 ? Storage::f64 : Storage::bf16)];
  const int groups = batch.problem.groups();
  const int64_t item = blockIdx.x / groups;
  const Matrix& a = batch.matrices[batch.split_owner[item]];
  if (a.progress->done) return;
  transposed_block<Acc>(Block(), batch.problem, a, item - a.first_split, static_cast<int>(blockIdx.x % groups), shared);
}

extern __shared__ Raw dynamic_shared[];

__device__ inline StepWork step_work(const Problem& p) {
  Arena arena(reinterpret_cast<char*>(dynamic_shared));
  return take_step_work(p, arena);
}

__device__ inline void count_down(const Batch& batch, const Matrix& a, bool done) {
  if (!done || threadIdx.x != 0) return;
  atomicSub(batch.remaining, 1);
  if (a.progress->bad) atomicMin(batch.first_bad, static_cast<int>(a.index));
}

template <class Acc>
__global__ void __launch_bounds__(kStepThreads, 1) begin_kernel(Batch batch) {
  const Matrix& a = batch.matrices[blockIdx.x];
  count_down(batch, a, begin<Acc>(Block(), batch.problem, a, step_work(batch.problem)));
}

template <class Acc>
__global__ void __launch_bounds__(kStepThreads, 1) advance_kernel(Batch batch) {
  const Matrix& a = batch.matrices[blockIdx.x];
  if (a.progress->done) return;
  count_down(batch, a, advance<Acc>(Block(), batch.problem, a, step_work(batch.problem)));
}

template <class Acc>
__global__ void __launch_bounds__(kStepThreads, 1) results_kernel(Batch batch) {
  write_results<Acc>(Block(), batch.problem, batch.matrices[blockIdx.x], step_work(batch.problem));
}

template <class Acc>
__global__ void __launch_bounds__(kDenseThreads, 1) dense_kernel(Batch batch) {
  const Matrix& a = batch.matrices[blockIdx.x];
  Arena arena(reinterpret_cast<char*>(dynamic_shared));
  const int side = a.rows < a.columns ? a.rows : a.columns, length = a.rows < a.columns ? a.columns : a.rows;
  const DenseWork work = take_dense_work(side, length, a.k, arena);
  with_reader<Acc>(a, [&](const auto& reader) { dense_svd<Acc>(Block(), batch.problem, a, reader, work); });
  count_down(batch, a, true);
}

// Results from all singular values of a matrix, found elsewhere.
template <class Acc>
__global__ void full_results_kernel(Matrix a, const double* s, int k) {
  const double bound = (a.rows < a.columns ? a.columns : a.rows) * std::numeric_limits<double>::epsilon() * s[0];
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    if (a.out_s != nullptr) reinterpret_cast<Acc*>(a.out_s)[i] = static_cast<Acc>(s[i]);
    if (a.out_residual != nullptr) reinterpret_cast<Acc*>(a.out_residual)[i] = static_cast<Acc>(bound);
    if (a.out_statistics != nullptr) a.out_statistics[3 + i] = s[i];
  }
  if (a.out_passes != nullptr && threadIdx.x == 0) *a.out_passes = 1;
}

inline unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

// Reads the matrices once and draws the random starts.
template <class Acc>
void launch_begin(const Batch& batch, bool sums, int shared_bytes, cudaStream_t stream) {
  if (sums) {
    inspect_kernel<Acc, true><<<blocks(batch.product_items), kPassThreads, 0, stream>>>(batch);
  } else {
    inspect_kernel<Acc, false><<<blocks(batch.product_items), kPassThreads, 0, stream>>>(batch);
  }
  begin_kernel<Acc><<<batch.count, kStepThreads, shared_bytes, stream>>>(batch);
}

// One pass over the matrices that are not done, and what follows from it.
template <class Acc>
void launch_pass(const Batch& batch, int shared_bytes, cudaStream_t stream) {
  const int groups = batch.problem.groups();
  product_kernel<Acc><<<blocks(batch.product_items * groups), kPassThreads, 0, stream>>>(batch, false);
  transposed_kernel<Acc><<<blocks(batch.split_items * groups), kPassThreads, 0, stream>>>(batch);
  advance_kernel<Acc><<<batch.count, kStepThreads, shared_bytes, stream>>>(batch);
}

template <class Acc>
void launch_results(const Batch& batch, int shared_bytes, cudaStream_t stream) {
  if (batch.problem.vectors) {
    product_kernel<Acc>
        <<<blocks(batch.product_items * batch.problem.groups()), kPassThreads, 0, stream>>>(batch, true);
  }
  results_kernel<Acc><<<batch.count, kStepThreads, shared_bytes, stream>>>(batch);
}

// Lets a kernel use `bytes` of dynamic shared memory.
inline cudaError_t allow_shared_memory(void (*kernel)(Batch), int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class Acc>
cudaError_t allow_step_memory(int bytes) {
  cudaError_t error = allow_shared_memory(begin_kernel<Acc>, bytes);
  if (error == cudaSuccess) error = allow_shared_memory(advance_kernel<Acc>, bytes);
  if (error == cudaSuccess) error = allow_shared_memory(results_kernel<Acc>, bytes);
  return error;
}

}  // namespace statsmerge::cuda::svd
