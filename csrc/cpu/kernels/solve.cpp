// Three ways to a pseudo-inverse, each tried where the one before does not do:
//  - C is safely positive definite: a Cholesky factorisation. Lanczos iterations with its factor show that, or near the
//    cut-off a factorisation of C less the cut-off.
//  - C has a factor L [n, r] with markedly fewer columns than rows, found by complete pivoting: C^† = L M⁻² Lᵀ, where
//    M = LᵀL has C's nonzero eigenvalues, with a Cholesky factorisation of M where it proves them all to be kept, and
//    M's eigenvectors otherwise.
//  - The eigenvectors of C.
// The error of each is a small multiple of eps times the condition number, relative to the norm of the result. A C given
// in float is of full rank however few the features were: what its rounding put there is no part of the factor. Then
// C = LLᵀ + E, and the factor serves if E is no more than rounding to float can be, n·eps of the largest eigenvalue, if
// the factor's eigenvalues are all kept, and if E's, by the size of E, are all dropped (Weyl). The result changes by at
// most about ‖E‖ over the least eigenvalue kept, of which kLeftOut is the limit, and usually by a hundredth of it.
#include "cpu/kernels/solve.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

#include "common/parallel.h"
#include "cpu/kernels/cholesky.h"
#include "cpu/kernels/product.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr int64_t kDirect = 32;    // up to this size the eigenvectors cost no more than a factorisation
constexpr double kThin = 0.8;      // the largest rank, as a part of n, for which a pivoted factorisation gains anything
constexpr int64_t kBlock = 192;    // columns of a triangular factor by which zeros are left out
constexpr int64_t kSteps = 16;     // of a Lanczos iteration
constexpr double kMargin = 1.25;   // by which a Lanczos iteration of so many steps hardly ever misses the largest
constexpr double kSafely = 4;      // by which a condition number by Lanczos must stay below 1 / rcond
constexpr double kNoise = 64;      // rounding errors of a factorisation stay below so many eps of the largest eigenvalue
constexpr double kLeftOut = 1e-3;  // the largest part of the least eigenvalue kept that a factor may leave out of C
constexpr double kEps = std::numeric_limits<double>::epsilon();

using Vectors = std::vector<double>;

SquareView square(Vectors& storage, int64_t n) { return {storage.data(), n, n}; }
SquareView square(const Vectors& storage, int64_t n) { return {const_cast<double*>(storage.data()), n, n}; }

MatrixView view(const double* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return {reinterpret_cast<const char*>(data), Storage::f64, rows, columns, row_stride, column_stride};
}

// aᵀ b for dense b [rows of a, columns].
Vectors product(const MatrixView& a, const double* b, int64_t stride, int64_t columns) {
  Vectors out(static_cast<size_t>(a.columns * columns), 0.0);
  accumulate_product<double>(1.0, a, view(b, a.rows, columns, stride, 1), nullptr, out.data(), columns, 1, false);
  return out;
}

// x += alpha aᵀ b for dense b [rows of a, columns].
void add_product(double alpha, const MatrixView& a, const Vectors& b, double* x, int64_t stride, int64_t columns) {
  accumulate_product<double>(alpha, a, view(b.data(), a.rows, columns, columns, 1), nullptr, x, stride, 1, false);
}

// The largest eigenvalue of a symmetric operator y = apply(x) by Lanczos, from below and usually within a few per cent.
double largest_eigenvalue(int64_t n, const std::function<void(const double* x, double* y)>& apply) {
  if (n == 0) return 0;
  std::mt19937_64 generator(0);
  std::normal_distribution<double> normal;
  const int64_t most = std::min(kSteps, n);
  Vectors basis(static_cast<size_t>(n * (most + 1))), diagonal, beside;
  for (int64_t i = 0; i < n; ++i) basis[i] = normal(generator);
  const auto norm = [n](const double* x) { return std::sqrt(dot(x, x, n)); };
  multiply(1 / norm(basis.data()), basis.data(), n);
  double scale = 0;
  while (static_cast<int64_t>(diagonal.size()) < most) {
    const auto step = static_cast<int64_t>(diagonal.size());
    double* next = basis.data() + (step + 1) * n;
    apply(next - n, next);
    diagonal.push_back(dot(next, next - n, n));
    for (int repeat = 0; repeat < 2; ++repeat) {
      for (int64_t i = 0; i <= step; ++i) axpy(-dot(next, basis.data() + i * n, n), basis.data() + i * n, next, n);
    }
    beside.push_back(norm(next));
    scale = std::max(scale, std::abs(diagonal.back()) + beside.back());
    if (!(beside.back() > static_cast<double>(n) * kEps * scale)) break;  // an invariant subspace
    multiply(1 / beside.back(), next, n);
  }
  const auto steps = static_cast<int64_t>(diagonal.size());
  Vectors tridiagonal(static_cast<size_t>(steps * steps), 0.0);
  for (int64_t i = 0; i < steps; ++i) {
    tridiagonal[i * steps + i] = diagonal[i];
    if (i > 0) tridiagonal[i * steps + i - 1] = tridiagonal[(i - 1) * steps + i] = beside[i - 1];
  }
  return symmetric_eigen(std::move(tridiagonal), steps).values[0];
}

