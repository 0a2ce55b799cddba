// layer_solve on the CPU: T = A + (D − A C) (C + ridge·I)^†, in double. With F the pseudo-inverse of C + ridge·I and P
// the projection onto what it keeps, C F = P − ridge·F, so that T = (D + ridge·A) F + A (I − P): C itself is not needed
// once it is factorised, and rows of D are taken through F a few at a time.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/tensors.h"
#include "cpu/kernels/product.h"
#include "cpu/kernels/solve.h"

namespace statsmerge {
namespace {

constexpr int64_t kSmall = 64;       // up to this size our own eigendecomposition is faster than aten's
constexpr int64_t kMedium = 256;     // systems up to this size are solved one a thread where there are several
constexpr int64_t kRows = 192;       // rows of D at a time
constexpr double kEps = std::numeric_limits<double>::epsilon();

double* data(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

// Eigenvectors as symmetric_eigen returns them, by aten where that is faster.
Eigen eigenvectors(const Tensor& like, std::vector<double> matrix, int64_t n) {
  if (n <= kSmall) return symmetric_eigen(std::move(matrix), n);
  Tensor c = new_empty(like, {n, n}, ScalarType::Double);
  std::copy(matrix.begin(), matrix.end(), data(c));
  matrix = {};
  auto [values, vectors] = call_aten<2>("aten::linalg_eigh", "", c, std::string("L"));
  c = {};
  const Tensor rows = dense(aten::transpose(vectors));
  Eigen eigen{std::vector<double>(static_cast<size_t>(n)), std::vector<double>(static_cast<size_t>(n * n))};
  for (int64_t i = 0; i < n; ++i) {
    eigen.values[i] = data(values)[n - 1 - i];
    std::copy_n(data(rows) + (n - 1 - i) * n, n, eigen.vectors.data() + i * n);
  }
  return eigen;
}

// x [n, rows] += factor · rows [first, first + rows) of a matrix of n columns, transposed.
void add_rows(const Tensor& matrix, int64_t first, int64_t rows, int64_t n, double factor, double* x) {
  constexpr int64_t block = 16;
  dispatch_storage(storage_of(matrix, "D"), [&](auto* type) {
    const auto* from = reinterpret_cast<decltype(type)>(bytes(matrix)) + first * n;
    for (int64_t column = 0; column < n; column += block) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = column; j < std::min(column + block, n); ++j) {
          x[j * rows + i] += factor * static_cast<double>(widen(from[i * n + j]));
        }
      }
    }
  });
}

// Rows [first, first + rows) of a matrix of n columns = (x + y)ᵀ; a null y is zero.
template <class T>
void store_rows(const double* x, const double* y, int64_t first, int64_t rows, int64_t n, T* matrix) {
  constexpr int64_t block = 16;
  for (int64_t column = 0; column < n; column += block) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = column; j < std::min(column + block, n); ++j) {
        matrix[(first + i) * n + j] = static_cast<T>(x[j * rows + i] + (y ? y[j * rows + i] : 0.0));
      }
    }
  }
}

// Rows [begin, end) of t = (d + ridge·a) F + a (I − P), matrices of n columns.
void solve_rows(const PseudoInverse& inverse, const Tensor& d, const std::optional<Tensor>& anchor, double ridge,
                int64_t begin, int64_t end, int64_t n, const Tensor& t) {
  parallel_for(0, (end - begin + kRows - 1) / kRows, 1, [&](int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = begin + block * kRows, rows = std::min(kRows, end - first);
      std::vector<double> x(static_cast<size_t>(n * rows), 0.0), kept;
      add_rows(d, first, rows, n, 1.0, x.data());
      if (anchor) {
        add_rows(*anchor, first, rows, n, ridge, x.data());
        kept.resize(x.size(), 0.0);
        add_rows(*anchor, first, rows, n, 1.0, kept.data());
        inverse.drop(kept.data(), rows, rows);
      }
      inverse.apply(x.data(), rows, rows);
      const double* rest = anchor ? kept.data() : nullptr;
      if (t.scalar_type() == ScalarType::Double) {
        store_rows(x.data(), rest, first, rows, n, data(t));
      } else {
        store_rows(x.data(), rest, first, rows, n, static_cast<float*>(t.mutable_data_ptr()));
      }
    }
  });
}

