// What comes before and after the products: operands from features and weights, conversions for aten's products, and
// sums into the Gram. All of it is limited by memory: bytes read and written over 4.3 TB/s on an H200.
#pragma once

#include "cuda/gram_features.cuh"
#include "cuda/gram_layout.cuh"

namespace statsmerge::cuda::gram {

// How weights enter the tile kernels. Scaling a 16-bit operand would round it, so tokens are sorted by their weights on
// the device, with no need for the host to know them: those of weight 1 are copied as they are, and the rows between
// them become zeros, which is exact; tokens of any other weight are scaled in float and split into three parts. Each
// kind takes a launch of its own, over the steps that have tokens of that kind, so a mask of zeros and ones costs a
// copy and skips the steps that are padding throughout. Dropped tokens are never multiplied, so what they hold is of
// no consequence.
enum class Kept { all, ones, nonzero, neither_zero_nor_one };

STATSMERGE_HD bool keeps(Kept kept, float weight) {
  return kept == Kept::all || (kept == Kept::ones ? weight == 1.0f
                                                  : weight != 0.0f && (kept == Kept::nonzero || weight != 1.0f));
}

// Features [tokens, columns] with contiguous columns, and their weights (null: ones).
template <class T>
struct Features {
  const T* data;
  int64_t row_stride, tokens, columns;
  const float* weight;
  Kept kept;
  bool vectors;  // rows are aligned for loads of four elements
};

// Where prepared operands go: parts [tokens, columns], rows of `pitch` (a multiple of 8) numbers; `right` is null where
// it would be the same as `left`. used[step] tells whether the step has tokens that are kept; rows of other steps are
// not written.
struct Prepared {
  uint16_t *left, *right;
  int64_t pitch, part_stride;
  int* used;
};

constexpr int kPrepareThreads = 256;
constexpr int kPrepareColumns = 4 * kPrepareThreads;  // of one block

template <class T>
STATSMERGE_HD void load_four(const Features<T>& x, int64_t token, int64_t column, T (&out)[4]) {
  const T* row = x.data + token * x.row_stride + column;
  if (x.vectors && column + 4 <= x.columns) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(row);
    STATSMERGE_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = four.values[i];
  } else {
    STATSMERGE_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = column + i < x.columns ? row[i] : T{};
  }
}

struct alignas(8) FourHalves {
  uint16_t values[4];
};

STATSMERGE_HD void store_four(uint16_t* to, const FourHalves& values) { *reinterpret_cast<FourHalves*>(to) = values; }

// Stores four numbers as three bfloat16 parts. Each remainder is exact in float.
STATSMERGE_HD void store_split(uint16_t* to, int64_t part_stride, float (&values)[4]) {
  STATSMERGE_UNROLL
  for (int part = 0; part < 3; ++part) {
    FourHalves bits;
    STATSMERGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      bits.values[i] = static_cast<uint16_t>(float_to_bfloat16(values[i]));
      values[i] -= to_acc(bf16{bits.values[i]});
    }
    store_four(to + part * part_stride, bits);
  }
}

// One block a step and kPrepareColumns columns. One part: the kept features as they are. Three parts: the features, in
// float and times their weights, as left operand, and without their weights as right one.
template <int kParts, class T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(Features<T> x, Prepared out) {
  constexpr int kTokens = Parts<kParts>::kTokens;
  __shared__ float weight[kTokens];
  __shared__ bool kept[kTokens];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  bool mine = false;
  if (threadIdx.x < kTokens && first + threadIdx.x < x.tokens) {
    const float w = x.weight ? x.weight[first + threadIdx.x] : 1.0f;
    mine = keeps(x.kept, w);
    weight[threadIdx.x] = w;
    kept[threadIdx.x] = mine;
  }
  const bool any = __syncthreads_or(mine);
  if (blockIdx.y == 0 && threadIdx.x == 0) out.used[blockIdx.x] = any;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kPrepareColumns + 4 * threadIdx.x;
  if (!any || column >= x.columns) return;
  STATSMERGE_UNROLL_4
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = first + i;
    if (token >= x.tokens) break;
    const int64_t at = token * out.pitch + column;
    T values[4] = {};
    if (kept[i]) load_four(x, token, column, values);
    if constexpr (kParts == 1) {
      static_assert(sizeof(T) == 2);
      FourHalves bits;
      STATSMERGE_UNROLL
      for (int e = 0; e < 4; ++e) bits.values[e] = values[e].bits;
      store_four(out.left + at, bits);
    } else {
      float left[4], right[4];
      STATSMERGE_UNROLL
      for (int e = 0; e < 4; ++e) {
        right[e] = static_cast<float>(to_acc(values[e]));
        left[e] = kept[i] ? right[e] * weight[i] : 0.0f;
      }
      store_split(out.left + at, out.part_stride, left);
      if (out.right) store_split(out.right + at, out.part_stride, right);
    }
  }
}

// The numbers of the used steps, ascending, and how many they are. One block.
constexpr int kListThreads = 256;

__global__ void __launch_bounds__(kListThreads) list_steps_kernel(const int* used, int steps, int* list, int* count) {
  __shared__ int of_warp[kListThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int listed = 0;
  for (int first = 0; first < steps; first += kListThreads) {
    const int step = first + static_cast<int>(threadIdx.x);
    const bool mine = step < steps && used[step];
    const unsigned votes = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();
    int at = listed + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kListThreads / 32; ++w) {
      if (w < warp) at += of_warp[w];
      listed += of_warp[w];
    }
    if (mine) list[at] = step;
    __syncthreads();
  }
  if (threadIdx.x == 0) *count = listed;
}

constexpr int kRowThreads = 256;
constexpr int kRowsOfBlock = kRowThreads / 32;  // one a warp

// out [batches, rows, columns] = x, in the Gram's type and times its weights (of a batch: from b · weight_stride on).
template <class Acc, class T>
__global__ void __launch_bounds__(kRowThreads)
    convert_kernel(Strided<const T> x, const Acc* weight, int64_t weight_stride, int64_t batches, int64_t rows,
                   int64_t columns, Acc* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (i >= batches * rows) return;
  const int64_t batch = i / rows, row = i % rows;
  const Acc factor = weight ? weight[batch * weight_stride + row] : Acc{1};
  STATSMERGE_UNROLL_4
  for (int64_t column = threadIdx.x % 32; column < columns; column += 32) {
    out[i * columns + column] = factor == 0 ? Acc{0} : factor * static_cast<Acc>(to_acc(x.at(batch, row, column)));
  }
}

// gram += product [batches, rows, columns].
__global__ void __launch_bounds__(kRowThreads)
    add_product_kernel(Strided<float> gram, const float* product, int64_t batches, int64_t rows, int64_t columns) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (i >= batches * rows) return;
  STATSMERGE_UNROLL_4
  for (int64_t column = threadIdx.x % 32; column < columns; column += 32) {
    gram.at(i / rows, i % rows, column) += product[i * columns + column];
  }
}

}  // namespace statsmerge::cuda::gram
