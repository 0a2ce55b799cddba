// Small matrices decomposed in one block, in double in shared memory, by one-sided Jacobi rotations of the vectors
// along the shorter side (Demmel and Veselić 1992: small singular values come out with high relative accuracy too).
#pragma once

#include "cuda/svd_lanczos.cuh"

namespace statsmerge::cuda::svd {

constexpr int kDenseThreads = 256;
constexpr int kDenseSide = 128;  // matrices with no side longer are decomposed directly
constexpr int kThinSide = 32;    // ... and so are those with a side no longer, if they fit into shared memory

struct DenseWork {
  double* g;        // [side][length]
  Moments* moments; // [kDenseThreads]
  Sums sums;        // [k]
  double* values;   // [side]
  int* order;       // [side]
  int* rotated;     // [side / 2 + 1]
};

STATSMERGE_HD_PHASE DenseWork take_dense_work(int64_t side, int64_t length, int64_t k, Arena& arena) {
  DenseWork w{};
  w.g = arena.take<double>(side * length);
  w.moments = arena.take<Moments>(kDenseThreads);
  w.sums = {arena.take<double>(k * kParts), arena.take<double>(k)};
  w.values = arena.take<double>(side);
  w.order = arena.take<int>(side);
  w.rotated = arena.take<int>(side / 2 + 1);
  return w;
}

inline int64_t dense_shared_bytes(int64_t rows, int64_t columns, int64_t k) {
  Arena arena(nullptr);
  take_dense_work(std::min(rows, columns), std::max(rows, columns), k, arena);
  return arena.used();
}

inline bool is_dense(int64_t rows, int64_t columns, int64_t k, int64_t shared_limit) {
  if (std::max(rows, columns) > kDenseSide && std::min(rows, columns) > kThinSide) return false;
  return std::max(rows, columns) <= shared_limit && dense_shared_bytes(rows, columns, k) <= shared_limit;
}

// Memory for the vectors: [k][length] and [k][side] doubles, and the progress.
inline void take_dense_memory(Matrix& a, bool vectors, Arena& arena) {
  const int64_t kept = vectors ? a.k : 0;
  a.basis = reinterpret_cast<char*>(arena.take<double>(kept * std::max(a.rows, a.columns)));
  a.spare = reinterpret_cast<char*>(arena.take<double>(kept * std::min(a.rows, a.columns)));
  a.progress = arena.take<Progress>(1);
}

// Rotates the rows of g until they are orthogonal.
STATSMERGE_HD_PHASE void orthogonalize_rows(const Block& block, const DenseWork& work, int side, int length) {
  constexpr double eps = std::numeric_limits<double>::epsilon();
  const int players = side + side % 2, pairs = players / 2;
  for (int sweep = 0; sweep < kSweeps && side > 1; ++sweep) {
    block.each(pairs, [&](int64_t i) { work.rotated[i] = 0; });
    for (int step = 0; step < players - 1; ++step) {
      block.each_warp(pairs, [&](int i, const Warp& warp) {
        int p, q;
        pair_of(players, step, i, p, q);
        if (q >= side) return;
        double* const x = work.g + static_cast<int64_t>(p) * length;
        double* const y = work.g + static_cast<int64_t>(q) * length;
        double products[3];
        warp.sums(products, [&](int lane, double(&share)[3]) {
          for (int e = lane; e < length; e += kWarp) {
            share[0] += x[e] * x[e];
            share[1] += x[e] * y[e];
            share[2] += y[e] * y[e];
          }
        });
        const double xy = products[1];
        if (xy == 0 || fabs(xy) <= eps * sqrt(products[0]) * sqrt(products[2])) return;
        const Rotation r = jacobi_rotation(products[0], xy, products[2]);
        warp.each(length, [&](int e) {
          const double xe = x[e], ye = y[e];
          x[e] = r.c * xe - r.s * ye;
          y[e] = r.s * xe + r.c * ye;
        });
        warp.each(1, [&](int) { work.rotated[i] = 1; });
      });
    }
    int rotated = 0;
    for (int i = 0; i < pairs; ++i) rotated += work.rotated[i];
    block.each(0, [](int64_t) {});
    if (rotated == 0) break;
  }
}

// All of one matrix: moments, singular values, vectors, results in Out. Marks the matrix bad if it is not finite.
template <class Out, class Reader>
STATSMERGE_HD_PHASE void dense_svd(const Block& block, const Problem& p, const Matrix& a, const Reader& reader,
                                   const DenseWork& work) {
  using Acc = typename Reader::Acc;
  constexpr double eps = std::numeric_limits<double>::epsilon();
  const bool wide = a.rows <= a.columns;
  const int side = wide ? a.rows : a.columns, length = wide ? a.columns : a.rows;
  const int64_t count = static_cast<int64_t>(side) * length;
  const double origin = static_cast<double>(reader.element(0, 0));
  block.each(kDenseThreads, [&](int64_t thread) {
    Moments m{};
    for (int64_t i = thread; i < count; i += kDenseThreads) {
      const int64_t row = i / a.columns;
      const int column = static_cast<int>(i % a.columns);
      const Acc element = reader.element(row, column);
      const Acc size = element < 0 ? -element : element;
      const double value = static_cast<double>(element), deviation = value - origin;
      const double magnitude =
          size <= finite_limit<Acc>() ? static_cast<double>(size) : std::numeric_limits<double>::infinity();
      add(m, {magnitude, deviation, deviation * deviation, value * value});
      work.g[wide ? row * length + column : static_cast<int64_t>(column) * length + row] = value;
    }
    work.moments[thread] = m;
  });
  for (int half = kDenseThreads / 2; half > 0; half /= 2) {
    block.each(half, [&](int64_t i) { add(work.moments[i], work.moments[i + half]); });
  }
  const Moments total = work.moments[0];
  const bool bad = !(total.largest <= finite_limit<double>());
  block.each(1, [&](int64_t) {
    a.progress->bad = bad;
    a.progress->done = true;
    if (a.out_passes != nullptr) *a.out_passes = p.vectors ? 2 : 1;
    if (a.out_statistics != nullptr) write_moments(total, origin, static_cast<double>(count), a.out_statistics);
  });
  if (bad) return write_bad<Out>(block, p, a);
  if (a.k == 0) return;

  const double scale = scale_for<double>(total.largest);
  block.each(count, [&](int64_t i) { work.g[i] *= scale; });
  orthogonalize_rows(block, work, side, length);
  block.each_warp(side, [&](int i, const Warp& warp) {
    double square[1];
    warp.sums(square, [&](int lane, double(&share)[1]) {
      for (int e = lane; e < length; e += kWarp) {
        const double x = work.g[static_cast<int64_t>(i) * length + e];
        share[0] += x * x;
      }
    });
    warp.each(1, [&](int) { work.values[i] = sqrt(square[0]); });
  });
  block.each(side, [&](int64_t i) {
    int place = 0;
    for (int j = 0; j < side; ++j) {
      place += work.values[j] > work.values[i] || (work.values[j] == work.values[i] && j < i);
    }
    work.order[place] = static_cast<int>(i);
  });
  const double bound = eps * length * work.values[work.order[0]];
  block.each(a.k, [&](int64_t i) {
    const double value = work.values[work.order[i]], sigma = value > bound ? value / scale : 0;
    if (a.out_s != nullptr) reinterpret_cast<Out*>(a.out_s)[i] = static_cast<Out>(sigma);
    if (a.out_residual != nullptr) reinterpret_cast<Out*>(a.out_residual)[i] = static_cast<Out>(bound / scale);
    if (a.out_statistics != nullptr) a.out_statistics[3 + i] = sigma;
  });
  if (!p.vectors) return;

  // The rotated rows are σ times the vectors along the longer side; the others are the images of these.
  double* longer = reinterpret_cast<double*>(a.basis);
  double* shorter = reinterpret_cast<double*>(a.spare);
  block.each(static_cast<int64_t>(a.k) * length, [&](int64_t i) {
    longer[i] = work.g[static_cast<int64_t>(work.order[i / length]) * length + i % length];
  });
  orthonormalize(block, longer, 0, longer, a.k, length, 0, Same{bound}, p.seed, 0, work.sums, nullptr);
  block.each(static_cast<int64_t>(a.k) * side, [&](int64_t i) {
    const double* x = longer + i / side * length;
    const int64_t e = i % side;
    double sum = 0;
    for (int l = 0; l < length; ++l) {
      const double value =
          static_cast<double>(wide ? reader.element(e, l) : reader.element(l, static_cast<int>(e)));
      sum += value * scale * x[l];
    }
    shorter[i] = sum;
  });
  orthonormalize(block, shorter, 0, shorter, a.k, side, 0, Same{bound}, p.seed, 1, work.sums, nullptr);
  const double* left = wide ? shorter : longer;   // along the rows' side
  const double* right = wide ? longer : shorter;  // along the columns' side
  Out* u = reinterpret_cast<Out*>(a.out_u);
  Out* vh = reinterpret_cast<Out*>(a.out_vh);
  block.each(static_cast<int64_t>(a.k) * a.rows, [&](int64_t i) {
    const int64_t j = i / a.rows, e = i % a.rows;
    (a.transposed ? vh[i] : u[e * a.k + j]) = static_cast<Out>(left[i]);
  });
  block.each(static_cast<int64_t>(a.k) * a.columns, [&](int64_t i) {
    const int64_t j = i / a.columns, e = i % a.columns;
    (a.transposed ? u[e * a.k + j] : vh[i]) = static_cast<Out>(right[i]);
  });
}

}  // namespace statsmerge::cuda::svd
