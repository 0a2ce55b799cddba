// Cholesky factorisations and pseudo-inverses against plain loops in double.
#include "check.h"
#include "cpu/kernels/cholesky.h"
#include "cpu/kernels/solve.h"

namespace {

using Matrix = std::vector<double>;

// xᵀ x for x [rows, n].
Matrix gram(const Matrix& x, int64_t rows, int64_t n) {
  Matrix c(static_cast<size_t>(n * n), 0.0);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) c[i * n + j] += x[t * n + i] * x[t * n + j];
    }
  }
  return c;
}

// The symmetric matrix c [n, n] times x [n, columns].
Matrix times(const Matrix& c, const Matrix& x, int64_t n, int64_t columns) {
  Matrix out(static_cast<size_t>(n * columns), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t j = 0; j < columns; ++j) out[i * columns + j] += c[i * n + k] * x[k * columns + j];
    }
  }
  return out;
}

double largest_difference(const Matrix& a, const Matrix& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

std::unique_ptr<statsmerge::PseudoInverse> inverse_of(const Matrix& c, int64_t n, double rcond = 0) {
  const auto eigen = [](const std::vector<double>& matrix, int64_t size) {
    return statsmerge::symmetric_eigen(matrix, size);
  };
  return statsmerge::pseudo_inverse({reinterpret_cast<const char*>(c.data()), statsmerge::Storage::f64, n}, 0.0, rcond,
                                    eigen, "C");
}

}  // namespace

NATIVE_TEST(cholesky_factorises_and_solves) {
  for (const int64_t n : {1, 7, 24, 63, 64, 65, 128, 200, 321}) {
    for (const int threads : {1, 2, 5}) {
      set_threads(threads);
      const int64_t stride = n + 3, columns = n % 2 ? 1 : 51;
      const Matrix c = gram(normal(2 * n * n, 1), 2 * n, n);
      Matrix storage(static_cast<size_t>(n * stride), NAN);
      for (int64_t i = 0; i < n; ++i) std::copy_n(c.data() + i * n, n, storage.data() + i * stride);
      const statsmerge::SquareView factor{storage.data(), n, stride};
      CHECK(statsmerge::cholesky(factor), n);
      statsmerge::mirror_upper(factor);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          double sum = 0;
          for (int64_t k = 0; k <= j; ++k) sum += factor.row(i)[k] * factor.row(k)[j];
          CHECK(std::abs(sum - c[i * n + j]) <= 1e-13 * static_cast<double>(n * n), n, i, j);
        }
      }
      const Matrix x = normal(n * columns, 2);
      Matrix y = times(c, x, n, columns);
      statsmerge::cholesky_solve(factor, y.data(), columns, columns);
      CHECK(largest_difference(x, y) <= 1e-9, n, largest_difference(x, y));
    }
  }
}

NATIVE_TEST(cholesky_refuses_what_is_not_positive_definite) {
  for (const int64_t n : {1, 60, 130, 300}) {
    Matrix c = gram(normal(2 * n * n, 3), 2 * n, n);
    c[(n - 1) * n + n - 1] = -1;
    CHECK(!statsmerge::cholesky({c.data(), n, n}), n);
  }
}

NATIVE_TEST(cholesky_refuses_small_pivots) {
  for (const int64_t n : {1, 65, 300}) {
    Matrix c(static_cast<size_t>(n * n), 0.0);
    for (int64_t i = 0; i < n; ++i) c[i * n + i] = i == n / 2 ? 1e-6 : 1;
    Matrix copy = c;
    CHECK(statsmerge::cholesky({copy.data(), n, n}, 0.9e-6), n);
    CHECK(!statsmerge::cholesky({c.data(), n, n}, 1.1e-6), n);
  }
}

NATIVE_TEST(pivoted_cholesky_finds_the_rank) {
  for (const int64_t n : {1, 40, 150, 260}) {
    for (const int64_t rank : {int64_t{0}, int64_t{1}, n / 3, n}) {
      if (rank > n) continue;
      const Matrix c = gram(normal(rank * n, 4), rank, n);
      Matrix work = c;
      std::vector<int64_t> order;
      CHECK(statsmerge::pivoted_cholesky({work.data(), n, n}, 1e-9, n, order) == rank, n, rank);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          double sum = 0;
          for (int64_t k = 0; k < rank; ++k) sum += work[i * n + k] * work[j * n + k];
          CHECK(std::abs(sum - c[order[i] * n + order[j]]) <= 1e-9, n, rank, i, j);
        }
      }
    }
  }
}