struct Outputs {
  Outputs(const Tensor& like, int64_t batches)
      : rank(new_empty(like, {batches}, ScalarType::Long)), condition(new_empty(like, {batches}, ScalarType::Double)) {}
  void set(int64_t batch, const Spectrum& spectrum) {
    static_cast<int64_t*>(rank.mutable_data_ptr())[batch] = spectrum.rank;
    data(condition)[batch] = spectrum.condition;
  }
  Tensor rank, condition;
};

// c [B, n, n], d and anchor [B, m, n]; shapes are checked by the Python wrapper.
std::tuple<Tensor, Tensor, Tensor> layer_solve(Tensor c, Tensor d, std::optional<Tensor> anchor, double rcond,
                                               double ridge) {
  const int64_t batches = c.sizes()[0], n = c.sizes()[1], m = d.sizes()[1];
  Outputs reports(c, batches);
  c = dense(c);
  d = dense(d);
  if (anchor) anchor = dense(*anchor);
  const Tensor t = torch::stable::empty_like(d);
  const Storage storage = storage_of(c, "C");
  const auto solve = [&](int64_t b, const EigenSolver& eigen) {
    const LowerTriangle matrix{bytes(c) + b * n * n * bytes_of(storage), storage, n};
    const auto inverse = pseudo_inverse(matrix, ridge, rcond, eigen, batches > 1 ? indexed("C", b) : "C");
    if (!inverse) return false;
    reports.set(b, inverse->spectrum);
    solve_rows(*inverse, d, anchor, ridge, b * m, (b + 1) * m, n, t);
    return true;
  };
  const EigenSolver small = [](const std::vector<double>& matrix, int64_t size) { return symmetric_eigen(matrix, size); };
  std::vector<char> solved(static_cast<size_t>(batches), false);
  if (batches > 1 && n <= kMedium) {
    parallel_for(0, batches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) solved[b] = solve(b, n <= kSmall ? small : EigenSolver());
    });
  }
  for (int64_t b = 0; b < batches; ++b) {
    if (!solved[b]) {
      solve(b, [&](std::vector<double> matrix, int64_t size) { return eigenvectors(c, std::move(matrix), size); });
    }
  }
  return {t, reports.rank, reports.condition};
}

