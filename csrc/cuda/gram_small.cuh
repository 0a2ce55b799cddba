// Small Grams, batched, as of the groups of a depthwise convolution: in ≤ 64 columns, any element types, any strides;
// features in memory or the patches of a convolution, which exist in shared memory alone.
//
// A thread block takes a range of one matrix's tokens, 64 to 256 at a time through shared memory in the Gram's type. A
// thread sums a 4 × 4 block of the lower triangle over some of the tokens, its slice; the slices are added in their
// order, and so are the ranges: the result does not depend on the order in which blocks run.
//
// Floor on an H200, 768 groups of 9 × 9 and 25088 tokens in float: 0.69 GB, 0.16 ms; 6 blocks of 16 products for 45
// entries, 3.7 TFLOP/s of 67; shared memory is read 6 × 36 bytes a token, 0.15 ms. Expected 0.25 ms. The same as
// patches of 32 × 768 × 28 × 28: 77 MB, 0.02 ms; finding the entries takes some 20 instructions each, 0.12 ms. Expected
// 0.3 ms.
#pragma once

#include "cuda/gram_features.cuh"

namespace statsmerge::cuda::gram {

// Where the sums go: into the Grams, or with several ranges of tokens among partial sums.
template <class Acc>
struct SmallSums {
  SmallShape shape;
  Strided<Acc> gram;
  Acc* partial;  // [batches, ranges, entries]
  int64_t batches;
  int ranges;  // a block's share of a matrix's tokens is one of these
};

template <class Acc, class Features>
struct SmallProblem {
  SmallSums<Acc> sums;
  Features x;
  const Acc* weight;      // null, or those of a batch's tokens
  int64_t weight_stride;  // from batch to batch
  int64_t tokens, range;  // of a matrix, and how many of them are a range
};

// Blocks that a multiprocessor is to hold: as many as there are registers for without spills.
template <class Acc>
constexpr int kSmallBlocks = sizeof(Acc) == sizeof(float) ? 4 : 3;

template <class Acc, class Features>
__global__ void __launch_bounds__(kSmallThreads, kSmallBlocks<Acc>)
    small_gram_kernel(const __grid_constant__ SmallProblem<Acc, Features> p) {
  __shared__ __align__(16) Acc tile[kSmallShared];
  __shared__ Acc weights[kSmallTokens];
  __shared__ typename Features::Place token_places[kSmallTokens], column_places[kSmall];
  const SmallShape shape = p.sums.shape;
  const int ranges = p.sums.ranges, thread = static_cast<int>(threadIdx.x);
  const int64_t batch = blockIdx.x / ranges, range = blockIdx.x % ranges;
  const int64_t end = (range + 1) * p.range, last = end < p.tokens ? end : p.tokens;
  const int block = thread % shape.blocks(), slice = thread / shape.blocks();
  const Tile place = shape.block(block);
  const bool computes = slice < shape.slices();
  Acc sum[4][4] = {};

  // The columns that fill up the last block of 4 are zeros throughout.
  for (int i = thread; i < kSmallShared; i += kSmallThreads) tile[i] = 0;
  if (thread < shape.columns) column_places[thread] = p.x.column(thread);
  for (int64_t first = range * p.range; first < last; first += shape.tokens()) {
    const int count = static_cast<int>(last - first < shape.tokens() ? last - first : shape.tokens());
    __syncthreads();  // the tile has been used
    if (thread < count) {
      token_places[thread] = p.x.token(first + thread);
      weights[thread] = p.weight ? p.weight[batch * p.weight_stride + first + thread] : Acc{1};
    }
    __syncthreads();
    read_tile(p.x, batch, token_places, count, column_places, shape.columns, thread, kSmallThreads,
              [&](int token, int column, auto value) {
                tile[token * shape.pitch() + column] = static_cast<Acc>(to_acc(value));
              });
    __syncthreads();
    if (!computes) continue;
    for (int token = slice; token < count; token += shape.slices()) {
      const Acc w = weights[token];
      if (w == 0) continue;  // a dropped token has no part in the sums, whatever it holds
      const Acc* row = tile + token * shape.pitch();
      const Four<Acc> left = *reinterpret_cast<const Four<Acc>*>(row + 4 * place.row);
      const Four<Acc> right = *reinterpret_cast<const Four<Acc>*>(row + 4 * place.column);
      STATSMERGE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Acc weighted = w * left.values[i];
        STATSMERGE_UNROLL
        for (int j = 0; j < 4; ++j) sum[i][j] += weighted * right.values[j];
      }
    }
  }

  __syncthreads();
  if (computes) {
    STATSMERGE_UNROLL
    for (int i = 0; i < 16; ++i) tile[slice * shape.entries() + 16 * block + i] = sum[i / 4][i % 4];
  }
  __syncthreads();
  for (int e = thread; e < shape.entries(); e += kSmallThreads) {
    Acc total = 0;
    for (int s = 0; s < shape.slices(); ++s) total += tile[s * shape.entries() + e];
    if (ranges > 1) {
      p.sums.partial[blockIdx.x * static_cast<int64_t>(shape.entries()) + e] = total;
    } else {
      const Tile at = shape.entry(e);
      if (at.row < shape.columns && at.column <= at.row) p.sums.gram.at(batch, at.row, at.column) += total;
    }
  }
}

constexpr int kAddSmallThreads = 256;

// Adds the ranges' sums to the Grams, in the order of the tokens; a thread an entry.
template <class Acc>
__global__ void __launch_bounds__(kAddSmallThreads) add_small_kernel(const __grid_constant__ SmallSums<Acc> sums) {
  const int entries = sums.shape.entries();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddSmallThreads + threadIdx.x;
  if (i >= sums.batches * entries) return;
  const int64_t batch = i / entries;
  const int e = static_cast<int>(i % entries);
  const Tile at = sums.shape.entry(e);
  if (at.row >= sums.shape.columns || at.column > at.row) return;
  Acc total = 0;
  for (int r = 0; r < sums.ranges; ++r) total += sums.partial[(batch * sums.ranges + r) * entries + e];
  sums.gram.at(batch, at.row, at.column) += total;
}

}  // namespace statsmerge::cuda::gram
