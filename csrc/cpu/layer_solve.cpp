// layer_solve on the CPU: T = A + (D − A C) (C + ridge·I)^†, always computed in double. Small matrices, as of the
// groups of a depthwise convolution, are diagonalised one a thread; large ones take a Cholesky factorisation where C is
// proven to be safely positive definite and aten's symmetric eigendecomposition where not.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "common/tensors.h"
#include "cpu/kernels/symmetric_eigen.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr int64_t kSmall = 64;
constexpr double kEps = std::numeric_limits<double>::epsilon();

struct Report {
  int64_t rank;
  double condition;  // largest over smallest eigenvalue kept; 1 where none was
};

// How many of the n eigenvalues (descending) lie above rcond times the largest, and their condition number.
Report cut_spectrum(const double* values, int64_t n, double rcond) {
  const double threshold = std::max(0.0, std::max(rcond, n * kEps) * values[0]);
  int64_t rank = 0;
  while (rank < n && values[rank] > threshold) ++rank;
  return {rank, rank == 0 ? 1.0 : values[0] / values[rank - 1]};
}

// The lower triangle of c mirrored, in double, with ridge on the diagonal.
void mirror(const double* c, int64_t n, double ridge, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) out[i * n + j] = out[j * n + i] = c[i * n + j];
    out[i * n + i] += ridge;
  }
}

bool finite_lower(const double* c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      if (!std::isfinite(c[i * n + j])) return false;
    }
  }
  return true;
}

// rows <- rows (C + ridge·I)^† for `count` rows of length n.
Report solve_small(std::vector<double> c, int64_t n, double rcond, double* rows, int64_t count) {
  const Eigen eigen = symmetric_eigen(std::move(c), n);
  const Report report = cut_spectrum(eigen.values.data(), n, rcond);
  std::vector<double> coordinates(static_cast<size_t>(report.rank));
  for (int64_t r = 0; r < count; ++r) {
    double* row = rows + r * n;
    for (int64_t i = 0; i < report.rank; ++i)
      coordinates[i] = dot(row, eigen.vectors.data() + i * n, n) / eigen.values[i];
    std::fill(row, row + n, 0.0);
    for (int64_t i = 0; i < report.rank; ++i) axpy(coordinates[i], eigen.vectors.data() + i * n, row, n);
  }
  return report;
}

double* data(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

// The largest eigenvalue of a symmetric positive definite operator by Lanczos, from below and usually within a few per
// cent.
double largest_eigenvalue(const std::function<Tensor(const Tensor&)>& apply, const Tensor& like, int64_t n) {
  constexpr int64_t steps = 16;
  std::mt19937_64 generator(0);
  std::normal_distribution<double> normal;
  std::vector<double> basis(static_cast<size_t>(n * (steps + 1))), t(steps * steps, 0.0);
  for (int64_t i = 0; i < n; ++i) basis[i] = normal(generator);
  const auto normalize = [&](double* x) {
    const double norm = std::sqrt(dot(x, x, n));
    if (norm > 0) std::for_each(x, x + n, [&](double& value) { value /= norm; });
    return norm;
  };
  normalize(basis.data());
  for (int64_t s = 0; s < steps; ++s) {
    Tensor x = new_empty(like, {n, 1}, ScalarType::Double);
    std::copy_n(basis.data() + s * n, n, data(x));
    const Tensor y = dense(apply(x));
    double* next = basis.data() + (s + 1) * n;
    std::copy_n(data(y), n, next);
    t[s * steps + s] = dot(next, basis.data() + s * n, n);
    for (int repeat = 0; repeat < 2; ++repeat) {
      for (int64_t i = 0; i <= s; ++i) axpy(-dot(next, basis.data() + i * n, n), basis.data() + i * n, next, n);
    }
    const double coupling = normalize(next);
    if (s + 1 < steps) t[s * steps + s + 1] = t[(s + 1) * steps + s] = coupling;
  }
  return symmetric_eigen(std::move(t), steps).values[0];
}

// The lower Cholesky factor of c [n, n], or nothing where c is not positive definite.
std::optional<Tensor> cholesky(const Tensor& c) {
  const auto [factor, info] = call_aten<2>("aten::linalg_cholesky_ex", "", c, false, false);
  if (*static_cast<const int32_t*>(info.const_data_ptr()) != 0) return std::nullopt;
  return factor;
}

// Proves by a factorisation that every eigenvalue of c exceeds rcond times the largest: c − rcond·‖c‖·I is positive
// definite with ‖c‖ at least the largest eigenvalue.
bool safely_positive_definite(const Tensor& c, int64_t n, double rcond) {
  double largest_row = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double* row = data(c) + i * n;
    squares += dot(row, row, n);
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += std::abs(row[j]);
    largest_row = std::max(largest_row, sum);
  }
  const double bound = std::min(largest_row, std::sqrt(squares));
  Tensor shifted = torch::stable::clone(c);
  for (int64_t i = 0; i < n; ++i) data(shifted)[i * n + i] -= std::max(rcond, n * kEps) * bound;
  return cholesky(shifted).has_value();
}

