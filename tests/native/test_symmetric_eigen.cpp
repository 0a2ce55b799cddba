#include "check.h"
#include "cpu/kernels/symmetric_eigen.h"

namespace {

std::vector<double> symmetric(int64_t n, uint64_t seed) {
  auto a = normal(n * n, seed);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) a[i * n + j] = a[j * n + i];
  }
  return a;
}

void check_eigen(const std::vector<double>& a, int64_t n, double scale) {
  const statsmerge::Eigen eigen = statsmerge::symmetric_eigen(a, n);
  const double allowed = 1e-14 * static_cast<double>(n);
  for (int64_t k = 0; k < n; ++k) {
    const double* x = eigen.vectors.data() + k * n;
    CHECK(k == 0 || eigen.values[k] <= eigen.values[k - 1]);
    for (int64_t i = 0; i < n; ++i) {
      double image = 0, product = 0;
      for (int64_t j = 0; j < n; ++j) {
        image += a[i * n + j] * x[j];
        product += eigen.vectors[i * n + j] * x[j];
      }
      CHECK(std::abs(image - eigen.values[k] * x[i]) <= allowed * scale * static_cast<double>(n), n, image);
      CHECK(std::abs(product - (i == k)) <= allowed, n, product);
    }
  }
  for (int64_t first : {n - 1, n / 2, n}) {
    const statsmerge::Eigen trailing = statsmerge::symmetric_eigen(a, n, first);
    for (int64_t k = 0; k < n; ++k) {
      CHECK(trailing.values[k] == eigen.values[k]);
      for (int64_t i = first; i < n; ++i) {
        const double difference = trailing.vectors[k * (n - first) + i - first] - eigen.vectors[k * n + i];
        CHECK(std::abs(difference) <= allowed, n, first);
      }
    }
  }
}

}  // namespace

NATIVE_TEST(eigenpairs_of_random_matrices) {
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 40}) check_eigen(symmetric(n, 3), n, 1);
}

// What a reduction leaves of them is rounding error, again and again, until its squares leave the range.
NATIVE_TEST(eigenpairs_of_constant_matrices) {
  for (int64_t n : {2, 13, 20, 32, 60}) {
    for (double value : {1.0, 0.3}) check_eigen(std::vector<double>(static_cast<size_t>(n * n), value), n, 1);
  }
}

// A cluster of zeros, as rounding leaves it: tiny entries of every size, the smallest ones first.
NATIVE_TEST(eigenpairs_of_what_rounding_leaves) {
  const int64_t n = 120;
  const auto noise = normal(2 * n, 5);
  std::vector<double> a(n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    const double size = i < 3 ? 1 : std::pow(10.0, -32 + 15.0 * static_cast<double>(i) / n);
    a[i * n + i] = size * noise[i];
    if (i > 0) a[i * n + i - 1] = a[(i - 1) * n + i] = (i < 3 ? 1 : 1e-3 * size) * noise[n + i];
  }
  check_eigen(a, n, 1);
}

NATIVE_TEST(eigenpairs_of_special_matrices) {
  const int64_t n = 12;
  std::vector<double> zero(n * n, 0.0), identity = zero, ones(n * n, 1.0), tiny = symmetric(n, 4), huge = tiny;
  for (int64_t i = 0; i < n; ++i) identity[i * n + i] = 1;
  for (double& x : tiny) x *= 1e-300;
  for (double& x : huge) x *= 1e300;
  check_eigen(zero, n, 1);
  check_eigen(identity, n, 1);
  check_eigen(ones, n, 1);
  check_eigen(tiny, n, 1e-300);
  check_eigen(huge, n, 1e300);
  CHECK(statsmerge::symmetric_eigen({}, 0).values.empty());
}
