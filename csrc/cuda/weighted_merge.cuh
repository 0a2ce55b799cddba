// The CUDA kernels of weighted_merge, without torch. A block takes one chunk of one tensor; every operand is read once.
//
// Floor: the bytes. With 8 · 10⁹ parameters in bfloat16 and 4 task vectors the forward pass reads 5 · 16 GB and writes
// 16 GB: 96 GB, 22.3 ms at 4.3 TB/s; the gradient reads 80 GB: 18.6 ms. Predicted: at 640 threads a multiprocessor with
// 64 bytes in flight each, 40 KB against the 25 KB that hide the latency of memory, 90 % of the copy's bandwidth: 25 ms and
// 21 ms. Quantised task vectors have a quarter of that in flight; 4 bits and 8 tasks (8 bytes an element) are bound by
// instructions, about 5 an element and task: 80 %.
#pragma once

#include "cuda/merge_threads.h"
#include "cuda/reduce.cuh"

namespace statsmerge::cuda {

// Blocks that a multiprocessor is to hold: as many as there are registers for without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 5;
#else
constexpr int kBlocks = 4;
#endif

// The tensor that this block's chunk belongs to, found by every warp for itself. Tensors without elements have no
// chunks: of those that start at one chunk, the last has it.
__device__ inline int64_t layer_of_block(const MergeArguments& a) {
  Search search{0, a.layer_count};
  while (search.count > 1) {
    const bool below = search.below(a.chunk_start, blockIdx.x, static_cast<int>(threadIdx.x % 32));
    search.narrow(__ballot_sync(0xffffffffu, below));
  }
  return search.low;
}

__global__ void __launch_bounds__(kThreads, kBlocks) merge_kernel(MergeArguments a) {
  const int64_t l = layer_of_block(a);
  const Range chunk = chunk_range(a, l, blockIdx.x);
  if (a.layers[l].wide) {
    merge_thread<double>(a, l, chunk, static_cast<int>(threadIdx.x));
  } else {
    merge_thread<float>(a, l, chunk, static_cast<int>(threadIdx.x));
  }
}

// partial[chunk, k] = <gradient, task vector k> over the chunk, for kTasksAtOnce tasks from kTasksAtOnce · blockIdx.y on.
__global__ void __launch_bounds__(kThreads, kBlocks) chunk_dot_kernel(MergeArguments a, double* partial) {
  __shared__ double sums[kTasksAtOnce * kThreads];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t first = int64_t{kTasksAtOnce} * blockIdx.y, left = a.tasks - first;
  const int count = static_cast<int>(left < kTasksAtOnce ? left : kTasksAtOnce);
  for (int j = 0; j < count; ++j) sums[j * kThreads + thread] = 0;

  const int64_t l = layer_of_block(a);
  const Range chunk = chunk_range(a, l, blockIdx.x);
  if (a.layers[l].wide) {
    dot_thread<double>(a, l, chunk, first, count, thread, sums + thread);
  } else {
    dot_thread<float>(a, l, chunk, first, count, thread, sums + thread);
  }
  __syncthreads();
  for (int j = warp; j < count; j += kThreads / 32) {
    double sum = 0;
    for (int i = lane; i < kThreads; i += 32) sum += sums[j * kThreads + i];
    sum = warp_sum(sum);
    if (lane == 0) partial[blockIdx.x * a.tasks + first + j] = sum;
  }
}

// out[l, k] = Σ partial[chunk, k] over the chunks of tensor l; one warp for every entry.
__global__ void __launch_bounds__(kThreads) sum_chunks_kernel(MergeArguments a, const double* partial, double* out) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32;
  if (i >= a.layer_count * a.tasks) return;
  const int64_t l = i / a.tasks, k = i % a.tasks;
  const int lane = static_cast<int>(threadIdx.x % 32);
  double sum = 0;
  for (int64_t c = a.chunk_start[l] + lane; c < a.chunk_start[l + 1]; c += 32) sum += partial[c * a.tasks + k];
  sum = warp_sum(sum);
  if (lane == 0) out[i] = sum;
}

}  // namespace statsmerge::cuda
