// Small Grams, batched, as of the groups of a depthwise convolution: in ≤ 64 columns, any element types, any strides.
//
// A thread block takes a range of one matrix's tokens, 64 to 256 at a time through shared memory in the Gram's type. A
// thread sums a 4 × 4 block of the lower triangle over some of the tokens, its slice; the slices are added in their
// order, and so are the ranges: the result does not depend on the order in which blocks run.
//
// Floor on an H200, 768 groups of 9 × 9 and 25088 tokens in float: 0.69 GB, 0.16 ms; 6 blocks of 16 products for 45
// entries, 3.7 TFLOP/s of 67; shared memory is read 6 × 36 bytes a token, 0.15 ms. Expected 0.25 ms.
#pragma once

#include "cuda/gram_prepare.cuh"

namespace statsmerge::cuda::gram {

template <class Acc, class T>
struct SmallProblem {
  SmallShape shape;
  Strided<const T> x;
  const Acc* weight;  // [batches, tokens] or null
  Strided<Acc> gram;
  Acc* partial;  // [batches, ranges, entries]
  int64_t tokens, batches;
  int ranges;              // a block's share of a matrix's tokens is one of these
  int64_t range;           // tokens in each
  bool tokens_contiguous;  // rather than columns
};

template <class Acc, class T>
__global__ void __launch_bounds__(kSmallThreads) small_gram_kernel(const __grid_constant__ SmallProblem<Acc, T> p) {
  __shared__ __align__(16) Acc tile[kSmallShared];
  __shared__ Acc weights[kSmallTokens];
  const SmallShape shape = p.shape;
  const int64_t batch = blockIdx.x / p.ranges, range = blockIdx.x % p.ranges;
  const int64_t last = min((range + 1) * p.range, p.tokens);
  const int block = static_cast<int>(threadIdx.x) % shape.blocks();
  const int slice = static_cast<int>(threadIdx.x) / shape.blocks();
  const Tile place = shape.block(block);
  const bool computes = slice < shape.slices();
  Acc sum[4][4] = {};

  // The columns that fill up the last block of 4 are zeros throughout.
  for (int i = threadIdx.x; i < kSmallShared; i += kSmallThreads) tile[i] = 0;
  for (int64_t first = range * p.range; first < last; first += shape.tokens()) {
    const int count = static_cast<int>(min(static_cast<int64_t>(shape.tokens()), last - first));
    __syncthreads();  // the tile has been used
    if (threadIdx.x < count) {
      weights[threadIdx.x] = p.weight ? p.weight[batch * p.tokens + first + threadIdx.x] : Acc{1};
    }
    // Neighbouring threads read what is contiguous: columns of a token, or tokens of a column.
    Walk walk(threadIdx.x, kSmallThreads, p.tokens_contiguous ? count : shape.columns);
    for (int i = threadIdx.x; i < count * shape.columns; i += kSmallThreads, walk.next()) {
      const int token = p.tokens_contiguous ? walk.inner : walk.outer;
      const int column = p.tokens_contiguous ? walk.outer : walk.inner;
      tile[token * shape.pitch() + column] = converted<Acc>(p.x.at(batch, first + token, column));
    }
    __syncthreads();
    if (!computes) continue;
    for (int token = slice; token < count; token += shape.slices()) {
      const Acc w = weights[token];
      if (w == 0) continue;  // a dropped token has no part in the sums, whatever it holds
      const Acc* row = tile + token * shape.pitch();
      const Four<Acc> left = *reinterpret_cast<const Four<Acc>*>(row + 4 * place.row);
      const Four<Acc> right = *reinterpret_cast<const Four<Acc>*>(row + 4 * place.column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Acc weighted = w * left.values[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += weighted * right.values[j];
      }
    }
  }

  __syncthreads();
  if (computes) {
#pragma unroll
    for (int i = 0; i < 16; ++i) tile[slice * shape.entries() + 16 * block + i] = sum[i / 4][i % 4];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < shape.entries(); e += kSmallThreads) {
    Acc total = 0;
    for (int s = 0; s < shape.slices(); ++s) total += tile[s * shape.entries() + e];
    if (p.ranges > 1) {
      p.partial[blockIdx.x * static_cast<int64_t>(shape.entries()) + e] = total;
    } else {
      const Tile at = shape.entry(e);
      if (at.row < shape.columns && at.column <= at.row) p.gram.at(batch, at.row, at.column) += total;
    }
  }
}

constexpr int kAddSmallThreads = 256;

// Adds the ranges' sums to the Grams, in the order of the tokens; a thread an entry.
template <class Acc, class T>
__global__ void __launch_bounds__(kAddSmallThreads) add_small_kernel(const __grid_constant__ SmallProblem<Acc, T> p) {
  const int entries = p.shape.entries();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddSmallThreads + threadIdx.x;
  if (i >= p.batches * entries) return;
  const int64_t batch = i / entries;
  const int e = static_cast<int>(i % entries);
  const Tile at = p.shape.entry(e);
  if (at.row >= p.shape.columns || at.column > at.row) return;
  Acc total = 0;
  for (int r = 0; r < p.ranges; ++r) total += p.partial[(batch * p.ranges + r) * entries + e];
  p.gram.at(batch, at.row, at.column) += total;
}

}  // namespace statsmerge::cuda::gram
