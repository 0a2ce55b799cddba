// The passes of topk_svd over the matrices themselves, each in its own element type: the inspection, Y = A V and
// W = Aᵀ Y for kGroup vectors. Blocks cover parts of one matrix; the grids cover all matrices of a call.
#pragma once

#include <limits>

#include "cuda/svd_matrix.cuh"

namespace statsmerge::cuda::svd {

template <class Acc>
struct alignas(16) Quad {
  Acc v[kGroup];
};

template <class Acc>
constexpr Acc finite_limit() {
  return std::numeric_limits<Acc>::max();
}

STATSMERGE_HD void add(Moments& a, const Moments& b) {
  a.largest = a.largest < b.largest ? b.largest : a.largest;
  a.deviation += b.deviation;
  a.squared_deviation += b.squared_deviation;
  a.square += b.square;
}

// The largest magnitude and, if kSums, the sums of kProductRows rows. `shared`: [kPassThreads].
template <bool kSums, class Reader>
STATSMERGE_HD_PHASE void inspect_rows(const Block& block, const Reader& reader, int first, Moments* shared,
                                      Moments* out) {
  using Acc = typename Reader::Acc;
  constexpr int C = Reader::kColumns;
  const double origin = static_cast<double>(reader.element(0, 0));
  block.each(kPassThreads, [&](int64_t thread) {
    Moments m{};
    const int start = first + static_cast<int>(thread) / kWarp * kTileRows;
    for (int row = start; row < start + kTileRows && row < reader.rows; row += Reader::kRows) {
      for (int x = static_cast<int>(thread) % kWarp * C; x < reader.columns; x += kWarp * C) {
        reader.tile(row, x, [&](int r, const Acc(&values)[C]) {
          STATSMERGE_UNROLL
          for (int c = 0; c < C; ++c) {
            if (row + r >= reader.rows || x + c >= reader.columns) continue;
            const Acc size = values[c] < 0 ? -values[c] : values[c];
            const double magnitude = size <= finite_limit<Acc>() ? static_cast<double>(size)
                                                                 : std::numeric_limits<double>::infinity();
            if (m.largest < magnitude) m.largest = magnitude;
            if constexpr (kSums) {
              const double value = static_cast<double>(values[c]), deviation = value - origin;
              m.deviation += deviation;
              m.squared_deviation += deviation * deviation;
              m.square += value * value;
            }
          }
        });
      }
    }
    shared[thread] = m;
  });
  for (int half = kPassThreads / 2; half > 0; half /= 2) {
    block.each(half, [&](int64_t i) { add(shared[i], shared[i + half]); });
  }
  block.each(1, [&](int64_t) { *out = shared[0]; });
}

// y[row] = scale · A[row] V for kTileRows rows from `first`; V holds quads, one a column, at its padded_position.
template <class Reader>
STATSMERGE_HD_PHASE void product_rows(const Warp& warp, const Reader& reader, int first, typename Reader::Acc scale,
                                      const Quad<typename Reader::Acc>* v, Quad<typename Reader::Acc>* y) {
  using Acc = typename Reader::Acc;
  constexpr int C = Reader::kColumns;
  static_assert(kTileRows * kGroup == kWarp);
  warp.sum_each<Acc>(
      [&](int lane, Acc(&share)[kWarp]) {
        for (int x = lane * C; x < reader.columns; x += kWarp * C) {
          Quad<Acc> factor[C];
          STATSMERGE_UNROLL
          for (int c = 0; c < C; ++c) {
            factor[c] = x + c < reader.columns ? v[x - lane * C + c * kWarp + lane] : Quad<Acc>{};
          }
          STATSMERGE_UNROLL
          for (int tile = 0; tile < kTileRows; tile += Reader::kRows) {
            reader.tile(first + tile, x, [&](int r, const Acc(&values)[C]) {
              STATSMERGE_UNROLL
              for (int c = 0; c < C; ++c) {
                STATSMERGE_UNROLL
                for (int j = 0; j < kGroup; ++j) share[(tile + r) * kGroup + j] += values[c] * factor[c].v[j];
              }
            });
          }
        }
      },
      [&](int lane, Acc total) {
        if (first + lane / kGroup < reader.rows) y[first + lane / kGroup].v[lane % kGroup] = total * scale;
      });
}

// out[x] = Σ A[row, x] y[row] over kSplitRows rows from `first` and the columns of one panel. Each warp takes every
// kPassWarps-th tile of rows; `shared`, [kPassWarps][panel columns], holds their sums.
template <class Reader>
STATSMERGE_HD_PHASE void transposed_panel(const Block& block, const Reader& reader, int first, int panel,
                                          const Quad<typename Reader::Acc>* y, Quad<typename Reader::Acc>* shared,
                                          Quad<typename Reader::Acc>* out) {
  using Acc = typename Reader::Acc;
  constexpr int C = Reader::kColumns, kPanel = kWarp * C;
  const int last = first + kSplitRows < reader.rows ? first + kSplitRows : reader.rows, start = panel * kPanel;
  block.each(kPassThreads, [&](int64_t thread) {
    const int warp = static_cast<int>(thread) / kWarp, x = start + static_cast<int>(thread) % kWarp * C;
    Quad<Acc> sum[C] = {};
    if (x < reader.columns) {
      for (int row = first + warp * Reader::kRows; row < last; row += Reader::kRows * kPassWarps) {
        Quad<Acc> factor[Reader::kRows];
        STATSMERGE_UNROLL
        for (int r = 0; r < Reader::kRows; ++r) factor[r] = row + r < last ? y[row + r] : Quad<Acc>{};
        reader.tile(row, x, [&](int r, const Acc(&values)[C]) {
          STATSMERGE_UNROLL
          for (int c = 0; c < C; ++c) {
            STATSMERGE_UNROLL
            for (int j = 0; j < kGroup; ++j) sum[c].v[j] += values[c] * factor[r].v[j];
          }
        });
      }
    }
    STATSMERGE_UNROLL
    for (int c = 0; c < C; ++c) shared[warp * kPanel + x - start + c] = sum[c];
  });
  block.each(kPanel, [&](int64_t i) {
    if (start + i >= reader.columns) return;
    Quad<Acc> sum = shared[i];
    for (int warp = 1; warp < kPassWarps; ++warp) {
      STATSMERGE_UNROLL
      for (int j = 0; j < kGroup; ++j) sum.v[j] += shared[warp * kPanel + i].v[j];
    }
    out[start + i] = sum;
  });
}

// Part `index` of `a` in the inspection and in the product Y = A V: kProductRows rows.
template <class Acc, bool kSums>
STATSMERGE_HD_PHASE void inspect_block(const Block& block, const Matrix& a, int64_t index, Moments* shared) {
  with_reader<Acc>(a, [&](const auto& reader) {
    inspect_rows<kSums>(block, reader, static_cast<int>(index) * kProductRows, shared, a.moments + index);
  });
}

template <class Acc>
STATSMERGE_HD_PHASE void product_block(const Block& block, const Matrix& a, int64_t index, int group) {
  const auto* v = reinterpret_cast<const Quad<Acc>*>(a.block) + group * padded_columns(a);
  auto* y = reinterpret_cast<Quad<Acc>*>(a.y) + static_cast<int64_t>(group) * a.rows;
  const Acc scale = static_cast<Acc>(a.progress->scale);
  with_reader<Acc>(a, [&](const auto& reader) {
    block.each_warp(kPassWarps, [&](int i, const Warp& warp) {
      const int first = static_cast<int>(index) * kProductRows + i * kTileRows;
      if (first < a.rows) product_rows(warp, reader, first, scale, v, y);
    });
  });
}

// Part `index` of `a` in the product W = Aᵀ Y: one panel of columns, kSplitRows rows; panels run fastest.
template <class Acc>
STATSMERGE_HD_PHASE void transposed_block(const Block& block, const Problem& p, const Matrix& a, int64_t index,
                                          int group, Quad<Acc>* shared) {
  const int split = static_cast<int>(index / panels(a)), panel = static_cast<int>(index % panels(a));
  const auto* y = reinterpret_cast<const Quad<Acc>*>(a.y) + static_cast<int64_t>(group) * a.rows;
  auto* out = reinterpret_cast<Quad<Acc>*>(a.partial) +
              (static_cast<int64_t>(split) * p.groups() + group) * a.columns;
  with_reader<Acc>(a, [&](const auto& reader) {
    transposed_panel(block, reader, split * kSplitRows, panel, y, shared, out);
  });
}

}  // namespace statsmerge::cuda::svd
