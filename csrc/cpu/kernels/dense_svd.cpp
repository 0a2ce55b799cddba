// Singular values alone come from the Gram matrix of the shorter side where its rounding errors, in which the squares of
// small ones drown, allow. Else one-sided Jacobi rotations of the vectors along that side (Demmel and Veselić 1992:
// small singular values come out with high relative accuracy too).
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels/orthonormalize.h"
#include "cpu/kernels/svd.h"
#include "cpu/kernels/symmetric_eigen.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

// The singular values of the rows of g and their bounds; false, and none, if they are not exact to `accuracy`.
bool values_from_gram(const Rows& g, int64_t side, int64_t k, double accuracy, Svd& out) {
  std::vector<double> gram(static_cast<size_t>(side * side));
  double trace = 0;
  for (int64_t i = 0; i < side; i += kBlock) {
    for (int64_t j = 0; j <= i; j += kBlock) {
      double products[kBlock * kBlock];
      BlockProducts<double>::products(g[i], g[j], g.stride, g.stride, products);
      for (int64_t r = 0; r < std::min(kBlock, side - i); ++r) {
        for (int64_t c = 0; c < std::min(kBlock, side - j); ++c) {
          gram[(i + r) * side + j + c] = gram[(j + c) * side + i + r] = products[r * kBlock + c];
        }
      }
    }
  }
  for (int64_t i = 0; i < side; ++i) trace += gram[i * side + i];
  const std::vector<double> values = symmetric_eigen(gram, side, side).values;
  const double rounding = kEps * static_cast<double>(g.length + side) * trace;
  if (!(rounding < accuracy * values[k - 1])) return false;
  for (int64_t i = 0; i < k; ++i) {
    out.s.push_back(std::sqrt(values[i]));
    out.bound.push_back(rounding / out.s[i]);
  }
  return true;
}

}  // namespace

Svd dense_svd(Operand a, const SvdSettings& settings, Moments* moments) {
  const int64_t k = settings.k, side = std::min(a.rows, a.columns), length = std::max(a.rows, a.columns);
  const bool wide = a.rows <= a.columns;
  inspect(a);
  if (moments) *moments = statsmerge::moments(a);
  Rows g(side, length);
  read_rows(a, 0, a.rows, [&](int64_t i, const double* row) {
    for (int64_t j = 0; j < a.columns; ++j) (wide ? g[i][j] : g[j][i]) = row[j];
  });
  Svd out;
  out.passes = 2;  // the inspection is one
  const double accuracy = std::min<double>(settings.tol, std::numeric_limits<float>::epsilon());
  if (!a.is_double() && !settings.vectors && values_from_gram(g, side, k, accuracy, out)) {
    for (double& s : out.s) s /= a.scale;
    for (double& b : out.bound) b /= a.scale;
    return out;
  }
  Rows rotation(side, side);
  for (int64_t i = 0; i < side; ++i) rotation[i][i] = 1;
  bool rotated = true;
  for (int sweep = 0; sweep < 60 && rotated; ++sweep) {
    rotated = false;
    for (int64_t p = 0; p < side; ++p) {
      for (int64_t q = p + 1; q < side; ++q) {
        const double pp = dot(g[p], g[p], length), qq = dot(g[q], g[q], length), pq = dot(g[p], g[q], length);
        if (std::abs(pq) <= kEps * std::sqrt(pp) * std::sqrt(qq) || pq == 0) continue;
        rotated = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1 / std::hypot(1.0, t);
        rotate(g[p], g[q], c, c * t, length);
        rotate(rotation[p], rotation[q], c, c * t, side);
      }
    }
  }
  std::vector<std::pair<double, int64_t>> order;
  for (int64_t i = 0; i < side; ++i) order.emplace_back(-std::sqrt(dot(g[i], g[i], length)), i);
  std::sort(order.begin(), order.end());
  const double largest = -order[0].first;
  Rows shorter(k, side), longer(k, length);
  Random random(settings.seed);
  for (int64_t i = 0; i < k; ++i) {
    const double sigma = -order[i].first;
    out.s.push_back(sigma > kEps * length * largest ? sigma / a.scale : 0.0);
    out.bound.push_back(kEps * length * largest / a.scale);
    if (!settings.vectors) continue;
    std::copy_n(rotation[order[i].second], side, shorter[i]);
    std::copy_n(g[order[i].second], length, longer[i]);
    orthonormalize(longer, 0, i, kEps * length * largest, random, longer[i]);
  }
  out.u = std::move(wide ? shorter : longer);
  out.v = std::move(wide ? longer : shorter);
  return out;
}

}  // namespace statsmerge
