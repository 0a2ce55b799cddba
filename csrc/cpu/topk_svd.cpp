// topk_svd and weight_statistics on the CPU. Thin or small matrices are decomposed directly, others by block Lanczos.
#include <algorithm>
#include <cmath>

#include "cpu/operand.h"
#include "cpu/svd.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr int64_t kDenseSide = 32;           // matrices with at most this many rows or columns are decomposed directly
constexpr int64_t kDenseElements = 1 << 19;  // ... unless they are long

struct Settings {
  int64_t k;
  double tol;
  int64_t max_passes;
  bool vectors;
  uint64_t seed;
};

Svd decompose(const Operand& a, const Settings& settings) {
  const int64_t k = std::min(settings.k, std::min(a.rows, a.columns));
  Svd out;
  if (k > 0) {
    const bool dense = std::min(a.rows, a.columns) <= kDenseSide && a.rows * a.columns <= kDenseElements;
    out = dense ? dense_svd(a, k, settings.vectors, settings.seed)
                : lanczos_svd(a, k, settings.tol, settings.max_passes, settings.vectors, settings.seed);
  }
  ++out.passes;  // the inspection
  for (double& s : out.s) s /= a.scale();
  for (double& b : out.bound) b /= a.scale();
  if (a.transposed()) std::swap(out.u, out.v);
  return out;
}

// Calls f(index, operand) for every matrix: large ones one after another with all threads, then small ones in parallel.
template <class F>
void for_each_matrix(const TensorList& mats, const TensorList& minus, const F& f) {
  std::vector<int64_t> small;
  const auto one = [&](int64_t i) {
    Operand a(mats[i], minus.empty() ? nullptr : &minus[i]);
    a.inspect(i);
    f(i, a);
  };
  for (size_t i = 0; i < mats.size(); ++i) {
    if (mats[i].numel() < kShared) {
      small.push_back(static_cast<int64_t>(i));
    } else {
      one(static_cast<int64_t>(i));
    }
  }
  parallel_for(0, static_cast<int64_t>(small.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(small[i]);
  });
}

template <class T>
void store(const std::vector<double>& values, int64_t count, Tensor& out) {
  std::transform(values.begin(), values.begin() + count, static_cast<T*>(out.mutable_data_ptr()),
                 [](double x) { return static_cast<T>(x); });
}

std::tuple<TensorList, TensorList, TensorList, TensorList, Tensor> topk_svd(TensorList mats, TensorList minus,
                                                                            int64_t k, double tol, int64_t max_passes,
                                                                            bool vectors, int64_t seed) {
  check(!mats.empty(), "mats: expected at least one matrix");
  const Settings settings{k, tol, max_passes, vectors, static_cast<uint64_t>(seed)};
  TensorList s, u, vh, residual;
  Tensor passes = new_empty(mats[0], {static_cast<int64_t>(mats.size())}, ScalarType::Long);
  const auto type_of = [](const Tensor& mat) {
    return mat.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  };
  for (const Tensor& mat : mats) {
    const int64_t kept = vectors ? k : 0;
    s.push_back(new_empty(mat, {k}, type_of(mat)));
    residual.push_back(new_empty(mat, {k}, type_of(mat)));
    u.push_back(new_empty(mat, {mat.sizes()[0], kept}, type_of(mat)));
    vh.push_back(new_empty(mat, {kept, mat.sizes()[1]}, type_of(mat)));
  }
  for_each_matrix(mats, minus, [&](int64_t i, const Operand& a) {
    const Svd svd = decompose(a, settings);
    const auto write = [&](auto zero) {
      using T = decltype(zero);
      store<T>(svd.s, k, s[i]);
      store<T>(svd.bound, k, residual[i]);
      if (!vectors) return;
      store<T>(svd.v.values, k * svd.v.length, vh[i]);
      T* out = static_cast<T*>(u[i].mutable_data_ptr());
      for (int64_t r = 0; r < svd.u.length; ++r) {
        for (int64_t c = 0; c < k; ++c) out[r * k + c] = static_cast<T>(svd.u[c][r]);
      }
    };
    s[i].scalar_type() == ScalarType::Double ? write(0.0) : write(0.0f);
    static_cast<int64_t*>(passes.mutable_data_ptr())[i] = svd.passes;
  });
  return {s, u, vh, residual, passes};
}

// Mean, biased variance and L2 norm. Deviations are taken from the first element, so that a constant has variance 0
// exactly.
void moments(const Operand& a, double* out) {
  const double count = static_cast<double>(a.rows * a.columns);
  std::vector<double> first_row(static_cast<size_t>(a.columns)), sums(static_cast<size_t>(3 * a.parts()), 0.0);
  a.load_row(0, first_row.data());
  const double origin = first_row[0];
  a.for_parts([&](int64_t part, int64_t first, int64_t last) {
    std::vector<double> row(static_cast<size_t>(a.columns)), ones(static_cast<size_t>(a.columns), 1.0);
    for (int64_t i = first; i < last; ++i) {
      a.load_row(i, row.data());
      sums[3 * part + 2] += dot(row.data(), row.data(), a.columns);
      axpy(-origin, ones.data(), row.data(), a.columns);
      sums[3 * part] += dot(row.data(), ones.data(), a.columns);
      sums[3 * part + 1] += dot(row.data(), row.data(), a.columns);
    }
  });
  double deviation = 0, squares = 0, norm = 0;
  for (int64_t p = 0; p < a.parts(); ++p) {
    deviation += sums[3 * p];
    squares += sums[3 * p + 1];
    norm += sums[3 * p + 2];
  }
  const double shift = deviation / count;
  out[0] = (origin + shift) / a.scale();
  out[1] = std::max(0.0, squares / count - shift * shift) / a.scale() / a.scale();
  out[2] = std::sqrt(norm) / a.scale();
}

Tensor weight_statistics(TensorList mats, TensorList minus, int64_t r, double tol, int64_t max_passes, int64_t seed) {
  check(!mats.empty(), "mats: expected at least one tensor");
  Tensor out = new_empty(mats[0], {static_cast<int64_t>(mats.size()), 3 + r}, ScalarType::Double);
  double* table = static_cast<double*>(out.mutable_data_ptr());
  std::fill(table, table + mats.size() * static_cast<size_t>(3 + r), 0.0);
  const Settings settings{r, tol, max_passes, false, static_cast<uint64_t>(seed)};
  for_each_matrix(mats, minus, [&](int64_t i, const Operand& a) {
    if (a.rows * a.columns == 0) return;
    double* row = table + i * (3 + r);
    moments(a, row);
    const Svd svd = decompose(a, settings);
    std::copy(svd.s.begin(), svd.s.end(), row + 3);
  });
  return out;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("topk_svd", TORCH_BOX(&statsmerge::topk_svd));
  m.impl("weight_statistics", TORCH_BOX(&statsmerge::weight_statistics));
}
