// Gram–Schmidt, a second time where much was taken away ("twice is enough": Giraud, Langou and Rozložník 2005).
#include "cpu/kernels/orthonormalize.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr double kMuch = 0.1;  // of a vector's length: what is left is no longer orthogonal to full precision

double norm(const double* x, int64_t n) { return std::sqrt(dot(x, x, n)); }

// One sweep over the basis, block by block: each is read once.
void sweep(const Rows& basis, int64_t count, double* block, double* components) {
  using Blocks = BlockProducts<double>;
  for (int64_t i = 0; i < count; i += kBlock) {
    alignas(64) double y[kBlock * kBlock];
    Blocks::products(basis[i], block, basis.stride, y);
    const int64_t present = std::min(kBlock, count - i) * kBlock;
    std::fill(y + present, y + kBlock * kBlock, 0.0);
    for (int64_t j = 0; j < present; ++j) {
      components[i * kBlock + j] += y[j];
      y[j] = -y[j];
    }
    Blocks::combine(basis[i], y, basis.stride, block);
  }
}

}  // namespace

void project_out(const Rows& basis, int64_t count, double* block, double* components) {
  double before[kBlock];
  for (int64_t c = 0; c < kBlock; ++c) before[c] = norm(block + c * basis.stride, basis.length);
  sweep(basis, count, block, components);
  for (int64_t c = 0; c < kBlock; ++c) {
    if (norm(block + c * basis.stride, basis.length) < kMuch * before[c]) {
      return sweep(basis, count, block, components);
    }
  }
}

double orthonormalize(const Rows& basis, int64_t clean, int64_t count, double negligible, Random& random, double* x,
                      double* components) {
  const int64_t n = basis.length;
  const auto project = [&](int64_t first) {
    for (int64_t i = first; i < count; ++i) {
      const double along = dot(basis[i], x, n);
      axpy(-along, basis[i], x, n);
      if (components) components[i] += along;
    }
    return norm(x, n);
  };
  const double before = norm(x, n);
  double left = project(clean);
  left = project(left < kMuch * before ? 0 : clean);
  const double length = left > negligible ? left : 0;
  components = nullptr;
  while (!(left > negligible)) {
    negligible = 1e-8;
    for (int64_t j = 0; j < n; ++j) x[j] = random();
    multiply(1 / norm(x, n), x, n);
    project(0);
    left = project(0);
  }
  multiply(1 / left, x, n);
  if (length == 0) multiply(1 / project(0), x, n);  // a random direction can lose much of its length to the basis
  return length;
}

}  // namespace statsmerge
