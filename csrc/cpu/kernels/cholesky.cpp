// Factorisations by blocks: what is not a small triangle is a matrix product. The upper triangle is worked on because
// its rows are then the rows of the products' operands.
#include "cpu/kernels/cholesky.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/parallel.h"
#include "cpu/kernels/mirror.h"
#include "cpu/kernels/product.h"

namespace statsmerge {
namespace {

constexpr int64_t kLeaf = 64;      // rows of a triangle that is solved with directly
constexpr int64_t kBorder = 256;   // columns by which a factor of a leading block is extended
constexpr int64_t kColumns = 192;  // right-hand sides that a thread solves for at a time
constexpr int64_t kPivots = 96;    // rows of a pivoted factorisation between two updates of all that is left

// Entry (i, k) of a lower triangular matrix is data[i · row_stride + k · column_stride].
struct TriangleView {
  const double* data;
  int64_t row_stride, column_stride;
};

struct CholeskyKernels {
  bool (*factor_leaf)(double* c, int64_t stride, int64_t n, double least);
  void (*solve_leaf)(const TriangleView& t, int64_t n, double* x, int64_t stride, int64_t columns);
  void (*pivot_row)(const double* above, const double* factors, int64_t count, int64_t stride, double scale,
                    double* row, double* diagonal, int64_t n);
};

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/cholesky.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {
namespace {

MatrixView view(const double* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride = 1) {
  return {reinterpret_cast<const char*>(data), Storage::f64, rows, columns, row_stride, column_stride};
}

// The upper triangle of c [n, n] -= aᵀa for a [depth, n], by blocks of columns.
void subtract_square(const double* a, int64_t depth, int64_t n, int64_t a_stride, double* c, int64_t c_stride) {
  const int64_t width = std::clamp(n / 8 / kLeaf * kLeaf, kLeaf, 6 * kLeaf);
  for (int64_t column = 0; column < n; column += width) {
    const int64_t columns = std::min(width, n - column);
    accumulate_product<double>(-1.0, view(a, depth, column + columns, a_stride),
                               view(a + column, depth, columns, a_stride), nullptr, c + column, c_stride, 1, false);
  }
}

int64_t half(int64_t n) { return (n / 2 + kLeaf - 1) / kLeaf * kLeaf; }

SquareView trailing(const SquareView& u, int64_t first) { return {u.row(first) + first, u.n - first, u.stride}; }

// x [n, columns] <- U⁻ᵀ x.
void solve_forward(const SquareView& u, double* x, int64_t stride, int64_t columns) {
  if (u.n <= kLeaf) return STATSMERGE_ACTIVE(kCholesky).solve_leaf({u.data, 1, u.stride}, u.n, x, stride, columns);
  const int64_t first = half(u.n);
  solve_forward({u.data, first, u.stride}, x, stride, columns);
  accumulate_product<double>(-1.0, view(u.data + first, first, u.n - first, u.stride), view(x, first, columns, stride),
                             nullptr, x + first * stride, stride, 1, false);
  solve_forward(trailing(u, first), x + first * stride, stride, columns);
}

// x [n, columns] <- U⁻¹ x; needs Uᵀ below the diagonal.
void solve_backward(const SquareView& u, double* x, int64_t stride, int64_t columns) {
  const int64_t last = u.n - 1;
  if (u.n <= kLeaf) {  // read backwards, U is lower triangular
    return STATSMERGE_ACTIVE(kCholesky)
        .solve_leaf({u.row(last) + last, -u.stride, -1}, u.n, x + last * stride, -stride, columns);
  }
  const int64_t first = half(u.n);
  solve_backward(trailing(u, first), x + first * stride, stride, columns);
  accumulate_product<double>(-1.0, view(u.row(first), u.n - first, first, u.stride),
                             view(x + first * stride, u.n - first, columns, stride), nullptr, x, stride, 1, false);
  solve_backward({u.data, first, u.stride}, x, stride, columns);
}

// x [n, columns] <- U⁻ᵀ x, columns side by side.
void solve_forward_in_parallel(const SquareView& u, double* x, int64_t stride, int64_t columns) {
  const int64_t blocks = (columns + kColumns - 1) / kColumns;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      solve_forward(u, x + b * kColumns, stride, std::min(kColumns, columns - b * kColumns));
    }
  });
}

bool factor(const SquareView& c, double least) {
  if (c.n <= kLeaf) return STATSMERGE_ACTIVE(kCholesky).factor_leaf(c.data, c.stride, c.n, least);
  const int64_t first = half(c.n);
  const SquareView leading{c.data, first, c.stride}, rest = trailing(c, first);
  if (!factor(leading, least)) return false;
  solve_forward_in_parallel(leading, c.data + first, c.stride, rest.n);
  subtract_square(c.data + first, first, rest.n, c.stride, rest.data, c.stride);
  return factor(rest, least);
}

// Exchanges rows and columns i < j of a symmetric matrix given by its upper triangle; in rows [begin, i), which belong
// to a factor already, the columns alone.
void exchange(const SquareView& c, int64_t begin, int64_t i, int64_t j) {
  for (int64_t t = begin; t < i; ++t) std::swap(c.row(t)[i], c.row(t)[j]);
  std::swap(c.row(i)[i], c.row(j)[j]);
  for (int64_t t = i + 1; t < j; ++t) std::swap(c.row(i)[t], c.row(t)[j]);
  std::swap_ranges(c.row(i) + j + 1, c.row(i) + c.n, c.row(j) + j + 1);
}

}  // namespace

