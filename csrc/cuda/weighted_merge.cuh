// The CUDA kernels of weighted_merge, without torch. A block takes one chunk of one tensor; every operand is read once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/quantized.h"

namespace statsmerge::cuda {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;  // elements

// One tensor of the model: the base (or the gradient) and, in the forward pass, the result.
struct Layer {
  const char* in;
  char* out;
  Storage storage;
  int64_t numel;
};

// Everything a launch needs, all pointers to device memory. `coefficients` is [layers, tasks], task_vectors [tasks,
// layers].
struct MergeArguments {
  const Layer* layers;
  const TaskVector* task_vectors;
  const int64_t* chunk_start;  // [layers + 1] first chunk of every tensor
  const double* coefficients;
  int64_t layer_count, tasks;
};

template <class Acc>
__device__ Acc load(const char* data, Storage storage, int64_t i) {
  switch (storage) {
    case Storage::f64:
      return static_cast<Acc>(reinterpret_cast<const double*>(data)[i]);
    case Storage::f32:
      return static_cast<Acc>(reinterpret_cast<const float*>(data)[i]);
    case Storage::bf16:
      return static_cast<Acc>(__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[i]));
    default:
      return static_cast<Acc>(__half2float(reinterpret_cast<const __half*>(data)[i]));
  }
}

template <class Acc>
__device__ void store(char* data, Storage storage, int64_t i, Acc value) {
  switch (storage) {
    case Storage::f64:
      reinterpret_cast<double*>(data)[i] = static_cast<double>(value);
      break;
    case Storage::f32:
      reinterpret_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case Storage::bf16:
      reinterpret_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(static_cast<float>(value));
      break;
    default:
      reinterpret_cast<__half*>(data)[i] = __float2half_rn(static_cast<float>(value));
  }
}

template <class Acc>
__device__ Acc element(const TaskVector& t, int64_t i) {
  if (t.bits == 0) return load<Acc>(t.data, t.storage, i);
  const auto* codes = reinterpret_cast<const unsigned char*>(t.data) + i / 8 * t.bits;
  const int position = static_cast<int>(i % 8) * t.bits;
  const int shift = position % 8;
  unsigned word = codes[position / 8];
  if (shift + t.bits > 8) word |= static_cast<unsigned>(codes[position / 8 + 1]) << 8;
  const unsigned code = (word >> shift) & ((1u << t.bits) - 1);
  const int64_t group = i / t.group_size;
  return static_cast<Acc>(t.scale[group] * (static_cast<float>(code) - static_cast<float>(t.zero_point[group])));
}

// The tensor that this block's chunk belongs to.
__device__ inline int64_t layer_of_block(const MergeArguments& a) {
  int64_t low = 0, high = a.layer_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.chunk_start[middle] <= static_cast<int64_t>(blockIdx.x) ? low : high) = middle;
  }
  // tensors without elements have no chunks: of those that start here, the last one has this chunk
  return low;
}

template <class Acc>
__device__ void merge_block(const MergeArguments& a, int64_t l, int64_t first, int64_t end) {
  const Layer layer = a.layers[l];
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    Acc sum = load<Acc>(layer.in, layer.storage, i);
    for (int64_t k = 0; k < a.tasks; ++k) {
      sum += static_cast<Acc>(a.coefficients[l * a.tasks + k]) * element<Acc>(a.task_vectors[k * a.layer_count + l], i);
    }
    store(layer.out, layer.storage, i, sum);
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(MergeArguments a) {
  const int64_t l = layer_of_block(a);
  const int64_t first = (blockIdx.x - a.chunk_start[l]) * kChunk;
  const int64_t end = min(first + kChunk, a.layers[l].numel);
  if (a.layers[l].storage == Storage::f64) {
    merge_block<double>(a, l, first, end);
  } else {
    merge_block<float>(a, l, first, end);
  }
}

// partial[chunk, k] = <gradient, task vector k> over the chunk.
__global__ void __launch_bounds__(kThreads) chunk_dot_kernel(MergeArguments a, double* partial) {
  __shared__ double sums[kThreads];
  const int64_t l = layer_of_block(a);
  const Layer layer = a.layers[l];
  const int64_t first = (blockIdx.x - a.chunk_start[l]) * kChunk;
  const int64_t end = min(first + kChunk, layer.numel);
  for (int64_t k = 0; k < a.tasks; ++k) {
    const TaskVector t = a.task_vectors[k * a.layer_count + l];
    double sum = 0;
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
      sum += load<double>(layer.in, layer.storage, i) * element<double>(t, i);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) partial[blockIdx.x * a.tasks + k] = sums[0];
    __syncthreads();
  }
}

// out[l, k] = Σ partial[chunk, k] over the chunks of tensor l, in their order; one thread for every entry.
__global__ void sum_chunks_kernel(MergeArguments a, const double* partial, double* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= a.layer_count * a.tasks) return;
  const int64_t l = i / a.tasks, k = i % a.tasks;
  double sum = 0;
  for (int64_t c = a.chunk_start[l]; c < a.chunk_start[l + 1]; ++c) sum += partial[c * a.tasks + k];
  out[i] = sum;
}

}  // namespace statsmerge::cuda