// Calls f(i) for the rows of a triangle: short and long ones in turn, so that ranges of equal length are equal work.
void parallel_rows(int64_t n, const std::function<void(int64_t)>& f) {
  parallel_for(0, (n + 1) / 2, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i);
      if (n - 1 - i != i) f(n - 1 - i);
    }
  });
}

// The symmetric matrix as a whole, in double, with the ridge on its diagonal; false where it is not finite.
bool load(const LowerTriangle& c, double ridge, const SquareView& out) {
  constexpr int64_t block = 32;
  const int64_t blocks = (c.n + block - 1) / block;
  Vectors sums(static_cast<size_t>(blocks), 0.0);
  dispatch_storage(c.storage, [&](auto* type) {
    const auto* from = reinterpret_cast<decltype(type)>(c.data);
    parallel_rows(blocks, [&](int64_t b) {
      const int64_t begin = b * block, end = std::min(begin + block, c.n);
      for (int64_t first = 0; first <= begin; first += block) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t j = first; j < std::min(first + block, i + 1); ++j) {
            const double x = static_cast<double>(widen(from[i * c.n + j]));
            out.row(i)[j] = out.row(j)[i] = x;
            sums[b] += x * 0;  // stays 0 but for NaN and Inf
          }
        }
      }
    });
  });
  for (int64_t i = 0; i < c.n; ++i) out.row(i)[i] += ridge;
  return std::all_of(sums.begin(), sums.end(), [](double x) { return x == 0; });
}

// At least the largest eigenvalue: the least of two norms and an estimate with a margin.
double largest_bound(const SquareView& c) {
  Vectors rows(static_cast<size_t>(c.n)), squares(static_cast<size_t>(c.n));
  parallel_for(0, c.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < c.n; ++j) rows[i] += std::abs(c.row(i)[j]);
      squares[i] = dot(c.row(i), c.row(i), c.n);
    }
  });
  double norm = 0;
  for (double x : squares) norm += x;
  norm = std::min(std::sqrt(norm), *std::max_element(rows.begin(), rows.end()));
  const double estimate = largest_eigenvalue(c.n, [&](const double* x, double* y) {
    parallel_for(0, c.n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) y[i] = dot(c.row(i), x, c.n);
    });
  });
  return std::min(norm, kMargin * estimate);
}

// The condition number of UᵀU; U's transpose is below its diagonal.
double factor_condition(const SquareView& u) {
  const int64_t n = u.n;
  double largest[2];
  parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t inverse = begin; inverse < end; ++inverse) {
      largest[inverse] = largest_eigenvalue(n, [&](const double* x, double* y) {
        if (inverse) {
          for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - dot(u.row(i), y, i)) / u.row(i)[i];
          for (int64_t i = n - 1; i >= 0; --i) {
            y[i] = (y[i] - dot(u.row(i) + i + 1, y + i + 1, n - 1 - i)) / u.row(i)[i];
          }
        } else {
          for (int64_t i = 0; i < n; ++i) y[i] = dot(u.row(i) + i, x + i, n - i);
          for (int64_t i = n - 1; i >= 0; --i) y[i] = dot(u.row(i), y, i + 1);
        }
      });
    }
  });
  return std::max(1.0, largest[0] * largest[1]);
}

class PositiveDefinite final : public PseudoInverse {
 public:
  PositiveDefinite(Vectors factor, int64_t n) : factor_(std::move(factor)), n_(n) {
    mirror_upper(square(factor_, n));
    spectrum = {n, factor_condition(square(factor_, n))};
  }
  void apply(double* x, int64_t stride, int64_t columns) const override {
    cholesky_solve(square(factor_, n_), x, stride, columns);
  }
  void drop(double* x, int64_t stride, int64_t columns) const override {
    for (int64_t i = 0; i < n_; ++i) std::fill_n(x + i * stride, columns, 0.0);
  }
  Vectors release() { return std::move(factor_); }

 private:
  Vectors factor_;
  int64_t n_;
};

