// Gram–Schmidt, a second time where much was taken away ("twice is enough": Giraud, Langou and Rozložník 2005).
#include "cpu/kernels/orthonormalize.h"

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr double kMuch = 0.1;  // of a vector's length: what is left is no longer orthogonal to full precision
constexpr int64_t kChunk = 512;  // elements of long vectors that a thread takes at a time

double norm(const double* x, int64_t n) { return std::sqrt(dot(x, x, n)); }

// One sweep over the basis: the components along all of it, and then what they make of the block. Long vectors are cut
// into chunks, whose sums are added in their order.
void sweep(const Rows& basis, int64_t count, double* block, double* components) {
  using Blocks = BlockProducts<double>;
  constexpr int64_t square = kBlock * kBlock;
  const int64_t stride = basis.stride, chunks = (stride + kChunk - 1) / kChunk;
  const int64_t all = (count + kBlock - 1) / kBlock * square, present = count * kBlock;
  std::vector<double> sums(static_cast<size_t>(chunks * all));
  const auto for_chunks = [&](const auto& f) {
    parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c * kChunk, std::min(kChunk, stride - c * kChunk), sums.data() + c * all);
    });
  };
  for_chunks([&](int64_t first, int64_t n, double* y) {
    for (int64_t i = 0; i < all; i += square) {
      Blocks::products(basis[i / kBlock] + first, block + first, n, stride, y + i);
    }
  });
  for (int64_t j = 0; j < all; ++j) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += sums[c * all + j];
    sums[j] = j < present ? -sum : 0.0;
    if (j < present) components[j] += sum;
  }
  for_chunks([&](int64_t first, int64_t n, double*) {
    for (int64_t i = 0; i < all; i += square) {
      Blocks::combine(basis[i / kBlock] + first, sums.data() + i, n, stride, block + first);
    }
  });
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