bool cholesky(const SquareView& c, double least) {
  for (int64_t done = 0; done < c.n; done += kBorder) {
    const SquareView next{c.row(done) + done, std::min(kBorder, c.n - done), c.stride};
    if (done > 0) {
      solve_forward_in_parallel({c.data, done, c.stride}, c.data + done, c.stride, next.n);
      subtract_square(c.data + done, done, next.n, c.stride, next.data, c.stride);
    }
    if (!factor(next, least)) return false;
  }
  return true;
}

void mirror_upper(const SquareView& u) { mirror_lower(u.data, 1, 0, u.n, 1, u.stride); }

void cholesky_solve(const SquareView& u, double* x, int64_t stride, int64_t columns) {
  if (u.n == 0) return;
  solve_forward(u, x, stride, columns);
  solve_backward(u, x, stride, columns);
}

int64_t pivoted_cholesky(const SquareView& c, double tolerance, int64_t most, std::vector<int64_t>& order) {
  const int64_t n = c.n;
  order.resize(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::vector<double> diagonal(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) diagonal[i] = c.row(i)[i];
  std::vector<int64_t> pivots;
  int64_t rank = 0;
  for (bool more = true; more && rank < most;) {
    const int64_t begin = rank, end = std::min(begin + kPivots, most);
    for (; rank < end; ++rank) {
      const int64_t pivot = std::max_element(diagonal.begin() + rank, diagonal.end()) - diagonal.begin();
      more = diagonal[pivot] > tolerance;
      if (!more) break;
      pivots.push_back(pivot);
      if (pivot != rank) {
        exchange(c, begin, rank, pivot);
        std::swap(diagonal[rank], diagonal[pivot]);
        std::swap(order[rank], order[pivot]);
      }
      const double root = std::sqrt(diagonal[rank]);
      c.row(rank)[rank] = root;
      const int64_t next = rank + 1;
      STATSMERGE_ACTIVE(kCholesky)
          .pivot_row(c.row(begin) + next, c.row(begin) + rank, rank - begin, c.stride, 1 / root, c.row(rank) + next,
                     diagonal.data() + next, n - next);
    }
    if (rank < n) {
      subtract_square(c.row(begin) + rank, rank - begin, n - rank, c.stride, c.row(rank) + rank, c.stride);
    }
  }
  // The exchanges of later blocks, row by row: each stays in the cache meanwhile.
  parallel_for(0, rank, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t s = (t / kPivots + 1) * kPivots; s < rank; ++s) std::swap(c.row(t)[s], c.row(t)[pivots[s]]);
    }
  });
  mirror_upper(c);
  for (int64_t i = 0; i < rank; ++i) std::fill(c.row(i) + i + 1, c.row(i) + rank, 0.0);
  return rank;
}

}  // namespace statsmerge
