// Householder reduction to tridiagonal form and implicit QL (Golub and Van Loan, Matrix Computations, sections 8.3.1
// and 8.3.3). Vectors are kept as rows, so that every inner loop runs over contiguous memory.
#include "cpu/kernels/symmetric_eigen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

// a becomes tridiagonal with diagonal d and subdiagonal e; row j of z is column j of the orthogonal Q with a = Q T Qᵀ.
void tridiagonalize(std::vector<double>& a, int64_t n, double* d, double* e, double* z) {
  std::vector<double> beta(static_cast<size_t>(n), 0.0), p(static_cast<size_t>(n));
  for (int64_t k = 0; k + 2 < n; ++k) {
    double* v = a.data() + k * n + k + 1;  // row k right of the diagonal: becomes the Householder vector
    const int64_t m = n - k - 1;
    d[k] = a[k * n + k];
    const double norm = std::sqrt(dot(v, v, m));
    e[k] = v[0] > 0 ? -norm : norm;
    if (norm == 0) continue;
    v[0] -= e[k];
    beta[k] = 2 / dot(v, v, m);
    double* block = a.data() + (k + 1) * n + k + 1;
    for (int64_t i = 0; i < m; ++i) p[i] = beta[k] * dot(block + i * n, v, m);
    axpy(-beta[k] / 2 * dot(p.data(), v, m), v, p.data(), m);
    for (int64_t i = 0; i < m; ++i) {
      axpy(-v[i], p.data(), block + i * n, m);
      axpy(-p[i], v, block + i * n, m);
    }
  }
  if (n > 1) {
    d[n - 2] = a[(n - 2) * n + n - 2];
    e[n - 2] = a[(n - 2) * n + n - 1];
  }
  d[n - 1] = a[n * n - 1];
  for (int64_t j = 0; j < n; ++j) z[j * n + j] = 1;
  for (int64_t k = n - 3; k >= 0; --k) {
    const double* v = a.data() + k * n + k + 1;
    for (int64_t j = k + 1; j < n; ++j) {
      double* row = z + j * n + k + 1;
      axpy(-beta[k] * dot(row, v, n - k - 1), v, row, n - k - 1);
    }
  }
}

// Diagonalises (d, e); the rotations act on the rows of z.
void implicit_ql(int64_t n, double* d, double* e, double* z) {
  constexpr double eps = std::numeric_limits<double>::epsilon();
  e[n - 1] = 0;
  for (int64_t l = 0; l < n; ++l) {
    for (int iteration = 0;; ++iteration) {
      int64_t m = l;
      while (m < n - 1 && !(std::abs(e[m]) <= eps * (std::abs(d[m]) + std::abs(d[m + 1])))) ++m;
      if (m == l) break;
      if (iteration == 100) throw std::runtime_error("symmetric_eigen: no convergence");
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      g = d[m] - d[l] + e[l] / (g + std::copysign(std::hypot(g, 1.0), g));
      double s = 1, c = 1, shift = 0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        const double r = std::hypot(f, g);
        e[i + 1] = r;
        if (r == 0) {
          d[i + 1] -= shift;
          e[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - shift;
        const double t = (d[i] - g) * s + 2 * c * b;
        shift = s * t;
        d[i + 1] = g + shift;
        g = c * t - b;
        rotate(z + i * n, z + (i + 1) * n, c, s, n);
      }
      if (i >= l) continue;
      d[l] -= shift;
      e[l] = g;
      e[m] = 0;
    }
  }
}

}  // namespace

Eigen symmetric_eigen(std::vector<double> a, int64_t n) {
  if (n == 0) return {};
  double largest = 0;
  for (double x : a) largest = std::max(largest, std::abs(x));
  const double scale = largest > 0 ? largest : 1;  // keeps squares of entries within range
  for (double& x : a) x /= scale;
  std::vector<double> d(static_cast<size_t>(n)), e(static_cast<size_t>(n)), z(static_cast<size_t>(n * n), 0.0);
  tridiagonalize(a, n, d.data(), e.data(), z.data());
  implicit_ql(n, d.data(), e.data(), z.data());

  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
  Eigen out{std::vector<double>(static_cast<size_t>(n)), std::move(a)};
  for (int64_t i = 0; i < n; ++i) {
    out.values[i] = d[order[i]] * scale;
    std::copy_n(z.data() + order[i] * n, n, out.vectors.data() + i * n);
  }
  return out;
}

}  // namespace statsmerge
