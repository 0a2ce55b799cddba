// One-sided Jacobi rotations of the vectors along the shorter side of a matrix (Demmel and Veselić 1992: small singular
// values come out with high relative accuracy too).
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels/orthonormalize.h"
#include "cpu/kernels/svd.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

}  // namespace

Svd dense_svd(Operand a, const SvdSettings& settings, Moments* moments) {
  const int64_t k = settings.k, side = std::min(a.rows, a.columns), length = std::max(a.rows, a.columns);
  const bool wide = a.rows <= a.columns;
  inspect(a);
  if (moments) *moments = statsmerge::moments(a);
  Rows g(side, length), rotation(side, side);
  read_rows(a, 0, a.rows, [&](int64_t i, const double* row) {
    for (int64_t j = 0; j < a.columns; ++j) (wide ? g[i][j] : g[j][i]) = row[j];
  });
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
  Svd out;
  out.passes = 2;  // the inspection is one
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