NATIVE_TEST(pseudo_inverses_of_every_kind) {
  for (const int64_t n : {1, 5, 33, 70, 150}) {
    for (const int64_t rank : {int64_t{0}, int64_t{1}, n / 2, n - 1, 2 * n}) {
      for (const int threads : {1, 3}) {
        set_threads(threads);
        const Matrix c = gram(normal(rank * n, 5), rank, n);
        const auto inverse = inverse_of(c, n);
        CHECK(inverse->spectrum.rank == std::min(rank, n), n, rank, inverse->spectrum.rank);
        CHECK(inverse->spectrum.condition >= 1, n, rank);
        const int64_t columns = 5, stride = 9;
        const Matrix x = normal(n * columns, 6), y = times(c, x, n, columns);
        Matrix solved(static_cast<size_t>(n * stride), 7.0), dropped = solved;
        for (int64_t i = 0; i < n; ++i) {
          std::copy_n(y.data() + i * columns, columns, solved.data() + i * stride);
          std::copy_n(x.data() + i * columns, columns, dropped.data() + i * stride);
        }
        inverse->apply(solved.data(), stride, columns);  // C^† C x is the part of x that is kept
        inverse->drop(dropped.data(), stride, columns);  // and this what is not
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < stride; ++j) {
            const double expected = j < columns ? x[i * columns + j] : 14.0;
            CHECK(std::abs(solved[i * stride + j] + dropped[i * stride + j] - expected) <= 1e-7, n, rank, i, j);
          }
        }
      }
    }
  }
}

// Rounded to float, a matrix of low rank has full rank; what is beside its features is left out.
NATIVE_TEST(pseudo_inverses_leave_out_the_rounding_of_floats) {
  for (const int64_t n : {70, 150}) {
    const int64_t rank = n / 2, columns = 5;
    const Matrix c = gram(normal(rank * n, 9), rank, n);
    const std::vector<float> rounded(c.begin(), c.end());
    const auto no_eigenvectors = [n](const std::vector<double>&, int64_t) -> statsmerge::Eigen {
      CHECK(false, n);
      return {};
    };
    const auto inverse = statsmerge::pseudo_inverse({reinterpret_cast<const char*>(rounded.data()),
                                                     statsmerge::Storage::f32, n},
                                                    0.0, static_cast<double>(n) * 0x1p-23, no_eigenvectors, "C");
    CHECK(inverse->spectrum.rank == rank, n, inverse->spectrum.rank);
    const Matrix x = normal(n * columns, 10);
    Matrix once = times(c, x, n, columns);
    inverse->apply(once.data(), columns, columns);
    const Matrix image = times(c, once, n, columns), expected = times(c, x, n, columns);
    CHECK(largest_difference(image, expected) <= 1e-4 * largest_difference(expected, Matrix(expected.size(), 0.0)), n);
  }
}

NATIVE_TEST(pseudo_inverses_do_not_depend_on_threads) {
  const int64_t n = 200, columns = 30;
  for (const int64_t rank : {90, 400}) {
    const Matrix c = gram(normal(rank * n, 7), rank, n);
    Matrix first;
    for (const int threads : {1, 2, 7}) {
      set_threads(threads);
      Matrix x = normal(n * columns, 8);
      inverse_of(c, n)->apply(x.data(), columns, columns);
      if (first.empty()) first = x;
      CHECK(first == x, rank, threads);
    }
  }
}

NATIVE_TEST(pseudo_inverse_refuses_what_is_not_finite) {
  for (const int64_t n : {3, 40}) {
    Matrix c(static_cast<size_t>(n * n), NAN);  // above the diagonal nothing is read
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) c[i * n + j] = i == j;
    }
    CHECK(inverse_of(c, n)->spectrum.rank == n);
    c[(n - 1) * n] = INFINITY;
    bool refused = false;
    try {
      inverse_of(c, n);
    } catch (const std::invalid_argument& error) {
      refused = std::string(error.what()) == "C contains NaN or Inf";
    }
    CHECK(refused, n);
  }
}