class EigenInverse final : public PseudoInverse {
 public:
  EigenInverse(Eigen eigen, int64_t n, double rcond) : vectors_(std::move(eigen.vectors)), n_(n) {
    const Vectors& values = eigen.values;
    const double cut = n == 0 ? 0.0 : std::max(0.0, rcond * values[0]);
    const auto dropped = std::find_if(values.begin(), values.end(), [&](double x) { return !(x > cut); });
    const int64_t rank = dropped - values.begin();
    spectrum = {rank, rank == 0 ? 1.0 : values[0] / values[rank - 1]};
    vectors_.resize(static_cast<size_t>(rank * n));
    for (int64_t i = 0; i < rank; ++i) inverses_.push_back(1 / values[i]);
  }
  void apply(double* x, int64_t stride, int64_t columns) const override {
    Vectors kept = coordinates(x, stride, columns);
    for (int64_t i = 0; i < spectrum.rank; ++i) multiply(inverses_[i], kept.data() + i * columns, columns);
    for (int64_t i = 0; i < n_; ++i) std::fill_n(x + i * stride, columns, 0.0);
    add_product(1.0, rows(), kept, x, stride, columns);
  }
  void drop(double* x, int64_t stride, int64_t columns) const override {
    add_product(-1.0, rows(), coordinates(x, stride, columns), x, stride, columns);
  }

 private:
  MatrixView rows() const { return view(vectors_.data(), spectrum.rank, n_, n_, 1); }
  Vectors coordinates(const double* x, int64_t stride, int64_t columns) const {
    return product(view(vectors_.data(), n_, spectrum.rank, 1, n_), x, stride, columns);
  }

  Vectors vectors_, inverses_;  // eigenvectors kept, as rows, and the inverses of their eigenvalues
  int64_t n_;
};

// C ≈ LLᵀ, rows and columns in another order, with an inverse of LᵀL. What is zero of L is left out by blocks.
class ThinInverse final : public PseudoInverse {
 public:
  ThinInverse(Vectors factor, std::vector<int64_t> order, int64_t rank, std::unique_ptr<PseudoInverse> inner)
      : factor_(std::move(factor)), order_(std::move(order)), rank_(rank), inner_(std::move(inner)) {
    spectrum = inner_->spectrum;
  }
  void apply(double* x, int64_t stride, int64_t columns) const override {
    Vectors z = project(x, stride, columns);
    inner_->apply(z.data(), columns, columns);
    inner_->apply(z.data(), columns, columns);
    const Vectors expanded = expand(z, columns);
    for (size_t i = 0; i < order_.size(); ++i) {
      std::copy_n(expanded.data() + static_cast<int64_t>(i) * columns, columns, x + order_[i] * stride);
    }
  }
  void drop(double* x, int64_t stride, int64_t columns) const override {
    Vectors z = project(x, stride, columns);
    inner_->apply(z.data(), columns, columns);
    const Vectors expanded = expand(z, columns);
    for (size_t i = 0; i < order_.size(); ++i) {
      axpy(-1.0, expanded.data() + static_cast<int64_t>(i) * columns, x + order_[i] * stride, columns);
    }
  }

 private:
  int64_t n() const { return static_cast<int64_t>(order_.size()); }

  // Lᵀ x
  Vectors project(const double* x, int64_t stride, int64_t columns) const {
    Vectors ordered(static_cast<size_t>(n() * columns)), z(static_cast<size_t>(rank_ * columns), 0.0);
    for (int64_t i = 0; i < n(); ++i) std::copy_n(x + order_[i] * stride, columns, ordered.data() + i * columns);
    for (int64_t first = 0; first < rank_; first += kBlock) {
      accumulate_product<double>(
          1.0, view(factor_.data() + first * (rank_ + 1), n() - first, std::min(kBlock, rank_ - first), rank_, 1),
          view(ordered.data() + first * columns, n() - first, columns, columns, 1), nullptr, z.data() + first * columns,
          columns, 1, false);
    }
    return z;
  }
  // L z
  Vectors expand(const Vectors& z, int64_t columns) const {
    Vectors x(static_cast<size_t>(n() * columns), 0.0);
    for (int64_t first = 0, end; first < n(); first = end) {
      end = first < rank_ ? std::min(first + kBlock, rank_) : n();
      const int64_t depth = std::min(end, rank_);
      accumulate_product<double>(1.0, view(factor_.data() + first * rank_, depth, end - first, 1, rank_),
                                 view(z.data(), depth, columns, columns, 1), nullptr, x.data() + first * columns,
                                 columns, 1, false);
    }
    return x;
  }