// y [m, r] with column i divided by values[i].
void divide_columns(const Tensor& y, const double* values) {
  const int64_t m = y.sizes()[0], r = y.sizes()[1];
  parallel_for(0, m, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < r; ++j) data(y)[i * r + j] /= values[j];
    }
  });
}

// rows [m, n] (C + ridge·I)^†; c is symmetric with the ridge on its diagonal.
std::pair<Tensor, Report> solve_large(const Tensor& c, int64_t n, double rcond, const Tensor& rows) {
  if (safely_positive_definite(c, n, rcond)) {
    if (const auto factor = cholesky(c)) {
      const auto inverse = [&](const Tensor& b) {
        return call_aten<1>("aten::cholesky_solve", "", b, *factor, false)[0];
      };
      const auto forward = [&](const Tensor& b) { return aten::matmul(c, b); };
      const double condition = largest_eigenvalue(forward, c, n) * largest_eigenvalue(inverse, c, n);
      return {aten::transpose(inverse(aten::transpose(rows))), Report{n, condition}};
    }
  }
  auto [ascending, vectors] = call_aten<2>("aten::linalg_eigh", "", c, std::string("L"));
  std::vector<double> values(data(ascending), data(ascending) + n);
  std::reverse(values.begin(), values.end());
  const Report report = cut_spectrum(values.data(), n, rcond);
  Tensor kept = slice(vectors, 1, n - report.rank, report.rank);
  Tensor coordinates = dense(aten::matmul(rows, kept));
  divide_columns(coordinates, data(ascending) + n - report.rank);
  return {aten::matmul(coordinates, aten::transpose(kept)), report};
}

struct Outputs {
  Outputs(const Tensor& like, int64_t batches)
      : rank(new_empty(like, {batches}, ScalarType::Long)), condition(new_empty(like, {batches}, ScalarType::Double)) {}
  void set(int64_t batch, const Report& report) {
    static_cast<int64_t*>(rank.mutable_data_ptr())[batch] = report.rank;
    data(condition)[batch] = report.condition;
  }
  Tensor rank, condition;
};

