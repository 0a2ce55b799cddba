// Where the features of a Gram come from, as the kernels see it: matrices of any strides, or the patches of a
// convolution, which are formed as they are read. Places of tokens and columns are found once, entries then cost an
// addition. Compiled for the device and, to be tested, for the host.
#pragma once

#include "cuda/elements.h"
#include "cuda/gram_schedule.cuh"

namespace statsmerge::cuda::gram {

// Four elements, loaded in as few instructions as their size allows.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T values[4];
};

// A batch of matrices of any strides.
template <class T>
struct Strided {
  using Place = int64_t;

  T* data;
  int64_t batch_stride, row_stride, column_stride;

  STATSMERGE_HD T& at(int64_t b, int64_t i, int64_t j) const { return entry(b, token(i), column(j)); }
  STATSMERGE_HD Place token(int64_t i) const { return i * row_stride; }
  STATSMERGE_HD Place column(int64_t j) const { return j * column_stride; }
  STATSMERGE_HD T& entry(int64_t b, Place token, Place column) const { return data[b * batch_stride + token + column]; }
  STATSMERGE_HD bool tokens_contiguous() const { return row_stride < column_stride; }
};

// Which element of x [N, C, three spatial dimensions] a convolution reads where. The patches of a group are a matrix: a
// token for every output, image by image, and columns in the order of the convolution's weight.
struct PatchShape {
  struct Place {
    int64_t offset;  // from the group's first element; of no meaning outside of the input
    int at[3];       // position in the input; a column's is relative to the token's
  };

  int64_t group_stride, image_stride, channel_stride, element_stride[3];
  int size[3], kernel[3], stride[3], padding[3], dilation[3], out[3];

  STATSMERGE_HD Place token(int64_t i) const {
    Place place{};
    STATSMERGE_UNROLL
    for (int d = 2; d >= 0; --d) {
      place.at[d] = static_cast<int>(i % out[d]) * stride[d] - padding[d];
      place.offset += place.at[d] * element_stride[d];
      i /= out[d];
    }
    place.offset += i * image_stride;
    return place;
  }
  STATSMERGE_HD Place column(int64_t j) const {
    Place place{};
    STATSMERGE_UNROLL
    for (int d = 2; d >= 0; --d) {
      place.at[d] = static_cast<int>(j % kernel[d]) * dilation[d];
      place.offset += place.at[d] * element_stride[d];
      j /= kernel[d];
    }
    place.offset += j * channel_stride;
    return place;
  }
  STATSMERGE_HD bool inside(const Place& token, const Place& column) const {
    bool all = true;
    STATSMERGE_UNROLL
    for (int d = 0; d < 3; ++d) {
      all = all && static_cast<unsigned>(token.at[d] + column.at[d]) < static_cast<unsigned>(size[d]);
    }
    return all;
  }
};

// A batch of such matrices, one a group.
template <class T>
struct Patches {
  using Place = PatchShape::Place;

  const T* data;
  PatchShape shape;

  STATSMERGE_HD Place token(int64_t i) const { return shape.token(i); }
  STATSMERGE_HD Place column(int64_t j) const { return shape.column(j); }
  STATSMERGE_HD T entry(int64_t group, const Place& token, const Place& column) const {
    if (!shape.inside(token, column)) return T{};
    return data[group * shape.group_stride + token.offset + column.offset];
  }
  STATSMERGE_HD bool tokens_contiguous() const { return shape.element_stride[2] < shape.channel_stride; }
};

// Calls f(token, column, entry) for what thread `thread` of `threads` reads of a tile whose places are given: `tokens`
// by `columns` of matrix `batch`. Neighbouring threads read what is contiguous.
template <class Features, class F>
STATSMERGE_HD void read_tile(const Features& x, int64_t batch, const typename Features::Place* token_places, int tokens,
                             const typename Features::Place* column_places, int columns, int thread, int threads,
                             const F& f) {
  const bool along_tokens = x.tokens_contiguous();
  Walk walk(thread, threads, along_tokens ? tokens : columns);
  for (int i = thread; i < tokens * columns; i += threads, walk.next()) {
    const int token = along_tokens ? walk.inner : walk.outer, column = along_tokens ? walk.outer : walk.inner;
    f(token, column, x.entry(batch, token_places[token], column_places[column]));
  }
}

// ---- patches as matrices, for Grams of more columns than the kernel of small ones takes
//
// Floor on an H200, 128 × 256 × 14 × 14 in bf16 and 3 × 3 (25088 tokens, in 2304): 116 MB written and read again,
// 0.054 ms, beside 0.15 TFLOP of the Gram's tiles, 0.19 ms. Expected 0.35 ms; in float 0.23 GB, 0.12 ms, 0.9 TFLOP,
// 1.1 ms; expected 1.6 ms.

constexpr int kUnfoldEdge = 64;  // tokens and columns of one block
constexpr int kUnfoldThreads = 256;

// out [groups, tokens, pitch] = tokens first, first + 1, … of every group's patches. A block passes a square through
// shared memory, so that reading follows the input's order and writing the output's. Grid: squares along the tokens,
// group by group; squares along the columns.
template <class T>
__global__ void __launch_bounds__(kUnfoldThreads)
    unfold_kernel(const __grid_constant__ Patches<T> x, int64_t first, int64_t tokens, int64_t columns, int64_t pitch,
                  T* out) {
  __shared__ T tile[kUnfoldEdge * (kUnfoldEdge + 1)];  // rows of an odd length, for writing down its columns
  __shared__ typename Patches<T>::Place token_places[kUnfoldEdge], column_places[kUnfoldEdge];
  const int64_t squares = (tokens + kUnfoldEdge - 1) / kUnfoldEdge;
  const int64_t group = blockIdx.x / squares, token0 = blockIdx.x % squares * kUnfoldEdge;
  const int64_t column0 = int64_t{blockIdx.y} * kUnfoldEdge;
  const int height = static_cast<int>(tokens - token0 < kUnfoldEdge ? tokens - token0 : kUnfoldEdge);
  const int width = static_cast<int>(columns - column0 < kUnfoldEdge ? columns - column0 : kUnfoldEdge);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < height) {
    token_places[thread] = x.token(first + token0 + thread);
  } else if (thread >= kUnfoldEdge && thread < kUnfoldEdge + width) {
    column_places[thread - kUnfoldEdge] = x.column(column0 + thread - kUnfoldEdge);
  }
  __syncthreads();
  read_tile(x, group, token_places, height, column_places, width, thread, kUnfoldThreads,
            [&](int token, int column, T value) { tile[token * (kUnfoldEdge + 1) + column] = value; });
  __syncthreads();
  const int column = thread % kUnfoldEdge;
  if (column >= width) return;
  for (int token = thread / kUnfoldEdge; token < height; token += kUnfoldThreads / kUnfoldEdge) {
    out[(group * tokens + token0 + token) * pitch + column0 + column] = tile[token * (kUnfoldEdge + 1) + column];
  }
}

}  // namespace statsmerge::cuda::gram