// T = Yᵀ (X^†)ᵀ with the rows X_k of all experts stacked and Y_k = X_k T_kᵀ. A weight w of a token multiplies its row
// by √w. Where eps over the cut-off's square leaves the result's precision, X^† comes from the smaller of XXᵀ and XᵀX, the
// squares of whose singular values are compared with rcond²; otherwise from a singular value decomposition.
std::tuple<Tensor, Tensor, Tensor> layer_solve_features(TensorList xs, TensorList ts, TensorList weights,
                                                        double rcond) {
  const ScalarType type = ts[0].scalar_type();
  const int64_t n = ts[0].sizes()[1], m = ts[0].sizes()[0];
  int64_t tokens = 0;
  for (const Tensor& x : xs) tokens += x.sizes()[0];
  const Tensor x = new_empty(ts[0], {tokens, n}, ScalarType::Double);
  const Tensor y = torch::stable::new_zeros(x, std::vector<int64_t>{tokens, m});
  const auto view = [](const Tensor& matrix, int64_t first, int64_t rows, int64_t columns, bool transposed) {
    const char* from = bytes(matrix) + first * columns * static_cast<int64_t>(matrix.element_size());
    const Storage storage = storage_of(matrix, "xs");
    return transposed ? MatrixView{from, storage, columns, rows, 1, columns}
                      : MatrixView{from, storage, rows, columns, columns, 1};
  };
  Outputs reports(x, 1);
  for (int64_t k = 0, first = 0; k < static_cast<int64_t>(xs.size()); first += xs[k++].sizes()[0]) {
    const int64_t rows = xs[k].sizes()[0];
    const Tensor features = dense(xs[k]), solution = dense(ts[k]);
    std::optional<Tensor> weight;
    if (!weights.empty()) weight = dense(to_dtype(weights[k], ScalarType::Double));
    dispatch_storage(storage_of(features, "xs"), [&](auto* type) {
      const auto* from = reinterpret_cast<decltype(type)>(bytes(features));
      parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const double root = weight ? std::sqrt(data(*weight)[i]) : 1.0;
          double sum = 0;
          for (int64_t j = 0; j < n; ++j) {
            const double value = root * static_cast<double>(widen(from[i * n + j]));
            data(x)[(first + i) * n + j] = value;
            sum += value * 0;
          }
          check(sum == 0, "xs contains NaN or Inf");
        }
      });
    });
    accumulate_product<double>(1.0, view(x, first, rows, n, true), view(solution, 0, m, n, true), nullptr,
                               data(y) + first * m, m, 1, false);
  }
  if (tokens == 0 || n == 0) {
    reports.set(0, {0, 1.0});
    return {torch::stable::new_zeros(ts[0], std::vector<int64_t>{m, n}), reports.rank, reports.condition};
  }
  const Tensor t = torch::stable::new_zeros(x, std::vector<int64_t>{m, n});
  const double resolution = type == ScalarType::Double ? kEps : std::numeric_limits<float>::epsilon();
  if (rcond * rcond * resolution >= kEps) {
    const int64_t size = std::min(tokens, n);
    const Tensor gram = torch::stable::new_zeros(x, std::vector<int64_t>{size, size});
    const MatrixView side = view(x, 0, tokens, n, tokens < n);
    accumulate_product<double>(1.0, side, side, nullptr, data(gram), size, 1, true);
    const auto inverse = pseudo_inverse(
        {bytes(gram), Storage::f64, size}, 0.0, rcond * rcond,
        [&](std::vector<double> matrix, int64_t rank) { return eigenvectors(x, std::move(matrix), rank); }, "xs");
    reports.set(0, inverse->spectrum);
    const auto apply = [&](const Tensor& columns, int64_t count) {
      parallel_for(0, (count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          inverse->apply(data(columns) + b * kRows, count, std::min(kRows, count - b * kRows));
        }
      });
    };
    if (tokens < n) {
      apply(y, m);
      accumulate_product<double>(1.0, view(y, 0, tokens, m, false), view(x, 0, tokens, n, false), nullptr, data(t), n,
                                 1, false);
    } else {
      accumulate_product<double>(1.0, view(y, 0, tokens, m, false), view(x, 0, tokens, n, false), nullptr, data(t), n,
                                 1, false);
      solve_rows(*inverse, t, std::nullopt, 0.0, 0, m, n, t);
    }
    return {to_dtype(t, type), reports.rank, reports.condition};
  }
  auto [u, s, vh] = call_aten<3>("aten::linalg_svd", "", x, false, std::optional<std::string>());
  const int64_t count = std::min(tokens, n);
  const double cut = std::max(rcond, static_cast<double>(count) * kEps) * data(s)[0];
  const int64_t rank = std::find_if(data(s), data(s) + count, [&](double value) { return !(value > cut); }) - data(s);
  // The condition of the Gram matrix XᵀX, as layer_solve reports it.
  reports.set(0, {rank, rank == 0 ? 1.0 : std::pow(data(s)[0] / data(s)[rank - 1], 2)});
  const Tensor left = dense(slice(u, 1, 0, rank));
  parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < rank; ++j) data(left)[i * rank + j] /= data(s)[j];
    }
  });
  const Tensor coordinates = aten::matmul(aten::transpose(y), left);
  return {to_dtype(aten::matmul(coordinates, slice(vh, 0, 0, rank)), type), reports.rank, reports.condition};
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("layer_solve", TORCH_BOX(&statsmerge::layer_solve));
  m.impl("layer_solve_features", TORCH_BOX(&statsmerge::layer_solve_features));
}