// c [B, n, n], d and anchor [B, m, n]; shapes are checked by the Python wrapper.
std::tuple<Tensor, Tensor, Tensor> layer_solve(Tensor c, Tensor d, std::optional<Tensor> anchor, double rcond,
                                               double ridge) {
  const int64_t batches = c.sizes()[0], n = c.sizes()[1], m = d.sizes()[1];
  const ScalarType type = d.scalar_type();
  Outputs reports(c, batches);
  if (n == 0) {
    for (int64_t b = 0; b < batches; ++b) reports.set(b, {0, 1.0});
    return {torch::stable::clone(d), reports.rank, reports.condition};
  }
  const Tensor gram = dense(to_dtype(c, ScalarType::Double));
  Tensor full = torch::stable::empty_like(gram);
  parallel_for(0, batches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      check(finite_lower(data(gram) + b * n * n, n), batches > 1 ? indexed("C", b) : "C", " contains NaN or Inf");
      mirror(data(gram) + b * n * n, n, 0.0, data(full) + b * n * n);
    }
  });
  Tensor rows = torch::stable::clone(dense(to_dtype(d, ScalarType::Double)));
  Tensor start = rows;
  if (anchor) {
    start = dense(to_dtype(*anchor, ScalarType::Double));
    rows = dense(torch::stable::subtract(rows, aten::matmul(start, full)));
  }
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t i = 0; i < n; ++i) data(full)[(b * n + i) * n + i] += ridge;
  }
  if (n <= kSmall) {
    parallel_for(0, batches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const double* matrix = data(full) + b * n * n;
        reports.set(b, solve_small(std::vector<double>(matrix, matrix + n * n), n, rcond, data(rows) + b * m * n, m));
      }
    });
  } else {
    for (int64_t b = 0; b < batches; ++b) {
      Tensor target = reshape(slice(rows, 0, b, 1), {m, n});
      const Tensor matrix = reshape(slice(full, 0, b, 1), {n, n});
      const auto [solution, report] = solve_large(matrix, n, rcond, target);
      torch::stable::copy_(target, solution);
      reports.set(b, report);
    }
  }
  if (anchor) axpy(1.0, data(start), data(rows), rows.numel());
  return {to_dtype(rows, type), reports.rank, reports.condition};
}

// T = Yᵀ (X^†)ᵀ with the rows X_k of all experts stacked and Y_k = X_k T_kᵀ: the singular values of X, not their
// squares, are compared with rcond. A weight w of a token multiplies its row by √w.
std::tuple<Tensor, Tensor, Tensor> layer_solve_features(TensorList xs, TensorList ts, TensorList weights,
                                                        double rcond) {
  const ScalarType type = ts[0].scalar_type();
  TensorList outputs;
  for (size_t k = 0; k < xs.size(); ++k) {
    Tensor x = dense(to_dtype(xs[k], ScalarType::Double));
    if (!weights.empty()) {
      x = torch::stable::clone(x);
      const Tensor weight = dense(to_dtype(weights[k], ScalarType::Double));
      const int64_t columns = x.sizes()[1];
      for (int64_t i = 0; i < x.sizes()[0]; ++i) {
        const double root = std::sqrt(data(weight)[i]);
        std::for_each(data(x) + i * columns, data(x) + (i + 1) * columns, [&](double& value) { value *= root; });
      }
    }
    outputs.push_back(aten::matmul(x, aten::transpose(to_dtype(ts[k], ScalarType::Double))));
    xs[k] = x;
  }
  const Tensor x = call_aten<1>("aten::cat", "", xs, int64_t{0})[0];
  const Tensor y = call_aten<1>("aten::cat", "", outputs, int64_t{0})[0];
  for (int64_t i = 0; i < x.numel(); ++i) check(std::isfinite(data(x)[i]), "xs contains NaN or Inf");
  const int64_t tokens = x.sizes()[0], n = x.sizes()[1], m = ts[0].sizes()[0];
  Outputs reports(x, 1);
  if (tokens == 0 || n == 0) {
    reports.set(0, {0, 1.0});
    return {torch::stable::new_zeros(ts[0], std::vector<int64_t>{m, n}), reports.rank, reports.condition};
  }
  auto [u, s, vh] = call_aten<3>("aten::linalg_svd", "", x, false, std::optional<std::string>());
  Report report = cut_spectrum(data(s), std::min(tokens, n), rcond);
  Tensor left = slice(u, 1, 0, report.rank);
  Tensor right = slice(vh, 0, 0, report.rank);
  const Tensor coordinates = dense(aten::matmul(aten::transpose(y), left));
  divide_columns(coordinates, data(s));
  report.condition *= report.condition;  // of the Gram matrix XᵀX, as layer_solve reports it
  reports.set(0, report);
  return {to_dtype(aten::matmul(coordinates, right), type), reports.rank, reports.condition};
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("layer_solve", TORCH_BOX(&statsmerge::layer_solve));
  m.impl("layer_solve_features", TORCH_BOX(&statsmerge::layer_solve_features));
}
