#include "check.h"
#include "cpu/kernels/vector_ops.h"

NATIVE_TEST(dot_and_axpy_at_every_length) {
  for (int64_t n = 0; n < 100; ++n) {
    const auto x = normal(n, 1);
    auto y = normal(n, 2);
    double expected = 0, magnitude = 1;
    for (int64_t i = 0; i < n; ++i) {
      expected += x[i] * y[i];
      magnitude += std::abs(x[i] * y[i]);
    }
    CHECK(std::abs(statsmerge::dot(x.data(), y.data(), n) - expected) <= 1e-15 * magnitude, n);
    const auto before = y;
    statsmerge::axpy(0.5, x.data(), y.data(), n);
    for (int64_t i = 0; i < n; ++i) CHECK(std::abs(y[i] - (before[i] + 0.5 * x[i])) <= 1e-15 * (1 + std::abs(y[i])));
  }
}