  Vectors factor_;  // [n, rank]
  std::vector<int64_t> order_;
  int64_t rank_;
  std::unique_ptr<PseudoInverse> inner_;
};

void shift(const SquareView& c, double by) {
  for (int64_t i = 0; i < c.n; ++i) c.row(i)[i] += by;
}

// The norm, from above, of the symmetric matrix whose upper triangle is that of c from row `first` on.
double trailing_norm(const SquareView& c, int64_t first) {
  double squares = 0;
  for (int64_t i = first; i < c.n; ++i) squares += 2 * dot(c.row(i) + i, c.row(i) + i, c.n - i);
  return std::sqrt(squares);
}

// The upper triangle of LᵀL for L in the first `rank` columns of l, zero above its diagonal.
Vectors factor_square(const SquareView& l, int64_t rank) {
  Vectors out(static_cast<size_t>(rank * rank), 0.0);
  for (int64_t first = 0; first < rank; first += kBlock) {
    const int64_t end = std::min(first + kBlock, rank);
    accumulate_product<double>(1.0, view(l.row(first), l.n - first, end, l.stride, 1),
                               view(l.row(first) + first, l.n - first, end - first, l.stride, 1), nullptr,
                               out.data() + first, rank, 1, false);
  }
  return out;
}

}  // namespace

std::unique_ptr<PseudoInverse> pseudo_inverse(const LowerTriangle& c, double ridge, double rcond,
                                              const EigenSolver& eigen, const std::string& name) {
  const int64_t n = c.n;
  rcond = std::max(rcond, static_cast<double>(n) * kEps);
  Vectors work(static_cast<size_t>(n * n));
  const SquareView matrix = square(work, n);
  if (!load(c, ridge, matrix)) throw std::invalid_argument(name + " contains NaN or Inf");
  if (n <= kDirect) return std::make_unique<EigenInverse>(symmetric_eigen(std::move(work), n), n, rcond);

  // A pivot is no less than the smallest eigenvalue, a diagonal entry no more than the largest: where a pivot is too
  // small, so is an eigenvalue.
  double largest_entry = 0;
  for (int64_t i = 0; i < n; ++i) largest_entry = std::max(largest_entry, matrix.row(i)[i]);
  const bool positive = cholesky(matrix, rcond * largest_entry);
  if (positive) {
    auto inverse = std::make_unique<PositiveDefinite>(std::move(work), n);
    if (kSafely * rcond * inverse->spectrum.condition <= 1) return inverse;
    work = inverse->release();
  }

  load(c, ridge, matrix);
  const double bound = largest_bound(matrix), cut = rcond * bound;
  if (positive) {  // near the cut the factorisation of a shifted matrix decides
    shift(matrix, -cut);
    if (cholesky(matrix)) {
      load(c, ridge, matrix);
      cholesky(matrix);
      return std::make_unique<PositiveDefinite>(std::move(work), n);
    }
    load(c, ridge, matrix);
  }

  std::vector<int64_t> order;
  const auto most = static_cast<int64_t>(kThin * static_cast<double>(n));
  const double rounding = c.storage == Storage::f32 ? std::numeric_limits<float>::epsilon() : kEps;
  const int64_t rank = pivoted_cholesky(matrix, kNoise * rounding * bound, most, order);
  const double left_out = rank < most ? trailing_norm(matrix, rank) : bound;
  const bool exact = c.storage != Storage::f32;
  if (left_out <= static_cast<double>(n) * rounding * bound && (exact || left_out <= cut)) {
    Vectors inner = factor_square(matrix, rank), factor(static_cast<size_t>(n * rank));
    for (int64_t i = 0; i < n; ++i) std::copy_n(matrix.row(i), rank, factor.data() + i * rank);
    Vectors shifted = inner;
    shift(square(shifted, rank), -(exact ? cut : std::max(cut, left_out / kLeftOut)));
    std::unique_ptr<PseudoInverse> inverse;
    if (cholesky(square(shifted, rank))) {
      cholesky(square(inner, rank));
      inverse = std::make_unique<PositiveDefinite>(std::move(inner), rank);
    } else if (exact) {
      if (!eigen) return nullptr;
      mirror_upper(square(inner, rank));
      inverse = std::make_unique<EigenInverse>(eigen(std::move(inner), rank), rank, rcond);
    }
    if (inverse) return std::make_unique<ThinInverse>(std::move(factor), std::move(order), rank, std::move(inverse));
  }

  if (!eigen) return nullptr;
  load(c, ridge, matrix);
  return std::make_unique<EigenInverse>(eigen(std::move(work), n), n, rcond);
}

}  // namespace statsmerge
