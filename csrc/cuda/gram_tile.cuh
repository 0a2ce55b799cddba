// What the two tile kernels (gram_wgmma.cuh, gram_mma.cuh) share: the problem, and where the sums go.
#pragma once

#include "cuda/gram_layout.cuh"

namespace statsmerge::cuda::gram {

// Two neighbouring entries, accessed as one.
struct alignas(8) Pair {
  float x, y;
};

// gram (lower triangle) += leftᵀ right over the tokens of some steps. The operands are described apart, as each kernel
// reads them.
struct TileProblem {
  Schedule schedule;
  int64_t columns;
  float* gram;
  int64_t row_stride, column_stride;
  float* partial;     // [slots, kTileRows, kTileRows · ratio]
  const int* steps;   // the steps to take, or null: all of them in order
  const int* count;   // their number, or null: `most`
  int most;
  bool one_operand;   // left and right are the same matrix
  bool pairs;         // two neighbouring entries of the Gram can be accessed as a Pair

  STATSMERGE_HD int step_count() const { return count ? *count : most; }
  STATSMERGE_HD int step(int i) const { return steps ? steps[i] : i; }
};

// Adds value(0), value(1), … (Pair) to the Gram's entries (row, column + 8 i) and their right neighbours, as far as
// those lie on or below the diagonal.
template <int kCount, class Value>
STATSMERGE_HD void add_to_gram(const TileProblem& p, int64_t row, int64_t column, const Value& value) {
  if (row >= p.columns) return;
  float* entries = p.gram + row * p.row_stride + column * p.column_stride;
  if (p.pairs && column + 8 * (kCount - 1) + 1 <= row) {
    Pair sum[kCount];  // all loads are issued before the first store, to wait for memory once
STATSMERGE_UNROLL
    for (int i = 0; i < kCount; ++i) sum[i] = reinterpret_cast<const Pair*>(entries)[4 * i];
STATSMERGE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      reinterpret_cast<Pair*>(entries)[4 * i] = {sum[i].x + value(i).x, sum[i].y + value(i).y};
    }
    return;
  }
STATSMERGE_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (column + 8 * i <= row) entries[8 * i * p.column_stride] += value(i).x;
    if (column + 8 * i + 1 <= row) entries[(8 * i + 1) * p.column_stride] += value(i).y;
  }
}

// The same for a unit's sums, which go into the Gram or among the partial sums; row and column are those in the tile.
template <int kWidth, int kCount, class Value>
STATSMERGE_HD void store_sums(const TileProblem& p, const Unit& unit, int row, int column, const Value& value) {
  if (unit.slot < 0) {
    add_to_gram<kCount>(p, static_cast<int64_t>(unit.tile.row) * kTileRows + row,
                        static_cast<int64_t>(unit.tile.column) * kWidth + column, value);
    return;
  }
  float* entries = p.partial + (static_cast<int64_t>(unit.slot) * kTileRows + row) * kWidth + column;
STATSMERGE_UNROLL
  for (int i = 0; i < kCount; ++i) *reinterpret_cast<Pair*>(entries + 8 * i) = value(i);
}

// Adds up two neighbouring partial sums of the divided tiles, in the order of the tokens, and adds them to the Gram.
template <int kWidth>
STATSMERGE_HD void add_partial(const TileProblem& p, int divided, int row, int column) {
  const Tile tile = p.schedule.triangle.tile(p.schedule.whole + divided);
  const int split = p.schedule.split;
  const float* entries = p.partial + (static_cast<int64_t>(divided) * split * kTileRows + row) * kWidth + column;
  Pair sum{0, 0};
  for (int part = 0; part < split; ++part) {
    const Pair more = *reinterpret_cast<const Pair*>(entries + static_cast<int64_t>(part) * kTileRows * kWidth);
    sum.x += more.x;
    sum.y += more.y;
  }
  add_to_gram<1>(p, static_cast<int64_t>(tile.row) * kTileRows + row,
                 static_cast<int64_t>(tile.column) * kWidth + column, [&](int) { return sum; });
}

#ifdef __CUDACC__
// The same for all of them: a block takes eight rows of a tile, a thread two neighbouring entries at a time. Every
// partial sum is read once: for 8 tiles of 16 parts 17 MB, 4 µs on an H200, mostly from its cache.
constexpr int kAddRows = 8;
constexpr int kAddThreads = 256;

template <int kWidth>
__global__ void __launch_bounds__(kAddThreads) add_partial_kernel(const __grid_constant__ TileProblem p) {
  constexpr int kBlocks = kTileRows / kAddRows;
  const int divided = static_cast<int>(blockIdx.x) / kBlocks;
  const int first_row = static_cast<int>(blockIdx.x) % kBlocks * kAddRows;
  for (int i = threadIdx.x; i < kAddRows * kWidth / 2; i += kAddThreads) {
    add_partial<kWidth>(p, divided, first_row + i / (kWidth / 2), i % (kWidth / 2) * 2);
  }
}
#endif

}  // namespace statsmerge::cuda::gram
