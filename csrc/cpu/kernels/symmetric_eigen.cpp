// Householder reduction to tridiagonal form and implicit QL (Golub and Van Loan, Matrix Computations, sections 8.3.1
// and 8.3.3).
#include "cpu/kernels/symmetric_eigen.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace statsmerge {
namespace {

struct SymmetricEigen {
  int64_t lanes;
  void (*tridiagonalize)(double*, int64_t, int64_t, double*, double*, double*, double*);
  void (*reflect)(const double*, int64_t, int64_t, const double*, double*);
  bool (*implicit_ql)(int64_t, double*, double*, double*, int64_t);
};

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/symmetric_eigen.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {

Eigen symmetric_eigen(const std::vector<double>& a, int64_t n, int64_t first) {
  if (n == 0) return {};
  const SymmetricEigen& kernels = STATSMERGE_ACTIVE(kSymmetricEigen);
  const auto padded = [&](int64_t length) { return (length + kernels.lanes - 1) / kernels.lanes * kernels.lanes; };
  double largest = 0;
  for (double x : a) largest = std::max(largest, std::abs(x));
  const int exponent = largest > 0 ? std::max(std::ilogb(largest), -1000) : 0;
  const double scale = std::ldexp(1.0, -exponent);  // keeps squares of entries within range

  const int64_t stride = padded(n), count = n - first, width = padded(count);
  std::vector<double> work(static_cast<size_t>(n * stride), 0.0), z(static_cast<size_t>(n * width), 0.0);
  std::vector<double> d(static_cast<size_t>(n)), e(static_cast<size_t>(n)), beta(static_cast<size_t>(n));
  std::vector<double> row(static_cast<size_t>(stride), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) work[i * stride + j] = a[i * n + j] * scale;
  }
  kernels.tridiagonalize(work.data(), n, stride, d.data(), e.data(), beta.data(), row.data());
  for (int64_t i = 0; i < count; ++i) {  // row j of z holds the components of column j of Q
    std::fill(row.begin(), row.end(), 0.0);
    row[first + i] = 1;
    kernels.reflect(work.data(), n, stride, beta.data(), row.data());
    for (int64_t j = 0; j < n; ++j) z[j * width + i] = row[j];
  }
  if (!kernels.implicit_ql(n, d.data(), e.data(), z.data(), width))
    throw std::runtime_error("symmetric_eigen: no convergence");

  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
  Eigen out{std::vector<double>(static_cast<size_t>(n)), std::vector<double>(static_cast<size_t>(n * count))};
  for (int64_t i = 0; i < n; ++i) {
    out.values[i] = d[order[i]] / scale;
    std::copy_n(z.data() + order[i] * width, count, out.vectors.data() + i * count);
  }
  return out;
}

}  // namespace statsmerge
